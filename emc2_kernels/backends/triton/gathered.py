"""Walks over drawn or given positions: each program gathers the keys that one chain is proposed.

Nothing is shared between chains here, so the work is the reading of the keys, and a scan over a block of proposals
costs little beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..params import WalkParams
from . import tuning
from .epilogue import BLOCK_R, RESULTS, Layout, Results, compose_segments, launch_epilogue, store_results
from .launch import NUMBERS, Arguments, Kernel, dimensions, walk_arguments
from .philox import ACCEPTANCE, chain_words, load_generator, random_words
from .proposals import DRAWN, GIVEN, Proposals, load_chain, load_temperature, proposed_keys
from .transition import (
    NEG_INF,
    Schedule,
    acceptance_threshold,
    compose,
    compose_fields,
    empty_scratch,
    identity,
    load_state_score,
    load_transition,
    sample_count,
    scratch_layout,
    store_transition,
)


@triton.jit
def _multiply_chunk(query_ptr, key_ptr, mask, begin, d, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """(BLOCK_K,) float32 inner products over columns ``begin`` and on."""
    dim = begin + tl.arange(0, BLOCK_D)
    query_at, key_at = query_ptr + dim, key_ptr[:, None] + dim[None, :]
    if EVEN_D:
        query, key = tl.load(query_at), tl.load(key_at, mask[:, None], other=0.0)
    else:
        query = tl.load(query_at, dim < d, other=0.0)
        key = tl.load(key_at, mask[:, None] & (dim < d)[None, :], other=0.0)
    return tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], 1)


@triton.jit
def _multiply(query_ptr, key_ptr, mask, d, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr):
    """(BLOCK_K,) float32 inner products of a query with the keys at ``key_ptr``, (BLOCK_K,)."""
    if WHOLE_D:
        return _multiply_chunk(query_ptr, key_ptr, mask, 0, d, BLOCK_D, EVEN_D)
    else:
        products = tl.zeros(mask.shape, tl.float32)
        for begin in range(0, d, BLOCK_D):
            products += _multiply_chunk(query_ptr, key_ptr, mask, begin, d, BLOCK_D, EVEN_D)
        return products


@triton.jit
def _acceptance_word(proposal, chain, generator):
    """The word of each proposal: ``proposal % 4`` of its block."""
    low, tag = chain_words(chain, ACCEPTANCE)
    w0, w1, w2, w3 = random_words((proposal >> 2).to(tl.uint32), low, tag, generator, 0)
    lane = proposal & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _proposal_transitions(number, mask, chain, score, schedule, generator):
    """Proposals as transitions, the identity where there is none: the first of a scan must not hold a NaN."""
    word = _acceptance_word(schedule.first + number.to(tl.int64), chain, generator)
    threshold = acceptance_threshold(score, word)
    moves = mask & (threshold > NEG_INF)
    return tl.where(moves, threshold, NEG_INF), tl.where(moves, score, NEG_INF), tl.where(moves, number, -1)


@triton.jit
def _record(records_ptr, row, number, mask, prefix, schedule):
    """Stores the prefixes at this block's sample points."""
    proposal = schedule.first + number.to(tl.int64)
    sample = sample_count(proposal, schedule)
    due = mask & (sample_count(proposal + 1, schedule) > sample)
    store_transition(records_ptr, row * schedule.num_samples + sample, due, prefix)


@triton.jit
def _last(prefix, BLOCK_K: tl.constexpr):
    """The transition of a whole block, (1,), from its prefixes, (BLOCK_K,)."""
    last = tl.arange(0, BLOCK_K) == BLOCK_K - 1
    return (
        tl.sum(tl.where(last, prefix[0], 0.0), 0, keep_dims=True),
        tl.sum(tl.where(last, prefix[1], 0.0), 0, keep_dims=True),
        tl.sum(tl.where(last, prefix[2], 0), 0, keep_dims=True),
    )


