"""Small data sets in the formats that examples.pretrain reads: STL-10's binary files, and a tree of folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 96


def images(labels: np.ndarray, seed: int) -> np.ndarray:
    """(n, 3, 96, 96) uint8, a colour for each class and a ramp that tells rows from columns."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(99).integers(40, 200, (10, 3))
    ramp = np.linspace(0, 30, SIDE)[None, None, :, None]
    noise = generator.integers(-15, 15, (len(labels), 3, SIDE, SIDE))
    return (colours[labels][:, :, None, None] + ramp + noise).clip(0, 255).astype(np.uint8)


def write_stl10(directory: Path, train: int = 40, test: int = 20, unlabelled: int = 12) -> dict[str, np.ndarray]:
    """The files as STL-10 has them: columns first, labels from 1. Returns the images, rows first."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (name, count) in enumerate({"train": train, "test": test, "unlabeled": unlabelled}.items()):
        labels = np.arange(count) % 10
        written[name] = images(labels, seed)
        if count:
            written[name].transpose(0, 1, 3, 2).tofile(directory / f"{name}_X.bin")
        if name != "unlabeled":
            (labels + 1).astype(np.uint8).tofile(directory / f"{name}_y.bin")
    return written


def write_tree(directory: Path, train: int = 10, test: int = 4, classes: int = 3, held_out: str = "val") -> None:
    """Images of several shapes and formats in folders, one a class."""
    for seed, (part, count) in enumerate({"train": train, held_out: test}.items()):
        for label in range(classes):
            folder = directory / part / f"class{label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(images(np.full(count, label), 10 * seed + label)):
                picture = Image.fromarray(image.transpose(1, 2, 0)).resize((60 + 10 * (number % 3), 64))
                picture.save(folder / f"{number}{('.png', '.jpg', '.JPEG')[number % 3]}")
