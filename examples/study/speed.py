"""Part e: what a step costs, taken in turns so that a busy machine slows all methods alike.

Time to an accuracy is then steps to it, of part a, times the time of a step: the wall clock of long runs on a shared
machine says more about its other users.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from examples.study.accuracy import METHODS
from examples.study.cells import Row, grouped, measure_missing
from examples.study.compare_methods import trained

NAMES = ("data", "batch_size", "round")
FILE = "speed.csv"
BASE = "SimCLR"
# Data, batch sizes, rounds.
FULL = (("digits", (8, 32), 7), ("mnist5k", (8, 32), 3))
QUICK = (("digits", (128,), 2),)


@cache
def _warm_up(data: str) -> None:
    """Kernels are compiled and loaded by the first runs of a process, and no method is to be charged for that."""
    for settings in METHODS.values():
        trained(**settings, data=data, epochs=1, batch_size=256, seed=0)


def measure(data: str, batch_size: int, number: int) -> list[Row]:
    """One epoch of each method, in an order of this round's own: milliseconds a step, training alone."""
    _warm_up(data)
    order = random.Random(number).sample(list(METHODS), len(METHODS))
    found = {
        method: trained(**METHODS[method], data=data, epochs=1, batch_size=batch_size, seed=number) for method in order
    }
    return [{"method": method, "step_ms": 1000 * run.seconds / run.steps} for method, run in found.items()]


def run(folder: Path, quick: bool) -> list[Row]:
    settings = QUICK if quick else FULL
    cells = ((data, size, k) for data, sizes, rounds in settings for k in range(rounds) for size in sizes)
    return measure_missing(folder / FILE, NAMES, cells, measure)


class Ratio(NamedTuple):
    """Of a step's time to SimCLR's in the same round, over the rounds."""

    median: float
    low: float  # quartiles
    high: float


def ratios(rows: Sequence[Row]) -> dict[tuple, Ratio]:
    """(data, batch_size, method) -> what its step costs."""
    found: dict[tuple, list[float]] = {}
    for (data, size, _), turn in grouped(rows, *NAMES).items():
        times = {row["method"]: row["step_ms"] for row in turn}
        for method, time in times.items():
            found.setdefault((data, size, method), []).append(time / times[BASE])
    return {case: _ratio(values) for case, values in found.items()}


def _ratio(values: Sequence[float]) -> Ratio:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * tuple(values)
    return Ratio(median, low, high)


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The step at which a curve of (step, accuracy) first is at the target, linear between its points; None: never."""
    before_step, before = 0.0, None
    for step, value in curve:
        if value >= target:
            share = 1.0 if before is None else (target - before) / (value - before)
            return before_step + share * (step - before_step)
        before_step, before = step, value
    return None
