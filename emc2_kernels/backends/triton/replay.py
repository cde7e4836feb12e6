"""The sweep's launches that walk tiles again: those of a long walk's samples, and all of them to count accepts.

A segment is walked before it is known in which state a chain enters it, and the compiler would keep in registers, from
the first tile to the last, what only a tile with a sample needs. Both can be had by walking once more: the draws are a
function of their numbers, so a tile walked again from where it was entered is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import Results
from .launch import NUMBERS, Kernel
from .philox import ACCEPTANCE, load_generator
from .proposals import load_chain_rows
from .scores import SEGMENTS, STEPS
from .sweep_tile import (
    Sweep,
    entry_records,
    load_queries,
    multiply_tile,
    next_sample_step,
    split_segments,
    store_split,
    walk_program,
    walk_tile,
)
from .transition import NEG_INF, Schedule, load_state_score, load_transition, scratch_layout


@triton.jit(do_not_specialize=NUMBERS)
def replay_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, key_ids_ptr,  # (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_proposal: tl.int64, burn_in: tl.int64, num_kept: tl.int64, num_samples: tl.int64, segment_length: tl.int64,
    scratch_ptr,  # transition.Scratch, with segments and entries from sweep_kernel
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr,  # epilogue.Results, None where another launch stores them
    out_key_ptr, out_score_ptr, out_threshold_ptr, out_position_ptr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z), as of sweep_kernel: walks the tiles that have a sample point, and ends as a short sweep does.

    Roofline: as the sweep's, for at most a tile a sample and program; the latency of one tile after another binds
    (expected, not measured), since nothing is loaded ahead.
    """
    scratch = scratch_layout(scratch_ptr, n, tl.num_programs(1).to(tl.int64), num_samples, SEGMENTS)
    d = d_over_align * ALIGN_D
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    rows = load_chain_rows(
        n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, None, ACCEPTANCE, 1.0, BLOCK_M
    )
    schedule = Schedule(first_proposal, m, burn_in, num_kept, num_samples)
    segments = split_segments(segment_length, schedule)
    sweep = Sweep(rows, segments, schedule, generator, key_ids_ptr, log_proposal_ptr)
    operands = load_queries(
        queries_ptr, stride_query_row, keys_ptr, stride_key_row, rows, segment_length, schedule, d, BLOCK_D, WHOLE_D,
        EVEN_D,
    )  # fmt: skip
    due = next_sample_step(0, sweep)
    while due < segment_length:
        tile = (due // STEPS).to(tl.int32)
        to, has_sample = entry_records(tile, sweep)
        walk = load_transition(scratch.records_ptr, to, has_sample)
        tl.debug_barrier()  # the sample is stored where this was
        products = multiply_tile(operands, tile, False, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        walk_tile(walk, (), products, tile * STEPS, sweep, scratch.records_ptr, due, True, False, False, False)
        due = next_sample_step((tile + 1) * STEPS, sweep)

    results = Results(
        state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, out_score_ptr, out_threshold_ptr,
        out_position_ptr,
    )  # fmt: skip
    store_split(scratch, sweep, results, segment_length, SPLIT, BLOCK_R)


@triton.jit
def load_entry_score(state_score_ptr, scratch, rows, SPLIT: tl.constexpr):
    """(BLOCK_M, 8) scores of the states in which chains enter the program's segments."""
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    score = load_state_score(state_score_ptr, rows.index, rows.ok)
    if SPLIT:
        threshold, then, _number = load_transition(
            scratch.split_prefixes_ptr, rows.index * (splits + 1) + split, rows.ok
        )
        score = tl.where(score < threshold, then, score)
    at = (rows.index * splits + split)[:, None] * (SEGMENTS + 1) + tl.arange(0, SEGMENTS)[None, :]
    threshold, then, _number = load_transition(scratch.prefixes_ptr, at, rows.ok[:, None])
    return tl.where(score[:, None] < threshold, then, score[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def count_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, key_ids_ptr,  # (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_proposal: tl.int64, burn_in: tl.int64, num_kept: tl.int64, num_samples: tl.int64, segment_length: tl.int64,
    scratch_ptr,  # transition.Scratch, with the prefixes
    state_score_ptr,  # (n,) float32
    accepted_ptr,  # (n,) int32, added to
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (i, z), as of sweep_kernel: counts accepted proposals, from the states that chains enter segments in.

    Roofline: as the sweep's, whose work is done once more.
    """
    scratch = scratch_layout(scratch_ptr, n, tl.num_programs(1).to(tl.int64), num_samples, SEGMENTS)
    d = d_over_align * ALIGN_D
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    rows = load_chain_rows(
        n, temperatures_ptr, temperature, chain_ids_ptr, query_ids_ptr, None, ACCEPTANCE, 1.0, BLOCK_M
    )
    schedule = Schedule(first_proposal, m, burn_in, num_kept, num_samples)
    segments = split_segments(segment_length, schedule)
    sweep = Sweep(rows, segments, schedule, generator, key_ids_ptr, log_proposal_ptr)
    entry = load_entry_score(state_score_ptr, scratch, rows, SPLIT)
    walk = tl.full(entry.shape, NEG_INF, tl.float32), entry, tl.zeros(entry.shape, tl.int32)
    operands = load_queries(
        queries_ptr, stride_query_row, keys_ptr, stride_key_row, rows, segment_length, schedule, d, BLOCK_D, WHOLE_D,
        EVEN_D,
    )  # fmt: skip
    walk, _sums = walk_program(
        walk, (), operands, sweep, segment_length, None, False, True, False, BLOCK_D, WHOLE_D, EVEN_D, PRECISION
    )
    tl.atomic_add(accepted_ptr + rows.index, tl.sum(walk[2], 1), rows.ok)


REPLAY_KERNEL, COUNT_KERNEL = Kernel(replay_kernel), Kernel(count_kernel)
