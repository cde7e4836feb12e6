"""A step over all keys: their log-sum-exp and the race for the next state (race.py) in one pass over the scores.

Sums run as the races do, eight of a row side by side in the registers of a thread. What a chain brings along enters
once, at the end: of the only program of its rows, or, where keys are split, of a small kernel that joins the splits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import CarriedParams, ScoreParams
from . import tuning
from .epilogue import LN_2, log_sum_exp
from .launch import (
    NUMBERS,
    Arguments,
    Kernel,
    dense,
    device_guard,
    dimensions,
    power_of_two,
    precision,
    random_arguments,
    score_arguments,
)
from .philox import CARRIED, GUMBEL, Generator, gumbel_log2, in_stream, load_generator, random_words, zeros_like
from .proposals import Rows, load_chain_rows
from .race import (
    Keys,
    best_and_lowest,
    finish_race,
    four_scores,
    nobody,
    tile_blocks,
    tile_operand,
    update_race,
)
from .scores import LOG2_E, SEGMENTS, TILE, Operand, larger, load_resident, multiply, sixteen_steps
from .transition import NEG_INF

BLOCK_ELEMENTS = 1024  # splits of rows that a program of isir_combine_kernel holds at a time
MINUS_LOG_LN_2 = tl.constexpr(0.36651292058166435)  # Gumbel noise is this less LN_2 * gumbel_log2


class Carried(NamedTuple):
    """What rows bring along, which of their draws are meant, and where their next states go."""

    rows: Rows
    generator: Generator
    key_ptr: tl.tensor  # (n, OWN) int64
    score_ptr: tl.tensor  # (n, OWN) float32
    labels_ptr: tl.tensor | None  # (m,) int64; None: keys are named by their numbers
    first_key: tl.tensor  # number of the keys' first one
    out_position_ptr: tl.tensor  # (n,) int64
    out_key_ptr: tl.tensor  # (n,) int64
    out_score_ptr: tl.tensor  # (n,) float32
    out_lse_ptr: tl.tensor  # (n,) float32
    out_value_ptr: tl.tensor  # (n,) float64


@triton.jit
def _step_tile(race, sums, products, keys, tile, rows, generator):
    """The races, and the sums (maximum, exponentials over it), (BLOCK_M, 8) each, after the 128 keys of a tile."""
    groups = sixteen_steps(products)
    largest, total = sums
    scores, new = (), largest
    for group in tl.static_range(4):
        four = four_scores(groups[group], keys, tile, group, rows)
        zeros = zeros_like(four[0])
        block = tile_blocks(keys, tile, group)
        drawn = random_words(block[None, :], rows.chain_low[:, None], rows.tag[:, None], generator, zeros)
        for i in tl.static_range(4):
            race = update_race(race, four[i] - gumbel_log2(drawn[i]), tile, 4 * group + i)
            new = larger(new, four[i])
        scores = scores + (four,)
    origin = tl.where(new > NEG_INF, new, 0.0)
    total *= tl.exp2(largest - origin)
    for group in tl.static_range(4):
        for i in tl.static_range(4):
            total += tl.exp2(larger(scores[group][i] - origin, NEG_INF))
    return race, (new, total)


@triton.jit
def _noise(word):
    """Gumbel noise of a word, in the scores' own units from here on: of what is brought along they are the caller's."""
    return MINUS_LOG_LN_2 - gumbel_log2(word) * LN_2


@triton.jit
def _race_own(largest, total, carried, OWN: tl.constexpr):
    """The best value of what a row brings along, which one has it, -1 where there is none, and the sum of exponentials
    over the ``largest`` score with all of them; (BLOCK_M,) each."""
    rows = carried.rows
    zeros = tl.zeros(rows.chain_low.shape, tl.uint32)
    drawn = random_words(zeros, rows.chain_low, in_stream(rows.tag, CARRIED), carried.generator, zeros)
    best, which = tl.full(zeros.shape, NEG_INF, tl.float32), tl.full(zeros.shape, -1, tl.int32)
    for c in tl.static_range(OWN):
        score = tl.load(carried.score_ptr + rows.index * OWN + c, rows.ok, other=NEG_INF)
        score = tl.where(tl.abs(score) < float("inf"), score, NEG_INF)
        value = score + _noise(drawn[c])
        wins = value > best
        best, which = tl.where(wins, value, best), tl.where(wins, c, which)
        new = tl.maximum(largest, score)
        origin = tl.where(new > NEG_INF, new, 0.0)
        total = total * tl.exp(largest - origin) + tl.exp(score - origin)
        largest = new
    return best, which, largest, total


@triton.jit
def _noise_of_key(column, carried):
    """The noise of a row's key, made again: that costs less than a place to keep the score beside the value."""
    rows = carried.rows
    zeros = tl.zeros(rows.chain_low.shape, tl.uint32)
    w0, w1, w2, w3 = random_words((column >> 2).to(tl.uint32), rows.chain_low, rows.tag, carried.generator, zeros)
    even = (column & 1) == 0
    return _noise(tl.where((column & 2) == 0, tl.where(even, w0, w1), tl.where(even, w2, w3)))


