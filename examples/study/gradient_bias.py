"""How far each method's mean gradient is from the gradient of the global loss, at fixed parameters.

python -m examples.study.gradient_bias --batches 4000 --out docs/images/gradient_bias.png

400 real digits with two fixed views each and a linear encoder, so that the exact gradient, a softmax over 798 negatives
for each of 800 anchors, is a minute's work. Nothing is rescaled before comparing. The parameters never move: what is
kept from earlier batches is old, but not out of date.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from emc2_kernels import losses
from examples.study.cells import worker_pool

ITEMS, PIXELS, DIM, TEMPERATURE = 400, 64, 16, 0.2
WARM_UP = 0.1  # of the batches come first and are not averaged: chains leave their starts, caches fill
STREAMS = (2, 3)  # seeds of independent runs, from whose means the bias is told apart from the noise
MARKS = 12  # points of a curve

Encode = Callable[[Tensor, Tensor], Tensor]


@cache
def views(items: int = ITEMS) -> Tensor:
    """(items, 2, 64): each digit seen twice through fixed noise, centred so that similarities spread."""
    images = torch.tensor(load_digits().data[:items], dtype=torch.float32) / 16
    noise = 0.2 * torch.randn(items, 2, PIXELS, generator=torch.Generator().manual_seed(0))
    return images[:, None] + noise - images.mean(0)


def weight() -> Tensor:
    """(64, 16): the encoder's parameters."""
    return (torch.randn(PIXELS, DIM, generator=torch.Generator().manual_seed(1)) / 8).requires_grad_()


def embeddings(parameters: Tensor) -> Tensor:
    """(800, 16) of unit length, view 0 first."""
    return functional.normalize(views().transpose(0, 1).reshape(2 * ITEMS, PIXELS).to(parameters) @ parameters, dim=1)


