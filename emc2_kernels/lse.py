"""contrastive_lse: the log of a contrastive loss's denominator, and its gradient, without an n x m array."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import checks
from .autograd import functorch_active, no_double_backward
from .backends import NAMES, resolve
from .backends.params import ScoreParams
from .ops import LIBRARY, nothing_to_dispatch, registered

_SCORES = "Tensor queries, Tensor? keys, float temperature, Tensor? temperatures, Tensor? query_ids, Tensor? key_ids"
LIBRARY.define(f"contrastive_lse({_SCORES}, str backend) -> Tensor")
LIBRARY.define(
    f"contrastive_lse_backward({_SCORES}, Tensor grad, Tensor lse, str backend)"
    " -> (Tensor queries, Tensor keys, Tensor temperatures)"
)


def contrastive_lse(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log sum over keys of exp(<q_i, k_j> / temperature_i), differentiable in queries, keys and temperature.

    Memory is O((n + m) d) forward and backward: scores are made by tiles, and again for the gradient.

    Args:
        queries: (n, d) float32, bfloat16 or float16 (float64 on the reference backend), unit last stride.
        keys: (m, d), dtype and device of ``queries``, m < 2^31.
        temperature: number, 0-d tensor or (n,) tensor, in [2^-120, 2^100].
        query_ids, key_ids: (n,) and (m,) int64. A key with the row's id is left out of its sum.
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
    n = queries.shape[0]
    checks.temperature(temperature, n, queries.device)
    checks.ids(queries, keys, query_ids, key_ids)
    number, temperatures = checks.number_or_rows(temperature, queries)
    if keys is queries and query_ids is key_ids:  # one gradient instead of two, and scores that are symmetric
        keys = None
    arguments = queries, keys, number, temperatures, query_ids, key_ids, backend
    if nothing_to_dispatch(arguments):
        call = _Eager.apply
    elif functorch_active():
        call = _Transformed.apply
    else:
        call = torch.ops.emc2_kernels.contrastive_lse.default
    return call(*arguments)


def mean_similarity(
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(n,) mean of <q_i, k_j> under the softmax that ``contrastive_lse`` has summed, detached; 0 for a row of no keys.

    It is -temperature^2 times the derivative of ``lse`` in the temperature, and is made like one.
    """
    with torch.no_grad():
        like = temperature if isinstance(temperature, Tensor) else lse.new_full((), temperature)
        number, temperatures = checks.number_or_rows(like.detach(), queries)
        operands = queries.detach(), None if keys is queries and query_ids is key_ids else keys.detach()
        ones, lse = torch.ones_like(lse), lse.detach()
        gradients = lse_gradients(*operands, number, temperatures, query_ids, key_ids, ones, lse, backend)
        return -temperatures * (temperatures * gradients[2])  # the square alone could overflow


def _scores(queries, keys, temperature, temperatures, query_ids, key_ids) -> ScoreParams:
    """Of an operator's arguments. Without keys the queries are the keys, with their ids."""
    temperature = temperature if temperatures is None else temperatures
    if keys is None:
        return ScoreParams.among(queries, temperature, query_ids)
    return ScoreParams(queries, keys, temperature, query_ids, key_ids)


def _forward(*arguments):
    *scores, backend = arguments
    return resolve(backend, scores[0], op="lse").contrastive_lse(_scores(*scores))


def _backward(*arguments):
    *scores, grad, lse, backend = arguments
    return resolve(backend, scores[0], op="lse").contrastive_lse_backward(grad, lse, _scores(*scores))


def _check(queries, keys, temperature, temperatures, query_ids, key_ids, *_):
    keys, key_ids = (queries, query_ids) if keys is None else (keys, key_ids)
    checks.operands(queries, keys)
    checks.row_temperatures(temperature if temperatures is None else temperatures, queries)
    if temperatures is not None:  # what a graph that was traced could not see
        checks.temperature(temperatures, queries.shape[0], queries.device)
    checks.ids(queries, keys, query_ids, key_ids)


# For calls that torch need not differentiate: the operators' arguments, checked already.
lse_values = registered("contrastive_lse", _forward, _check, differentiable=True)
lse_gradients = registered("contrastive_lse_backward", _backward, _check)


def _score_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


@torch.library.register_fake("emc2_kernels::contrastive_lse", lib=LIBRARY)
def _forward_fake(queries, *_):
    return queries.new_empty(queries.shape[0], dtype=_score_dtype(queries))


@torch.library.register_fake("emc2_kernels::contrastive_lse_backward", lib=LIBRARY)
def _backward_fake(queries, keys, temperature, temperatures, *_):
    d_temperatures = queries.new_empty(0 if temperatures is None else queries.shape[0], dtype=_score_dtype(queries))
    d_keys = queries.new_empty(0 if keys is None else keys.shape)
    return queries.new_empty(queries.shape), d_keys, d_temperatures


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    queries, keys, ctx.temperature, temperatures, query_ids, key_ids, ctx.backend = inputs
    ctx.save_for_backward(output, queries, keys, temperatures, query_ids, key_ids)


NO_SECOND_DERIVATIVE = "contrastive_lse has no second derivative"


def _differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple:
    lse, *operands = ctx.saved_tensors
    queries, keys, temperatures, query_ids, key_ids = (x if x is None else x.detach() for x in operands)
    sources = (grad, *operands[:3])
    d_queries, d_keys, d_temperatures = lse_gradients(
        queries, keys, ctx.temperature, temperatures, query_ids, key_ids, grad.detach(), lse.detach(), ctx.backend
    )
    d_queries, d_keys, d_temperatures = no_double_backward(
        NO_SECOND_DERIVATIVE, d_queries, d_keys, d_temperatures, of=sources
    )
    d_keys, d_temperatures = None if keys is None else d_keys, None if temperatures is None else d_temperatures
    return d_queries, d_keys, None, d_temperatures, None, None, None


torch.library.register_autograd("emc2_kernels::contrastive_lse", _differentiate, setup_context=_keep, lib=LIBRARY)


class _Eager(torch.autograd.Function):
    """The same, where the dispatcher has nothing to do."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor | float | str | None) -> Tensor:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


class _Transformed(torch.autograd.Function):
    """The same for torch.func's transforms, which refuse an operator's registered gradient as well as a Function with
    one method for both parts; of two methods, torch takes 10 us more for each call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)
