"""Which key a proposal proposes: its own number in a sweep, a draw, or what the caller gave."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import POSITION, chain_words, scale_to_range, words

SWEEP = tl.constexpr(0)
DRAWN = tl.constexpr(1)
GIVEN = tl.constexpr(2)

MAX_CHAIN_ID = tl.constexpr(1 << 40)
MIN_TEMPERATURE, MAX_TEMPERATURE = tl.constexpr(2.0**-120), tl.constexpr(2.0**100)  # as in checks.py


@triton.jit
def chain_of(chain_ids_ptr, rows, row_ok):
    """Chain ids name the random streams; by default they are the row numbers.

    On a GPU nobody has looked at the values before: an assertion here is seen at the next synchronisation.
    """
    if chain_ids_ptr is not None:
        chain = tl.load(chain_ids_ptr + rows, row_ok, other=0)
        tl.device_assert((chain >= 0) & (chain < MAX_CHAIN_ID), "chain_ids (or query_ids) must be in [0, 2^40)")
        return chain
    else:
        return rows


@triton.jit
def temperature_of(temperatures_ptr, temperature, rows, row_ok):
    """One for all rows, or one for each."""
    if temperatures_ptr is not None:
        own = tl.load(temperatures_ptr + rows, row_ok, other=1.0)
        in_range = (own >= MIN_TEMPERATURE) & (own <= MAX_TEMPERATURE)
        tl.device_assert(in_range, "temperature must be in [2^-120, 2^100]")
        return own
    else:
        return temperature


@triton.jit
def drawn_position(proposal, chain, m, draws):
    """The key of a uniform proposal: two words of one call of the generator, by the number's parity."""
    step, key_0, key_1 = draws
    low, tag = chain_words(chain, POSITION)
    w0, w1, w2, w3 = words((proposal >> 1).to(tl.uint32), low, tag, step, key_0, key_1, 0)
    odd = (proposal & 1) == 1
    return scale_to_range(tl.where(odd, w2, w0), tl.where(odd, w3, w1), m)


@triton.jit
def proposed_position(number, row, mask, schedule, where, KIND: tl.constexpr):
    """Positions in the keys, int64, of one row's proposals, numbered within the shard, and which of them there are.

    A position that no key has is refused at the next synchronisation; until then, and where assertions are left out, it
    is no proposal and reads nothing."""
    chain_ids_ptr, positions_ptr, stride_position, m, draws = where
    if KIND == GIVEN:
        position = tl.load(positions_ptr + row * stride_position + number, mask, other=0)
        inside = (position >= 0) & (position < m)
        tl.device_assert(inside, "proposal must hold positions in keys, in [0, m)")
        mask &= inside
    else:
        chain = chain_of(chain_ids_ptr, row, row >= 0)
        position = drawn_position(schedule[0] + number.to(tl.int64), chain, m, draws)
    return tl.where(mask, position, 0), mask


@triton.jit
def position_of(number, rows, mask, first, where, KIND: tl.constexpr):
    """Positions in the keys, int64, of proposals numbered within the shard; -1 stays -1.

    A draw is made again: that costs less than a place to keep it. ``where`` is (chain_ids_ptr, positions_ptr,
    stride_position, m, draws).
    """
    chain_ids_ptr, positions_ptr, stride_position, m, draws = where
    if KIND == SWEEP:
        position = number.to(tl.int64)
    elif KIND == GIVEN:
        position = tl.load(positions_ptr + rows * stride_position + number, mask & (number >= 0), other=-1)
    else:
        chain = chain_of(chain_ids_ptr, rows, mask)
        position = drawn_position(first + number.to(tl.int64), chain, m, draws)
    return tl.where(number >= 0, position, -1)
