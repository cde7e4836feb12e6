"""Losses whose negatives are the batch's other rows: NT-Xent among all 2b views, CLIP's between two towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..lse import contrastive_lse, mean_similarity

if TYPE_CHECKING:
    from .pairs import Anchors


class InBatch(NamedTuple):
    value: Tensor  # () differentiable
    negative_similarity: Tensor | None  # () detached, if asked for


def in_batch(
    anchors: Anchors,
    temperature: float | Tensor,
    *,
    bimodal: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_similarity: bool = False,
) -> InBatch:
    """Mean over the 2b anchors of -s+ + log(exp(s+) + sum of exp(s-)), which is softplus(lse of s- less s+).

    Negatives are all rows of other items (without items: of other pairs), of both views, or with ``bimodal`` of the
    other view alone. Memory is O(b d).

    Args:
        dtype: that a GPU multiplies in; None: the embeddings' own. On the CPU products are always float32's.
        return_similarity: also the mean, over the anchors that have negatives, of their negatives' similarity under
            softmax weights. It costs what a backward pass does.
    """
    embeddings, b = anchors.embeddings, anchors.embeddings.shape[0] // 2
    operands = embeddings if dtype is None or embeddings.is_cpu else embeddings.to(dtype)
    items = torch.arange(b, device=embeddings.device).repeat(2) if anchors.items is None else anchors.items
    if bimodal:
        sides, ids = ((operands[:b], operands[b:]), (operands[b:], operands[:b])), items[:b]
    else:
        sides, ids = ((operands, operands),), items
    options = {"temperature": temperature, "query_ids": ids, "key_ids": ids, "backend": backend}
    lses = [contrastive_lse(queries, keys, **options) for queries, keys in sides]
    view_0, view_1 = embeddings.view(2, b, -1).unbind()
    positive = (view_0 * view_1).sum(1) / temperature
    lse = torch.stack(lses) if bimodal else lses[0].view(2, b)
    value = torch.nn.functional.softplus(lse - positive).mean()
    if not return_similarity:
        return InBatch(value, None)
    means = [mean_similarity(lse, *side, **options) for lse, side in zip(lses, sides, strict=True)]
    counted = sum((lse > -torch.inf).sum() for lse in lses)  # an anchor in a batch of one item has no negatives
    return InBatch(value, sum(mean.sum() for mean in means) / counted.clamp_min(1))