@triton.jit
def _store_states(best, number, sums, carried, OWN: tl.constexpr):
    """The next states, from the best of all keys' scores less ``gumbel_log2``, its key, int32, -1 where there is none,
    and the keys' sums, in powers of two. Of equal values a row's own are first."""
    rows, value = carried.rows, best * LN_2 + MINUS_LOG_LN_2
    own_value, which, largest, total = _race_own(sums[0] * LN_2, sums[1], carried, OWN)
    is_key, is_own = rows.ok & (value > own_value), rows.ok & (own_value >= value) & (which >= 0)
    column, own_at = carried.first_key + number, rows.index * OWN + which
    key = column
    if carried.labels_ptr is not None:
        key = tl.load(carried.labels_ptr + number, is_key, other=-1)
    key = tl.where(is_key, key, tl.load(carried.key_ptr + own_at, is_own, other=-1))
    score = tl.load(carried.score_ptr + own_at, is_own, other=NEG_INF)
    score = tl.where(is_key, value - _noise_of_key(column, carried), score)
    position = tl.where(is_key, column, tl.where(is_own, -1 - which, -1))
    tl.store(carried.out_position_ptr + rows.index, position, rows.ok)
    tl.store(carried.out_key_ptr + rows.index, key, rows.ok)
    tl.store(carried.out_score_ptr + rows.index, score, rows.ok)
    tl.store(carried.out_lse_ptr + rows.index, largest + tl.log2(total) * LN_2, rows.ok)
    tl.store(carried.out_value_ptr + rows.index, tl.maximum(value, own_value).to(tl.float64), rows.ok)


@triton.jit(do_not_specialize=NUMBERS)
def isir_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, carried_ids_ptr, key_ids_ptr,  # (n,), (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_key: tl.int64, split_length: tl.int64,
    carried_key_ptr, carried_score_ptr, labels_ptr,  # Carried
    out_position_ptr, out_key_ptr, out_score_ptr, out_lse_ptr, out_value_ptr,  # written where keys are not split
    values_ptr, numbers_ptr, levels_ptr,  # (n, splits) float32, int32, float32: of each split; or None
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over keys z * split_length and on, less those by which the first split
    starts before the keys, at a block of the generator."""
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    d = d_over_align * ALIGN_D
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    rows = load_chain_rows(
        n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, carried_ids_ptr, GUMBEL, LOG2_E, BLOCK_M
    )
    first, first_block = split * split_length - first_key % 4, first_key // 4 + split * (split_length // 4)
    keys = Keys(first, first_block, m, query_ids_ptr, carried_ids_ptr, key_ids_ptr, log_proposal_ptr)
    queries = Operand(queries_ptr, stride_query_row, rows.index, rows.ok)
    resident = load_resident(queries, d, BLOCK_D, WHOLE_D, EVEN_D)
    race = nobody(BLOCK_M)
    sums = tl.full((BLOCK_M, SEGMENTS), NEG_INF, tl.float32), tl.zeros((BLOCK_M, SEGMENTS), tl.float32)
    for tile in range(0, (split_length // TILE).to(tl.int32)):
        block = tile_operand(keys_ptr, stride_key_row, keys, tile)
        products = multiply(resident, queries, block, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        race, sums = _step_tile(race, sums, products, keys, tile, rows, generator)

    best, number = finish_race(race, keys)
    sums = log_sum_exp(sums[0], sums[1])
    if values_ptr is None:
        carried = Carried(
            rows, generator, carried_key_ptr, carried_score_ptr, labels_ptr, first_key, out_position_ptr, out_key_ptr,
            out_score_ptr, out_lse_ptr, out_value_ptr,
        )  # fmt: skip
        _store_states(best, number, sums, carried, OWN)
    else:
        at = rows.index * splits + split
        tl.store(values_ptr + at, best, rows.ok)
        tl.store(numbers_ptr + at, number, rows.ok)
        tl.store(levels_ptr + at, sums[0] + tl.log2(sums[1]), rows.ok)


ISIR_KERNEL = Kernel(isir_kernel)


@triton.jit(do_not_specialize=NUMBERS)
def isir_combine_kernel(
    values_ptr, numbers_ptr, levels_ptr,  # (n, splits) float32, int32, float32
    chain_ids_ptr,  # (n,) int64 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_key: tl.int64, n: tl.int64, splits: tl.int64,
    carried_key_ptr, carried_score_ptr, labels_ptr,  # Carried
    out_position_ptr, out_key_ptr, out_score_ptr, out_lse_ptr, out_value_ptr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Program i: rows i * BLOCK_M and on, each the best and the sum of its splits and of what it brings along."""
    rows = load_chain_rows(n, None, 1.0, chain_ids_ptr, None, None, GUMBEL, LOG2_E, BLOCK_M)
    split = tl.arange(0, WIDTH)
    ok = rows.ok[:, None] & (split < splits)[None, :]
    at = rows.index[:, None] * splits + split[None, :]
    values, numbers = tl.load(values_ptr + at, ok, other=NEG_INF), tl.load(numbers_ptr + at, ok, other=-1)
    best, number = best_and_lowest(values, numbers)
    levels = tl.load(levels_ptr + at, ok, other=NEG_INF)
    sums = log_sum_exp(levels, tl.full(levels.shape, 1.0, tl.float32))
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    carried = Carried(
        rows, generator, carried_key_ptr, carried_score_ptr, labels_ptr, first_key, out_position_ptr, out_key_ptr,
        out_score_ptr, out_lse_ptr, out_value_ptr,
    )  # fmt: skip
    _store_states(best, number, sums, carried, OWN)


