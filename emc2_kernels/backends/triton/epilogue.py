"""The end of every walk: its segments composed in order, then the samples and the new states.

A walk is cut into segments that are walked at the same time, each from the identity: the columns of one program, or the
programs of one block of rows. A segment leaves its whole transition, and at its sample points its own prefixes, the
records. Here a scan makes the exclusive prefixes of the segments, each record is composed with its segment's, and the
incoming state is applied last. The same two functions close both levels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import NUMBERS
from .philox import seed_words, step_word
from .proposals import SWEEP, position_of
from .transition import (
    NEVER,
    compose,
    compose_fields,
    incoming_score,
    load_transition,
    rooms,
    sample_point,
    store_transition,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scan_segments(segments_ptr, prefixes_ptr, at, row_ok, count, WIDTH: tl.constexpr):
    """Exclusive prefixes 0 .. count of the ``count`` segments of each row; ``at`` is the rows' index in both arrays.

    Column j takes segment j - 1, so that an inclusive scan gives exclusive prefixes, and column ``count`` the whole.
    """
    column = tl.arange(0, WIDTH)[None, :]
    mask = row_ok[:, None] & (column <= count)
    segments = load_transition(segments_ptr, at[:, None] * count + column - 1, mask & (column >= 1))
    prefixes = tl.associative_scan(segments, 1, compose_fields)
    store_transition(prefixes_ptr, at[:, None] * (count + 1) + column, mask, prefixes)


@triton.jit
def finish_records(
    records_ptr, prefixes_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, segments,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Records sample_begin .. sample_end - 1 composed with the prefix before their segment, in place.

    ``layout`` is (first segment, length of a segment, lead): segments are numbered through the whole shard, and the
    first starts ``lead`` proposals before it, at a block of the generator. A sample point before the shard is the
    identity, one behind it the whole shard.
    """
    first_segment, length, lead = layout
    first, count, _burn_in, _kept, num_samples = schedule
    for begin in range(sample_begin, sample_end, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)
        done = tl.minimum(tl.maximum(sample_point(sample, schedule) + 1 - first, 0), count)
        segment = tl.where(done == count, segments, (done - 1 + lead) // length - first_segment)
        mask = row_ok[:, None] & (sample < sample_end)[None, :]
        walked = mask & (done > 0)[None, :]
        before = load_transition(prefixes_ptr, at[:, None] * (segments + 1) + segment[None, :], walked)
        to = rows[:, None] * num_samples + sample[None, :]
        record = load_transition(records_ptr, to, walked & (done < count)[None, :])
        store_transition(records_ptr, to, mask, compose(before, record))


@triton.jit
def _emit_transitions(records_ptr, rows, row_ok, schedule, where, outputs, KIND: tl.constexpr, BLOCK_R: tl.constexpr):
    """The finished records, as ``mh_transition`` gives them."""
    threshold_ptr, score_ptr, position_ptr = outputs
    first, num_samples = schedule[0], schedule[4]
    for begin in range(0, num_samples, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)[None, :]
        mask = row_ok[:, None] & (sample < num_samples)
        at = rows[:, None] * num_samples + sample
        threshold, score, number = load_transition(records_ptr, at, mask)
        position = position_of(number, rows[:, None], mask, first, where, KIND)
        if KIND == SWEEP:  # numbered as in the whole walk, so that shards compose
            position = tl.where(number >= 0, position + first, -1)
        tl.store(threshold_ptr + at, threshold, mask)
        tl.store(score_ptr + at, score, mask)
        tl.store(position_ptr + at, position, mask)


@triton.jit
def _emit_step(
    records_ptr, whole, rows, row_ok, schedule, where, states, outputs, KIND: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The chains' samples and new states, as ``mh_step`` gives them."""
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, key_ptr = states
    threshold_ptr, score_ptr, _position_ptr = outputs
    first, num_samples = schedule[0], schedule[4]
    state = incoming_score(state_score_ptr, rows, row_ok)
    for begin in range(0, num_samples, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)[None, :]
        mask = row_ok[:, None] & (sample < num_samples)
        at = rows[:, None] * num_samples + sample
        threshold, _score, number = load_transition(records_ptr, at, mask)
        number = tl.where(state[:, None] < threshold, number, -1)
        position = position_of(number, rows[:, None], mask, first, where, KIND)
        tl.store(samples_ptr + at, position.to(tl.int32), mask)
    threshold, score, number = whole
    moves = state < threshold
    position = position_of(tl.where(moves, number, -1), rows, row_ok, first, where, KIND)
    if labels_ptr is not None:
        position = tl.load(labels_ptr + position, row_ok & moves, other=-1)
    stays = row_ok & (state > NEVER) & (state >= threshold)
    tl.store(key_ptr + rows, tl.where(moves, position, tl.load(state_key_ptr + rows, stays, other=-1)), row_ok)
    tl.store(score_ptr + rows, tl.where(moves, score, state), row_ok)
    tl.store(threshold_ptr + rows, threshold, row_ok)


@triton.jit
def emit(records_ptr, whole, rows, row_ok, schedule, where, states, outputs, KIND: tl.constexpr, BLOCK_R: tl.constexpr):
    """Writes the results of whole walks, ``whole`` and the finished records.

    where: (chain_ids_ptr, positions_ptr, stride_position, m, draws), what gives a proposal its key. states: pointers
    (key, score, labels, samples, new key), None for a transition. outputs: pointers (threshold, score, position).
    """
    if states[0] is not None:
        _emit_step(records_ptr, whole, rows, row_ok, schedule, where, states, outputs, KIND, BLOCK_R)
    else:
        _emit_transitions(records_ptr, rows, row_ok, schedule, where, outputs, KIND, BLOCK_R)


@triton.jit
def finish(
    segments_ptr, prefixes_ptr, records_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, segments,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Composes the ``segments`` < WIDTH segments of each row; returns its whole transition.

    What one thread has stored another one loads: hence the barriers.
    """
    tl.debug_barrier()
    scan_segments(segments_ptr, prefixes_ptr, at, row_ok, segments, WIDTH)
    tl.debug_barrier()
    finish_records(
        records_ptr, prefixes_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, segments, BLOCK_R
    )
    tl.debug_barrier()
    return load_transition(prefixes_ptr, at * (segments + 1) + segments, row_ok)


@triton.jit
def log_sum_exp(largest, total):
    """Of (maximum, sum of exponentials over it), both in powers of two, along the last axis; -inf for none at all."""
    most = tl.max(largest, 1)
    total = tl.sum(total * tl.exp2(largest - tl.where(most > NEVER, most, 0.0)[:, None]), 1)
    return most, total


@triton.jit(do_not_specialize=NUMBERS)
def close_kernel(
    n: tl.int64, m: tl.int64, chain_ids_ptr, positions_ptr, stride_position: tl.int64,
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32, step_ptr, step: tl.int32,
    first: tl.int64, count: tl.int64, burn_in: tl.int64, kept: tl.int64, num_samples: tl.int64,
    split_length: tl.int64, lead: tl.int64, splits: tl.int64,
    scratch_ptr,
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr,
    out_threshold_ptr, out_score_ptr, out_position_ptr, lse_ptr, lse_parts_ptr,
    KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The last launch of a split walk: composes the splits of BLOCK_M rows in order and writes the results."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < n
    key_0, key_1 = seed_words(seed_ptr, seed_low, seed_high)
    draws = step_word(step_ptr, step), key_0, key_1
    split_segments_ptr, split_prefixes_ptr, records_ptr, _segments, _prefixes = rooms(
        scratch_ptr, n, splits, num_samples, 0
    )
    schedule = first, count, burn_in, kept, num_samples
    layout = 0, split_length, lead
    whole = finish(
        split_segments_ptr, split_prefixes_ptr, records_ptr, rows, rows, row_ok, layout, schedule, 0, num_samples,
        splits, WIDTH, BLOCK_R,
    )  # fmt: skip
    where = chain_ids_ptr, positions_ptr, stride_position, m, draws
    states = state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr
    emit(
        records_ptr, whole, rows, row_ok, schedule, where, states, (out_threshold_ptr, out_score_ptr, out_position_ptr),
        KIND, BLOCK_R,
    )  # fmt: skip
    if lse_ptr is not None:
        column = tl.arange(0, WIDTH)[None, :]
        there = row_ok[:, None] & (column < splits)
        part = lse_parts_ptr + 2 * (rows[:, None] * splits + column)
        largest, total = log_sum_exp(tl.load(part, there, other=NEVER), tl.load(part + 1, there, other=0.0))
        tl.store(lse_ptr + rows, (largest + tl.log2(total)) * LN_2, row_ok)
