"""isir_step: a chain's next state drawn from the softmax over all keys and its present one, and that softmax's
log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import checks, ops
from .autograd import functorch_active
from .backends import NAMES
from .backends.params import CarriedParams, ScoreParams
from .dispatch import LIBRARY, nothing_to_dispatch
from .lse import keep_scores, score_gradients
from .transition import ISIRResult, MHState

NO_SECOND_DERIVATIVE = "isir_step has no second derivative"


def isir_step(
    queries: Tensor,
    keys: Tensor,
    state: MHState,
    *,
    temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    chain_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_labels: Tensor | None = None,
    carried_ids: Tensor | None = None,
    log_proposal: Tensor | None = None,
    backend: str = "auto",
) -> ISIRResult:
    """One step of n chains of iterated sampling importance resampling (i-SIR: Andrieu, Lee, Vihola 2018; as an estimate
    of a mean: BR-SNIS, arXiv 2207.06364), scores included and none of them kept.

    Chain i has the target ``p_i(j) ~ exp(<q_i, k_j> / temperature)`` over the data set that the keys are from. Its
    candidates are the keys that are not excluded for it and its present state; the next state is drawn from their
    softmax. When the chain follows its target, the softmax's mean of any function is unbiased for the target's, and the
    mean over candidates of exp(score), inverted, for N over the partition function. ``lse`` with the positive's score
    taken off is a contrastive loss with that gradient.

    Exact for a batch drawn without replacement from a finite data set, if the state stands for the keys of its own item
    (``carried_ids``); and for keys that are independent draws of log-probability ``log_proposal``.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        state: where the chains are: keys (n,) int64 and scores (n,) float32, as they are now: similarity / temperature
            - log g, rescored by the caller. A score that is not finite has not started, and is no candidate.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100].
        seed: integer or 0-d int64 tensor, 0 <= seed < 2^64.
        step: integer or 0-d int64 tensor, 0 <= step < 2^32, another one for each call.
        chain_ids: (n,) int64 in [0, 2^40), name the random streams; default: ``query_ids``, else the row number.
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is no candidate of it (the positive, itself).
        key_labels: (m,) int64, what ``state.key`` holds; default: ``key_ids``, else the position in ``keys``.
        carried_ids: (n,) int64. A key with this id is no candidate either: the incoming state stands for it.
        log_proposal: (m,) float32: log g_j up to a constant, where the keys were not drawn uniformly but from g. +inf:
            the key is no candidate of any row.
        backend: "auto" or a name from ``backends()``.

    Returns:
        The chains afterwards, and ``lse``, which is differentiable in queries, keys, ``state.score`` and temperature;
        nothing else is. Where a row has no candidate: position -1, a state that has not started, lse -inf with gradient
        0.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values in tensors are looked at on
            the CPU only.
        RuntimeError: the named backend cannot run here.
    """
    checks.operands(queries, keys)
    checks.one_of("backend", backend, NAMES)
    (n, _), m, device = queries.shape, keys.shape[0], queries.device
    checks.temperature(temperature, n, device, operator_looks=True)
    seed, step = checks.counter("seed", seed, 64, device), checks.counter("step", step, 32, device)
    chain_ids = checks.chain_ids(queries, keys, chain_ids, query_ids, key_ids, carried_ids)
    key, score = checks.state(state, queries)
    for name, value, dtype in (("key_labels", key_labels, torch.int64), ("log_proposal", log_proposal, torch.float32)):
        if value is not None:
            checks.vector(name, value, m, dtype, device)
    if log_proposal is not None:
        log_proposal = log_proposal.detach()
    scores = ScoreParams(
        queries, keys, checks.one_or_rows(temperature, queries), query_ids, key_ids,
        keys is queries and query_ids is key_ids, carried_ids, log_proposal,
    )  # fmt: skip
    labels = key_ids if key_labels is None else key_labels
    score = score.to(torch.float64 if queries.dtype == torch.float64 else torch.float32)
    carried = CarriedParams(key[:, None], score[:, None], labels, chain_ids, seed, step, 0)
    position, key, score_after, lse, _ = differentiable_step(scores, carried, backend)
    weight = carried_weights(carried.score.detach(), lse.detach())[:, 0]
    return ISIRResult(position.clamp_min(-1), MHState(key, score_after), lse, weight)


class Drawn(NamedTuple):
    """What ``ops.isir_step`` returns, of some of the candidates: those of several calls combine in any order."""

    position: Tensor
    key: Tensor
    score: Tensor
    lse: Tensor
    value: Tensor

    def or_better(self, other: Drawn) -> Drawn:
        """Of these candidates and others; of equal values the lowest position's, as in one pass over all."""
        wins = (other.value > self.value) | ((other.value == self.value) & (other.position < self.position))
        drawn = (torch.where(wins, theirs, ours) for ours, theirs in zip(self[:3], other[:3], strict=True))
        lse, value = torch.logaddexp(self.lse, other.lse), torch.maximum(self.value, other.value)
        return Drawn(*drawn, lse, value)


