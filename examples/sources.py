"""What --data names: the bundled sets, and files in a directory of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import folder
import stl10
import torch
from data import DATASETS, UNLABELLED, Split
from images import Images


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
