"""Short and long training on fixed views towards the exact global loss, at equal encoder passes.

python -m examples.study.long_training --out docs/results --figures docs/images

The setting of global_loss.py: 400 real digits, two fixed views each, a small encoder, plain SGD; here with a cosine
schedule to zero, so that a run ends where its estimator takes it and not where its learning rate makes it tremble. All
methods get the same learning rates, and each its best one. Methods that encode samples again are stopped, and their
schedule with them, when they have encoded as much as the others. The floor is training by the exact gradient of all 800
anchors. Table and figure are of all that the folder has, from earlier calls too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.pretrain.processes import cpu_threads
from examples.study.cells import Row, grouped, measure_missing, read
from examples.study.figures import learning_curves
from examples.study.global_loss import Encoder
from examples.study.gradient_bias import DIM, ITEMS, METHODS, PIXELS, global_loss, make_loss, mean_cosine, views
from examples.study.tables import markdown

FILE, FIGURE = "long_training.csv", "long_training.png"
NAMES = ("method", "items", "batch_size", "temperature", "steps", "rate", "seed")
MAX_ITEMS = 1797
FLOOR = "exact gradient"
SHOWN = ("NT-Xent", "SogCLR", "cache, corrected", "EMC², cached", "i-SIR", "i-SIR, no queue", "i-SIR, recompute")
RATES = (0.1, 0.3, 1.0)
MARKS = 24  # points of a curve, evenly spaced on a logarithmic axis


def marks(steps: int) -> list[int]:
    return sorted({round(steps ** (k / MARKS)) for k in range(MARKS // 3, MARKS + 1)})


def embed_all(encoder: Encoder, items: int) -> Tensor:
    """(2 * items, dim) of unit length, view 0 first."""
    images = views(items).transpose(0, 1).reshape(2 * items, PIXELS)
    return torch.nn.functional.normalize(encoder.layers(images), dim=1)


@torch.no_grad()
def point(encoder: Encoder, items: int, temperature: float, step: int) -> Row:
    z = embed_all(encoder, items)
    return {"step": step, "loss": global_loss(z, temperature).item(), "mean_cosine": mean_cosine(z)}


def train(
    method: str, items: int, batch_size: int, temperature: float, steps: int, rate: float, seed: int
) -> list[Row]:
    """The exact loss after each mark; a step is what encodes 2 ``batch_size`` images."""
    with cpu_threads(1):
        images, encoder = views(items), Encoder(seed)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(seed + 10)
        exact = method == FLOOR
        if not exact:
            loss = make_loss(
                METHODS[method], lambda chosen, which: encoder(images[chosen, which]), items, DIM, temperature
            )
        rows, left, passed = [], marks(steps), 0.0
        while left:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * min(passed / steps, 1))) / 2
            optimizer.zero_grad()
            if exact:
                global_loss(embed_all(encoder, items), temperature).backward()
                passed += 1
            else:
                index = torch.randperm(items, generator=generator)[:batch_size]
                z0, z1 = encoder(torch.cat((images[index, 0], images[index, 1]))).chunk(2)
                loss(z0, z1, index).backward()
                passed = encoder.encoded / (2 * batch_size)
            optimizer.step()
            while left and passed >= left[0]:
                rows.append(point(encoder, items, temperature, left.pop(0)))
        return rows


def table(rows: Sequence[Row]) -> str:
    """At the end: mean and standard deviation over the seeds at each method's best rate, and that rate."""
    parts = []
    for (items, temperature), alike in grouped(rows, "items", "temperature").items():
        ends = [row for row in alike if row["step"] == row["steps"]]
        floors = [row["loss"] for row in ends if row["method"] == FLOOR]
        floor = f"floor {min(floors):.3f}" if floors else "floor not measured"
        cases = grouped([row for row in ends if row["method"] != FLOOR], "batch_size", "steps")
        methods = dict.fromkeys(row["method"] for row in ends if row["method"] != FLOOR)
        columns = [[best(found, method) for found in cases.values()] for method in methods]
        header = ["", *(f"b = {size}, {steps:,} steps" for size, steps in cases)]
        body = [[method, *cells] for method, cells in zip(methods, columns, strict=True)]
        seeds = len({row["seed"] for row in ends})
        title = f"{items} items, temperature {temperature:g}, {seeds} seeds; {floor}: loss (best rate; mean cosine)"
        parts.append(f"{title}\n\n{markdown(header, body)}")
    return "\n\n".join(parts)


def best_rate(rows: Sequence[Row]) -> list[Row]:
    """Those of one method, size and length that have the rate with the lowest mean."""
    by_rate = grouped(rows, "rate")
    return min(by_rate.values(), key=lambda found: statistics.fmean(row["loss"] for row in found))


def best(rows: Sequence[Row], method: str) -> str:
    own = [row for row in rows if row["method"] == method]
    if not own:
        return "-"
    found = best_rate(own)
    losses = [row["loss"] for row in found]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    cosine = statistics.fmean(row["mean_cosine"] for row in found)
    return f"{statistics.fmean(losses):.3f}{spread} ({found[0]['rate']:g}; {cosine:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.study.long_training"
    parser = argparse.ArgumentParser(program, description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1500, 20000], metavar="N")
    parser.add_argument("--items", type=int, default=ITEMS, help=f"of the data set (default: {ITEMS})")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], metavar="B")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.2], metavar="T")
    parser.add_argument("--methods", nargs="+", default=list(SHOWN), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), metavar="LR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-floor", action="store_true", help="no training by the exact gradient, and no figure")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/long_training"), help="folder of the CSV file")
    parser.add_argument("--figures", type=Path, help="folder of the figure (default: that of the CSV file)")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or min(given.steps) < 1:
        parser.error(f"--seeds, --steps: expected at least 1, got {given.seeds} and {min(given.steps)}")
    if not max(given.batch_sizes) <= given.items <= MAX_ITEMS:
        parser.error(f"--items: expected from the batch size to {MAX_ITEMS}, got {given.items}")
    cells = [
        (method, given.items, size, temperature, steps, rate, seed)
        for temperature in given.temperatures
        for steps in given.steps
        for size in given.batch_sizes
        for seed in range(given.seeds)
        for method in given.methods
        for rate in given.rates
    ]
    # Without batches, and so the same for all sizes and seeds but for where it starts.
    longest = max(given.steps)
    floors = [
        (FLOOR, given.items, given.items, temperature, longest, rate, 0)
        for temperature in given.temperatures
        for rate in (1.0, 3.0)
        if not given.no_floor
    ]
    measure_missing(given.out / FILE, NAMES, [*floors, *cells], train, jobs=given.jobs)
    rows = read(given.out / FILE)  # of earlier calls, too
    print(table(rows))
    written = [given.out / FILE]
    if floors:
        written.append((given.figures or given.out) / FIGURE)
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        meant = {"items": [given.items], "temperature": given.temperatures, "method": [FLOOR, *given.methods]}
        meant["batch_size"] = [given.items, *given.batch_sizes]
        drawn = [row for row in rows if all(row[name] in values for name, values in meant.items())]
        learning_curves(drawn, best_rate, FLOOR, written[-1])
    print("written:", ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
