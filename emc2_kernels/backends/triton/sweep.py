"""The sweep: scores, draws and walk of a block of rows over all keys in one program; nothing of size n x m is stored.

A product of BLOCK_M rows and 128 keys leaves the matrix unit with two neighbouring columns of every eight in one
thread. So the key rows are loaded permuted: column 8 g + s of the t-th product holds step 16 t + g of segment s, and
each of the eight segments is a run of consecutive keys that one thread walks in its registers, from the first tile to
the last. The operator makes that right: a segment is walked from the identity, whatever comes before it, and the eight
are composed once, at the end (finish.py). Further segments are further programs, where rows are too few to fill the
GPU. Of a long walk one launch leaves the segments, and what they enter the tiles of sample points with; the next one
takes the samples there and writes the results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import LN_2, emit, finish, log_sum_exp
from .launch import NUMBERS
from .philox import ACCEPTANCE, chain_words, seed_words, step_word, words, zeros_like
from .proposals import SWEEP, chain_of, temperature_of
from .scores import LOG2_E, SEGMENTS, STEPS, TILE, load_rows, multiply, sixteen_steps
from .transition import (
    NEVER,
    compose,
    identity,
    incoming_score,
    load_transition,
    rooms,
    sample_point,
    samples_before,
    store_transition,
    threshold_of,
)

# What a launch does. A short walk records its samples on the way: one launch. A long one would carry through all of its
# tiles what few of them need. So it leaves what it enters those with, and a second launch walks them again.
RECORD = tl.constexpr(0)
WALK = tl.constexpr(1)
REPLAY = tl.constexpr(2)
COUNT = tl.constexpr(3)  # accepted proposals, when it is known in which state a chain enters its segment

FAR = tl.constexpr(1 << 61)  # the next sample point where none is left


@triton.jit
def _next_sample(proposal, schedule):
    """The first sample at or after a proposal of the whole walk, and how many proposals on.

    The last one is never looked for: it is at the end of the walk, whose transition is there anyway.
    """
    sample = samples_before(tl.maximum(proposal, 0), schedule)
    return sample, tl.where(sample < schedule[4] - 1, sample_point(sample, schedule) - proposal, FAR)


@triton.jit
def _next_sample_step(step, start, schedule):
    """The first step at or after ``step`` that is a sample point of any segment; ``start`` is where segments start."""
    return step + tl.min(_next_sample(start + step, schedule)[1])


@triton.jit
def _add_to_sums(sums, similarity):
    """The running (maximum, sum of exponentials over it) of a row's segments, in powers of two."""
    largest, total = sums
    scaled = tl.where(tl.abs(similarity) < float("inf"), similarity * LOG2_E, NEVER)
    new = tl.maximum(largest, scaled)
    origin = tl.where(new > NEVER, new, 0.0)
    return new, total * tl.exp2(largest - origin) + tl.exp2(scaled - origin)


