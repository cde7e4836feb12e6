"""Which random views of an image a run trains on: a fresh draw at each visit, or a few that are drawn once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from augment import change, draw_colour_noise
from data import augment, draw_noise
from images import Images
from torch import Tensor


class Drawn(Protocol):
    def rows(self, positions: Tensor) -> Drawn:
        """What these of the views differ by."""


class Augmentation(NamedTuple):
    draw: Callable[[int, Tensor, torch.Generator], Drawn]  # number of views, images of their kind, generator
    apply: Callable[[Tensor, Drawn], Tensor]  # one view of every image


class Choice(NamedTuple):
    uniform: Tensor  # (n,) on 0 to 1, which of the fixed views

    def rows(self, positions: Tensor) -> Choice:
        return Choice(self.uniform[positions])


def augmentation_of(size: int | None, jitter: float, blur: float) -> Augmentation:
    """SimCLR's for colour images, (n, 3, h, w) -> (n, 3, size, size); size None: that for written digits."""
    if size is None:
        return Augmentation(draw_noise, augment)
    return Augmentation(draw_colour_noise, partial(change, size=size, jitter=jitter, blur=blur))


class Views:
    """Makes views of a data set's images. All its randomness is in what `draw` returns, but for the fixed views."""

    def __init__(self, augmentation: Augmentation, images: Tensor | Images, count: int, seed: int) -> None:
        """count: of fixed views an image, 0: fresh ones at each visit. What the fixed ones differ by is kept, for all
        images."""
        self.augmentation = augmentation
        self.count = count
        self.fixed: Drawn | None = None
        if count > 0:
            like = images[torch.zeros(1, dtype=torch.int64)]
            self.fixed = augmentation.draw(count * len(images), like, torch.Generator(like.device).manual_seed(seed))

    def draw(self, num_views: int, like: Tensor, generator: torch.Generator) -> Drawn:
        if self.fixed is None:
            return self.augmentation.draw(num_views, like, generator)
        return Choice(torch.rand(num_views, device=generator.device, generator=generator))

    def make(self, images: Tensor, drawn: Drawn, items: Tensor, views: Tensor) -> Tensor:
        """images (n, channels, h, w) of the items (n,), as view 0 or 1 each, views (n,)."""
        if self.fixed is not None:
            # View 0 is one of the even ones and view 1 one of the odd ones: of two fixed views each is always the same.
            choices = (self.count + 1 - views) // 2
            number = 2 * (drawn.uniform * choices).long() + views
            drawn = self.fixed.rows(items * self.count + number)
        return self.augmentation.apply(images, drawn)
