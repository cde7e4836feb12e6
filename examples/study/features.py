"""Features after long training by each method, at two learning rates.

python -m examples.study.features --data digits --epochs 24 --out docs/results

Runs of `python -m examples.pretrain`, as in accuracy.py, with the same settings for all methods and tuned for none;
here for so long that SimCLR has stopped improving.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.study import tables
from examples.study.accuracy import LOWER, LR, METHODS, NAMES, measure
from examples.study.cells import measure_missing

FILE = "features.csv"
SHOWN = ("SimCLR", "SogCLR", "EMC²", "i-SIR", "i-SIR, no queue")


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.study.features"
    parser = argparse.ArgumentParser(program, description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128], metavar="B")
    parser.add_argument("--methods", nargs="+", default=list(SHOWN), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=[LR, LOWER], metavar="LR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/features"), help="folder of the CSV file")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.epochs < 1:
        parser.error(f"--seeds, --epochs: expected at least 1, got {given.seeds} and {given.epochs}")
    cells = [
        (given.data, given.epochs, rate, size, seed, method)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for size in given.batch_sizes
        for rate in given.rates
        for method in given.methods
    ]
    print(tables.accuracy(measure_missing(given.out / FILE, NAMES, cells, measure, jobs=given.jobs)))
    print(f"written: {given.out / FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