def carried_weights(score: Tensor, lse: Tensor) -> Tensor:
    """(n, C) shares of a chain's own candidates, of scores (n, C), in the exponential of lse (n,)."""
    # NaN where neither is there, or the score is NaN; infinite where the score is, which is no candidate either.
    return (score - lse[:, None]).exp().nan_to_num_(0.0, 0.0, 0.0)


def differentiable_step(
    scores: ScoreParams, carried: CarriedParams, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ops.isir_step`` of arguments that have been checked; ``lse`` is differentiable in queries, keys, temperatures
    and the scores that the chains bring along."""
    if nothing_to_dispatch((scores, carried)):
        return _Eager.apply(*scores, *carried, backend)
    if functorch_active():
        return _Transformed.apply(*scores, *carried, backend)
    return ops.isir_step.overload(*ops.isir_step.flatten((scores, carried, backend)))


_FIELDS = len(ScoreParams._fields)


def _arguments(inputs: tuple) -> tuple[ScoreParams, CarriedParams, str]:
    return ScoreParams(*inputs[:_FIELDS]), CarriedParams(*inputs[_FIELDS:-1]), inputs[-1]


def _run(*inputs: Tensor | float | str | None) -> tuple[Tensor, ...]:
    return ops.isir_step.function(*_arguments(inputs))


def _keep(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    scores, carried, backend = _arguments(inputs)
    position, key, score, lse, value = output
    ctx.mark_non_differentiable(position, key, score, value)
    keep_scores(ctx, scores, backend, lse, carried.score)


def _gradients(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Of queries, keys, temperature, and the scores carried; None for each of the other inputs."""
    grad, saved = grads[3], ctx.saved_tensors
    lse, *_, score = saved
    d_carried = grad.detach()[:, None] * carried_weights(score.detach(), lse.detach())
    *of_scores, d_carried = score_gradients(ctx, saved, grad, d_carried, no_second_derivative=NO_SECOND_DERIVATIVE)
    return *of_scores, *[None] * (_FIELDS - 3), None, d_carried, *[None] * 6


class _Eager(torch.autograd.Function):
    """Where the dispatcher has nothing to do."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor | float | str | None) -> tuple[Tensor, ...]:
        output = _run(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


class _Transformed(torch.autograd.Function):
    """The same for torch.func's transforms; see lse.py."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_gradients)


def _keep_of_operator(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    scores, carried, backend = ops.isir_step.unflatten(inputs)
    _keep(ctx, (*scores, *carried, backend), output)


def _gradients_of_operator(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    made = dict(zip((*ScoreParams._fields, *CarriedParams._fields, "backend"), _gradients(ctx, *grads), strict=True))
    flat: list[Tensor | None] = []
    for argument in ops.isir_step.arguments:
        for field in argument.fields or (argument,):
            both = field.number is not None  # a number has no gradient, the tensor beside it may have
            flat += [None, made[field.name]] if both else [made[field.name]]
    return tuple(flat)


torch.library.register_autograd(
    ops.isir_step.name, _gradients_of_operator, setup_context=_keep_of_operator, lib=LIBRARY
)
