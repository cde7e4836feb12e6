"""All methods on the same images, over batch sizes and seeds: accuracy, time of a step, memory.

python -m examples.study.compare_methods --batch-sizes 8 32 128 --seeds 5

Every run is one of `python -m examples.pretrain` with its defaults and the same number of epochs; no method is tuned.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from examples.pretrain.config import Config
from examples.pretrain.training import Results, train
from examples.study.cells import worker_pool
from examples.study.gradient_bias import named

VARIANTS: dict[str, dict[str, Any]] = {
    "SimCLR": {"method": "simclr"},
    "EMC²": {"method": "emc2", "sampler": "mh"},
    "i-SIR": {"method": "emc2", "sampler": "isir"},
    "i-SIR, no queue": {"method": "emc2", "sampler": "isir", "queue": 0},
    "i-SIR, coupled": {"method": "emc2", "sampler": "isir", "coupled": True},
    "EMC² from the bank": {"method": "emc2", "proposals": "bank"},
    "SogCLR": {"method": "sogclr"},
    "iSogCLR": {"method": "isogclr"},
    "negative cache": {"method": "cached"},
    "SimCLR, GCBS": {"method": "simclr", "batching": "gcbs"},
    "EMC² bank, GCBS": {"method": "emc2", "proposals": "bank", "batching": "gcbs"},
}


class Row(NamedTuple):
    few_probe: float  # linear probe with 10 labels a class, %
    few_nearest: float  # 1-NN with them, %
    mean_cosine: float  # in the last epoch
    step_ms: float
    peak_mb: float  # of the process


def trained(**settings: Any) -> Results:
    """A run of `examples.pretrain`, of which nothing is kept. What it would warn of is what is measured here."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        return train(Config(**settings, out=out, quiet=True))


def run(variant: str, batch_size: int, epochs: int, seed: int, data: str) -> Row:
    """In a process of its own, so that the peak of its memory is its own."""
    results = trained(**VARIANTS[variant], batch_size=batch_size, epochs=epochs, seed=seed, data=data)
    accuracy = results.accuracy
    return Row(
        100 * accuracy.few_linear_probe,
        100 * accuracy.few_nearest_neighbour,
        results.history[-1]["mean_cosine"],
        1000 * results.seconds / results.steps,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.study.compare_methods"
    parser = argparse.ArgumentParser(program, description="All methods over batch sizes and seeds.")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128], metavar="B")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.csv"))
    given = parser.parse_args(arguments)
    if given.seeds < 2 or given.jobs < 1:
        parser.error(f"--seeds, --jobs: expected at least 2 and 1, got {given.seeds} and {given.jobs}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    print(f"{given.data}, {given.epochs} epochs, {given.seeds} seeds: mean +- standard deviation")
    print(f"{'':28}  probe, 10 labels  1-NN, 10 labels  mean cosine  ms a step  peak MB")
    with worker_pool(given.jobs, **fresh) as pool, given.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "batch_size", "seed", *Row._fields])
        jobs = {
            (variant, size): [
                pool.submit(run, variant, size, given.epochs, seed, given.data) for seed in range(given.seeds)
            ]
            for size in given.batch_sizes
            for variant in given.methods
        }
        for (variant, size), found in tqdm(jobs.items(), unit="case"):
            rows = [job.result() for job in found]
            for seed, row in enumerate(rows):
                writer.writerow([variant, size, seed, *row])
            file.flush()
            probe, nearest, cosine, step, peak = zip(*rows, strict=True)
            tqdm.write(
                f"b = {size:<4} {named(variant):19}  {_spread(probe)}     {_spread(nearest)}"
                f"    {statistics.fmean(cosine):11.3f}  {statistics.median(step):9.1f}  {statistics.fmean(peak):7.0f}"
            )
    print(f"written: {given.out}")
    return 0


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):4.1f} +- {statistics.stdev(values):3.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