ISIR_COMBINE_KERNEL = Kernel(isir_combine_kernel)


def _combine_splits(arguments: Arguments, splits: int) -> None:
    """Writes the next states; 12 bytes of memory for each row and split."""
    width = power_of_two(splits)
    rows = max(1, BLOCK_ELEMENTS // width)
    own = {"splits": splits, "BLOCK_M": rows, "WIDTH": width}
    ISIR_COMBINE_KERNEL((-(-arguments["n"] // rows), 1, 1), arguments | own, {"num_warps": 4})


_OUTPUTS = {
    "out_position_ptr": torch.int64,
    "out_key_ptr": torch.int64,
    "out_score_ptr": torch.float32,
    "out_lse_ptr": torch.float32,
    "out_value_ptr": torch.float64,
}
_PARTS = {"values_ptr": torch.float32, "numbers_ptr": torch.int32, "levels_ptr": torch.float32}


def isir_step(scores: ScoreParams, carried: CarriedParams) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Position, key, score, log-sum-exp and value (n,) of the next states; see ``reference_isir``.

    Roofline on an H100: the schedulers, at 41.0 instructions for a warp's 32 (row, key) at d = 128, of rows with two
    ids (33.4 without), counted in the code of Triton 3.9. ``contrastive_lse`` alone takes 18.8 (10.6), and noise and
    race 21.2 (21.3), by what a second sample adds to ``gumbel_sample``. For 32,768 rows and keys in bfloat16 that
    predicts 1.53 ms; loads from the L2 0.78, products 0.35. Not measured.
    """
    (n, d), m = scores.queries.shape, scores.keys.shape[0]
    if scores.queries.is_cpu:  # the interpreter's
        carried.check_values(scores)
    new = scores.queries.new_empty
    out = {name: new(n, dtype=dtype) for name, dtype in _OUTPUTS.items()}
    generation, processors = tuning.device(scores.queries.device.index or 0)
    chosen = tuning.sweep(generation, scores.queries.dtype != torch.float32, d, n)
    blocks, tiles = -(-n // chosen.block_m), -(-(m + carried.first_key % 4) // TILE.value) if m else 0
    length = -(-tiles // tuning.splits(max(1, blocks), tiles, processors))
    splits = -(-tiles // max(1, length)) or 1  # none of them empty, but where there are no keys
    parts = {name: new(n, splits, dtype=dtype) if splits > 1 else None for name, dtype in _PARTS.items()}
    arguments = score_arguments(scores) | random_arguments(carried.seed, carried.step) | out | parts
    arguments |= {
        "chain_ids_ptr": dense(carried.chain_ids),
        "first_key": carried.first_key,
        "split_length": length * TILE.value,
        "carried_key_ptr": dense(carried.key),
        "carried_score_ptr": dense(carried.score),
        "labels_ptr": dense(carried.key_labels),
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(scores.queries.dtype),
        "OWN": carried.key.shape[1],
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.max_registers}
    with device_guard(scores.queries):
        ISIR_KERNEL((blocks, splits, 1), arguments, options)
        if splits > 1:
            _combine_splits(arguments, splits)
    return tuple(out.values())
