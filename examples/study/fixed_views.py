"""Finite augmentation: a data set in which every image has two views, drawn once."""

from __future__ import annotations

from functools import cache

import torch
from data import DATASETS, augment, draw_noise
from torch import Tensor


@cache
def fixed_views(data: str, num_items: int, seed: int = 0) -> Tensor:
    """(num_items, 2, 1, h, w): two augmentations of each of the first training images, the same in every run."""
    images = DATASETS[data]().train_images
    if num_items > len(images):
        raise ValueError(f"num_items must be at most {len(images)}, the training images of {data}, got {num_items}")
    twice = images[:num_items].repeat(2, 1, 1, 1)
    noise = draw_noise(2 * num_items, twice, torch.Generator().manual_seed(seed))
    return torch.stack(augment(twice, noise).chunk(2), dim=1)
