"""contrastive_lse: the log of a contrastive loss's denominator, and its gradient, without an n x m array."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import checks, ops
from .autograd import functorch_active, no_double_backward
from .backends import NAMES
from .backends.params import ScoreParams
from .dispatch import LIBRARY, nothing_to_dispatch

NO_SECOND_DERIVATIVE = "contrastive_lse has no second derivative"


def contrastive_lse(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``log sum_j exp(<q_i, k_j> / temperature_i)`` over keys j, differentiable in queries, keys and temperature.

    Memory is O((n + m) d) forward and backward: scores are made by tiles, and again for the gradient.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100].
        query_ids: (n,) int64, ids of the rows; they need ``key_ids``.
        key_ids: (m,) int64. A key with the row's id is left out of its sum.
        backend: "auto" or a name from ``backends()``.

    Returns:
        (n,) float32, float64 for float64 operands. -inf, with gradient 0, for a row that has no keys. A score that is
        not finite is left out.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values in tensors are looked at on
            the CPU only.
        RuntimeError: the named backend cannot run here.
    """
    checks.operands(queries, keys)
    checks.one_of("backend", backend, NAMES)
    checks.temperature(temperature, queries.shape[0], queries.device)
    checks.ids(queries, keys, query_ids, key_ids)
    temperature = checks.one_or_rows(temperature, queries)
    # One operand with one set of ids: one gradient instead of two, and scores that are symmetric.
    symmetric = keys is queries and query_ids is key_ids
    return differentiable_lse(ScoreParams(queries, keys, temperature, query_ids, key_ids, symmetric), backend)


def differentiable_lse(scores: ScoreParams, backend: str) -> Tensor:
    """``contrastive_lse`` of arguments that have been checked."""
    if nothing_to_dispatch(scores):
        return _Eager.apply(*scores, backend)
    if functorch_active():
        return _Transformed.apply(*scores, backend)
    return ops.contrastive_lse.overload(*ops.contrastive_lse.flatten((scores, backend)))


@torch.no_grad()
def mean_similarity(lse: Tensor, scores: ScoreParams, backend: str) -> Tensor:
    """(n,) mean of <q_i, k_j> under the softmax that ``contrastive_lse`` has summed to ``lse``, detached; 0 for a row
    of no keys. Arguments have been checked.

    It is -temperature^2 times the derivative of ``lse`` in the temperature, and is made like one.
    """
    temperature = scores.temperature
    rows = temperature.detach() if isinstance(temperature, Tensor) else lse.new_full((), temperature).expand_as(lse)
    scores = scores._replace(queries=scores.queries.detach(), keys=scores.keys.detach(), temperature=rows)
    gradients = ops.contrastive_lse_backward(scores, torch.ones_like(lse), lse.detach(), False, backend)
    return -rows * (rows * gradients[2])  # the square alone could overflow


def keep_scores(ctx: FunctionCtx, scores: ScoreParams, backend: str, lse: Tensor, *others: Tensor) -> None:
    """For ``score_gradients``, between the two passes of an autograd Function. others: are saved behind."""
    ctx.numbers, ctx.backend = tuple(None if isinstance(value, Tensor) else value for value in scores), backend
    ctx.save_for_backward(lse, *(value if isinstance(value, Tensor) else None for value in scores), *others)


def score_gradients(
    ctx: FunctionCtx,
    saved: tuple[Tensor | None, ...],
    grad: Tensor,
    *beside: Tensor,
    no_second_derivative: str = NO_SECOND_DERIVATIVE,
) -> tuple[Tensor | None, ...]:
    """Of queries, keys and the rows' temperatures, for grad (n,) of the log-sum-exps that were kept. None: of keys that
    are the queries, or need none, and of a temperature that is a number.

    Args:
        saved: ``ctx.saved_tensors``, which torch.utils.checkpoint lets a backward pass ask for once.
        beside: gradients of what was saved behind the scores; they come back behind the scores'.
        no_second_derivative: the error of a derivative of any of them.
    """
    lse, *saved = saved
    saved, others = saved[: len(ctx.numbers)], saved[len(ctx.numbers) :]
    fields = (value if tensor is None else tensor.detach() for value, tensor in zip(ctx.numbers, saved, strict=True))
    scores, keys_wanted = ScoreParams(*fields), ctx.needs_input_grad[1]
    made = ops.contrastive_lse_backward(scores, grad.detach(), lse.detach(), keys_wanted, ctx.backend)
    sources = (grad, *saved[:3], *others)  # queries, keys and temperatures, and what was saved behind the scores
    d_queries, d_keys, d_rows, *beside = no_double_backward(no_second_derivative, *made, *beside, of=sources)
    per_row = isinstance(scores.temperature, Tensor)
    return d_queries, d_keys if keys_wanted and not scores.symmetric else None, d_rows if per_row else None, *beside


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    keep_scores(ctx, ScoreParams(*inputs[:-1]), inputs[-1], output)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of queries, keys and temperature; then None for each of the other inputs."""
    return *score_gradients(ctx, ctx.saved_tensors, grad), *[None] * (len(ScoreParams._fields) - 2)


class _Eager(torch.autograd.Function):
    """Where the dispatcher has nothing to do."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor | float | str | None) -> Tensor:
        output = ops.contrastive_lse.function(ScoreParams(*inputs[:-1]), inputs[-1])
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


class _Transformed(torch.autograd.Function):
    """The same for torch.func's transforms, which refuse an operator's registered gradient as well as a Function with
    one method for both parts; of two methods, torch takes 10 us more for each call."""

    @staticmethod
    def forward(*inputs: Tensor | float | str | None) -> Tensor:
        return ops.contrastive_lse.function(ScoreParams(*inputs[:-1]), inputs[-1])

    setup_context = staticmethod(_keep)
    backward = staticmethod(_gradients)


def _keep_of_operator(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    scores, backend = ops.contrastive_lse.unflatten(inputs)
    keep_scores(ctx, scores, backend, output)


def _gradients_of_operator(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_queries, d_keys, *rest = _gradients(ctx, grad)
    return d_queries, d_keys, None, *rest  # the temperature's number has none


torch.library.register_autograd(
    ops.contrastive_lse.name, _gradients_of_operator, setup_context=_keep_of_operator, lib=LIBRARY
)
