"""What training by each method makes of the global loss itself: per step, and per encoder pass.

python -m examples.study.global_loss --batch-sizes 4 16

The setting of gradient_bias.py with a small encoder that is trained: 400 real digits, two fixed views each, plain SGD.
The exact global loss is computed at the end, and for methods that encode samples again also at the moment when they
have encoded as much as the others at the end. Each method gets the same learning rates, and its best one counts. An
encoder that maps everything to one point has a loss of log 798 = 6.68.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from examples.study.cells import worker_pool
from examples.study.gradient_bias import (
    DIM,
    ITEMS,
    METHODS,
    PIXELS,
    TEMPERATURE,
    global_loss,
    make_loss,
    mean_cosine,
    views,
)

HIDDEN = 64
RATES = (0.03, 0.1, 0.3, 1.0)


class Encoder(nn.Module):
    """Counts the images that it encodes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
        self.encoded = 0

    def forward(self, images: Tensor) -> Tensor:
        self.encoded += images.shape[0]
        return self.layers(images)


@dataclass(frozen=True)
class Trained:
    """Exact global loss after all steps, and after as many encodings as that is without encoding again; mean cosine of
    all pairs at the end; encodings, relative to two an item and step."""

    per_step: float
    per_encoding: float
    mean_cosine: float
    encodings: float


def evaluate(encoder: Encoder) -> tuple[float, float]:
    """The exact global loss and the mean cosine of all pairs."""
    with torch.no_grad():
        z = functional.normalize(encoder.layers(views().transpose(0, 1).reshape(2 * ITEMS, PIXELS)), dim=1)
        return global_loss(z).item(), mean_cosine(z)


def train(method: str, batch_size: int, steps: int, rate: float, seed: int) -> Trained:
    torch.set_num_threads(1)
    images, encoder = views(), Encoder(seed)
    loss = make_loss(METHODS[method], lambda items, which: encoder(images[items, which]), ITEMS, DIM, TEMPERATURE)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed + 10)
    budget, per_encoding = 2 * batch_size * steps, None
    for _ in range(steps):
        index = torch.randperm(ITEMS, generator=generator)[:batch_size]
        z0, z1 = encoder(torch.cat((images[index, 0], images[index, 1]))).chunk(2)
        optimizer.zero_grad()
        loss(z0, z1, index).backward()
        optimizer.step()
        if per_encoding is None and encoder.encoded >= budget:
            per_encoding = evaluate(encoder)[0]
    per_step, cosine = evaluate(encoder)
    return Trained(per_step, per_encoding, cosine, encoder.encoded / budget)


def best(runs: dict[float, list[Trained]], field: str) -> tuple[float, float, float]:
    """Learning rate with the least mean loss, that mean, and its standard deviation over the seeds."""
    values = {rate: [getattr(run, field) for run in found] for rate, found in runs.items()}
    rate = min(values, key=lambda rate: statistics.fmean(values[rate]))
    return rate, statistics.fmean(values[rate]), statistics.stdev(values[rate])


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.study.global_loss"
    parser = argparse.ArgumentParser(program, description="Exact global loss after training by each method.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], metavar="B")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/global_loss.csv"))
    given = parser.parse_args(arguments)
    if given.seeds < 2 or given.steps < 1:
        parser.error(f"--seeds, --steps: expected at least 2 and 1, got {given.seeds} and {given.steps}")
    cases = [(method, size) for size in given.batch_sizes for method in given.methods]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print("exact global loss: mean and standard deviation over the seeds, at the best learning rate of each method")
    print(f"{'':46}  per step (lr)            per encoding (lr)        cosine  encodings")
    with worker_pool(given.jobs) as pool, given.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["method", "batch_size", "rate", "seed", "per_step", "per_encoding", "mean_cosine", "encodings"]
        )
        jobs = {
            case: {
                rate: [pool.submit(train, *case, given.steps, rate, seed) for seed in range(given.seeds)]
                for rate in RATES
            }
            for case in cases
        }
        for method, size in tqdm(cases, unit="case"):
            runs = {rate: [job.result() for job in found] for rate, found in jobs[method, size].items()}
            for rate, found in runs.items():
                for seed, run in enumerate(found):
                    values = (run.per_step, run.per_encoding, run.mean_cosine, run.encodings)
                    writer.writerow([method, size, rate, seed, *values])
            rate, mean, deviation = best(runs, "per_step")
            again = best(runs, "per_encoding")
            cosine = statistics.fmean(run.mean_cosine for run in runs[rate])
            encodings = statistics.fmean(run.encodings for run in runs[rate])
            columns = f"{mean:.2f} +- {deviation:.2f} ({rate})      {again[1]:.2f} +- {again[2]:.2f} ({again[0]})"
            tqdm.write(f"b = {size:<3} {method:38}  {columns}      {cosine:6.2f}  {encodings:9.2f}")
    print(f"written: {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
