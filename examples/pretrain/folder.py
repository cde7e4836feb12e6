"""Images in folders, one folder a class, as ImageNet-100 comes: decoded when they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.pretrain.images import Images, Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LAYOUT = f"train/CLASS/FILE and val/CLASS/FILE or test/CLASS/FILE, FILE ending in {', '.join(SUFFIXES)}"


def read(directory: Path, image_size: int, workers: int) -> Split:
    """Training images from train, held out those from val, or else from test; classes in alphabetical order.

    Images have eight sevenths of the side `image_size`, so that crops of a part of them lose little; the
    middle with the side itself is what is evaluated.

    Raises:
        FileNotFoundError, ValueError: a folder is missing, empty, or has a class that the training images lack.
    """
    train = directory / "train"
    held_out = next((directory / name for name in ("val", "test") if (directory / name).is_dir()), directory / "val")
    classes = [path.name for path in _folders(train)]
    unknown = sorted({path.name for path in _folders(held_out)} - set(classes))
    if unknown:
        raise ValueError(f"{held_out}: expected the classes of {train}, got others, too: {', '.join(unknown[:5])}")
    side = round(image_size * 8 / 7)
    images, labels = zip(*(_images(folder, classes, side, workers) for folder in (train, held_out)), strict=True)
    return Split(images[0], labels[0], images[1], labels[1])


def _folders(directory: Path) -> list[Path]:
    found = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    if not found:
        has = "no folder of a class in it" if directory.is_dir() else "no such folder"
        raise FileNotFoundError(f"{directory}: expected {LAYOUT}; {has}")
    return found


def _images(directory: Path, classes: list[str], side: int, workers: int) -> tuple[Images, Tensor]:
    files: list[str] = []
    labels: list[int] = []
    for folder in _folders(directory):
        own = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not own:
            raise FileNotFoundError(f"{folder}: expected {LAYOUT}; no such file in it")
        files += own
        labels += [classes.index(folder.name)] * len(own)
    return Images(_Reader(files, side), torch.arange(len(files)), (3, side, side), workers), torch.tensor(labels)


class _Reader:
    """Item -> (3, side, side) uint8: the largest square in the middle of the image, resized."""

    def __init__(self, files: list[str], side: int) -> None:
        self.files = files
        self.side = side

    def __call__(self, item: int) -> Tensor:
        try:
            with Image.open(self.files[item]) as image:
                image.draft(
                    "RGB", (self.side, self.side)
                )  # JPEG: decoded at a fraction of its size where that is enough
                image = image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.files[item]}: expected a whole image that Pillow reads: {error}") from error
        width, height = image.size
        left, top, short = (width - min(image.size)) / 2, (height - min(image.size)) / 2, min(image.size)
        box = (left, top, left + short, top + short)
        square = image.resize((self.side, self.side), Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
