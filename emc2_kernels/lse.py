"""contrastive_lse: the log of a contrastive loss's denominator, and its gradient, without an n x m array."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import checks
from .backends import NAMES, resolve
from .backends.scores import Scores
from .ops import LIBRARY

_SCORES = (
    "Tensor queries, Tensor keys, float temperature, Tensor? temperatures, Tensor? query_ids, Tensor? key_ids, "
    "str backend"
)
LIBRARY.define(f"contrastive_lse({_SCORES}) -> Tensor")
LIBRARY.define(
    f"contrastive_lse_backward(Tensor grad, Tensor lse, {_SCORES})"
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
        temperature: number, 0-d tensor or (n,) tensor, > 0.
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
    return torch.ops.emc2_kernels.contrastive_lse(queries, keys, number, temperatures, query_ids, key_ids, backend)


def _scores(queries, keys, temperature, temperatures, query_ids, key_ids) -> Scores:
    return Scores(queries, keys, temperature if temperatures is None else temperatures, query_ids, key_ids)


def _forward(*arguments):
    *scores, backend = arguments
    return resolve(backend, scores[0], op="lse").contrastive_lse(_scores(*scores))


def _backward(grad, lse, *arguments):
    *scores, backend = arguments
    return resolve(backend, scores[0], op="lse").contrastive_lse_backward(grad, lse, _scores(*scores))


LIBRARY.impl("contrastive_lse", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("contrastive_lse_backward", _backward, "CompositeExplicitAutograd")


def _score_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


@torch.library.register_fake("emc2_kernels::contrastive_lse", lib=LIBRARY)
def _forward_fake(queries, *_):
    return queries.new_empty(queries.shape[0], dtype=_score_dtype(queries))


@torch.library.register_fake("emc2_kernels::contrastive_lse_backward", lib=LIBRARY)
def _backward_fake(grad, lse, queries, keys, *_):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), torch.empty_like(lse)


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    queries, keys, ctx.temperature, temperatures, query_ids, key_ids, ctx.backend = inputs
    ctx.save_for_backward(output, queries, keys, temperatures, query_ids, key_ids)


def _differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple:
    lse, queries, keys, temperatures, query_ids, key_ids = ctx.saved_tensors
    gradients = torch.ops.emc2_kernels.contrastive_lse_backward(
        grad, lse, queries, keys, ctx.temperature, temperatures, query_ids, key_ids, ctx.backend
    )
    d_temperatures = None if temperatures is None else gradients[2]
    return gradients[0], gradients[1], None, d_temperatures, None, None, None


torch.library.register_autograd("emc2_kernels::contrastive_lse", _differentiate, setup_context=_keep, lib=LIBRARY)
