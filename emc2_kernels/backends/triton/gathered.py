"""Walks over drawn or given positions: each program gathers the keys that one chain is proposed.

Nothing is shared between chains here, so the work is the reading of the keys, and a scan over a block of proposals
costs little beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import emit, finish
from .launch import NUMBERS
from .philox import ACCEPTANCE, chain_words, seed_words, step_word, words
from .proposals import chain_of, proposed_position, temperature_of
from .transition import (
    NEVER,
    compose,
    compose_fields,
    identity,
    incoming_score,
    load_transition,
    rooms,
    samples_before,
    store_transition,
    threshold_of,
)


@triton.jit
def _chunk(queries_ptr, keys_ptr, row, position, mask, strides, begin, d, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """(BLOCK_K,) float32 inner products over columns ``begin`` and on."""
    stride_query, stride_key = strides
    dim = begin + tl.arange(0, BLOCK_D)
    query_at = queries_ptr + row * stride_query + dim
    key_at = keys_ptr + position[:, None] * stride_key + dim[None, :]
    if EVEN_D:
        query, key = tl.load(query_at), tl.load(key_at, mask[:, None], other=0.0)
    else:
        query = tl.load(query_at, dim < d, other=0.0)
        key = tl.load(key_at, mask[:, None] & (dim < d)[None, :], other=0.0)
    return tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], 1)


@triton.jit
def _products(
    queries_ptr, keys_ptr, row, position, mask, strides, d, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K,) float32 inner products of a query with the keys at ``position``."""
    if WHOLE_D:
        return _chunk(queries_ptr, keys_ptr, row, position, mask, strides, 0, d, BLOCK_D, EVEN_D)
    else:
        products = tl.zeros(position.shape, tl.float32)
        for begin in range(0, d, BLOCK_D):
            products += _chunk(queries_ptr, keys_ptr, row, position, mask, strides, begin, d, BLOCK_D, EVEN_D)
        return products


@triton.jit
def _acceptance_word(proposal, chain, draws):
    """The word of each proposal: ``proposal % 4`` of its block."""
    step, key_0, key_1 = draws
    low, tag = chain_words(chain, ACCEPTANCE)
    w0, w1, w2, w3 = words((proposal >> 2).to(tl.uint32), low, tag, step, key_0, key_1, 0)
    lane = proposal & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _steps(number, mask, row, chain, score, schedule, draws):
    """Proposals as transitions, the identity where there is none: the first of a scan must not hold a NaN."""
    threshold = threshold_of(score, _acceptance_word(schedule[0] + number.to(tl.int64), chain, draws))
    moves = mask & (threshold > NEVER)
    return tl.where(moves, threshold, NEVER), tl.where(moves, score, NEVER), tl.where(moves, number, -1)


@triton.jit
def _record(records_ptr, row, number, mask, prefix, schedule):
    """Stores the prefixes at this block's sample points."""
    proposal = schedule[0] + number.to(tl.int64)
    sample = samples_before(proposal, schedule)
    due = mask & (samples_before(proposal + 1, schedule) > sample)
    store_transition(records_ptr, row * schedule[4] + sample, due, prefix)


@triton.jit(do_not_specialize=NUMBERS)
def gathered_kernel(
    queries_ptr, keys_ptr, stride_query: tl.int64, stride_key: tl.int64, n: tl.int64, m: tl.int64,
    d_over_align: tl.int32,
    positions_ptr, stride_position: tl.int64,
    temperatures_ptr, temperature: tl.float32, chain_ids_ptr, query_ids_ptr, key_ids_ptr, log_proposal_ptr,
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32, step_ptr, step: tl.int32,
    first: tl.int64, count: tl.int64, burn_in: tl.int64, kept: tl.int64, num_samples: tl.int64, split_length: tl.int64,
    scratch_ptr,
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, accepted_ptr,
    out_threshold_ptr, out_score_ptr, out_position_ptr,
    KIND: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    ALIGN_D: tl.constexpr, SPLIT: tl.constexpr,
    RECORD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z): proposals z * split_length and on of row i.

    Without SPLIT it counts accepted proposals (if accepted_ptr is given) and writes the results itself. With SPLIT the
    first launch leaves transitions (RECORD) and a second one counts.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1).to(tl.int64)
    split_segments_ptr, split_prefixes_ptr, records_ptr, _segments, _prefixes = rooms(
        scratch_ptr, n, splits, num_samples, 0
    )
    rows = row + tl.arange(0, 1)
    d = d_over_align * ALIGN_D
    there = rows >= 0
    key_0, key_1 = seed_words(seed_ptr, seed_low, seed_high)
    draws = step_word(step_ptr, step), key_0, key_1
    where = chain_ids_ptr, positions_ptr, stride_position, m, draws
    schedule = first, count, burn_in, kept, num_samples
    chain = chain_of(chain_ids_ptr, row, row >= 0)
    COUNT: tl.constexpr = accepted_ptr is not None
    if COUNT:
        entry = incoming_score(state_score_ptr, rows, there)
        if SPLIT:
            before = load_transition(split_prefixes_ptr, rows * (splits + 1) + split, there)
            entry = tl.where(entry < before[0], before[1], entry)
    accepted = tl.zeros((1,), tl.int32)
    walk = identity((1,))
    end = tl.minimum(count, (split + 1) * split_length)
    for begin in range(split * split_length, end, BLOCK_K):
        number = (begin + tl.arange(0, BLOCK_K)).to(tl.int32)
        mask = number < end
        position, proposable = proposed_position(number, row, mask, schedule, where, KIND)
        score = _products(
            queries_ptr, keys_ptr, row, position, mask, (stride_query, stride_key), d, BLOCK_D, WHOLE_D, EVEN_D
        )
        score = score / temperature_of(temperatures_ptr, temperature, row, row >= 0)
        if log_proposal_ptr is not None:
            score -= tl.load(log_proposal_ptr + position, mask, other=0.0)
        if query_ids_ptr is not None:
            proposable &= tl.load(key_ids_ptr + position, mask, other=0) != tl.load(query_ids_ptr + row)
        steps = _steps(number, proposable, row, chain, score, schedule, draws)
        prefix = compose(walk, tl.associative_scan(steps, 0, compose_fields))
        if RECORD:
            _record(records_ptr, row, number, mask, prefix, schedule)
        if COUNT:  # a proposal is accepted where the chain is at it right after
            accepted += tl.sum((mask & (entry < prefix[0]) & (prefix[2] == number)).to(tl.int32), 0)
        last = tl.arange(0, BLOCK_K) == BLOCK_K - 1
        walk = (
            tl.sum(tl.where(last, prefix[0], 0.0), 0, keep_dims=True),
            tl.sum(tl.where(last, prefix[1], 0.0), 0, keep_dims=True),
            tl.sum(tl.where(last, prefix[2], 0), 0, keep_dims=True),
        )
    if RECORD:
        store_transition(split_segments_ptr, rows * splits + split, there, walk)
    if COUNT:
        tl.atomic_add(accepted_ptr + rows, accepted)
    if not SPLIT:
        whole = finish(
            split_segments_ptr, split_prefixes_ptr, records_ptr, rows, rows, there, (0, split_length, 0), schedule, 0,
            num_samples, 1, 2, BLOCK_R,
        )  # fmt: skip
        states = state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr
        outputs = out_threshold_ptr, out_score_ptr, out_position_ptr
        emit(records_ptr, whole, rows, there, schedule, where, states, outputs, KIND, BLOCK_R)