@triton.jit(do_not_specialize=NUMBERS)
def gathered_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    positions_ptr, stride_position_row: tl.int64,  # (n, K) int64 or None
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    chain_ids_ptr,  # (n,) int64 or None
    query_ids_ptr, key_ids_ptr,  # (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_proposal: tl.int64, num_proposals: tl.int64, burn_in: tl.int64, num_kept: tl.int64, num_samples: tl.int64,
    split_length: tl.int64,
    scratch_ptr,  # transition.Scratch
    accepted_ptr,  # (n,) int32, added to; None: not counted
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr,  # epilogue.Results, None where another launch stores them
    out_key_ptr, out_score_ptr, out_threshold_ptr, out_position_ptr,
    KIND: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    ALIGN_D: tl.constexpr, SPLIT: tl.constexpr, RECORD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z): proposals z * split_length and on of row i.

    Without SPLIT it counts accepted proposals and stores the results itself. With SPLIT a first launch leaves
    transitions and samples (RECORD), ``epilogue_kernel`` stores the results, and a second launch counts.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1).to(tl.int64)
    scratch = scratch_layout(scratch_ptr, n, splits, num_samples, 0)
    rows = row + tl.arange(0, 1)
    d = d_over_align * ALIGN_D
    there = rows >= 0
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    proposals = Proposals(chain_ids_ptr, positions_ptr, stride_position_row, m, generator)
    schedule = Schedule(first_proposal, num_proposals, burn_in, num_kept, num_samples)
    chain = load_chain(chain_ids_ptr, row, row >= 0)
    HAS_COUNT: tl.constexpr = accepted_ptr is not None
    if HAS_COUNT:
        entry = load_state_score(state_score_ptr, rows, there)
        if SPLIT:
            before = load_transition(scratch.split_prefixes_ptr, rows * (splits + 1) + split, there)
            entry = tl.where(entry < before[0], before[1], entry)
    accepted = tl.zeros((1,), tl.int32)
    walk = identity((1,))
    end = tl.minimum(num_proposals, (split + 1) * split_length)
    for begin in range(split * split_length, end, BLOCK_K):
        number = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        mask = number < end
        position, proposable = proposed_keys(number, row, mask, schedule, proposals, KIND)
        query_ptr, key_ptr = queries_ptr + row * stride_query_row, keys_ptr + position * stride_key_row
        score = _multiply(query_ptr, key_ptr, mask, d, BLOCK_D, WHOLE_D, EVEN_D)
        score = score / load_temperature(temperatures_ptr, temperature, row, row >= 0)
        if log_proposal_ptr is not None:
            score -= tl.load(log_proposal_ptr + position, mask, other=0.0)
        if query_ids_ptr is not None:
            proposable &= tl.load(key_ids_ptr + position, mask, other=0) != tl.load(query_ids_ptr + row)
        steps = _proposal_transitions(number, proposable, chain, score, schedule, generator)
        prefix = compose(walk, tl.associative_scan(steps, 0, compose_fields))
        if RECORD:
            _record(scratch.records_ptr, row, number, mask, prefix, schedule)
        if HAS_COUNT:  # a proposal is accepted where the chain is at it right after
            accepted += tl.sum((mask & (entry < prefix[0]) & (prefix[2] == number)).to(tl.int32), 0)
        walk = _last(prefix, BLOCK_K)
    if RECORD:
        store_transition(scratch.splits_ptr, rows * splits + split, there, walk)
    if HAS_COUNT:
        tl.atomic_add(accepted_ptr + rows, accepted)
    if not SPLIT:
        whole = compose_segments(
            scratch.splits_ptr, scratch.split_prefixes_ptr, scratch.records_ptr, rows, rows, there,
            Layout(0, split_length, 0), schedule, 0, num_samples, 1, 2, BLOCK_R,
        )  # fmt: skip
        results = Results(
            state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, out_score_ptr, out_threshold_ptr,
            out_position_ptr,
        )  # fmt: skip
        store_results(scratch.records_ptr, whole, rows, there, schedule, proposals, results, KIND, BLOCK_R)


GATHERED_KERNEL = Kernel(gathered_kernel)


def launch_gathered(walk: WalkParams, outputs: Arguments) -> None:
    """Launches a walk over drawn or given keys. ``outputs``: as of ``launch_sweep``.

    Roofline: memory, a key of d elements for each proposal, from anywhere. Of 32,768 rows and 256 proposals at d = 128
    in bfloat16 that is 2.1 GB: predicted, at an H100's 3.0 TB/s, 0.72 ms, and not measured. To keep as much in flight
    takes occupancy: 8 programs of 2 warps a multiprocessor, counted in the code of Triton 3.9.
    """
    n, d = walk.queries.shape
    generation, processors = tuning.device(walk.queries.device.index or 0)
    chosen = tuning.gathered(generation)
    blocks = -(-walk.num_proposals // chosen.block_k)
    splits = tuning.splits(n, blocks, tuning.GATHERED_PROGRAMS * processors)
    split_length = chosen.block_k * max(1, -(-blocks // splits))
    grid, options, split = (n, splits, 1), {"num_warps": chosen.num_warps}, splits > 1
    arguments = walk_arguments(walk)
    arguments |= outputs
    arguments |= dimensions(d, chosen.block_d)
    arguments |= {
        "split_length": split_length,
        "scratch_ptr": empty_scratch(walk.queries, splits, walk.num_samples, 0),
        "KIND": (DRAWN if walk.positions is None else GIVEN).value,
        "BLOCK_K": chosen.block_k,
        "SPLIT": split,
        "RECORD": True,
        "BLOCK_R": BLOCK_R,
    }
    if not split:
        GATHERED_KERNEL(grid, arguments, options)
        return
    GATHERED_KERNEL(grid, arguments | dict.fromkeys((*RESULTS, "accepted_ptr")), options)
    launch_epilogue(arguments, splits, split_length)
    if outputs["accepted_ptr"] is not None:
        GATHERED_KERNEL(grid, arguments | {"RECORD": False}, options)