def global_loss(z: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over all anchors of -s+ + log sum over the other items' views of exp(s). z: (2n, d), view 0 first."""
    scores = z @ z.T / temperature
    n = len(z) // 2
    item = torch.arange(n).repeat(2)
    negatives = scores.masked_fill(item[:, None] == item, -torch.inf)
    positive = scores[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    return (negatives.logsumexp(1) - positive).mean()


@cache
def exact_gradient() -> Tensor:
    """In float64."""
    parameters = weight().detach().double().requires_grad_()
    global_loss(embeddings(parameters)).backward()
    return parameters.grad


def mean_cosine(z: Tensor) -> float:
    """Over all pairs of rows of unit length; near 1, a small gradient is that of a collapsed encoder."""
    return ((z.sum(0).square().sum() - len(z)) / (len(z) * (len(z) - 1))).item()


# What losses.get is given beside the sizes of the data.
METHODS: dict[str, dict[str, Any]] = {
    "NT-Xent": {"name": "ntxent"},
    "SogCLR": {"name": "sogclr"},
    "SogCLR, gamma 0.1": {"name": "sogclr", "gamma": 0.1},
    # Its whole cache fits the encoder's present parameters only while these are fixed.
    "cache, corrected": {"name": "cached", "carry": "corrected"},
    "cache, recompute": {"name": "cached", "carry": "recompute", "refresh": 0},
    "EMC², recompute": {"name": "emc2", "sampler": "mh", "carry": "recompute"},
    "EMC², cached": {"name": "emc2", "sampler": "mh"},
    "EMC² from the bank, recompute": {"name": "emc2", "proposals": "bank", "carry": "recompute"},
    "EMC² from the bank, corrected": {"name": "emc2", "proposals": "bank", "carry": "corrected"},
    "i-SIR, recompute": {"name": "emc2", "sampler": "isir", "carry": "recompute"},
    "i-SIR": {"name": "emc2", "sampler": "isir"},
    "i-SIR, no queue": {"name": "emc2", "sampler": "isir", "queue": 0},
    "i-SIR, queue 64": {"name": "emc2", "sampler": "isir", "queue": 64},
    "i-SIR, coupled": {"name": "emc2", "sampler": "isir", "decoupled": False},
    "i-SIR, one view": {"name": "emc2", "sampler": "isir", "views": "one"},
}


def named(method: str) -> str:
    """As the pages say it: EMC² alone is the library's default, i-SIR; the paper's sampler is the walk."""
    return method.replace("EMC²", "walk").replace("i-SIR", "EMC²")


def make_loss(options: Mapping[str, Any], encode: Encode, num_items: int, dim: int, temperature: float) -> nn.Module:
    """options: a value of METHODS. What is kept is kept in float32, so that rounding does not pass for bias."""
    takes = losses.TABLE[options["name"]].options()
    common = {"num_items": num_items, "dim": dim, "temperature": temperature, "bank_dtype": torch.float32}
    given = {name: value for name, value in common.items() if name in takes} | options
    if options.get("carry") == "recompute" or options.get("refresh"):
        given["encode"] = encode
    return losses.get(**given)


@dataclass(frozen=True)
class Stream:
    """Of one run: the mean gradient, (64, 16) float64, after each mark, and the variance of one batch's gradient,
    summed over its entries."""

    means: list[Tensor]
    variance: float


def marks(batches: int) -> list[int]:
    """Numbers of batches after which a curve has a point, evenly spaced on a logarithmic axis."""
    return sorted({round(batches ** (k / MARKS)) for k in range(MARKS // 2, MARKS + 1)})


def run(options: Mapping[str, Any], batch_size: int, batches: int, seed: int) -> Stream:
    """options: a value of METHODS."""
    torch.set_num_threads(1)
    images, parameters = views(), weight()
    loss = make_loss(options, lambda items, which: images[items, which] @ parameters, ITEMS, DIM, TEMPERATURE)
    generator = torch.Generator().manual_seed(seed)
    total, squares, means = torch.zeros(PIXELS, DIM, dtype=torch.float64), 0.0, []
    for t in range(-int(WARM_UP * batches), batches):
        index = torch.randperm(ITEMS, generator=generator)[:batch_size]
        parameters.grad = None
        loss(images[index, 0] @ parameters, images[index, 1] @ parameters, index).backward()
        if t < 0:
            continue
        total += parameters.grad
        squares += parameters.grad.double().square().sum().item()
        if t + 1 in marks(batches):
            means.append(total / (t + 1))
    return Stream(means, squares / batches - means[-1].square().sum().item())


@torch.no_grad()
def isir_statistics(batch_size: int, batches: int = 2000) -> tuple[float, float]:
    """Mean carried weight, and the estimate of the global loss that comes with it, over the last two thirds."""
    images, parameters = views(), weight()
    loss = make_loss(METHODS["i-SIR"], lambda *_: parameters, ITEMS, DIM, TEMPERATURE)
    generator, found = torch.Generator().manual_seed(0), []
    for t in range(batches):
        index = torch.randperm(ITEMS, generator=generator)[:batch_size]
        _, stats = loss(images[index, 0] @ parameters, images[index, 1] @ parameters, index, return_stats=True)
        if t >= batches // 3:
            found.append((stats["carried_weight"], stats["log_partition"] - stats["positive_similarity"] / TEMPERATURE))
    weights, estimates = zip(*found, strict=True)
    return float(sum(weights) / len(found)), float(sum(estimates) / len(found))


@dataclass(frozen=True)
class Found:
    """Relative to the norm of the exact gradient.

    errors: of the mean gradient after each mark, averaged over the streams. bias: what is left of the last error
    without its noise, which is independent between the streams; 0 where noise is all there is. deviation: of the
    gradient of one batch, standard deviation.
    """

    errors: list[float]
    bias: float
    deviation: float


def summary(streams: Sequence[Stream]) -> Found:
    exact = exact_gradient()
    scale = exact.norm().item()
    points = zip(*(stream.means for stream in streams), strict=True)
    errors = [sum((mean - exact).norm().item() for mean in means) / len(means) / scale for means in points]
    first, second = (stream.means[-1] - exact for stream in streams)
    bias = math.sqrt(max((first * second).sum().item(), 0)) / scale
    variance = sum(stream.variance for stream in streams) / len(streams)
    return Found(errors, bias, math.sqrt(variance) / scale)


def study(methods: Sequence[str], batch_sizes: Sequence[int], batches: int, jobs: int) -> dict[tuple[str, int], Found]:
    cases = [(method, size) for size in batch_sizes for method in methods]
    with worker_pool(jobs) as pool:
        runs = {
            (method, size): [pool.submit(run, METHODS[method], size, batches, seed) for seed in STREAMS]
            for method, size in cases
        }
        return {case: summary([stream.result() for stream in runs[case]]) for case in tqdm(cases, unit="case")}


def plot(path: Path, found: dict[tuple[str, int], Found], batches: int) -> None:
    sizes = sorted({size for _, size in found})
    methods = list(dict.fromkeys(method for method, _ in found))
    figure = Figure(figsize=(8.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    styles = [("-", "o"), ("--", "s"), (":", "^")]
    for axis, size in zip(axes, sizes, strict=True):
        for number, method in enumerate(methods):
            style, marker = styles[number // 7]
            axis.loglog(
                marks(batches), found[method, size].errors, style, marker=marker, markersize=3.5,
                color=COLOURS[number % 7], label=named(method),
            )  # fmt: skip
        axis.set_title(f"batches of {size}", fontsize=12)
        axis.set_xlabel("batches averaged", fontsize=12)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("relative error of the mean gradient", fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    figure.savefig(path, dpi=110)


COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def print_table(found: dict[tuple[str, int], Found], batches: int) -> None:
    cosine = mean_cosine(embeddings(weight().detach()))
    print(f"\nrelative to the exact gradient's norm; mean pairwise cosine {cosine:.3f} (the parameters are fixed)")
    print(f"{'':44}  error after    bias  deviation of")
    print(f"{'':44}  {batches:>11}          one gradient")
    for (method, size), values in found.items():
        print(f"b = {size:<3} {method:36}  {values.errors[-1]:11.3f}  {values.bias:6.3f}  {values.deviation:12.2f}")


def write_csv(path: Path, found: dict[tuple[str, int], Found], batches: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "batch_size", "batches", "error", "bias", "deviation"])
        for (method, size), values in found.items():
            for mark, error in zip(marks(batches), values.errors, strict=True):
                writer.writerow([method, size, mark, error, values.bias, values.deviation])


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.study.gradient_bias"
    parser = argparse.ArgumentParser(program, description="Error of each method's mean gradient at fixed parameters.")
    parser.add_argument("--batches", type=int, default=4000, help="batches averaged (default: 4000)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64], metavar="B")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/gradient_bias.png"), help="figure; a CSV goes beside it")
    parser.add_argument(
        "--statistics", action="store_true", help="only what i-SIR says of itself beside the exact loss"
    )
    given = parser.parse_args(arguments)
    if given.statistics:
        print(f"exact global loss {global_loss(embeddings(weight().detach())).item():.2f}; i-SIR's estimate of it")
        for size in given.batch_sizes:
            carried, estimate = isir_statistics(size)
            print(f"b = {size:<3} {estimate:.2f}, carried weight {100 * carried:.0f} %")
        return 0
    if given.batches < 10:
        parser.error(f"--batches: expected at least 10, got {given.batches}")
    if any(not 2 <= size <= ITEMS for size in given.batch_sizes):
        parser.error(f"--batch-sizes: expected 2 to {ITEMS}, got {given.batch_sizes}")
    found = study(given.methods, given.batch_sizes, given.batches, given.jobs)
    print_table(found, given.batches)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    plot(given.out, found, given.batches)
    write_csv(given.out.with_suffix(".csv"), found, given.batches)
    print(f"written: {given.out}, {given.out.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
