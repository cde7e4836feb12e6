"""Row-wise log-sum-exp of scores and its gradient in plain torch: the formulas, and the oracle of the kernels.

Any device, float64 too. Rows are taken in blocks, so that memory is O(m) and not O(n m).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..params import ScoreParams

BLOCK_ELEMENTS = 1 << 22  # of the (rows, m) array of one block


def _wide(operand: Tensor) -> Tensor:
    """Half precision operands are widened first, so that products are exact."""
    return operand if operand.dtype == torch.float64 else operand.float()


def row_blocks(scores: ScoreParams) -> Iterator[tuple[slice, ScoreParams]]:
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    size = max(1, BLOCK_ELEMENTS // max(1, m))
    for first in range(0, n, size):
        rows = slice(first, first + size)
        yield rows, scores.slice_rows(rows)


def masked_scores(scores: ScoreParams) -> Tensor:
    """(rows, m): s_ij = <q_i, k_j> / temperature_i - log g_j; -inf where key j is excluded for row i or the score not
    finite."""
    temperature = scores.temperature
    dots = _wide(scores.queries) @ _wide(scores.keys).T
    values = dots / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    if scores.log_proposal is not None:
        values = values - scores.log_proposal
    counted = values.isfinite()
    for ids in (scores.query_ids, scores.carried_ids):
        if ids is not None:
            counted &= ids[:, None] != scores.key_ids
    return torch.where(counted, values, -torch.inf)


def contrastive_lse(scores: ScoreParams) -> Tensor:
    """(n,) lse_i = log sum_j exp(s_ij); -inf for a row without keys."""
    lse = _wide(scores.queries).new_empty(scores.queries.shape[0])
    with torch.autocast(lse.device.type, enabled=False):
        for rows, block in row_blocks(scores):
            lse[rows] = torch.logsumexp(masked_scores(block), 1) if block.keys.shape[0] else -torch.inf
    return lse


def contrastive_lse_backward(
    grad: Tensor, lse: Tensor, scores: ScoreParams, keys_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (n, d), keys (m, d) and each row's temperature (n,), for grad (n,) of lse (n,).

    With p_ij = exp(s_ij - lse_i): dq_i = grad_i / temperature_i * sum_j p_ij k_j, dk_j = sum_i grad_i / temperature_i *
    p_ij q_i, and dtemperature_i = -<q_i, dq_i> / temperature_i, since sum_j p_ij s_ij is <q_i, sum_j p_ij k_j> /
    temperature_i. A row without keys has gradient 0. Where the temperature is a number, its gradient is of shape (0,).
    Where queries and keys are one operand (``scores.symmetric``), the first gradient is of both, and the second of
    shape (0,), as it is without ``keys_wanted``.
    """
    # An element that is not finite leaves its row or key without scores, but 0 * inf would be NaN.
    queries, keys = (_wide(operand).nan_to_num(0, 0, 0) for operand in (scores.queries, scores.keys))
    d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys)
    with torch.autocast(lse.device.type, enabled=False):
        for rows, block in row_blocks(scores):
            level = torch.where(lse[rows].isfinite(), lse[rows], 0)[:, None]
            weights = (masked_scores(block) - level).exp() * (grad[rows] / block.temperature)[:, None]
            d_queries[rows] = weights @ keys
            d_keys += weights.T @ queries[rows]
        per_row = isinstance(scores.temperature, Tensor)
        d_temperature = -(queries * d_queries).sum(1) / scores.temperature if per_row else lse.new_empty(0)
    if scores.symmetric:
        d_queries, d_keys = d_queries + d_keys, d_keys.new_empty(0)
    elif not keys_wanted:
        d_keys = d_keys.new_empty(0)
    return d_queries.to(scores.queries.dtype), d_keys.to(scores.keys.dtype), d_temperature
