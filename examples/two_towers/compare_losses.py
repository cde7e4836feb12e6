"""Retrieval, the task that the global loss stands for: what two towers find after training by each loss.

python -m examples.two_towers.compare_losses --data digits-held-out --out docs/results

Both sides are encoded once a step whatever the loss is, so equal epochs are equal encodings; whether a loss with kept
keys gives a small batch what a larger one has is seen beside CLIP at twice the batch. All losses get the same learning
rates, and each its best one by the retrieval of the training pairs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from emc2_kernels import losses
from examples.pretrain.images import batches
from examples.pretrain.optimizers import warmup_cosine
from examples.pretrain.processes import cpu_threads
from examples.study.cells import Row, grouped, measure_missing
from examples.study.tables import markdown, spread
from examples.two_towers.halves import retrieve
from examples.two_towers.pairs import DATASETS, Pairs

TEMPERATURE = 0.1
NAMES = ("data", "loss", "batch_size", "epochs", "lr", "seed")
# What losses.get is given beside the sizes of the data.
LOSSES: dict[str, dict[str, Any]] = {
    "CLIP": {"name": "clip"},
    "SogCLR": {"name": "sogclr", "bimodal": True},
    "cache": {"name": "cached", "bimodal": True},
    "EMC² (mh)": {"name": "emc2", "sampler": "mh", "bimodal": True},
    "i-SIR": {"name": "emc2", "sampler": "isir", "bimodal": True},
    "i-SIR, no queue": {"name": "emc2", "sampler": "isir", "queue": 0, "bimodal": True},
    "i-SIR, coupled": {"name": "emc2", "sampler": "isir", "decoupled": False, "bimodal": True},
}


@cache
def pairs_of(data: str) -> Pairs:
    return DATASETS[data]()


def train(data: str, name: str, batch_size: int, epochs: int, lr: float, seed: int) -> list[Row]:
    """Mean reciprocal ranks of both directions, in %, among the training pairs and among the held-out ones."""
    pairs = pairs_of(data)
    with cpu_threads(1):
        towers, num_items = pairs.towers(seed), len(pairs.train.left)
        dim = pairs.embed(towers)[0].shape[1]
        takes = losses.TABLE[LOSSES[name]["name"]].options()
        common = {"num_items": num_items, "dim": dim, "temperature": TEMPERATURE, "seed": seed}
        loss = losses.get(**{key: value for key, value in common.items() if key in takes} | LOSSES[name])
        optimizer = torch.optim.AdamW(towers.parameters(), lr=lr, weight_decay=1e-4)
        schedule = warmup_cosine(epochs * (num_items // batch_size))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        order, noise = (torch.Generator().manual_seed(2 * seed + stream) for stream in range(2))
        for _ in range(epochs):
            for index in batches(num_items, batch_size, order):
                optimizer.zero_grad()
                loss(*pairs.views(towers, index, noise), index).backward()
                optimizer.step()
                scheduler.step()
        with torch.no_grad():
            sides = pairs.embed(towers)
            unit = torch.nn.functional.normalize(torch.cat(sides), dim=1)
        among = retrieve(*sides), retrieve(*reversed(sides))
        trained, held_out = (
            100 * statistics.fmean(found.reciprocal_rank for found in both) for both in (among, pairs.retrieval(towers))
        )
        cosine = ((unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1))).item()
        return [{"train_mrr": trained, "held_out_mrr": held_out, "mean_cosine": cosine}]


def table(rows: Sequence[Row]) -> str:
    parts = []
    for (data, epochs), of_data in grouped(rows, "data", "epochs").items():
        sizes = sorted({row["batch_size"] for row in of_data})
        body = [
            [name, *(cell(grouped(of_data, "loss", "batch_size").get((name, size), [])) for size in sizes)]
            for name in dict.fromkeys(row["loss"] for row in of_data)
        ]
        seeds = len({row["seed"] for row in of_data})
        title = f"{data}, {epochs} epochs, {seeds} seeds: MRR in %, training / held out (best rate; mean cosine)"
        parts.append(f"{title}\n\n{markdown(['', *(f'b = {size}' for size in sizes)], body)}")
    return "\n\n".join(parts)


def table_by_rate(rows: Sequence[Row]) -> str:
    """How much of the held-out pairs' retrieval hangs on the learning rate."""
    parts = []
    for (data, epochs, size), found in grouped(rows, "data", "epochs", "batch_size").items():
        rates, cells = sorted({row["lr"] for row in found}), grouped(found, "loss", "lr")
        body = [
            [name, *(spread(cells.get((name, rate), []), "held_out_mrr") for rate in rates)]
            for name in dict.fromkeys(row["loss"] for row in found)
        ]
        title = f"{data}, {epochs} epochs, b = {size}: held-out MRR in %, by learning rate"
        parts.append(f"{title}\n\n{markdown(['', *(f'{rate:g}' for rate in rates)], body)}")
    return "\n\n".join(parts)


def cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    by_rate = grouped(rows, "lr").values()
    found = max(by_rate, key=lambda some: statistics.fmean(row["train_mrr"] for row in some))
    trained, held_out = ([row[column] for row in found] for column in ("train_mrr", "held_out_mrr"))
    deviation = [f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "" for values in (trained, held_out)]
    means = [f"{statistics.fmean(values):.1f}" for values in (trained, held_out)]
    cosine = statistics.fmean(row["mean_cosine"] for row in found)
    return f"{means[0]}{deviation[0]} / {means[1]}{deviation[1]} ({found[0]['lr']:g}; {cosine:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.two_towers.compare_losses"
    parser = argparse.ArgumentParser(program, description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits-held-out", choices=["digits-held-out", "verses"])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), metavar="NAME")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32], metavar="B")
    parser.add_argument("--larger", type=int, nargs="*", default=[64], metavar="B", help="batches of CLIP alone")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], metavar="LR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="folder of the CSV file")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.epochs < 1:
        parser.error(f"--seeds, --epochs: expected at least 1, got {given.seeds} and {given.epochs}")
    sizes = [(name, size) for size in given.batch_sizes for name in given.losses]
    sizes += [("CLIP", size) for size in given.larger if "CLIP" in given.losses]
    cells = [
        (given.data, name, size, given.epochs, lr, seed)
        for seed in range(given.seeds)
        for name, size in sizes
        for lr in given.rates
    ]
    path = given.out / f"retrieval_{given.data}.csv"
    rows = measure_missing(path, NAMES, cells, train, jobs=given.jobs)
    print(table(rows), table_by_rate(rows), sep="\n\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
