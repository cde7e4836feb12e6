"""The global contrastive loss of a finite set of views, and its gradient, in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gradient_bias import mean_cosine
from torch import Tensor, nn
from torch.nn.functional import normalize

from emc2_kernels import contrastive_lse


class Exact(NamedTuple):
    loss: float  # nats an anchor
    gradient: Tensor  # (p,) of all parameters, one after another
    mean_cosine: float  # over all pairs of views


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def exact(encoder: nn.Module, views: Tensor, temperature: float, tile: int = 256) -> Exact:
    """Mean over the 2n anchors of -s+ + log sum over the other items' 2n - 2 views of exp(s).

    Neither the (2n, 2n) scores nor the encoder's activations for all views exist at once: `contrastive_lse` makes
    scores by tiles, and `tile` images at a time are encoded, once for their embeddings and again for the gradient.

    Args:
        encoder: (k, ...) images -> (k, d); an embedding must not depend on the other images (no BatchNorm).
        views: (n, 2, ...), the two views of each item.
    """
    n = len(views)
    images = views.transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        embeddings = torch.cat([encoder(part) for part in images.split(tile)])
    embeddings.requires_grad_()
    z = normalize(embeddings, dim=1)
    items = torch.arange(n, device=z.device).repeat(2)
    positive = (z * z.roll(n, 0)).sum(1) / temperature
    loss = (contrastive_lse(z, z, temperature=temperature, query_ids=items, key_ids=items) - positive).mean()
    (by_embedding,) = torch.autograd.grad(loss, embeddings)
    parameters = list(encoder.parameters())
    gradient = torch.zeros_like(flat(parameters))
    for part, wanted in zip(images.split(tile), by_embedding.split(tile), strict=True):
        gradient += flat(torch.autograd.grad(encoder(part), parameters, wanted))
    return Exact(loss.item(), gradient.detach(), mean_cosine(z.detach()))
