"""Exact draws from the softmax: scores, noise and the running maximum of a block of rows in one program (race.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import ScoreParams
from ..reference.gumbel import check_values
from . import tuning
from .launch import (
    NUMBERS,
    Kernel,
    dense,
    device_guard,
    dimensions,
    power_of_two,
    precision,
    random_arguments,
    score_arguments,
)
from .philox import GUMBEL, gumbel_log2, load_generator, random_words, zeros_like
from .proposals import load_chain_rows
from .race import Keys, best_and_lowest, finish_race, four_scores, nobody, tile_blocks, tile_operand, update_race
from .scores import LOG2_E, TILE, Operand, load_resident, multiply, sixteen_steps
from .transition import NEG_INF

BLOCK_ELEMENTS = 1024  # values that a program of gumbel_combine_kernel holds at a time


@triton.jit(do_not_specialize=NUMBERS)
def gumbel_combine_kernel(
    values_ptr,  # (n, splits) float32
    numbers_ptr,  # (n, splits) int32
    positions_ptr,  # (n,) int64, written
    n: tl.int64, splits: tl.int64,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program i: draws i * BLOCK_M and on, each the best of its splits."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, WIDTH)
    ok = (row < n)[:, None] & (split < splits)[None, :]
    at = row[:, None] * splits + split[None, :]
    values, numbers = tl.load(values_ptr + at, ok, other=NEG_INF), tl.load(numbers_ptr + at, ok, other=-1)
    _best, number = best_and_lowest(values, numbers)
    tl.store(positions_ptr + row, number.to(tl.int64), row < n)


GUMBEL_COMBINE_KERNEL = Kernel(gumbel_combine_kernel)


def _combine_splits(values: Tensor, numbers: Tensor, positions: Tensor) -> None:
    """Writes positions (n, R) int64 from values and numbers (n, R, splits); 8 bytes of memory for each of these."""
    count, splits = positions.numel(), values.shape[2]
    width = power_of_two(splits)
    rows = max(1, BLOCK_ELEMENTS // width)
    arguments = {
        "values_ptr": values,
        "numbers_ptr": numbers,
        "positions_ptr": positions,
        "n": count,
        "splits": splits,
        "BLOCK_M": rows,
        "WIDTH": width,
    }
    GUMBEL_COMBINE_KERNEL((-(-count // rows), 1, 1), arguments, {"num_warps": 4})


SAMPLES_AT_ONCE = 2  # of a program: four spill 120 to 560 bytes of a thread with Triton 3.6 and 3.9


@triton.jit
def _race_tile(races, products, keys, tile, rows, generator, first_sample, SAMPLES: tl.constexpr):
    """The races of each sample after the 128 keys of a tile."""
    groups = sixteen_steps(products)
    for group in tl.static_range(4):
        scores = four_scores(groups[group], keys, tile, group, rows)
        block = tile_blocks(keys, tile, group)
        for sample in tl.static_range(SAMPLES):
            tag = rows.tag | ((first_sample + sample) << 16).to(tl.uint32)
            zeros = zeros_like(scores[0])
            drawn = random_words(block[None, :], rows.chain_low[:, None], tag[:, None], generator, zeros)
            race = races[0]
            for i in tl.static_range(4):
                race = update_race(race, scores[i] - gumbel_log2(drawn[i]), tile, 4 * group + i)
            races = races[1:] + (race,)  # the others move up: after the last sample they are in their order again
    return races


@triton.jit(do_not_specialize=NUMBERS)
def gumbel_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, carried_ids_ptr, key_ids_ptr,  # (n,), (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    num_samples: tl.int64, split_length: tl.int64,
    positions_ptr,  # (n, R) int64, written where keys are not split
    values_ptr, numbers_ptr,  # (n, R, splits) float32 and int32, the best value and its position; or None
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Program (i, z, c): rows i * BLOCK_M and on, ``split_length`` keys from the z-th such on, and samples c * SAMPLES
    and on."""
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    first_sample = tl.program_id(2) * SAMPLES
    d = d_over_align * ALIGN_D
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    rows = load_chain_rows(
        n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, carried_ids_ptr, GUMBEL, LOG2_E, BLOCK_M
    )
    races = ()
    for _sample in tl.static_range(SAMPLES):
        races = races + (nobody(BLOCK_M),)
    queries = Operand(queries_ptr, stride_query_row, rows.index, rows.ok)
    resident = load_resident(queries, d, BLOCK_D, WHOLE_D, EVEN_D)
    first, first_block = split * split_length, split * (split_length // 4)
    keys = Keys(first, first_block, m, query_ids_ptr, carried_ids_ptr, key_ids_ptr, log_proposal_ptr)
    for tile in range(0, (split_length // TILE).to(tl.int32)):
        block = tile_operand(keys_ptr, stride_key_row, keys, tile)
        products = multiply(resident, queries, block, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        races = _race_tile(races, products, keys, tile, rows, generator, first_sample, SAMPLES)

    for sample in tl.static_range(SAMPLES):
        value, number = finish_race(races[sample], keys)
        own_sample = tl.full((BLOCK_M,), 0, tl.int64) + (first_sample + sample)
        at = rows.index * num_samples + own_sample
        ok = rows.ok & (own_sample < num_samples)
        if values_ptr is None:
            tl.store(positions_ptr + at, number.to(tl.int64), ok)
        else:
            tl.store(values_ptr + at * splits + split, value, ok)
            tl.store(numbers_ptr + at * splits + split, number, ok)


GUMBEL_KERNEL = Kernel(gumbel_kernel)


def gumbel_sample(
    scores: ScoreParams, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r; see ``reference_gumbel``.

    Roofline on an H100: the schedulers, at 27.1 instructions for a warp's 32 (row, key, sample) at d = 128, two
    logarithms and a call of the generator for every four among them; counted in the code of Triton 3.9. Products and
    keys are shared by SAMPLES_AT_ONCE samples only: for 32,768 rows, 100,000 keys and 16 samples in bfloat16, 50 ms of
    instructions, 19 of loads from the L2 and 8.6 on the tensor cores. All of these are predictions.
    """
    (n, d), m = scores.queries.shape, scores.keys.shape[0]
    if scores.queries.is_cpu:  # the interpreter's
        check_values(scores, chain_ids, step)
    positions = scores.queries.new_empty(n, num_samples, dtype=torch.int64)
    if n == 0 or m == 0:
        return positions.fill_(-1)
    generation, processors = tuning.device(scores.queries.device.index or 0)
    chosen = tuning.sweep(generation, scores.queries.dtype != torch.float32, d, n)
    at_once = min(SAMPLES_AT_ONCE, power_of_two(num_samples))
    blocks, chunks, tiles = -(-n // chosen.block_m), -(-num_samples // at_once), -(-m // TILE.value)
    length = -(-tiles // tuning.splits(blocks * chunks, tiles, processors))
    splits = -(-tiles // length)  # none of them empty
    halves = (n, num_samples, splits) if splits > 1 else None
    values = scores.queries.new_empty(halves, dtype=torch.float32) if halves else None
    numbers = scores.queries.new_empty(halves, dtype=torch.int32) if halves else None
    arguments = (
        score_arguments(scores)
        | random_arguments(seed, step)
        | {
            "chain_ids_ptr": dense(chain_ids),
            "num_samples": num_samples,
            "split_length": length * TILE.value,
            "positions_ptr": positions,
            "values_ptr": values,
            "numbers_ptr": numbers,
            "BLOCK_M": chosen.block_m,
            **dimensions(d, chosen.block_d),
            "PRECISION": precision(scores.queries.dtype),
            "SAMPLES": at_once,
        }
    )
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.max_registers}
    with device_guard(scores.queries):
        GUMBEL_KERNEL((blocks, splits, chunks), arguments, options)
        if halves:
            _combine_splits(values, numbers, positions)
    return positions
