"""What the kernels share that draw by a race: a tile's scores as sixteen steps of eight keys, each an own race.

A tile's product leaves the matrix unit with two neighbouring columns of every eight in one thread, so the key rows are
loaded permuted, as in sweep_tile.py: column 8 p + s holds key 16 s + p of the tile. Four steps in p are then four
neighbouring keys in one thread, which share a call of the generator, and the columns of one step, (BLOCK_M, 8), are
eight races that a thread runs in its registers from the first tile to the last. A maximum is commutative, so nothing
else has an order; of equal values the lowest position is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .proposals import has_id
from .scores import SEGMENTS, STEPS, TILE, key_bias, key_operand
from .transition import NEG_INF

_PAST_ALL = tl.constexpr(2**31 - 1)  # there are fewer keys


class Keys(NamedTuple):
    """The keys of a program's split."""

    first: tl.tensor  # number of the first one, int64; below 0, where keys begin inside a block of the generator
    first_block: tl.tensor  # of the generator, int64
    m: tl.tensor  # of all splits
    query_ids_ptr: tl.tensor | None  # (n,), loaded before; None: rows have no such ids
    carried_ids_ptr: tl.tensor | None  # (n,), the same
    key_ids_ptr: tl.tensor | None  # (m,)
    log_proposal_ptr: tl.tensor | None  # (m,)


@triton.jit
def tile_operand(keys_ptr, stride_key_row, keys, tile):
    """The rows of a tile's keys, in the order of its columns."""
    column = tl.arange(0, TILE)
    number = STEPS * (column % SEGMENTS) + column // SEGMENTS + (keys.first + tile * TILE).to(tl.int32)
    return key_operand(keys_ptr, stride_key_row, number, keys.m)


@triton.jit
def tile_blocks(keys, tile, group):
    """(8,) uint32 blocks of the generator of four steps."""
    block = keys.first_block + tile * (TILE // 4) + group
    return block.to(tl.uint32) + (tl.arange(0, SEGMENTS) * (STEPS // 4)).to(tl.uint32)


@triton.jit
def four_scores(products, keys, tile, group: tl.constexpr, rows):
    """Scores of four steps in powers of two, (BLOCK_M, 8) each, of their products; -inf where a key is excluded for the
    row, NaN, which wins no race, where there is none or its score is not finite."""
    HAS_QUERY: tl.constexpr = keys.query_ids_ptr is not None
    HAS_CARRIED: tl.constexpr = keys.carried_ids_ptr is not None
    first = keys.first + tile * TILE + STEPS * tl.arange(0, SEGMENTS)
    number = first.to(tl.int32)
    scores = ()
    for i in tl.static_range(4):
        step = 4 * group + i
        there = (number + step).to(tl.uint32) < keys.m.to(tl.uint32)  # nor below 0
        score = tl.fma(products[i], rows.scale[:, None], key_bias(keys.log_proposal_ptr, first + step, there)[None, :])
        score = tl.fma(score, 0.0, score)  # infinity becomes NaN
        if keys.key_ids_ptr is not None:
            key_id = tl.load(keys.key_ids_ptr + first + step, there)  # where there is none it is never seen
            excluded = has_id(key_id, rows.query_id, rows.carried_id, HAS_QUERY, HAS_CARRIED)
            score = tl.where(excluded, NEG_INF, score)
        scores = scores + (score,)
    return scores


@triton.jit
def nobody(BLOCK_M: tl.constexpr):
    """Races without a key: the best value in powers of two, and its step, (BLOCK_M, 8) each."""
    shape: tl.constexpr = (BLOCK_M, SEGMENTS)
    return tl.full(shape, NEG_INF, tl.float32), tl.full(shape, -1, tl.int32)


@triton.jit
def update_race(race, value, tile, step: tl.constexpr):
    """A step's keys in the races: strictly better, since those before them have lower positions."""
    best, winner = race
    wins = value > best
    return tl.where(wins, value, best), tl.where(wins, tile * TILE + step, winner)


@triton.jit
def finish_race(race, keys):
    """(BLOCK_M,) best value of a program's eight races, and the position of its key, int32; -1 where there is none."""
    best, winner = race
    position = winner + (keys.first + STEPS * tl.arange(0, SEGMENTS)).to(tl.int32)[None, :]
    return best_and_lowest(best, tl.where(winner >= 0, position, -1))


@triton.jit
def best_and_lowest(values, numbers):
    """(rows,) largest value of (rows, places) and the lowest of its numbers; -1 where no place has one.

    Two commutative reductions: ``tl.reduce`` takes its operands in any order.
    """
    best = tl.max(values, 1)
    lowest = tl.min(tl.where((values == best[:, None]) & (numbers >= 0), numbers, _PAST_ALL), 1)
    return best, tl.where(lowest == _PAST_ALL, -1, lowest)
