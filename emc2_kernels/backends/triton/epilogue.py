"""The end of every walk: its segments composed in order, then the samples and the new states.

A walk is cut into segments that are walked at the same time, each from the identity: the columns of one program, or the
programs of one block of rows. A segment leaves its whole transition, and at its sample points its own prefixes, the
records. Here a scan makes the exclusive prefixes of the segments, each record is composed with its segment's, and the
incoming state is applied last. The same two functions end both levels: inside a program, and, in a launch of their own,
across the programs of a walk that is split.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import NUMBERS, Arguments, Kernel, power_of_two
from .philox import load_generator
from .proposals import SWEEP, Proposals, accepted_keys
from .transition import (
    NEG_INF,
    Schedule,
    compose,
    compose_fields,
    load_state_score,
    load_transition,
    sample_point,
    scratch_layout,
    store_transition,
)

LN_2 = tl.constexpr(0.6931471805599453)

BLOCK_R = 16  # samples that the end of a walk handles at a time
BLOCK_ELEMENTS = 1024  # transitions that a program of epilogue_kernel holds at a time


class Layout(NamedTuple):
    """How proposals are cut into the segments that are composed."""

    first: tl.tensor  # segment; they are numbered through the whole shard
    length: tl.tensor  # proposals of a segment
    lead: tl.tensor  # proposals by which the shard's first segment starts before it, at a block of the generator


class Results(NamedTuple):
    """A step's states, before and after, and its samples; or a transition's outputs, where the former are None."""

    state_key_ptr: tl.tensor | None  # (n,) int64
    state_score_ptr: tl.tensor | None  # (n,) float32
    labels_ptr: tl.tensor | None  # (m,) int64; None: keys are named by their positions
    samples_ptr: tl.tensor | None  # (n, R) int32
    key_ptr: tl.tensor | None  # (n,) int64
    score_ptr: tl.tensor  # (n,) float32, of a transition (n, R)
    threshold_ptr: tl.tensor  # the same
    position_ptr: tl.tensor | None  # (n, R) int64, of a transition


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
def compose_records(
    records_ptr, prefixes_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, count,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Records sample_begin .. sample_end - 1 composed with the prefix before their segment, in place.

    A sample point before the shard is the identity, one behind it the whole shard.
    """
    num_samples = schedule.num_samples
    for begin in range(sample_begin, sample_end, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)
        done = tl.minimum(tl.maximum(sample_point(sample, schedule) + 1 - schedule.first, 0), schedule.count)
        segment = tl.where(done == schedule.count, count, (done - 1 + layout.lead) // layout.length - layout.first)
        mask = row_ok[:, None] & (sample < sample_end)[None, :]
        walked = mask & (done > 0)[None, :]
        before = load_transition(prefixes_ptr, at[:, None] * (count + 1) + segment[None, :], walked)
        to = rows[:, None] * num_samples + sample[None, :]
        record = load_transition(records_ptr, to, walked & (done < schedule.count)[None, :])
        store_transition(records_ptr, to, mask, compose(before, record))


@triton.jit
def compose_segments(
    segments_ptr, prefixes_ptr, records_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, count,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Composes the ``count`` < WIDTH segments of each row, and their records; returns the row's whole transition.

    What one thread has stored another one loads: hence the barriers.
    """
    tl.debug_barrier()
    scan_segments(segments_ptr, prefixes_ptr, at, row_ok, count, WIDTH)
    tl.debug_barrier()
    compose_records(
        records_ptr, prefixes_ptr, at, rows, row_ok, layout, schedule, sample_begin, sample_end, count, BLOCK_R
    )
    tl.debug_barrier()
    return load_transition(prefixes_ptr, at * (count + 1) + count, row_ok)


@triton.jit
def _store_transitions(
    records_ptr, rows, row_ok, schedule, proposals, results, KIND: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The composed records, as ``mh_transition`` gives them."""
    num_samples = schedule.num_samples
    for begin in range(0, num_samples, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)[None, :]
        mask = row_ok[:, None] & (sample < num_samples)
        at = rows[:, None] * num_samples + sample
        threshold, score, number = load_transition(records_ptr, at, mask)
        position = accepted_keys(number, rows[:, None], mask, schedule.first, proposals, KIND)
        if KIND == SWEEP:  # numbered as in the whole walk, so that shards compose
            position = tl.where(number >= 0, position + schedule.first, -1)
        tl.store(results.threshold_ptr + at, threshold, mask)
        tl.store(results.score_ptr + at, score, mask)
        tl.store(results.position_ptr + at, position, mask)


@triton.jit
def _store_step(
    records_ptr, whole, rows, row_ok, schedule, proposals, results, KIND: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The chains' samples and new states, as ``mh_step`` gives them."""
    num_samples = schedule.num_samples
    state = load_state_score(results.state_score_ptr, rows, row_ok)
    for begin in range(0, num_samples, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)[None, :]
        mask = row_ok[:, None] & (sample < num_samples)
        at = rows[:, None] * num_samples + sample
        threshold, _score, number = load_transition(records_ptr, at, mask)
        number = tl.where(state[:, None] < threshold, number, -1)
        position = accepted_keys(number, rows[:, None], mask, schedule.first, proposals, KIND)
        tl.store(results.samples_ptr + at, position.to(tl.int32), mask)
    threshold, score, number = whole
    moves = state < threshold
    position = accepted_keys(tl.where(moves, number, -1), rows, row_ok, schedule.first, proposals, KIND)
    if results.labels_ptr is not None:
        position = tl.load(results.labels_ptr + position, row_ok & moves, other=-1)
    stays = row_ok & (state > NEG_INF) & (state >= threshold)
    key = tl.where(moves, position, tl.load(results.state_key_ptr + rows, stays, other=-1))
    tl.store(results.key_ptr + rows, key, row_ok)
    tl.store(results.score_ptr + rows, tl.where(moves, score, state), row_ok)
    tl.store(results.threshold_ptr + rows, threshold, row_ok)


@triton.jit
def store_results(
    records_ptr, whole, rows, row_ok, schedule, proposals, results, KIND: tl.constexpr, BLOCK_R: tl.constexpr
):
    """What a walk is asked for, from its whole transition and the composed records. proposals: None of a sweep."""
    if results.state_key_ptr is not None:
        _store_step(records_ptr, whole, rows, row_ok, schedule, proposals, results, KIND, BLOCK_R)
    else:
        _store_transitions(records_ptr, rows, row_ok, schedule, proposals, results, KIND, BLOCK_R)


@triton.jit
def log_sum_exp(largest, total):
    """Of (maximum, sum of exponentials over it), both in powers of two, along the last axis; -inf for none at all."""
    most = tl.max(largest, 1)
    total = tl.sum(total * tl.exp2(largest - tl.where(most > NEG_INF, most, 0.0)[:, None]), 1)
    return most, total


@triton.jit(do_not_specialize=NUMBERS)
def epilogue_kernel(
    n: tl.int64, m: tl.int64,
    chain_ids_ptr,  # (n,) int64 or None
    positions_ptr, stride_position_row: tl.int64,  # (n, K) int64 or None
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr, step: tl.int32,
    first_proposal: tl.int64, num_proposals: tl.int64, burn_in: tl.int64, num_kept: tl.int64, num_samples: tl.int64,
    split_length: tl.int64, lead: tl.int64, splits: tl.int64,
    scratch_ptr,  # transition.Scratch
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr,  # Results
    out_key_ptr, out_score_ptr, out_threshold_ptr, out_position_ptr,
    lse_ptr,  # (n,) float32 or None
    lse_parts_ptr,  # (n, splits, 2) float32
    KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program i composes the splits of rows i * BLOCK_M and on, in order, and stores the results."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < n
    generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, step)
    scratch = scratch_layout(scratch_ptr, n, splits, num_samples, 0)
    schedule = Schedule(first_proposal, num_proposals, burn_in, num_kept, num_samples)
    whole = compose_segments(
        scratch.splits_ptr, scratch.split_prefixes_ptr, scratch.records_ptr, rows, rows, row_ok,
        Layout(0, split_length, lead), schedule, 0, num_samples, splits, WIDTH, BLOCK_R,
    )  # fmt: skip
    proposals = Proposals(chain_ids_ptr, positions_ptr, stride_position_row, m, generator)
    results = Results(
        state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, out_score_ptr, out_threshold_ptr,
        out_position_ptr,
    )  # fmt: skip
    store_results(scratch.records_ptr, whole, rows, row_ok, schedule, proposals, results, KIND, BLOCK_R)
    if lse_ptr is not None:
        column = tl.arange(0, WIDTH)[None, :]
        there = row_ok[:, None] & (column < splits)
        part = lse_parts_ptr + 2 * (rows[:, None] * splits + column)
        largest, total = log_sum_exp(tl.load(part, there, other=NEG_INF), tl.load(part + 1, there, other=0.0))
        tl.store(lse_ptr + rows, (largest + tl.log2(total)) * LN_2, row_ok)


EPILOGUE_KERNEL = Kernel(epilogue_kernel)

# The arguments by which a kernel that ends a walk is told of its results; another need not be compiled for them.
RESULTS = (
    "state_key_ptr", "state_score_ptr", "labels_ptr", "samples_ptr",
    "out_key_ptr", "out_score_ptr", "out_threshold_ptr", "out_position_ptr",
)  # fmt: skip


def launch_epilogue(arguments: Arguments, splits: int, split_length: int, lead: int = 0) -> None:
    """Ends a walk of which each program has left its transition. ``arguments``: those of that launch, and the results.

    Roofline: memory. 16 bytes a transition: splits read and splits + 1 prefixes written for each row, and for each of
    its samples the record and a prefix read, the record written and read again. Small beside the walk.
    """
    width = power_of_two(splits + 1)
    rows = max(1, BLOCK_ELEMENTS // max(width, BLOCK_R))
    own = {
        "splits": splits,
        "split_length": split_length,
        "lead": lead,
        "lse_parts_ptr": arguments.get("lse_parts_ptr"),
        "WIDTH": width,
        "BLOCK_M": rows,
        "BLOCK_R": BLOCK_R,
    }
    EPILOGUE_KERNEL((-(-arguments["n"] // rows), 1, 1), arguments | own, {"num_warps": 4})
