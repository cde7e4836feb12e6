"""Part b, its second table: whether what a method keeps is behind the encoder.

After training as in the first table the parameters are held, and the state (chains, running denominators) goes on over
further epochs. An error that falls then was not the method's bias but its lag.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from examples.pretrain.processes import cpu_threads
from examples.study.cells import Row, measure_missing
from examples.study.finite import Finite
from examples.study.subset import METHODS

CHOSEN = ("SogCLR", "EMC²", "EMC², both views", "EMC², re-encoded")
NAMES = ("data", "num_items", "batch_size", "steps", "lr", "seed", "method")
FILE = "lag.csv"
EPOCHS = (0, 1, 4, 12)  # with the parameters held, before the errors are measured
FULL = ("digits", 500, 4, 1250, 1e-3, 3)
QUICK = ("digits", 40, 4, 20, 1e-3, 1)


def measure(data: str, num_items: int, batch_size: int, steps: int, lr: float, seed: int, method: str) -> list[Row]:
    with cpu_threads(1):
        run = Finite(METHODS[method], data, num_items, batch_size, seed)
        order = run.batches()
        for index in islice(order, steps):
            run.update(run.gradient(run.loss, index), lr)
        target = run.exact().gradient
        rows: list[Row] = []
        done = 0
        for epochs in EPOCHS:
            with torch.no_grad():
                for index in islice(order, (epochs - done) * (num_items // batch_size)):
                    run.loss(*run.embeddings(index), index)
            done = epochs
            error = run.error(target)
            rows.append({"epochs_held": epochs, "common_error": error.common, "scale": error.scale})
    return rows


def run(folder: Path, quick: bool) -> list[Row]:
    *setting, seeds = QUICK if quick else FULL
    cells = ((*setting, seed, method) for seed in range(seeds) for method in CHOSEN if method in METHODS)
    return measure_missing(folder / FILE, NAMES, cells, measure)
