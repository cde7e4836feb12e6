"""The mean negative of each anchor, from samples inside and outside the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..bank import EmbeddingBank
from .pairs import unit
from .visits import Samples

Encode = Callable[[Tensor, Tensor], Tensor]


def of_batch(keys: Tensor, samples: Samples) -> Tensor:
    """(2b, d): the part inside the batch, differentiable in keys (m, d)."""
    weights = samples.row_weights.to(keys.dtype)
    return nn.functional.embedding_bag(samples.rows, keys, mode="sum", per_sample_weights=weights)


def of_bank(bank: EmbeddingBank, samples: Samples, dtype: torch.dtype) -> Tensor:
    """(2b, d): the part outside the batch, from the bank, without gradient."""
    n, width = samples.labels.shape
    kept = bank.lookup(samples.labels.flatten()).to(dtype).view(n, width, -1)
    return (samples.label_weights.to(dtype)[:, None] @ kept).squeeze(1)


def of_encoder(encode: Encode, samples: Samples, dim: int, normalize: bool, dtype: torch.dtype) -> Tensor | None:
    """(2b, d): the part outside the batch, each distinct sample encoded again, with gradient; None: there is none."""
    rows, columns = samples.label_weights.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return None
    distinct, inverse = samples.labels[rows, columns].unique(return_inverse=True)
    encoded = encode(distinct // 2, distinct % 2)
    checks.tensor("encode's result", encoded)
    checks.operand_dtype("encode's result", encoded)
    if encoded.shape != (distinct.shape[0], dim) or encoded.device != distinct.device:
        expected = f"shape ({distinct.shape[0]}, {dim}) on {distinct.device}"
        raise ValueError(f"encode's result must have {expected}, got {checks.describe(encoded)}")
    checks.finite("encode's result", encoded.detach())
    again = unit(encoded, normalize).to(dtype)[inverse]
    weights = samples.label_weights[rows, columns].to(dtype)
    return again.new_zeros(samples.labels.shape[0], dim).index_add(0, rows, weights[:, None] * again)
