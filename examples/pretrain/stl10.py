"""STL-10 from its official binary files, mapped into memory: an image is read when it is asked for.

Source: Coates, Lee, Ng, An Analysis of Single Layer Networks in Unsupervised Feature Learning, AISTATS 2011; the files
are those of stl10_binary.tar.gz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.pretrain.images import UNLABELLED, Images, Split

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
LAYOUT = "train_X.bin, train_y.bin, test_X.bin, test_y.bin and, to pre-train on 100,000 more, unlabeled_X.bin"


def read(directory: Path, image_size: int, workers: int) -> Split:
    """Training images: the labelled ones, then those of unlabeled_X.bin where that is there, labelled UNLABELLED. Held
    out: the test images. image_size: side that they are resized to.

    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short, or holds something else; named with what was
            expected.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"--data stl10: expected a directory with {LAYOUT}, got {directory}")
    parts = {name: _images(directory / f"{name}_X.bin") for name in ("train", "test")}
    labels = {name: _labels(directory / f"{name}_y.bin", len(parts[name])) for name in parts}
    pretrain, pretrain_labels = [parts["train"]], [labels["train"]]
    if (directory / "unlabeled_X.bin").exists():
        pretrain.append(_images(directory / "unlabeled_X.bin"))
        pretrain_labels.append(torch.full((len(pretrain[1]),), UNLABELLED))
    else:
        print(f"{directory}: no unlabeled_X.bin; {len(parts['train'])} labelled images to train on", file=sys.stderr)
    train, test = (
        Images(_Reader(files, image_size), *_all(files, image_size), workers) for files in (pretrain, [parts["test"]])
    )
    return Split(train, torch.cat(pretrain_labels), test, labels["test"])


def _all(files: list[np.ndarray], side: int) -> tuple[Tensor, tuple[int, int, int]]:
    return torch.arange(sum(map(len, files))), (3, side, side)


class _Reader:
    """Item -> (3, side, side) uint8, over several files one after the other."""

    def __init__(self, files: list[np.ndarray], side: int) -> None:
        self.files = files
        self.side = side

    def __call__(self, item: int) -> Tensor:
        for images in self.files:
            if item < len(images):
                break
            item -= len(images)
        # Columns come first in the files.
        image = torch.from_numpy(np.ascontiguousarray(images[item].transpose(0, 2, 1)))
        if self.side == SIDE:
            return image
        size = (self.side, self.side)
        resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
        return resized[0].round().clamp(0, 255).byte()


def _images(path: Path) -> np.ndarray:
    """(n, 3, width, height) uint8, mapped."""
    expected = f"uint8 images of 3 x {SIDE} x {SIDE}, {IMAGE_BYTES} bytes each"
    size = _size(path, expected)
    if size == 0 or size % IMAGE_BYTES:
        raise ValueError(f"{path}: expected {expected}, got {size} bytes: {size / IMAGE_BYTES:.2f} images")
    return np.memmap(path, np.uint8, mode="r", shape=(size // IMAGE_BYTES, 3, SIDE, SIDE))


def _labels(path: Path, count: int) -> Tensor:
    """(count,) int64 from 0; the file counts from 1."""
    expected = f"{count} labels from 1 to 10, a byte each, as many as {path.name.replace('_y', '_X')} has images"
    size = _size(path, expected)
    if size != count:
        raise ValueError(f"{path}: expected {expected}, got {size} bytes")
    labels = torch.from_numpy(np.fromfile(path, np.uint8)).long()
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"{path}: expected {expected}, got {labels.min()} to {labels.max()}")
    return labels - 1


def _size(path: Path, expected: str) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected {expected}; no such file")
    return path.stat().st_size