@triton.jit
def _walk_tile(
    walk, sums, products, step, columns, rows, draws, ids, log_proposal_ptr, records_ptr, schedule, due,
    MODE: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Sixteen steps of eight segments, from ``step`` on; the walk and the sums after them.

    columns: (first key, first block of draws, first step, last step + 1) of the segments, (8,) each. rows: (row number,
    whether it exists, 1 / temperature, two words of the chain), (BLOCK_M,) each. due: the first step that is a sample
    point of any segment; from there on what they leave is stored, in the modes that record.
    """
    first_key, first_block, begin, end = columns
    row, row_ok, inverse_temperature, chain_low, tag = rows
    random_step, key_0, key_1 = draws
    groups = sixteen_steps(products)
    for group in tl.static_range(4):
        block = first_block + (step // 4 + group)
        zeros = zeros_like(groups[group][0])
        drawn = words(block[None, :], chain_low[:, None], tag[:, None], random_step, key_0, key_1, zeros)
        after = ()
        for i in tl.static_range(4):
            number = step + (4 * group + i)
            there = (number >= begin) & (number < end)
            similarity = tl.fma(groups[group][i], inverse_temperature[:, None], tl.where(there, 0.0, NEVER)[None, :])
            score = similarity
            if log_proposal_ptr is not None:
                score -= tl.load(log_proposal_ptr + first_key + number, there, other=0.0)[None, :]
            threshold = threshold_of(score, drawn[i])
            if ids[1] is not None:
                excluded = tl.load(ids[1] + first_key + number, there, other=0)[None, :] == ids[0][:, None]
                threshold = tl.where(excluded, NEVER, threshold)
                similarity = tl.where(excluded, NEVER, similarity)
            if MODE == COUNT:  # it started from the chain's own state: a step that moves it is an accepted proposal
                walk = compose(walk, (threshold, score, walk[2] + 1))
            else:
                walk = compose(walk, (threshold, score, number))
            if LSE:
                sums = _add_to_sums(sums, similarity)
            after = after + (walk,)
        if (MODE == RECORD) | (MODE == REPLAY):  # noqa: SIM102  known to the compiler, as the next is not
            if due < step + 4 * (group + 1):
                _record(records_ptr, after, step + 4 * group, columns, row, row_ok, schedule)
    return walk, sums


@triton.jit
def _record(records_ptr, after, step, columns, row, row_ok, schedule):
    """Stores those of four steps' prefixes that are samples. ``after``: what each step leaves, (BLOCK_M, 8)."""
    first_key, _first_block, begin, end = columns
    first, _count, burn_in, kept, num_samples = schedule
    # Samples before the first of the steps, by one division; from there on by what it leaves.
    taken = tl.maximum(first + first_key + step - burn_in, 0) * num_samples
    sample = taken // tl.maximum(kept, 1)
    remainder = taken - sample * kept
    for i in tl.static_range(4):
        number = step + i
        remainder += tl.where(first + first_key + number >= burn_in, num_samples, 0)
        is_sample = remainder >= kept
        to = row[:, None] * num_samples + sample[None, :]
        due = row_ok[:, None] & ((number >= begin) & (number < end) & is_sample)[None, :]
        store_transition(records_ptr, to, due, _in_shard(after[i], first_key))
        sample += is_sample.to(tl.int64)
        remainder -= tl.where(is_sample, kept, 0)


@triton.jit
def _in_shard(walk, first_key):
    """A walk's transitions with the proposal's number in the shard instead of the segment."""
    threshold, score, number = walk
    return threshold, score, tl.where(number >= 0, number + first_key.to(tl.int32)[None, :], -1)


@triton.jit
def _products(
    operands, row, row_ok, key, m, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, 128) inner products of the rows with the keys ``key``, of which some may lie outside."""
    queries, queries_ptr, keys_ptr, strides, d = operands
    key_ok = (key >= 0) & (key < m)
    return multiply(
        queries, queries_ptr, keys_ptr, row, row_ok, key, key_ok, strides, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION
    )


@triton.jit
def _entry_place(row, row_ok, proposal, schedule):
    """Where segments keep what they enter a tile with, (BLOCK_M, 8): in the place of its first sample; and whether it
    has one. ``proposal``: the first of each segment's in the tile."""
    sample, ahead = _next_sample(proposal, schedule)
    return row[:, None] * schedule[4] + sample[None, :], row_ok[:, None] & (ahead < STEPS)[None, :]


@triton.jit
def _entry(state_score_ptr, split_prefixes_ptr, prefixes_ptr, row, row_ok, split, splits, SPLIT: tl.constexpr):
    """(BLOCK_M, 8): each chain's score as it enters the segments of this program."""
    x = incoming_score(state_score_ptr, row, row_ok)
    if SPLIT:
        threshold, score, _number = load_transition(split_prefixes_ptr, row * (splits + 1) + split, row_ok)
        x = tl.where(x < threshold, score, x)
    at = (row * splits + split)[:, None] * (SEGMENTS + 1) + tl.arange(0, SEGMENTS)[None, :]
    threshold, score, _number = load_transition(prefixes_ptr, at, row_ok[:, None])
    return tl.where(x[:, None] < threshold, score, x[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def sweep_kernel(
    # operands
    queries_ptr, keys_ptr, stride_query: tl.int64, stride_key: tl.int64, n: tl.int64, m: tl.int64,
    d_over_align: tl.int32,
    # of rows and keys
    temperatures_ptr, temperature: tl.float32, chain_ids_ptr, query_ids_ptr, key_ids_ptr, log_proposal_ptr,
    # random numbers
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32, step_ptr, step: tl.int32,
    # schedule, and how the keys are cut
    first: tl.int64, burn_in: tl.int64, kept: tl.int64, num_samples: tl.int64, segment_length: tl.int64,
    # transitions on the way
    scratch_ptr,
    # of a step, or of a transition; None for the other
    state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr, accepted_ptr,
    out_threshold_ptr, out_score_ptr, out_position_ptr,
    # log-sum-exp: the row's, or its splits' maximum and sum
    lse_ptr, lse_parts_ptr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over segments 8 z .. 8 z + 7 of ``segment_length`` keys.

    With SPLIT another kernel writes the results. lse_ptr is given to one launch of a walk only.
    """
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    split_segments_ptr, split_prefixes_ptr, records_ptr, segments_ptr, prefixes_ptr = rooms(
        scratch_ptr, n, splits, num_samples, SEGMENTS
    )
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    d = d_over_align * ALIGN_D
    key_0, key_1 = seed_words(seed_ptr, seed_low, seed_high)
    draws = step_word(step_ptr, step), key_0, key_1
    chain_low, tag = chain_words(chain_of(chain_ids_ptr, row, row_ok), ACCEPTANCE)
    inverse_temperature = tl.full((BLOCK_M,), 1.0, tl.float32) / temperature_of(
        temperatures_ptr, temperature, row, row_ok
    )
    query_id = row
    if query_ids_ptr is not None:
        query_id = tl.load(query_ids_ptr + row, row_ok, other=0)
    rows = row, row_ok, inverse_temperature, chain_low, tag
    schedule = first, m, burn_in, kept, num_samples

    lead = first % 4  # segments start at a block of the generator
    segment = split * SEGMENTS + tl.arange(0, SEGMENTS)
    first_key = segment * segment_length - lead
    columns = (
        first_key,
        ((first + first_key) // 4).to(tl.uint32),
        tl.maximum(-first_key, 0).to(tl.int32),
        tl.minimum(m - first_key, segment_length).to(tl.int32),
    )
    if MODE == COUNT:
        entry = _entry(state_score_ptr, split_prefixes_ptr, prefixes_ptr, row, row_ok, split, splits, SPLIT)
        walk = entry, entry, tl.zeros((BLOCK_M, SEGMENTS), tl.int32)
    else:
        walk = identity((BLOCK_M, SEGMENTS))
    LSE: tl.constexpr = lse_ptr is not None
    sums = tl.full((BLOCK_M, SEGMENTS), NEVER, tl.float32), tl.zeros((BLOCK_M, SEGMENTS), tl.float32)

    queries = row
    if WHOLE_D:
        queries = load_rows(queries_ptr, row, row_ok, stride_query, 0, d, BLOCK_D, EVEN_D)
    column = tl.arange(0, TILE)
    key_of_column = (split * SEGMENTS + column % SEGMENTS) * segment_length - lead + column // SEGMENTS
    operands = queries, queries_ptr, keys_ptr, (stride_query, stride_key), d
    ids = query_id, key_ids_ptr
    start = first + first_key
    due = _next_sample_step(0, start, schedule)
    if MODE == REPLAY:
        while due < segment_length:
            tile = (due // STEPS).to(tl.int32)
            to, has_sample = _entry_place(row, row_ok, start + tile * STEPS, schedule)
            walk = load_transition(records_ptr, to, has_sample)
            tl.debug_barrier()  # the sample is stored where this was
            products = _products(
                operands, row, row_ok, key_of_column + tile * STEPS, m, BLOCK_D, WHOLE_D, EVEN_D, PRECISION
            )
            _walk_tile(
                walk, sums, products, tile * STEPS, columns, rows, draws, ids, log_proposal_ptr, records_ptr, schedule,
                due, MODE, LSE,
            )  # fmt: skip
            due = _next_sample_step((tile + 1) * STEPS, start, schedule)
    else:
        for tile in range(0, (segment_length // STEPS).to(tl.int32)):
            products = _products(
                operands, row, row_ok, key_of_column + tile * STEPS, m, BLOCK_D, WHOLE_D, EVEN_D, PRECISION
            )
            due_here = due
            if MODE != COUNT:  # noqa: SIM102  known to the compiler, as the next is not
                if due < (tile + 1) * STEPS:
                    if MODE == WALK:
                        to, has_sample = _entry_place(row, row_ok, start + tile * STEPS, schedule)
                        store_transition(records_ptr, to, has_sample, walk)
                    due = _next_sample_step((tile + 1) * STEPS, start, schedule)
            walk, sums = _walk_tile(
                walk, sums, products, tile * STEPS, columns, rows, draws, ids, log_proposal_ptr, records_ptr, schedule,
                due_here, MODE, LSE,
            )  # fmt: skip

    at = row * splits + split
    if MODE == COUNT:
        tl.atomic_add(accepted_ptr + row, tl.sum(walk[2], 1), row_ok)
    if (MODE == RECORD) | (MODE == WALK):
        segment_at = at[:, None] * SEGMENTS + tl.arange(0, SEGMENTS)[None, :]
        store_transition(segments_ptr, segment_at, row_ok[:, None], _in_shard(walk, first_key))
    if LSE:
        largest, total = log_sum_exp(sums[0], sums[1])
        if SPLIT:
            tl.store(lse_parts_ptr + 2 * at, largest, row_ok)
            tl.store(lse_parts_ptr + 2 * at + 1, total, row_ok)
        else:
            tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN_2, row_ok)
    if (MODE == RECORD) | (MODE == REPLAY):
        layout = split * SEGMENTS, segment_length, lead
        sample_begin, sample_end = tl.full((), 0, tl.int64), num_samples
        if SPLIT:
            start_of_split = first - lead + split * SEGMENTS * segment_length
            sample_begin = samples_before(tl.maximum(start_of_split, first), schedule)
            sample_end = samples_before(tl.minimum(start_of_split + SEGMENTS * segment_length, first + m), schedule)
        whole = finish(
            segments_ptr, prefixes_ptr, records_ptr, at, row, row_ok, layout, schedule, sample_begin, sample_end,
            SEGMENTS, 2 * SEGMENTS, BLOCK_R,
        )  # fmt: skip
        if SPLIT:
            store_transition(split_segments_ptr, at, row_ok, whole)
        else:
            where = chain_ids_ptr, None, 0, m, draws
            states = state_key_ptr, state_score_ptr, labels_ptr, samples_ptr, out_key_ptr
            outputs = out_threshold_ptr, out_score_ptr, out_position_ptr
            emit(records_ptr, whole, row, row_ok, schedule, where, states, outputs, SWEEP, BLOCK_R)
