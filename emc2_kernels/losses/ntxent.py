"""NT-Xent, the in-batch contrastive loss of SimCLR (arXiv 2002.05709)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from .pairs import Anchors, batch_stats, check, stack


def nt_xent(anchors: Anchors, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss, and the detached mean similarity of its negatives under their own softmax weights.

    Each anchor's denominator has its positive and every row but itself; with items, other rows of its item are masked
    too.
    """
    embeddings, n = anchors.embeddings, anchors.embeddings.shape[0]
    with torch.autocast(embeddings.device.type, enabled=False):
        scores = embeddings @ embeddings.T / temperature
    rows = torch.arange(n, device=embeddings.device)
    positive = (rows + n // 2) % n
    masked = torch.eye(n, dtype=torch.bool, device=embeddings.device)
    if anchors.items is not None:
        same_item = anchors.items[:, None] == anchors.items
        masked = masked | (same_item & (rows != positive[:, None]))
    scores = scores.masked_fill(masked, -torch.inf)
    positive_scores = scores[rows, positive]
    loss = (torch.logsumexp(scores, 1) - positive_scores).mean()
    with torch.no_grad():
        is_negative = ~masked.index_put((rows, positive), torch.ones_like(rows, dtype=torch.bool))
        has_negatives = is_negative.any(1)  # an anchor in a batch of one item has none
        negatives = torch.where(is_negative, scores, torch.where(has_negatives[:, None], -torch.inf, 0))
        similarity = (torch.softmax(negatives, 1) * torch.where(is_negative, scores, 0)).sum(1) * temperature
    return loss, similarity.sum() / has_negatives.sum().clamp_min(1)


class NTXentLoss(nn.Module):
    """NT-Xent over the 2b views of a batch: mean over anchors of -s+ + log sum exp(s), s = similarity / temperature.

    Args:
        temperature: > 0.
        normalize: L2-normalise the embeddings first, in float32.

    Example:
        >>> loss = NTXentLoss(temperature=0.2)
        >>> loss(z0, z1).backward()
    """

    def __init__(self, *, temperature: float = 0.07, normalize: bool = True) -> None:
        super().__init__()
        self.temperature = checks.one_temperature(temperature)
        checks.boolean("normalize", normalize)
        self.normalize = normalize

    def forward(
        self, z0: Tensor, z1: Tensor, index: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of b pairs.

        Args:
            z0, z1: (b, d) embeddings of the two views, float32, bfloat16 or float16.
            index: (b,) int64 items; other rows of an anchor's item are then no negatives of it.
            return_stats: also return detached values: ntxent, positive_similarity, negative_similarity (of an anchor's
                negatives, weighted by their softmax), mean_cosine (over pairs of rows of one view).

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came.
        """
        checks.boolean("return_stats", return_stats)
        check(z0, z1, index, dim=None, num_items=None)
        anchors = stack(z0, z1, index, normalize=self.normalize)
        loss, negative_similarity = nt_xent(anchors, self.temperature)
        if not self.normalize:  # unit vectors cannot overflow
            checks.finite("the similarities of z0 and z1", loss.detach())
        if not return_stats:
            return loss
        return loss, batch_stats(anchors, self.temperature) | {"negative_similarity": negative_similarity}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}"
