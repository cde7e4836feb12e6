"""The mean negative of each anchor, from samples inside and outside the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..stores.bank import EmbeddingBank
from .encoding import Encode, encode_distinct, rows_of_labels


class Samples(NamedTuple):
    """The anchors' negatives as weighted means: the weights of an anchor sum to 1, or to 0 if it has no sample.

    A sample is one of the batch's keys, which have a gradient, or else a label of the bank.
    """

    rows: Tensor  # (2b, S) int64 positions in the batch's keys
    row_weights: Tensor  # (2b, S) float; 0 where ``rows`` means nothing
    labels: Tensor  # (2b, S') int64
    label_weights: Tensor  # (2b, S'); 0 where ``labels`` means nothing


def by_label(labels: Tensor, weights: Tensor, batch: Tensor) -> Samples:
    """Samples given by label: from the batch, whose rows have the labels ``batch`` (2b,), where it has them.

    Args:
        labels: (2b, S) int64, -1: none. weights: (2b, S), of any sum.
    """
    weights = weights * (labels >= 0)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    rows = rows_of_labels(batch, labels)
    inside = rows >= 0
    return Samples(rows.clamp_min(0), weights * inside, labels, weights * ~inside)


def mean_negative(
    keys: Tensor, samples: Samples, bank: EmbeddingBank, encode: Encode | None, normalize: bool
) -> Tensor:
    """(2b, d), differentiable in keys (m, d); zeros for an anchor without samples.

    Args:
        encode: makes what is outside the batch, each distinct sample once, with gradient. None: the bank gives it,
            without.
    """
    # A bag wants legal indices: one that means nothing points at row 0 with weight 0.
    mean = nn.functional.embedding_bag(
        samples.rows, keys, mode="sum", per_sample_weights=samples.row_weights.to(keys.dtype)
    )
    return mean_outside(mean, samples, bank, encode, normalize)


def mean_outside(mean: Tensor, samples: Samples, bank: EmbeddingBank, encode: Encode | None, normalize: bool) -> Tensor:
    """(2b, d): the same, where the part ``mean`` that is in the batch is known."""
    weights = samples.label_weights.to(mean.dtype)
    if encode is None:
        kept = bank.lookup(torch.where(weights > 0, samples.labels, -1).flatten()).to(mean.dtype)
        return mean + (weights[..., None] * kept.view(*weights.shape, -1)).sum(1)  # no product for autocast to round
    anchor, sample = weights.nonzero(as_tuple=True)
    again = encode_distinct(encode, samples.labels[anchor, sample], mean, normalize)
    return mean.index_add(0, anchor, weights[anchor, sample, None] * again)
