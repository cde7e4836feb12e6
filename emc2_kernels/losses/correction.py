"""What stands in, in a sampled gradient, for the keys that are outside the batch and are not encoded again.

Such a key c is a kept embedding k_c: old, because the encoder has moved since, and without a gradient of its own. Both
errors feed the same runaway. Attraction between positives acts on both ends, repulsion only on one: half of it is
missing, so the component that all embeddings share grows. And a positive is fresh where negatives are old, so whatever
direction the embeddings drift in is pushed further. Training from proposals out of the bank collapses.

The batch's own keys j show both: their kept embeddings k_j too are replaced by new ones z_j, with a gradient. So each
kept negative of anchor i becomes k_c + sum_j p_ij (z_j - k_j), p_i the softmax of anchor i over the batch's keys, held
constant. That is a control variate for the drift, and the in-batch estimate (NT-Xent's) of the lost side of the
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bank import EmbeddingBank
from ..lse import contrastive_lse
from .pairs import Anchors


def correction(
    anchors: Anchors, kept: Tensor, weights: Tensor, temperature: float, bimodal: bool, backend: str
) -> Tensor:
    """(2b,): weights_i <q_i, sum_j p_ij (z_j - k_j)>, differentiable in q and z.

    Args:
        kept: (2b, d) ``kept_rows``, from before this step's are written.
        weights: (2b,) of the anchors' samples outside the batch.
    """
    b = anchors.items.shape[0] // 2
    halves = (slice(0, b), slice(b, 2 * b))
    pairs = [(halves[0], halves[1]), (halves[1], halves[0])] if bimodal else [(slice(0, 2 * b), slice(0, 2 * b))]
    moved = anchors.embeddings.detach() - kept
    terms = [_of_part(anchors, rows, keys, weights[rows], moved[keys], temperature, backend) for rows, keys in pairs]
    return torch.cat(terms)


def kept_rows(anchors: Anchors, bank: EmbeddingBank) -> Tensor:
    """(2b, d): what the bank has of the anchors themselves; where it has nothing, what they are now."""
    labels = anchors.items * 2 + anchors.views
    embeddings = anchors.embeddings.detach()
    return torch.where((bank.age(labels) >= 0)[:, None], bank.lookup(labels).to(embeddings.dtype), embeddings)


def _of_part(
    anchors: Anchors, rows: slice, keys: slice, weights: Tensor, moved: Tensor, temperature: float, backend: str
) -> Tensor:
    """Both sides by ``contrastive_lse``, so that nothing of size (2b, 2b) is kept.

    Its gradient in the keys is p_ij q_i / temperature, the key side. Its gradient in the queries is sum_j p_ij k_j /
    temperature; with ``moved`` appended to the keys, and zeros to the queries, the new columns have sum_j p_ij moved_j.
    """
    queries, embeddings = anchors.embeddings[rows], anchors.embeddings[keys]
    options = {
        "temperature": temperature,
        "query_ids": anchors.items[rows],
        "key_ids": anchors.items[keys],
        "backend": backend,
    }
    with torch.enable_grad():
        wide = torch.cat((queries.detach(), torch.zeros_like(queries)), 1).requires_grad_()
        wide_keys = torch.cat((embeddings.detach(), moved), 1)
        (gradient,) = torch.autograd.grad(contrastive_lse(wide, wide_keys, **options).sum(), wide)
    drift = gradient[:, queries.shape[1] :] * temperature
    key_side = torch.where(weights > 0, weights * contrastive_lse(queries.detach(), embeddings, **options), 0)
    return weights * (queries * drift).sum(1) + temperature * (key_side - key_side.detach())
