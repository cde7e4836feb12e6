"""The sweep: scores, draws and walk of a block of rows over all keys in one program; nothing of size n x m is stored.

A product of BLOCK_M rows and 128 keys leaves the matrix unit with two neighbouring columns of every eight in one
thread. So the key rows are loaded permuted: column 8 g + s of the t-th product holds step 16 t + g of segment s, and
each of the eight segments is a run of consecutive keys that one thread walks in its registers, from the first tile to
the last. The operator makes that right: a segment is walked from the identity, whatever comes before it, and the eight
are composed once, at the end (finish.py). Further segments are further programs, where rows are too few to fill the
GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import LN_2, emit, finish, log_sum_exp
from .launch import NUMBERS
from .philox import ACCEPTANCE, chain_words, seed_words, step_word, words, zeros_like
from .positions import SWEEP, chain_of, temperature_of
from .scores import LOG2_E, SEGMENTS, STEPS, TILE, load_rows, multiply, sixteen_steps
from .walk import (
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

FAR = tl.constexpr(1 << 61)  # the next sample point where none is left


@triton.jit
def _next_sample(due, upcoming, schedule):
    """Moves the segments that are ``due`` on to their next sample: its number, its step, and how far ceil() rounded."""
    sample, at, rounded = upcoming
    _first, _count, _burn_in, kept, num_samples = schedule
    less = rounded - kept % num_samples
    wraps = less < 0
    sample = tl.where(due, sample + 1, sample)
    at = tl.where(due, at + kept // num_samples + wraps.to(tl.int64), at)
    at = tl.where(sample < num_samples, at, FAR)
    return sample, at, tl.where(due, tl.where(wraps, less + num_samples, less), rounded)


@triton.jit
def _first_sample(proposal, schedule):
    """First sample at or after a proposal of the whole walk: its number, how many proposals on, what was rounded."""
    _first, _count, burn_in, kept, num_samples = schedule
    sample = samples_before(tl.maximum(proposal, 0), schedule)
    point = sample_point(sample, schedule)
    rounded = (point + 1 - burn_in) * num_samples - (sample + 1) * kept
    return sample, tl.where(sample < num_samples, point - proposal, FAR), rounded


@triton.jit
def _soonest_after(tile, start, schedule):
    """The first step behind a tile that is a sample point of any segment; ``start`` is where the segments start."""
    step = (tile + 1) * STEPS
    return step + tl.min(_first_sample(start + step, schedule)[1])


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
    walk, sums, products, step, columns, rows, draws, ids, log_proposal_ptr, records_ptr, schedule,
    RECORD: tl.constexpr, COUNT: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Sixteen steps of eight segments, from ``step`` on; the walk and the sums after them.

    columns: (first key, first block of draws, first step, last step + 1) of the segments, (8,) each. rows: (row number,
    whether it exists, 1 / temperature, two words of the chain), (BLOCK_M,) each. RECORD: store what each sample point
    among them leaves; a tile that holds one is walked twice, so that the others carry nothing of that.
    COUNT: the walk started from the chain's own state, so that a step that moves it is an accepted proposal.
    """
    first_key, first_block, begin, end = columns
    row, row_ok, inverse_temperature, chain_low, tag = rows
    random_step, key_0, key_1 = draws
    query_id, key_ids_ptr = ids
    groups = sixteen_steps(products)
    if RECORD:
        upcoming = _first_sample(schedule[0] + first_key + step, schedule)
    for group in tl.static_range(4):
        block = first_block + (step // 4 + group)
        zeros = zeros_like(groups[group][0])
        drawn = words(block[None, :], chain_low[:, None], tag[:, None], random_step, key_0, key_1, zeros)
        for i in tl.static_range(4):
            number = step + (4 * group + i)
            there = (number >= begin) & (number < end)
            similarity = tl.fma(groups[group][i], inverse_temperature[:, None], tl.where(there, 0.0, NEVER)[None, :])
            score = similarity
            if log_proposal_ptr is not None:
                score -= tl.load(log_proposal_ptr + first_key + number, there, other=0.0)[None, :]
            threshold = threshold_of(score, drawn[i])
            if key_ids_ptr is not None:
                excluded = tl.load(key_ids_ptr + first_key + number, there, other=0)[None, :] == query_id[:, None]
                threshold = tl.where(excluded, NEVER, threshold)
                similarity = tl.where(excluded, NEVER, similarity)
            if COUNT:
                walk = compose(walk, (threshold, score, walk[2] + 1))
            else:
                walk = compose(walk, (threshold, score, number))
            if LSE:
                sums = _add_to_sums(sums, similarity)
            if RECORD:
                sample, at, _rounded = upcoming
                due = at == 4 * group + i
                to = row[:, None] * schedule[4] + sample[None, :]
                store_transition(records_ptr, to, row_ok[:, None] & due[None, :], _in_shard(walk, first_key))
                upcoming = _next_sample(due, upcoming, schedule)
    return walk, sums


@triton.jit
def _in_shard(walk, first_key):
    """A walk's transitions with the proposal's number in the shard instead of the segment."""
    threshold, score, number = walk
    return threshold, score, tl.where(number >= 0, number + first_key.to(tl.int32)[None, :], -1)


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
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over segments 8 z .. 8 z + 7 of ``segment_length`` keys.

    Without SPLIT it writes the results itself. With COUNT it counts accepted proposals, in a second launch that knows
    the state in which the chains enter each segment.
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
    soonest = _soonest_after(-1, first + first_key, schedule)
    ids = query_id, key_ids_ptr
    if COUNT:
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
    for tile in range(0, (segment_length // STEPS).to(tl.int32)):
        key = key_of_column + tile * STEPS
        products = multiply(
            queries, queries_ptr, keys_ptr, row, row_ok, key, (key >= 0) & (key < m), (stride_query, stride_key), d,
            BLOCK_D, WHOLE_D, EVEN_D, PRECISION,
        )  # fmt: skip
        if not COUNT:  # noqa: SIM102  known to the compiler, as the next is not
            if soonest < (tile + 1) * STEPS:
                sample, ahead, _rounded = _first_sample(first + first_key + tile * STEPS, schedule)
                to = row[:, None] * num_samples + sample[None, :]
                store_transition(records_ptr, to, row_ok[:, None] & (ahead < STEPS)[None, :], walk)
                soonest = _soonest_after(tile, first + first_key, schedule)
        walk, sums = _walk_tile(
            walk, sums, products, tile * STEPS, columns, rows, draws, ids, log_proposal_ptr, records_ptr, schedule,
            False, COUNT, LSE,
        )  # fmt: skip

    at = row * splits + split
    if COUNT:
        tl.atomic_add(accepted_ptr + row, tl.sum(walk[2], 1), row_ok)
    else:
        segment_at = at[:, None] * SEGMENTS + tl.arange(0, SEGMENTS)[None, :]
        store_transition(segments_ptr, segment_at, row_ok[:, None], _in_shard(walk, first_key))
        # Sample points: their tiles are walked once more, from what the first walk left in their place, so that it
        # carries nothing of this.
        soonest = _soonest_after(-1, first + first_key, schedule)
        while soonest < segment_length:
            again = soonest // STEPS
            sample, ahead, _rounded = _first_sample(first + first_key + again * STEPS, schedule)
            to = row[:, None] * num_samples + sample[None, :]
            tl.debug_barrier()
            before = load_transition(records_ptr, to, row_ok[:, None] & (ahead < STEPS)[None, :])
            tl.debug_barrier()
            key_again = key_of_column + again * STEPS
            products_again = multiply(
                queries, queries_ptr, keys_ptr, row, row_ok, key_again, (key_again >= 0) & (key_again < m),
                (stride_query, stride_key), d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION,
            )  # fmt: skip
            _walk_tile(
                before, sums, products_again, (again * STEPS).to(tl.int32), columns, rows, draws, ids, log_proposal_ptr,
                records_ptr, schedule, True, False, False,
            )  # fmt: skip
            soonest = _soonest_after(again, first + first_key, schedule)
        layout = split * SEGMENTS, segment_length, lead
        sample_begin, sample_end = tl.full((), 0, tl.int64), num_samples
        if SPLIT:
            start = first - lead + split * SEGMENTS * segment_length
            sample_begin = samples_before(tl.maximum(start, first), schedule)
            sample_end = samples_before(tl.minimum(start + SEGMENTS * segment_length, first + m), schedule)
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
        if LSE:
            largest, total = log_sum_exp(sums[0], sums[1])
            if SPLIT:
                tl.store(lse_parts_ptr + 2 * at, largest, row_ok)
                tl.store(lse_parts_ptr + 2 * at + 1, total, row_ok)
            else:
                tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN_2, row_ok)
