"""A walk as a value: what a block of Metropolis-Hastings proposals does to any chain that enters it.

One step moves the current score ``x`` to ``score`` where ``x < threshold``, and leaves it alone elsewhere. Such clamps
are closed under composition, so a walk is an associative scan and its blocks can be walked in any order, anywhere, and
composed afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .dispatch import operator


class MHState(NamedTuple):
    """Where n chains are. A chain that has not started has key -1 and score -inf.

    Attributes:
        key: (n,) int64, the label of the chain's current key; -1: not started.
        score: (n,) float32, its score when last seen: similarity / temperature - log g; -inf: not started.
    """

    key: Tensor
    score: Tensor


class MHResult(NamedTuple):
    """What a walk of n chains returns.

    Attributes:
        samples: (n, num_samples) int32, positions in ``keys``; -1: still at the incoming state.
        state: after the last proposal.
        num_accepted: (n,) int32, accepted proposals, with return_accepts=True; else None.
        threshold: (n,) float32. Every incoming score below it leads to the same outcome.
        lse: (n,) float32, log-sum-exp of similarity / temperature over the keys that are not excluded, with
            return_lse=True; else None.
    """

    samples: Tensor
    state: MHState
    num_accepted: Tensor | None
    threshold: Tensor
    lse: Tensor | None


class ISIRResult(NamedTuple):
    """What a step of iterated sampling importance resampling of n chains returns.

    Attributes:
        position: (n,) int64, of the next state in ``keys``; -1: it stayed, or there was no candidate.
        state: where the chains are now.
        lse: (n,) float32, log-sum-exp over the candidates, differentiable; -inf: there were none.
        carried_weight: (n,) float32, share of the incoming state in its exponential; 0: it had not started.
    """

    position: Tensor
    state: MHState
    lse: Tensor
    carried_weight: Tensor


class Transition(NamedTuple):
    """Prefixes of a walk at its sample points, (n, R); the last is the whole walk. Identity: (-inf, -inf, -1).

    Each is the clamp ``x -> score if x < threshold else x`` of a chain's score.

    Attributes:
        threshold: (n, R) float32, at least ``score``.
        score: (n, R) float32, where a chain ends that enters below the threshold.
        position: (n, R) int64 of the key that has this score; -1 in the identity.
    """

    threshold: Tensor
    score: Tensor
    position: Tensor


def init_state(n: int, device: torch.device | str | None = None) -> MHState:
    """n chains that have not started: key -1, score -inf.

    Args:
        n: number of chains, at least 0.
        device: of the tensors; None: torch's default.

    Raises:
        ValueError, TypeError: ``n`` is negative or not an integer.
    """
    checks.at_least("n", n, 0)
    key = torch.full((n,), -1, dtype=torch.int64, device=device)
    return MHState(key, torch.full((n,), -torch.inf, dtype=torch.float32, device=key.device))


def compose(first: Transition, then: Transition) -> Transition:
    """The transition of two blocks walked one after the other. Associative, not commutative.

    If ``then.threshold`` is the larger, every x below it ends in ``then.score``, because ``first.score <=
    first.threshold``; otherwise a moved x ends in whichever of the two scores ``first.score < then.threshold`` selects.

    Args:
        first: the earlier block, fields (n, R) or (n, 1). One column broadcasts: the whole of an earlier block against
            the prefixes of a later one.
        then: the later block, likewise.

    Returns:
        Fields (n, R).

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """
    first = Transition(*checks.transition("first", first))
    then = Transition(*checks.transition("then", then))
    (n, columns), (rows, others) = first.threshold.shape, then.threshold.shape
    if rows != n or (columns != others and 1 not in (columns, others)):
        expected = f"shape ({n}, {columns}), or one column where it broadcasts"
        raise ValueError(f"then must have {expected}, got {(rows, others)}")
    if (first.score.device, first.score.dtype) != (then.score.device, then.score.dtype):
        expected = f"{first.score.dtype} on {first.score.device}, as first is"
        raise ValueError(f"then must be {expected}, got {checks.describe(then.score)}")
    moves = first.score < then.threshold
    return Transition(
        torch.maximum(first.threshold, then.threshold),
        torch.where(moves, then.score, first.score),
        torch.where(moves, then.position, first.position),
    )


def _check_label_at(position: Tensor, key_labels: Tensor) -> None:
    checks.vector("transition.position", position, None, torch.int64, key_labels.device)
    checks.vector("key_labels", key_labels, None, torch.int64, key_labels.device)


@operator("Tensor", check=_check_label_at, fake=lambda position, _: torch.empty_like(position))
def label_at(position: Tensor, key_labels: Tensor) -> Tensor:
    """(n,) int64 labels at positions (n,), 0 .. m - 1; where a position is -1 the label means nothing."""
    named = "transition.position, a position in key_labels,"
    position = checks.within(named, position, -1, key_labels.shape[0], on_gpu=True)
    return key_labels[position.clamp_min(0)] if key_labels.numel() else position.clone()


def apply(transition: Transition, state: MHState, key_labels: Tensor | None = None) -> MHResult:
    """Let chains enter a walk: ``mh_step`` is ``apply(mh_transition(...), state, key_labels)``.

    Args:
        transition: fields (n, R).
        state: n chains; a score that is NaN counts as not started.
        key_labels: (m,) int64, what ``state.key`` holds for a position; default: the position. For a walk composed from
            shards of a sweep these are the labels of all its keys, in their order.

    Returns:
        Samples (n, R) int32, the state after the whole walk, and its threshold; no counts and no log-sum-exp.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """
    transition = Transition(*checks.transition("transition", transition))
    state = MHState(*checks.state(state, transition.threshold))
    started = state.score > -torch.inf
    score = torch.where(started, state.score, -torch.inf)
    moved = score[:, None] < transition.threshold
    samples = torch.where(moved, transition.position, -1).to(torch.int32)
    moves, position = moved[:, -1], transition.position[:, -1]
    label = position
    if key_labels is not None:
        checks.vector("key_labels", key_labels, None, torch.int64, position.device)
        label = label_at(position, key_labels)
    after = MHState(
        torch.where(moves, label, torch.where(started, state.key, -1)),
        torch.where(moves, transition.score[:, -1], score),
    )
    return MHResult(samples, after, None, transition.threshold[:, -1].clone(), None)
