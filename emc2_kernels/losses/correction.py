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

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..lse import contrastive_lse
from ..stores.bank import EmbeddingBank
from ..stores.strict_state import FINITE, outside
from ..stores.table import SlotTable
from .anchors import Anchors
from .negatives import Samples


class BatchMeans(SlotTable):
    """For each label, the mean of the keys of the batch with which its embedding was kept."""

    means: Tensor  # (num_items * 2, dim)

    def __init__(self, num_items: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(num_items, views=2)
        self.keep("means", 0, dtype, width=dim)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        yield from outside(f"{prefix}means", tables["means"], *FINITE)

    def update(self, labels: Tensor, anchors: Anchors, bimodal: bool, bank: EmbeddingBank, step: Tensor) -> None:
        """Of those of the labels (k,) whose embeddings the bank has been given at this step."""
        now = bank.written_at[labels] == step  # not so one that was not finite
        self.put(labels, only=now, means=batch_means(anchors, bimodal)[labels % 2])


def batch_means(anchors: Anchors, bimodal: bool) -> Tensor:
    """(2, d) detached means of the batch's rows, by view; of one modality both are of all rows."""
    by_view = anchors.embeddings.detach().unflatten(0, (2, -1)).mean(1)
    return by_view if bimodal else by_view.mean(0).expand(2, -1)


def correction(
    anchors: Anchors, whole: Anchors, samples: Samples, kept: BatchMeans, temperature: float, bimodal: bool
) -> Tensor:
    """(2b,) to be added to <q, mean negative>: both sides of it, differentiable.

    Args:
        whole: the anchors of all ranks, whose means and keys these are; ``anchors`` where there is one.
    """
    embeddings, items = anchors.embeddings, anchors.items
    weights = samples.label_weights.to(embeddings.dtype)
    outside = weights.sum(1)
    labels = torch.where(weights > 0, samples.labels, 0)
    then = (weights[..., None] * kept.means[labels].to(embeddings.dtype)).sum(1)
    now = batch_means(whole, bimodal)[1 - anchors.views]
    drift = (embeddings * (outside[:, None] * now - then)).sum(1)

    rows, keys = ((side.embeddings.chunk(2), side.items.chunk(2)) for side in (anchors, whole))
    sides = [((rows[0][view], rows[1][view]), (keys[0][1 - view], keys[1][1 - view])) for view in (0, 1)]
    if not bimodal:
        sides = [((embeddings, items), (whole.embeddings, whole.items))]
    lse = torch.cat(
        [
            contrastive_lse(queries.detach(), some, temperature=temperature, query_ids=query_items, key_ids=key_items)
            for (queries, query_items), (some, key_items) in sides
        ]
    )
    lse = torch.where(lse > -torch.inf, lse, 0)  # an anchor whose batch has no other item
    key_side = outside * lse
    return drift + temperature * (key_side - key_side.detach())


def warn_of_collapse(setting: str) -> None:
    """For a loss's constructor; the warning points at its caller."""
    warnings.warn(
        f'{setting} collapses when it trains from scratch, all embeddings to one point: use carry="corrected", or '
        '"recompute" with an encoder, and watch the statistic mean_cosine',
        stacklevel=3,
    )
