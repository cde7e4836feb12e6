"""The sweep: scores, draws and walk of a block of rows over all keys in one program; nothing of size n x m is stored.

sweep_tile.py says how a program walks eight segments of the keys in its registers. Further segments are further
programs, where rows are too few to fill the GPU. A short walk records its samples on the way and stores the results
itself: one launch. A long one would carry through all of its tiles what few of them need. So it leaves what it enters
those with, and a second launch walks them again (replay.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..params import WalkParams
from . import tuning
from .epilogue import BLOCK_R, LN_2, RESULTS, Results, launch_epilogue, log_sum_exp
from .launch import NUMBERS, Arguments, Kernel, dimensions, precision, walk_arguments
from .philox import ACCEPTANCE, load_generator
from .proposals import SWEEP, load_chain_rows
from .replay import COUNT_KERNEL, REPLAY_KERNEL
from .scores import SEGMENTS, STEPS, TILE
from .sweep_tile import (
    Sweep,
    load_queries,
    shard_transition,
    split_segments,
    store_split,
    walk_program,
)
from .transition import NEG_INF, Schedule, empty_scratch, identity, scratch_layout, store_transition


@triton.jit(do_not_specialize=NUMBERS)
def sweep_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, key_ids_ptr,  # (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_proposal: tl.int64, burn_in: tl.int64, num_kept: tl.int64, num_samples: tl.int64, segment_length: tl.int64,
    scratch_ptr,  # transition.Scratch
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr,  # epilogue.Results, None where another launch stores them
    out_key_ptr, out_score_ptr, out_threshold_ptr, out_position_ptr,
    lse_ptr,  # (n,) float32 or None
    lse_parts_ptr,  # (n, splits, 2) float32, its splits' maximum and sum; or None
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, RECORD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over segments 8 z .. 8 z + 7 of ``segment_length`` keys.

    RECORD: samples are taken on the way; else entries of their tiles are left for ``replay_kernel``. With SPLIT
    ``epilogue_kernel`` stores the results.
    """
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    scratch = scratch_layout(scratch_ptr, n, splits, num_samples, SEGMENTS)
    d = d_over_align * ALIGN_D
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    rows = load_chain_rows(
        n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, None, ACCEPTANCE, 1.0, BLOCK_M, RECORD
    )  # replay_kernel asserts for a long walk
    schedule = Schedule(first_proposal, m, burn_in, num_kept, num_samples)
    segments = split_segments(segment_length, schedule)
    sweep = Sweep(rows, segments, schedule, generator, key_ids_ptr, log_proposal_ptr)
    operands = load_queries(
        queries_ptr, stride_query_row, keys_ptr, stride_key_row, rows, segment_length, schedule, d, BLOCK_D, WHOLE_D,
        EVEN_D,
    )  # fmt: skip
    HAS_LSE: tl.constexpr = lse_ptr is not None
    sums = ()
    if HAS_LSE:
        sums = tl.full((BLOCK_M, SEGMENTS), NEG_INF, tl.float32), tl.zeros((BLOCK_M, SEGMENTS), tl.float32)
    walk, sums = walk_program(
        identity((BLOCK_M, SEGMENTS)), sums, operands, sweep, segment_length, scratch.records_ptr, RECORD, False,
        HAS_LSE, BLOCK_D, WHOLE_D, EVEN_D, PRECISION,
    )  # fmt: skip

    at = rows.index * splits + split
    segment_at = at[:, None] * SEGMENTS + tl.arange(0, SEGMENTS)[None, :]
    store_transition(scratch.segments_ptr, segment_at, rows.ok[:, None], shard_transition(walk, segments))
    if HAS_LSE:
        largest, total = log_sum_exp(sums[0], sums[1])
        if SPLIT:
            tl.store(lse_parts_ptr + 2 * at, largest, rows.ok)
            tl.store(lse_parts_ptr + 2 * at + 1, total, rows.ok)
        else:
            tl.store(lse_ptr + rows.index, (largest + tl.log2(total)) * LN_2, rows.ok)
    if RECORD:
        results = Results(
            state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, out_score_ptr, out_threshold_ptr,
            out_position_ptr,
        )  # fmt: skip
        store_split(scratch, sweep, results, segment_length, SPLIT, BLOCK_R)


