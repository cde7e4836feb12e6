"""Transitions inside Triton kernels: tuples (threshold, score, number), as ``emc2_kernels.transition``.

``number`` is that of a proposal within the shard, 0 .. K - 1; -1 in the identity. In memory a transition has four
words, the last of which means nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import INTERPRETED, scaled_exponential

LN_2_TIMES_32 = tl.constexpr(22.18070977791825)
WORDS = tl.constexpr(4)  # of a transition in memory
NEG_INF = tl.constexpr(float("-inf"))  # as a threshold, that of an identity step: nothing lies below it


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
        tl.full(SHAPE, NEG_INF, tl.float32),
        tl.full(SHAPE, NEG_INF, tl.float32),
        tl.full(SHAPE, -1, tl.int32),
    )


@triton.jit
def acceptance_threshold(score, word, BELOW_INF: tl.constexpr = False):
    """score + E, E = -log u of a random word. Where the score is not finite, something that nothing lies below.

    Of NaN that is NaN, which no maximum takes, and of -inf it is -inf. +inf needs an instruction: score * 0 is NaN
    there. BELOW_INF leaves it out, for a caller who looks for thresholds of +inf, and has nobody move to them.
    """
    threshold = tl.fma(scaled_exponential(word), LN_2_TIMES_32, score)
    if not BELOW_INF:
        threshold = tl.fma(score, 0.0, threshold)
    if INTERPRETED:  # whose maximum takes a NaN in Triton 3.6
        threshold = tl.where(threshold == threshold, threshold, NEG_INF)
    return threshold


@triton.jit
def load_transition(ptr, index, mask):
    """Entries ``index`` of an array of transitions; the identity where masked."""
    at = tl.expand_dims(ptr + WORDS * index, -1) + tl.arange(0, WORDS)
    entries = tl.load(at, tl.expand_dims(mask, -1), other=NEG_INF)
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
def load_state_score(score_ptr, rows, row_ok):
    """A chain's score as it enters; one that is NaN counts as not started."""
    score = tl.load(score_ptr + rows, row_ok, other=NEG_INF)
    return tl.where(score == score, score, NEG_INF)


class Scratch(NamedTuple):
    """Where the kernels of a walk leave transitions for each other."""

    splits_ptr: tl.tensor  # (n, splits)  of each program's proposals
    split_prefixes_ptr: tl.tensor  # (n, splits + 1)  of all splits before
    records_ptr: tl.tensor  # (n, num_samples)  at the sample points, from the segment's beginning
    segments_ptr: tl.tensor  # (n, splits, SEGMENTS)
    prefixes_ptr: tl.tensor  # (n, splits, SEGMENTS + 1)  of the split's segments before


@triton.jit
def scratch_layout(scratch_ptr, n, splits, num_samples, SEGMENTS: tl.constexpr):
    """One allocation for all, because each costs the host as much as the rest of a launch."""
    records = n * (2 * splits + 1)
    segments = records + n * num_samples
    return Scratch(
        scratch_ptr,
        scratch_ptr + WORDS * (n * splits),
        scratch_ptr + WORDS * records,
        scratch_ptr + WORDS * segments,
        scratch_ptr + WORDS * (segments + n * splits * SEGMENTS),
    )


def scratch_size(n: int, splits: int, num_samples: int, segments: int) -> int:
    """How many transitions ``scratch_layout`` has place for."""
    return n * (2 * splits + 1 + num_samples + splits * (2 * segments + 1))


def empty_scratch(like: Tensor, splits: int, num_samples: int, segments: int) -> Tensor:
    """Scratch for a walk of as many rows as ``like`` has, on its device."""
    size = WORDS.value * scratch_size(like.shape[0], splits, num_samples, segments)
    return torch.empty(size, dtype=torch.float32, device=like.device)


class Schedule(NamedTuple):
    """Which proposals of a walk a call sees, and after which of them samples are taken; scalars, int64."""

    first: tl.tensor  # of this call, in the whole walk
    count: tl.tensor  # of this call
    burn_in: tl.tensor
    kept: tl.tensor  # of the whole walk, those that are sampled: all after burn_in
    num_samples: tl.tensor


@triton.jit
def sample_count(proposal, schedule):
    """How many samples are taken after one of the proposals 0 .. proposal - 1 (``Schedule`` in csrc/params.h)."""
    return tl.maximum(proposal - schedule.burn_in, 0) * schedule.num_samples // tl.maximum(schedule.kept, 1)


@triton.jit
def sample_point(sample, schedule):
    """The proposal after which a sample is taken: burn_in + ceil((sample + 1) * kept / num_samples) - 1."""
    num_samples = schedule.num_samples
    return schedule.burn_in + ((sample + 1) * schedule.kept + num_samples - 1) // num_samples - 1
