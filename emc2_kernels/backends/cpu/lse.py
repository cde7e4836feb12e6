"""Row-wise log-sum-exp of scores and its gradient on the CPU: the compiled core, scores included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernel_calls import contiguous_scores, operands, score_fields
from ..params import ScoreParams
from .build import library


def _run(call: Callable[[Any, Any], None], params: Any, scores: ScoreParams) -> None:
    try:
        call(params, operands(library(), scores.queries, scores.keys))
    except ValueError:  # the core has refused a value
        scores.check_values()  # says which, and where it is
        raise


def contrastive_lse(scores: ScoreParams) -> Tensor:
    """(n,) float32; see ``reference_lse``."""
    core, scores = library(), contiguous_scores(scores)
    lse = torch.empty(scores.queries.shape[0], dtype=torch.float32, device="cpu")
    params = core.LseParams(**score_fields(scores), lse=lse.data_ptr(), num_threads=torch.get_num_threads())
    _run(core.contrastive_lse, params, scores)
    return lse


def contrastive_lse_backward(
    grad: Tensor, lse: Tensor, scores: ScoreParams, keys_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and temperatures; see ``reference_lse``."""
    core, scores = library(), contiguous_scores(scores)
    queries, keys, grad, lse = scores.queries, scores.keys, grad.contiguous(), lse.contiguous()
    d_queries = torch.empty(queries.shape, dtype=torch.float32, device="cpu")
    of_keys = keys_wanted and not scores.symmetric
    d_keys = torch.empty(keys.shape if of_keys else (0,), dtype=torch.float32, device="cpu")
    rows = queries.shape[0] if isinstance(scores.temperature, Tensor) else 0
    d_temperature = torch.empty(rows, dtype=torch.float32, device="cpu")
    params = core.LseGradientParams(
        **score_fields(scores),
        grad=grad.data_ptr(),
        lse=lse.data_ptr(),
        symmetric=scores.symmetric,
        d_queries=d_queries.data_ptr(),
        d_keys=d_keys.data_ptr() if of_keys else 0,
        d_temperatures=d_temperature.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    _run(core.contrastive_lse_backward, params, scores)
    return d_queries.to(queries.dtype), d_keys.to(keys.dtype), d_temperature
