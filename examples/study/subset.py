"""Part b: the EMC² paper's run on a subset with finite augmentation, where loss and gradient are known exactly.

500 images with two fixed views each, batches of 4, plain SGD, temperature 1/5, 1,250 steps (ten epochs). Every method
gets the same learning rates; the paper's is 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from examples.pretrain.processes import cpu_threads
from examples.study.cells import Row, measure_missing
from examples.study.finite import Finite

METHODS = {
    "SimCLR": {"name": "ntxent"},
    "SogCLR": {"name": "sogclr"},
    "iSogCLR": {"name": "isogclr"},
    "negative cache": {"name": "cached", "refresh": 0.01},
    "negative cache, refresh 0.1": {"name": "cached", "refresh": 0.1},  # the paper's
    "EMC²": {"name": "emc2", "sampler": "mh"},
    "EMC², both views": {"name": "emc2", "sampler": "mh", "views": "both"},
    "EMC², re-encoded": {"name": "emc2", "sampler": "mh", "carry": "recompute"},
    "EMC² from the bank": {"name": "emc2", "proposals": "bank"},
    "EMC² from the bank, re-encoded": {"name": "emc2", "proposals": "bank", "carry": "recompute"},
}
NAMES = ("data", "num_items", "batch_size", "steps", "seed", "lr", "method")
FILE = "subset.csv"
MARKS = 10  # points of a curve after the first
# Data, items, batch size, steps, seeds, learning rates.
FULL = (
    ("digits", 500, 4, 1250, 3, (1e-3,)),
    ("digits", 500, 4, 1250, 2, (3e-4, 3e-3)),
    ("mnist5k", 500, 4, 1250, 3, (1e-3,)),
)
QUICK = (("digits", 40, 4, 20, 1, (1e-3, 3e-3)),)


def cells(quick: bool) -> Iterator[tuple]:
    for data, num_items, size, steps, seeds, rates in QUICK if quick else FULL:
        for seed in range(seeds):
            for lr in rates:
                for method in METHODS:
                    yield data, num_items, size, steps, seed, lr, method


def measure(data: str, num_items: int, batch_size: int, steps: int, seed: int, lr: float, method: str) -> list[Row]:
    """A row each MARKS-th of the way: exact loss and squared gradient norm, mean cosine of all pairs; in the middle and
    at the end also the errors of the method's gradients there. encodings: relative to two an item and step."""
    with cpu_threads(1):
        run = Finite(METHODS[method], data, num_items, batch_size, seed)
        encoded = 0

        def count(_: torch.nn.Module, inputs: tuple) -> None:
            nonlocal encoded
            encoded += len(inputs[0])

        rows: list[Row] = []
        order = run.batches()
        for mark in range(MARKS + 1):
            found = run.exact()
            row: Row = {
                "step": round(steps * mark / MARKS),
                "loss": found.loss,
                "squared_gradient": found.gradient.square().sum().item(),
                "mean_cosine": found.mean_cosine,
                "common_error": None,
                "batch_error": None,
                "scale": None,
            }
            if mark in (MARKS // 2, MARKS):
                error = run.error(found.gradient)
                row |= {"common_error": error.common, "batch_error": error.batch, "scale": error.scale}
            rows.append(row)
            until = round(steps * min(mark + 1, MARKS) / MARKS)
            hook = run.encoder.register_forward_pre_hook(count)
            for index in islice(order, until - int(row["step"])):
                run.update(run.gradient(run.loss, index), lr)
            hook.remove()
    return [row | {"encodings": encoded / (2 * batch_size * steps)} for row in rows]


def run(folder: Path, quick: bool) -> list[Row]:
    return measure_missing(folder / FILE, NAMES, cells(quick), measure)
