"""What stands in, in a sampled gradient, for the keys that are outside the batch and are not encoded again.

Such a key c is a kept embedding k_c: old, because the encoder has moved since, and without a gradient of its own.
Either is enough for a runaway. Attraction between positives acts on both ends, repulsion from k_c on one: half of it is
missing, so the component that all embeddings share grows. And positives are fresh where negatives are old, so whichever
way the embeddings drift together, they are pushed on. Training ends with all embeddings at one point.

So each side is mended from the batch, which has both fresh embeddings and gradients:

- the drift: k_c is kept with the mean m_c of the batch that it came with, and is taken as k_c + m - m_c, with the mean
  m of the present batch. Both have to be of one batch each: a running mean lags, which feeds the runaway again, and the
  batch's own kept embeddings are older than k_c is, so that what these have moved by overshoots.
- the lost gradient: the batch's keys j get the one that they would have as negatives, p_ij q_i / temperature, with the
  softmax p_i over the batch (NT-Xent's), times the weight of the anchor's samples outside the batch.

At fixed parameters m - m_c is noise around 0, so the query side stays unbiased; the key side has NT-Xent's bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed.keys import LocalKeys
from ..stores.bank import EmbeddingBank
from ..stores.strict_state import FINITE, range_errors
from ..stores.table import SlotTable
from .anchors import Anchors


class BatchMeans(SlotTable):
    """For each label, the mean of the keys of the batch with which its embedding was kept."""

    means: Tensor  # (num_items * 2, dim)

    def __init__(self, num_items: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(num_items, views=2)
        self.keep("means", 0, dtype, width=dim)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        yield from range_errors(f"{prefix}means", tables["means"], *FINITE)

    def update(
        self, labels: Tensor, keys: LocalKeys, bimodal: bool, bank: EmbeddingBank, step: Tensor, **known: bool
    ) -> None:
        """Of those of the labels (k,) whose embeddings the bank has been given at this step. known: see
        ``SlotTable.put``, of the bank's put of these labels."""
        # Not so one that was not finite.
        now = None if known.get("finite") else bank.written_at[labels] == step
        self.put(labels, only=now, **known, means=batch_means(keys, bimodal)[labels % 2])


def batch_means(keys: LocalKeys, bimodal: bool) -> Tensor:
    """(2, d) detached means of the batch's rows, by view; of one modality both are of all rows."""
    by_view = keys.embeddings.detach().unflatten(0, (2, -1)).mean(1)
    return by_view if bimodal else by_view.mean(0).expand(2, -1)


def correction(
    anchors: Anchors,
    keys: LocalKeys,
    labels: Tensor,
    weights: Tensor,
    kept: BatchMeans,
    temperature: float,
    bimodal: bool,
) -> Tensor:
    """(2b,) to be added to <q, mean negative>: both sides of it, differentiable.

    Args:
        keys: of the whole batch, whose means these are. labels, weights: (2b, S) of the samples outside.
    """
    embeddings = anchors.embeddings
    weights = weights.to(embeddings.dtype)
    outside = weights.sum(1)
    (means,) = kept.rows(torch.where(weights > 0, labels, 0).flatten(), "means")
    then = (weights[..., None] * means.view(*weights.shape, -1).to(embeddings.dtype)).sum(1)
    now = batch_means(keys, bimodal)[1 - anchors.labels % 2]
    drift = (embeddings * (outside[:, None] * now - then)).sum(1)

    queries, items = embeddings.detach(), anchors.items
    if bimodal:
        halves = zip(queries.chunk(2), items.chunk(2), (keys.select_view(1), keys.select_view(0)), strict=True)
        lse = torch.cat([of_view.lse(some, ids, temperature, "auto") for some, ids, of_view in halves])
    else:
        lse = keys.lse(queries, items, temperature, "auto")
    lse = torch.where(lse > -torch.inf, lse, 0)  # an anchor whose batch has no other item
    key_side = outside * lse
    return drift + temperature * (key_side - key_side.detach())