SWEEP_KERNEL = Kernel(sweep_kernel)
_NO_RESULTS = dict.fromkeys(RESULTS)  # which another launch stores


class Plan(NamedTuple):
    """How a sweep is cut into programs."""

    grid: tuple[int, int, int]
    arguments: Arguments  # of every launch
    options: Arguments
    splits: int
    split_length: int  # proposals
    lead: int  # by which the first split starts before the first proposal
    tiles: int  # of a program
    samples: int  # that a program takes, at most


def plan(walk: WalkParams) -> Plan:
    """Made once for all walks of such sizes: a training step has the same again."""
    (n, d), m, dtype = walk.queries.shape, walk.keys.shape[0], walk.queries.dtype
    generation, processors = tuning.device(walk.queries.device.index or 0)
    chosen = tuning.sweep(generation, dtype != torch.float32, d, n)
    blocks, lead = -(-n // chosen.block_m), walk.first_proposal % 4
    splits = tuning.splits(blocks, -(-(m + lead) // TILE.value), processors)
    kept = walk.total_proposals - walk.burn_in
    return _cut(chosen, precision(dtype), d, m, blocks, splits, lead, walk.num_samples, kept)


@lru_cache(maxsize=256)
def _cut(
    chosen: tuning.Sweep, dot: str, d: int, m: int, blocks: int, splits: int, lead: int, num_samples: int, kept: int
) -> Plan:
    segment_length = STEPS.value * max(1, -(-(m + lead) // (splits * TILE.value)))
    split_length = SEGMENTS.value * segment_length
    samples = min(num_samples, -(-num_samples * split_length // max(kept, 1)))
    arguments = {
        "segment_length": segment_length,
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": dot,
        "SPLIT": splits > 1,
        "BLOCK_R": BLOCK_R,
        "KIND": SWEEP.value,
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.max_registers}
    tiles = segment_length // STEPS.value
    return Plan((blocks, splits, 1), arguments, options, splits, split_length, lead, tiles, samples)


def launch_sweep(walk: WalkParams, outputs: Arguments) -> None:
    """Launches a walk over all keys. ``outputs``: tensors of a step or of a transition, by the kernels' names.

    Roofline, bfloat16 on an H100: 2 d operations a (row, key) on the tensor cores; operands through the L2, each block
    of rows all keys, and beyond WHOLE_D its queries with each tile. At d = 128 a plain tile takes 18.0 slots of the
    scheduler for a warp's 32, with ids 22.7 cycles of the ALU, counted in the code of Triton 3.9 (`make compiled`). For
    32,768 rows and keys that predicts 0.67 ms (0.85), beside 0.35 of products and 0.78 of loads from the L2; at d = 512
    0.61 ms (0.85), beside 1.4 of products and up to 3.1 for 17.2 GB from the L2. None of it has been measured.
    """
    cut, n = plan(walk), walk.queries.shape[0]
    split, records = cut.splits > 1, tuning.records_on_the_way(cut.tiles, cut.samples)
    has_parts = split and outputs["lse_ptr"] is not None
    parts = walk.queries.new_empty(n, cut.splits, 2, dtype=torch.float32) if has_parts else None
    arguments = walk_arguments(walk)
    arguments |= outputs
    arguments |= cut.arguments
    arguments["RECORD"], arguments["lse_parts_ptr"] = records, parts
    arguments["scratch_ptr"] = empty_scratch(walk.queries, cut.splits, walk.num_samples, SEGMENTS.value)
    SWEEP_KERNEL(cut.grid, arguments | _NO_RESULTS if split or not records else arguments, cut.options)
    if not records:
        REPLAY_KERNEL(cut.grid, arguments | _NO_RESULTS if split else arguments, cut.options)
    if split:
        launch_epilogue(arguments, cut.splits, cut.split_length, cut.lead)
    if outputs["accepted_ptr"] is not None:  # the state in which a chain enters a segment is known now
        COUNT_KERNEL(cut.grid, arguments, cut.options)
