"""What the sweep's kernels share: a tile of 128 keys as sixteen steps of eight segments, walked in registers.

A product of BLOCK_M rows and 128 keys leaves the matrix unit with two neighbouring columns of every eight in one
thread. So the key rows are loaded permuted: column 8 g + s of the t-th product holds step 16 t + g of segment s, and
each of the eight segments is a run of consecutive keys that one thread walks in its registers, from the first tile to
the last. The operator makes that right: a segment is walked from the identity, whatever comes before it, and the eight
are composed once, at the end (epilogue.py).

A tile is *plain* if all of its 128 keys exist and no score is +inf: that is what a loop takes for granted which does
without masks and guards. Others are walked by a second loop.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import Layout, compose_segments, store_results
from .philox import Generator, random_words, zeros_like
from .proposals import SWEEP, Rows
from .scores import LOG2_E, SEGMENTS, STEPS, TILE, Operand, larger, load_resident, multiply, sixteen_steps
from .transition import (
    NEG_INF,
    Schedule,
    acceptance_threshold,
    compose,
    sample_count,
    sample_point,
    store_transition,
)

FAR = tl.constexpr(1 << 61)  # the next sample point where none is left


class Segments(NamedTuple):
    """The eight segments of a program, (8,) each."""

    first_key: tl.tensor  # position of step 0, which may lie before the keys
    first_block: tl.tensor  # of the generator
    begin: tl.tensor  # the first step that has a key
    end: tl.tensor  # the last one + 1


class Sweep(NamedTuple):
    """What a program walks."""

    rows: Rows
    segments: Segments
    schedule: Schedule
    generator: Generator
    key_ids_ptr: tl.tensor | None  # (m,)
    log_proposal_ptr: tl.tensor | None  # (m,)


@triton.jit
def split_segments(segment_length, schedule):
    """The segments of the program's split, number program_id(1) of the sweep."""
    lead = schedule.first % 4  # segments start at a block of the generator
    segment = tl.program_id(1).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    first_key = segment * segment_length - lead
    return Segments(
        first_key,
        ((schedule.first + first_key) // 4).to(tl.uint32),
        tl.maximum(-first_key, 0).to(tl.int32),
        tl.minimum(schedule.count - first_key, segment_length).to(tl.int32),
    )


class Products(NamedTuple):
    """What the products of the program's tiles are made of."""

    resident: tl.tensor
    queries: Operand
    keys_ptr: tl.tensor
    stride_key_row: tl.tensor
    first_key: tl.tensor  # (128,) the position of each column's key in tile 0
    m: tl.tensor
    d: tl.tensor


@triton.jit
def load_queries(
    queries_ptr, stride_query_row, keys_ptr, stride_key_row, rows, segment_length, schedule, d, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """The program's queries, and where the keys of its first tile are: permuted, so that columns are steps."""
    queries = Operand(queries_ptr, stride_query_row, rows.index, rows.ok)
    resident = load_resident(queries, d, BLOCK_D, WHOLE_D, EVEN_D)
    column = tl.arange(0, TILE)
    segment = tl.program_id(1).to(tl.int64) * SEGMENTS + column % SEGMENTS
    first_key = segment * segment_length - schedule.first % 4 + column // SEGMENTS
    return Products(resident, queries, keys_ptr, stride_key_row, first_key, schedule.count, d)


@triton.jit
def multiply_tile(
    products, tile, PLAIN: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, 128) inner products of the rows with the keys of a tile. If it is not PLAIN, some may lie outside."""
    if PLAIN:  # one number for all threads is added to addresses that leave the loop
        tile_ptr = products.keys_ptr + tile.to(tl.int64) * STEPS * products.stride_key_row
        keys = Operand(tile_ptr, products.stride_key_row, products.first_key, None)
    else:
        key = products.first_key + tile * STEPS
        keys = Operand(products.keys_ptr, products.stride_key_row, key, (key >= 0) & (key < products.m))
    return multiply(products.resident, products.queries, keys, products.d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)


@triton.jit
def next_sample(proposal, schedule):
    """The first sample at or after a proposal of the whole walk, and how many proposals on.

    The last one is never looked for: it is at the end of the walk, whose transition is there anyway.
    """
    sample = sample_count(tl.maximum(proposal, 0), schedule)
    return sample, tl.where(sample < schedule.num_samples - 1, sample_point(sample, schedule) - proposal, FAR)


@triton.jit
def next_sample_step(step, sweep):
    """The first step at or after ``step`` that is a sample point of any segment."""
    start = sweep.schedule.first + sweep.segments.first_key
    return step + tl.min(next_sample(start + step, sweep.schedule)[1])


@triton.jit
def entry_records(tile, sweep):
    """Where segments keep what they enter a tile with, (BLOCK_M, 8): in the place of its first sample; and whether it
    has one."""
    proposal = sweep.schedule.first + sweep.segments.first_key + tile * STEPS
    sample, ahead = next_sample(proposal, sweep.schedule)
    to = sweep.rows.index[:, None] * sweep.schedule.num_samples + sample[None, :]
    return to, sweep.rows.ok[:, None] & (ahead < STEPS)[None, :]


@triton.jit
def _add_to_sums(sums, similarities, BELOW_INF: tl.constexpr):
    """The running (maximum, sum of exponentials over it) of a row's segments, in powers of two, after four steps, for
    which the sum is scaled once. BELOW_INF: there is no +inf."""
    largest, total = sums
    new, scaled = largest, ()
    for i in tl.static_range(4):
        if BELOW_INF:
            each = larger(similarities[i] * LOG2_E, NEG_INF)  # not NaN
        else:
            each = tl.where(tl.abs(similarities[i]) < float("inf"), similarities[i] * LOG2_E, NEG_INF)
        new = tl.maximum(new, each)
        scaled = scaled + (each,)
    origin = tl.where(new > NEG_INF, new, 0.0)
    total *= tl.exp2(largest - origin)
    for i in tl.static_range(4):
        total += tl.exp2(scaled[i] - origin)
    return new, total


@triton.jit
def walk_tile(
    walk, sums, products, step, sweep, records_ptr, due, RECORD: tl.constexpr, COUNT: tl.constexpr,
    HAS_LSE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Sixteen steps of eight segments, from ``step`` on; the walk and the sums after them, (BLOCK_M, 8) each. Without
    HAS_LSE sums are an empty tuple.

    RECORD: what segments leave is stored, from the first four steps on that have a sample point of any of them, which
    is at step ``due``. COUNT: the walk has started from the chain's own state, and counts steps that move it. PLAIN:
    all keys exist, and a score of +inf would be moved to, which leaves a threshold of +inf.
    """
    rows, segments, generator = sweep.rows, sweep.segments, sweep.generator
    groups = sixteen_steps(products)
    for group in tl.static_range(4):
        block = segments.first_block + (step // 4 + group)
        zeros = zeros_like(groups[group][0])
        drawn = random_words(block[None, :], rows.chain_low[:, None], rows.tag[:, None], generator, zeros)
        if sweep.key_ids_ptr is not None:
            key_ids = _load_four_steps(sweep.key_ids_ptr, segments, step + 4 * group, PLAIN)
        if sweep.log_proposal_ptr is not None:
            weights = _load_four_steps(sweep.log_proposal_ptr, segments, step + 4 * group, PLAIN)
        after, similarities = (), ()
        for i in tl.static_range(4):
            number = step + (4 * group + i)
            product = groups[group][i]
            if sweep.key_ids_ptr is not None:  # early: a condition kept for later takes more instructions than a choice
                product = tl.where(key_ids[i][None, :] == rows.query_id[:, None], NEG_INF, product)
            there = (number >= segments.begin) & (number < segments.end)
            if PLAIN:
                similarity = product * rows.scale[:, None]
            else:
                similarity = tl.fma(product, rows.scale[:, None], tl.where(there, 0.0, NEG_INF)[None, :])
            score = similarity
            if sweep.log_proposal_ptr is not None:  # written as one fma: the compiler would make it of a plain tile's
                offset = -weights[i] if PLAIN else tl.where(there, -weights[i], NEG_INF)  # only, and round others twice
                score = tl.fma(product, rows.scale[:, None], offset[None, :])
            threshold = acceptance_threshold(score, drawn[i], PLAIN)
            walk = compose(walk, (threshold, score, walk[2] + 1 if COUNT else number))
            after, similarities = after + (walk,), similarities + (similarity,)
        if HAS_LSE:
            sums = _add_to_sums(sums, similarities, PLAIN)
        if RECORD:  # noqa: SIM102  known to the compiler, as the next is not
            if due < step + 4 * (group + 1):
                _record(records_ptr, after, step + 4 * group, sweep)
    return walk, sums


@triton.jit
def _load_four_steps(ptr, segments, step, PLAIN: tl.constexpr):
    """Four (8,), of the keys of four steps from ``step`` on; if not PLAIN, 0 where there is none. One load, because the
    compiler takes long over each."""
    number = step + tl.arange(0, 4)[None, :]
    at = (ptr + segments.first_key)[:, None] + number
    if PLAIN:
        found = tl.load(at)
    else:
        there = (number >= segments.begin[:, None]) & (number < segments.end[:, None])
        found = tl.load(at, there, other=0)
    even, odd = tl.split(tl.reshape(found, (SEGMENTS, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0, s1, s2, s3


@triton.jit
def _record(records_ptr, after, step, sweep):
    """Stores those of four steps' prefixes that are samples. ``after``: what each step leaves, (BLOCK_M, 8)."""
    rows, segments, schedule = sweep.rows, sweep.segments, sweep.schedule
    # Samples before the first of the steps, by one division; from there on by what it leaves.
    taken = tl.maximum(schedule.first + segments.first_key + step - schedule.burn_in, 0) * schedule.num_samples
    sample = taken // tl.maximum(schedule.kept, 1)
    remainder = taken - sample * schedule.kept
    for i in tl.static_range(4):
        number = step + i
        is_kept = schedule.first + segments.first_key + number >= schedule.burn_in
        remainder += tl.where(is_kept, schedule.num_samples, 0)
        is_sample = remainder >= schedule.kept
        to = rows.index[:, None] * schedule.num_samples + sample[None, :]
        due = rows.ok[:, None] & ((number >= segments.begin) & (number < segments.end) & is_sample)[None, :]
        store_transition(records_ptr, to, due, shard_transition(after[i], segments))
        sample += is_sample.to(tl.int64)
        remainder -= tl.where(is_sample, schedule.kept, 0)


@triton.jit
def _walk_tiles(
    walk, sums, begin, end, operands, sweep, records_ptr, RECORD: tl.constexpr, COUNT: tl.constexpr,
    HAS_LSE: tl.constexpr, PLAIN: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles begin .. end - 1, as ``walk_tile`` does. Samples are recorded, or the entries of their tiles."""
    due = next_sample_step(begin * STEPS, sweep)
    for i in range(0, end - begin):  # from 0: only such a loop's loads are made ahead if begin is not known before
        tile = begin + i
        products = multiply_tile(operands, tile, PLAIN, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        due_here = due
        if not COUNT:  # noqa: SIM102  known to the compiler, as the next is not
            if due < (tile + 1) * STEPS:
                if not RECORD:
                    to, has_sample = entry_records(tile, sweep)
                    store_transition(records_ptr, to, has_sample, walk)
                due = next_sample_step((tile + 1) * STEPS, sweep)
        walk, sums = walk_tile(
            walk, sums, products, tile * STEPS, sweep, records_ptr, due_here, RECORD, COUNT, HAS_LSE, PLAIN
        )
    return walk, sums


@triton.jit
def _choose(condition, first, second):
    """One of two tuples, by a scalar."""
    chosen = ()
    for i in tl.static_range(len(first)):
        chosen = chosen + (tl.where(condition, first[i], second[i]),)
    return chosen


@triton.jit
def walk_program(
    walk, sums, operands, sweep, segment_length, records_ptr, RECORD: tl.constexpr, COUNT: tl.constexpr,
    HAS_LSE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tiles of a program: the walk, from ``walk`` on, and the sums.

    Masks of keys and the guard against scores of +inf are 6 of 25 instructions. So a loop without them takes as many of
    the first tiles as have all of their keys, and one with them the rest. Should the first have met a score of +inf,
    its work is thrown away, and the second takes all.
    """
    tiles, begin = (segment_length // STEPS).to(tl.int32), 0
    if not RECORD:
        segments = sweep.segments
        begin = tl.where(tl.max(segments.begin) > 0, 0, tl.maximum(tl.min(segments.end), 0)) // STEPS
        end, end_sums = _walk_tiles(
            walk, sums, 0, begin, operands, sweep, records_ptr, RECORD, COUNT, HAS_LSE, True, BLOCK_D, WHOLE_D, EVEN_D,
            PRECISION,
        )  # fmt: skip
        # Choices, not a branch, after which no loop's loads are made ahead.
        is_right = tl.max(tl.max(end[0], 1), 0) < float("inf")
        begin = tl.where(is_right, begin, 0)
        walk = _choose(is_right, end, walk)
        sums = _choose(is_right, end_sums, sums)
        tl.debug_barrier()  # the second loop may store the same entries again, by other threads
    return _walk_tiles(
        walk, sums, begin, tiles, operands, sweep, records_ptr, RECORD, COUNT, HAS_LSE, False, BLOCK_D, WHOLE_D, EVEN_D,
        PRECISION,
    )  # fmt: skip


@triton.jit
def shard_transition(walk, segments):
    """A walk's transitions with the proposal's number in the shard instead of the segment."""
    threshold, score, number = walk
    return threshold, score, tl.where(number >= 0, number + segments.first_key.to(tl.int32)[None, :], -1)


@triton.jit
def store_split(scratch, sweep, results, segment_length, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr):
    """Composes the program's segments, and the records that lie in them. They are a split of the walk, whose transition
    is stored for ``epilogue_kernel``; or the whole of it, whose results are."""
    rows, schedule = sweep.rows, sweep.schedule
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    at, lead = rows.index * splits + split, schedule.first % 4
    sample_begin, sample_end = tl.full((), 0, tl.int64), schedule.num_samples
    if SPLIT:
        start = schedule.first - lead + split * SEGMENTS * segment_length
        end = tl.minimum(start + SEGMENTS * segment_length, schedule.first + schedule.count)
        sample_begin = sample_count(tl.maximum(start, schedule.first), schedule)
        sample_end = sample_count(end, schedule)
    whole = compose_segments(
        scratch.segments_ptr, scratch.prefixes_ptr, scratch.records_ptr, at, rows.index, rows.ok,
        Layout(split * SEGMENTS, segment_length, lead), schedule, sample_begin, sample_end, SEGMENTS, 2 * SEGMENTS,
        BLOCK_R,
    )  # fmt: skip
    if SPLIT:
        store_transition(scratch.splits_ptr, at, rows.ok, whole)
    else:  # a sweep's proposals are their keys
        store_results(scratch.records_ptr, whole, rows.index, rows.ok, schedule, None, results, SWEEP, BLOCK_R)
