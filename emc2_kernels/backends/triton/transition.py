"""Transitions inside Triton kernels: tuples (threshold, score, number), as ``emc2_kernels.transition``.

``number`` is that of a proposal within the shard, 0 .. K - 1; -1 in the identity. In memory a transition has four
words, the last of which means nothing. A schedule is the tuple (first, count, burn_in, kept, num_samples): proposals
first .. first + count - 1 of a walk whose last ``kept`` proposals are sampled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import INTERPRETED, log2_uniform

MINUS_LN_2 = tl.constexpr(-0.6931471805599453)
WORDS = tl.constexpr(4)  # of a transition in memory
NEVER = tl.constexpr(float("-inf"))  # the threshold of an identity step: nothing lies below it


@triton.jit
def compose_fields(threshold, score, number, then_threshold, then_score, then_number):
    """First one block, then the other; associative, not commutative.

    For ``tl.associative_scan`` only: ``tl.reduce`` takes its operands in any order on a GPU, though not in the
    interpreter.
    """
    moves = score < then_threshold
    return (
        tl.maximum(threshold, then_threshold),
        tl.where(moves, then_score, score),
        tl.where(moves, then_number, number),
    )


@triton.jit
def compose(first, then):
    return compose_fields(first[0], first[1], first[2], then[0], then[1], then[2])


@triton.jit
def identity(SHAPE: tl.constexpr):
    return (
        tl.full(SHAPE, NEVER, tl.float32),
        tl.full(SHAPE, NEVER, tl.float32),
        tl.full(SHAPE, -1, tl.int32),
    )


@triton.jit
def threshold_of(score, word):
    """score + E, E = -log u of a random word. Where the score is not finite, something that nothing lies below: NaN.

    score * 0 is NaN there, and no maximum takes a NaN: one instruction, where a comparison and a selection are three.
    """
    threshold = tl.fma(score, 0.0, tl.fma(log2_uniform(word), MINUS_LN_2, score))
    if INTERPRETED:  # whose maximum takes a NaN in Triton 3.6
        threshold = tl.where(threshold == threshold, threshold, NEVER)
    return threshold


@triton.jit
def load_transition(ptr, index, mask):
    """Entries ``index`` of an array of transitions; the identity where masked."""
    at = tl.expand_dims(ptr + WORDS * index, -1) + tl.arange(0, WORDS)
    entries = tl.load(at, tl.expand_dims(mask, -1), other=NEVER)
    threshold_number, score_number = tl.split(tl.reshape(entries, index.shape + [2, 2]))
    threshold, number = tl.split(threshold_number)
    score, _number = tl.split(score_number)
    return threshold, score, tl.where(mask, number.to(tl.int32, bitcast=True), -1)


@triton.jit
def store_transition(ptr, index, mask, transition):
    """All by one store of 16 bytes, the number twice: the compiler takes long over each store, and so does memory."""
    threshold, score, number = transition
    number = number.to(tl.float32, bitcast=True)
    entries = tl.join(tl.join(threshold, number), tl.join(score, number))
    at = tl.expand_dims(ptr + WORDS * index, -1) + tl.arange(0, WORDS)
    tl.store(at, tl.reshape(entries, index.shape + [WORDS]), tl.expand_dims(mask, -1))


@triton.jit
def rooms(scratch_ptr, n, splits, num_samples, SEGMENTS: tl.constexpr):
    """Where a walk keeps transitions between its steps: (splits, their prefixes, records, segments, their prefixes).

    Of n rows each: ``splits`` transitions, splits + 1 prefixes, ``num_samples`` records, and for each split SEGMENTS
    transitions and SEGMENTS + 1 prefixes. One allocation, because each costs the host as much as the rest of a launch.
    """
    records = n * (2 * splits + 1)
    segments = records + n * num_samples
    return (
        scratch_ptr,
        scratch_ptr + WORDS * (n * splits),
        scratch_ptr + WORDS * records,
        scratch_ptr + WORDS * segments,
        scratch_ptr + WORDS * (segments + n * splits * SEGMENTS),
    )


def room_for(n: int, splits: int, num_samples: int, segments: int) -> int:
    """How many transitions ``rooms`` has place for."""
    return n * (2 * splits + 1 + num_samples + splits * (2 * segments + 1))


@triton.jit
def incoming_score(score_ptr, rows, row_ok):
    """A chain's score as it enters; one that is NaN counts as not started."""
    score = tl.load(score_ptr + rows, row_ok, other=NEVER)
    return tl.where(score == score, score, NEVER)


@triton.jit
def samples_before(proposal, schedule):
    """How many samples are taken after one of the proposals 0 .. proposal - 1 (``Schedule`` in csrc/mh_params.h)."""
    _first, _count, burn_in, kept, num_samples = schedule
    return tl.maximum(proposal - burn_in, 0) * num_samples // tl.maximum(kept, 1)


@triton.jit
def sample_point(sample, schedule):
    """The proposal after which a sample is taken: burn_in + ceil((sample + 1) * kept / num_samples) - 1."""
    _first, _count, burn_in, kept, num_samples = schedule
    return burn_in + ((sample + 1) * kept + num_samples - 1) // num_samples - 1
