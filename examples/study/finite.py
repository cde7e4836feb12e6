"""Training by plain SGD on two views of every image that are drawn once, so that the exact global loss and its gradient
are at hand to compare with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from emc2_kernels import contrastive_lse
from examples.pretrain.augment import augment_digits, draw_digit_noise
from examples.pretrain.data import DATASETS
from examples.pretrain.encoders import build_encoder
from examples.pretrain.images import batches
from examples.study.gradient_bias import make_loss, mean_cosine

DIM, TEMPERATURE = 64, 0.2  # the paper's beta is 5


@cache
def fixed_views(data: str, num_items: int, seed: int = 0) -> Tensor:
    """(num_items, 2, 1, h, w): two augmentations of each of the first training images, the same in every run."""
    images = DATASETS[data]().train_images
    if num_items > len(images):
        raise ValueError(f"num_items must be at most {len(images)}, the training images of {data}, got {num_items}")
    twice = images[:num_items].repeat(2, 1, 1, 1)
    noise = draw_digit_noise(2 * num_items, twice, torch.Generator().manual_seed(seed))
    return torch.stack(augment_digits(twice, noise).chunk(2), dim=1)


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


class Error(NamedTuple):
    """Of a method's gradients, at the encoder as it is, relative to the norm of the exact gradient."""

    # Of the mean of an epoch: what two epochs from the same state of the loss have in common; 0 where noise is all that
    # there is. It is bias, and for chains that move slowly also where they happen to be.
    common: float
    batch: float  # of one batch's gradient, root mean square
    scale: float  # of the mean gradient along the exact one; 1: nothing to rescale


class Finite:
    """An encoder, a loss and the order of the batches.

    Args:
        options: of the loss, a value of gradient_bias.METHODS.
    """

    def __init__(self, options: Mapping[str, Any], data: str, num_items: int, batch_size: int, seed: int) -> None:
        if batch_size > num_items:
            raise ValueError(f"batch_size must be at most {num_items}, the items, got {batch_size}")
        self.views = fixed_views(data, num_items)
        self.encoder = build_encoder(DIM, seed)
        self.parameters = list(self.encoder.parameters())
        # Not a method of this object: measure() copies the loss, which must not copy the encoder.
        encoder, views = self.encoder, self.views
        self.loss = make_loss(options, lambda items, which: encoder(views[items, which]), num_items, DIM, TEMPERATURE)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def embeddings(self, index: Tensor) -> tuple[Tensor, ...]:
        """(b, dim) of the first views of these items, and of the second."""
        return self.encoder(torch.cat((self.views[index, 0], self.views[index, 1]))).chunk(2)

    def gradient(self, loss: nn.Module, index: Tensor) -> Tensor:
        """(p,) of one batch; the loss's state moves on."""
        return flat(torch.autograd.grad(loss(*self.embeddings(index), index), self.parameters))

    def batches(self) -> Iterator[Tensor]:
        while True:
            yield from batches(len(self.views), self.batch_size, self.generator)

    @torch.no_grad()
    def update(self, gradient: Tensor, lr: float) -> None:
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, gradient.split(sizes), strict=True):
            parameter -= lr * part.view_as(parameter)

    def exact(self) -> Exact:
        return exact(self.encoder, self.views, TEMPERATURE)

    def error(self, target: Tensor) -> Error:
        """Of one epoch of batches, twice, from copies of the loss's present state, against the exact gradient."""
        means, squares = [], []
        for stream in (1, 2):
            loss = copy.deepcopy(self.loss)
            if hasattr(loss, "seed"):
                loss.seed += stream  # else an item's draws would be alike in both
            order = torch.Generator().manual_seed(stream)
            found = [self.gradient(loss, index) for index in batches(len(self.views), self.batch_size, order)]
            means.append(torch.stack(found).mean(0))
            squares += [(gradient - target).square().sum().item() for gradient in found]
        norm = target.norm().item()
        common = ((means[0] - target) @ (means[1] - target)).item()
        scale = ((means[0] + means[1]) / 2 @ target).item() / norm**2
        return Error(math.sqrt(max(common, 0)) / norm, math.sqrt(sum(squares) / len(squares)) / norm, scale)
