"""Part a: accuracy over batch sizes, with the same epochs, settings and encoder for every method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.study.cells import Row, measure_missing
from examples.study.compare_methods import VARIANTS, trained

PAPER = "EMC², both views"
# Settings of examples.pretrain; with both views, EMC² is the paper's.
METHODS: dict[str, dict[str, Any]] = VARIANTS | {PAPER: {"method": "emc2", "sampler": "mh", "views": "both"}}
SHOWN = ("SimCLR", "EMC²", "EMC² from the bank", "SogCLR", "iSogCLR", "negative cache", PAPER)
NAMES = ("data", "epochs", "lr", "batch_size", "seed", "method")
FILE = "accuracy.csv"
LR, LOWER = 1e-3, 3e-4  # the default, and one at which nothing collapses
SIZES = (8, 16, 32, 64, 128, 256)
# Data, epochs, learning rate, batch sizes, seeds.
FULL = (
    ("digits", 8, LR, SIZES, 5),
    ("digits", 8, LOWER, SIZES[:2], 5),
    ("mnist5k", 4, LR, SIZES, 5),
    ("mnist5k", 4, LOWER, SIZES[:2], 5),
)
QUICK = (("digits", 1, LR, (128, 256), 1),)


def cells(quick: bool) -> Iterator[tuple]:
    """Seed by seed: an interrupted study has all methods."""
    for data, epochs, lr, sizes, seeds in QUICK if quick else FULL:
        for seed in range(seeds):
            for size in sizes:
                for method in SHOWN:
                    yield data, epochs, lr, size, seed, method


def measure(data: str, epochs: int, lr: float, batch_size: int, seed: int, method: str) -> list[Row]:
    """A row an epoch; the last has the accuracies, in %, few: with 10 labels a class."""
    results = trained(**METHODS[method], data=data, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    rows: list[Row] = [
        {
            "epoch": row["epoch"],
            "step": row["step"],
            "ntxent": row["ntxent"],
            "mean_cosine": row["mean_cosine"],
            "few_nearest": 100 * row["few_nearest_neighbour"],
            "few_probe": None,
            "probe": None,
        }
        for row in results.history
    ]
    rows[-1] |= {"few_probe": 100 * results.accuracy.few_linear_probe, "probe": 100 * results.accuracy.linear_probe}
    return rows


def run(folder: Path, quick: bool) -> list[Row]:
    return measure_missing(folder / FILE, NAMES, cells(quick), measure)
