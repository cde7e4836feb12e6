"""Part d: bias, noise and accuracy with EMC²'s options one by one, and accuracy over the cache's refresh."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.pretrain.processes import cpu_threads
from examples.study import gradient_bias
from examples.study.cells import Row, measure_missing
from examples.study.compare_methods import trained

BANK = {"proposals": "bank"}
# What differs from EMC2Loss's defaults: proposals from the batch, one view, burn-in 0.5, carry cached, all states up to
# 16; from the bank: 64 proposals, 16 samples, carry corrected.
OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {},
    "batch, burn-in 0": {"burn_in": 0.0},
    "batch, burn-in 0.25": {"burn_in": 0.25},
    "batch, burn-in 0.75": {"burn_in": 0.75},
    "batch, 1 sample": {"num_samples": 1},
    "batch, both views": {"views": "both"},
    "batch, recompute": {"carry": "recompute"},
    "batch, recompute, burn-in 0": {"carry": "recompute", "burn_in": 0.0},
    "batch, recompute, burn-in 0.75": {"carry": "recompute", "burn_in": 0.75},
    "batch, recompute, 1 sample": {"carry": "recompute", "num_samples": 1},
    "batch, recompute, both views": {"carry": "recompute", "views": "both"},
    "bank": BANK,
    "bank, burn-in 0": BANK | {"burn_in": 0.0},
    "bank, 1 sample": BANK | {"num_samples": 1},
    "bank, 16 proposals": BANK | {"num_proposals": 16},
    "bank, 256 proposals": BANK | {"num_proposals": 256},
    "bank, recompute": BANK | {"carry": "recompute"},
}
# What the library had up to commit ce51495: shown where a file of results has it, and not measured.
REMOVED = ("batch, recycled", "batch, corrected", "batch, two_sided", "batch, drop")
REMOVED += ("bank, recycled", "bank, cached", "bank, two_sided")
# With encoding again, one run stands for all.
NOT_TRAINED = tuple(name for name in OPTIONS if name.startswith("batch, recompute, "))
# What is kept does not age at fixed parameters, so refreshing it shows in training alone. The default is 0.01.
CACHE = {f"cache, refresh {share:g}": {"method": "cached", "refresh": share} for share in (0.0, 0.01, 0.05)}
CACHE["cache, 1 sample"] = {"method": "cached", "num_samples": 1}
TRAINED: dict[str, dict[str, Any]] = CACHE | {
    name: {"method": "emc2", "sampler": "mh", **options} for name, options in OPTIONS.items() if name not in NOT_TRAINED
}
BIAS_FILE, BIAS_NAMES = "bias.csv", ("batch_size", "batches", "options")
ACCURACY_FILE, ACCURACY_NAMES = "options.csv", ("data", "epochs", "batch_size", "seed", "options")
# Batch size and batches; data, epochs, batch size, seeds.
FULL = (16, 1500), (("digits", 8, 16, 3), ("mnist5k", 4, 16, 2))
QUICK = (16, 20), (("digits", 1, 256, 1),)


def bias_cells(quick: bool, names: Iterable[str]) -> Iterator[tuple]:
    size, batches = (QUICK if quick else FULL)[0]
    yield from ((size, batches, name) for name in names)


def accuracy_cells(quick: bool, names: Collection[str]) -> Iterator[tuple]:
    for data, epochs, size, seeds in (QUICK if quick else FULL)[1]:
        yield from ((data, epochs, size, seed, name) for seed in range(seeds) for name in names)


def measure_bias(batch_size: int, batches: int, options: str) -> list[Row]:
    """Relative to the norm of the exact gradient; see gradient_bias.Found."""
    with cpu_threads(1):
        settings = {"name": "emc2", "sampler": "mh", **OPTIONS[options]}
        streams = [gradient_bias.run(settings, batch_size, batches, seed) for seed in gradient_bias.STREAMS]
        found = gradient_bias.summary(streams)
    return [{"error": found.errors[-1], "bias": found.bias, "deviation": found.deviation}]


def measure_accuracy(data: str, epochs: int, batch_size: int, seed: int, options: str) -> list[Row]:
    """In %, with 10 labels a class; statistics of the last epoch."""
    results = trained(data=data, epochs=epochs, batch_size=batch_size, seed=seed, **TRAINED[options])
    last = results.history[-1]
    return [
        {
            "few_probe": 100 * results.accuracy.few_linear_probe,
            "few_nearest": 100 * results.accuracy.few_nearest_neighbour,
            "mean_cosine": last["mean_cosine"],
            "acceptance": last.get("acceptance"),
            "carry_share": last.get("carry_share"),
        }
    ]


def run(folder: Path, quick: bool) -> tuple[list[Row], list[Row]]:
    cells, shown = bias_cells(quick, OPTIONS), bias_cells(quick, REMOVED)
    bias = measure_missing(folder / BIAS_FILE, BIAS_NAMES, cells, measure_bias, shown)
    cells, shown = accuracy_cells(quick, TRAINED), accuracy_cells(quick, REMOVED)
    return bias, measure_missing(folder / ACCURACY_FILE, ACCURACY_NAMES, cells, measure_accuracy, shown)
