"""What kernels load of a row, and which key a proposal proposes: its own number in a sweep, a draw, or a given one."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import POSITION, Generator, chain_words, random_words, scale_to_range

SWEEP = tl.constexpr(0)
DRAWN = tl.constexpr(1)
GIVEN = tl.constexpr(2)

MAX_CHAIN_ID = tl.constexpr(1 << 40)
MIN_TEMPERATURE, MAX_TEMPERATURE = tl.constexpr(2.0**-120), tl.constexpr(2.0**100)  # as in checks.py


@triton.jit
def load_chain(chain_ids_ptr, rows, row_ok, ASSERT: tl.constexpr = True):
    """Chain ids name the random streams; by default they are the row numbers.

    On a GPU nobody has looked at the values before: an assertion here is seen at the next synchronisation. ASSERT: or
    leave it to another launch of the call. It is a function, and where one may be called, the assembler waits for each
    of a product's instructions before it begins the next.
    """
    if chain_ids_ptr is not None:
        chain = tl.load(chain_ids_ptr + rows, row_ok, other=0)
        if ASSERT:
            tl.device_assert((chain >= 0) & (chain < MAX_CHAIN_ID), "chain_ids (or query_ids) must be in [0, 2^40)")
        return chain
    else:
        return rows


@triton.jit
def load_temperature(temperatures_ptr, temperature, rows, row_ok, ASSERT: tl.constexpr = True):
    """One for all rows, or one for each."""
    if temperatures_ptr is not None:
        own = tl.load(temperatures_ptr + rows, row_ok, other=1.0)
        in_range = (own >= MIN_TEMPERATURE) & (own <= MAX_TEMPERATURE)
        if ASSERT:
            tl.device_assert(in_range, "temperature must be in [2^-120, 2^100]")
        return own
    else:
        return temperature


@triton.jit
def load_row_ids(query_ids_ptr, carried_ids_ptr, rows, row_ok):
    """Both ids of rows; the row number where they have none."""
    query_id, carried_id = rows, rows
    if query_ids_ptr is not None:
        query_id = tl.load(query_ids_ptr + rows, row_ok, other=0)
    if carried_ids_ptr is not None:
        carried_id = tl.load(carried_ids_ptr + rows, row_ok, other=0)
    return query_id, carried_id


@triton.jit
def has_id(key_id, query_id, carried_id, HAS_QUERY: tl.constexpr, HAS_CARRIED: tl.constexpr):
    """(rows, keys) whether a key, of ids (keys,), has one of those that its row has, of (rows,) each."""
    if not HAS_CARRIED:
        return key_id[None, :] == query_id[:, None]
    elif not HAS_QUERY:
        return key_id[None, :] == carried_id[:, None]
    else:
        return (key_id[None, :] == query_id[:, None]) | (key_id[None, :] == carried_id[:, None])


class Rows(NamedTuple):
    """The rows of a program, (BLOCK_M,) each."""

    index: tl.tensor
    ok: tl.tensor  # whether the row exists
    scale: tl.tensor  # of inner products
    chain_low: tl.tensor  # words of the generator's counter
    tag: tl.tensor
    query_id: tl.tensor  # the row number, where there is none
    carried_id: tl.tensor


@triton.jit
def load_chain_rows(
    n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, carried_ids_ptr, STREAM: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, ASSERT: tl.constexpr = True,
):  # fmt: skip
    """The rows of a program of a grid whose first axis they are; scores are UNIT / temperature times the products."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    chain_low, tag = chain_words(load_chain(chain_ids_ptr, row, row_ok, ASSERT), STREAM)
    own_temperature = load_temperature(temperatures_ptr, temperature, row, row_ok, ASSERT)
    scale = tl.full((BLOCK_M,), UNIT, tl.float32) / own_temperature
    query_id, carried_id = load_row_ids(query_ids_ptr, carried_ids_ptr, row, row_ok)
    return Rows(row, row_ok, scale, chain_low, tag, query_id, carried_id)


class Proposals(NamedTuple):
    """What gives a proposal its key."""

    chain_ids_ptr: tl.tensor | None  # (n,)
    positions_ptr: tl.tensor | None  # (n, K) of given ones
    stride_position_row: tl.tensor | None
    m: tl.tensor
    generator: Generator


@triton.jit
def draw_position(proposal, chain, m, generator):
    """The key of a uniform proposal: two words of one call of the generator, by the number's parity."""
    low, tag = chain_words(chain, POSITION)
    w0, w1, w2, w3 = random_words((proposal >> 1).to(tl.uint32), low, tag, generator, 0)
    odd = (proposal & 1) == 1
    return scale_to_range(tl.where(odd, w2, w0), tl.where(odd, w3, w1), m)


@triton.jit
def proposed_keys(number, row, mask, schedule, proposals, KIND: tl.constexpr):
    """Positions in the keys, int64, of one row's proposals, numbered within the shard, and which of them there are.

    A position that no key has is refused at the next synchronisation; until then, and where assertions are left out, it
    is no proposal and reads nothing."""
    if KIND == GIVEN:
        row_ptr = proposals.positions_ptr + row * proposals.stride_position_row
        position = tl.load(row_ptr + number, mask, other=0)
        inside = (position >= 0) & (position < proposals.m)
        tl.device_assert(inside, "proposal must hold positions in keys, in [0, m)")
        mask &= inside
    else:
        chain = load_chain(proposals.chain_ids_ptr, row, row >= 0)
        position = draw_position(schedule.first + number.to(tl.int64), chain, proposals.m, proposals.generator)
    return tl.where(mask, position, 0), mask


@triton.jit
def accepted_keys(number, rows, mask, first, proposals, KIND: tl.constexpr):
    """Positions in the keys, int64, of proposals numbered within the shard; -1 stays -1.

    A draw is made again: that costs less than a place to keep it.
    """
    if KIND == SWEEP:
        position = number.to(tl.int64)
    elif KIND == GIVEN:
        row_ptr = proposals.positions_ptr + rows * proposals.stride_position_row
        position = tl.load(row_ptr + number, mask & (number >= 0), other=-1)
    else:
        chain = load_chain(proposals.chain_ids_ptr, rows, mask)
        position = draw_position(first + number.to(tl.int64), chain, proposals.m, proposals.generator)
    return tl.where(number >= 0, position, -1)
