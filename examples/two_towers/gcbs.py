"""What choosing batches over the whole data set (GCBS) changes: the gap between global and in-batch loss, retrieval.

python -m examples.two_towers.gcbs --data digits --out runs/gcbs-digits

Pairs are left and right halves of digits, or verses in two translations, under a CLIP loss. Before each epoch the
batches are chosen by the towers as they are; random batches beside them.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from emc2_kernels.batching import GlobalContrastiveBatchSampler, consecutive_order, global_train_gap, similarity_graph
from emc2_kernels.losses import ClipLoss
from examples.pretrain.config import expect, expect_choice
from examples.pretrain.optimizers import warmup_cosine
from examples.pretrain.processes import cpu_threads
from examples.pretrain.report import COLOURS, table
from examples.two_towers.arguments import parse_settings
from examples.two_towers.pairs import DATASETS, Pairs

RANDOM = "random"
BLOCKS = 256  # a side of a picture of similarities


@dataclass(frozen=True)
class Settings:
    """Defaults are one reasonable setting for all batchings, tuned for none."""

    data: str = "digits"
    quantiles: str = "0.9,0.99,0.999"
    scope: str = "global"
    batch_size: int = 32
    epochs: int = 40
    seeds: int = 3
    lr: float = 2e-3
    temperature: float = 0.1
    threads: int = 1
    out: str = "runs/gcbs"
    quiet: bool = False

    def __post_init__(self) -> None:
        expect_choice("data", self.data, tuple(DATASETS))
        expect_choice("scope", self.scope, ("global", "row"))
        expect("quantiles", self.quantiles, "shares from 0 to below 1, with commas between", bool(self.shares()))
        expect("batch_size", self.batch_size, "an integer of at least 2", self.batch_size >= 2)
        expect("epochs", self.epochs, "an integer of at least 1", self.epochs >= 1)
        expect("seeds", self.seeds, "an integer of at least 2", self.seeds >= 2)
        expect("lr", self.lr, "a finite number above 0", 0 < self.lr < float("inf"))
        expect("temperature", self.temperature, "a finite number above 0", 0 < self.temperature < float("inf"))
        expect("threads", self.threads, "an integer of at least 1", self.threads >= 1)

    def shares(self) -> list[float]:
        try:
            shares = [float(text) for text in self.quantiles.split(",")]
        except ValueError:
            return []
        return shares if all(0 <= share < 1 for share in shares) else []

    def batchings(self) -> dict[str, float | None]:
        """Name -> quantile."""
        return {RANDOM: None} | {f"q = {share:g}": share for share in self.shares()}


HELP = {
    "data": "digits (1,792 pairs of halves, retrieval among themselves), digits-held-out (1,257 to train on, 540 to "
    "retrieve from) or verses (8,000 in two translations, 2,000 to retrieve from: a head on frozen embeddings; extra "
    "`sentences`)",
    "quantiles": "of the similarity graph, one run for each",
    "scope": "of the quantile: global or row",
    "batch_size": "pairs per step",
    "epochs": "passes over the pairs",
    "seeds": "runs of each batching",
    "lr": "peak learning rate of AdamW: linear warm-up over a tenth of the steps, then cosine to 0",
    "temperature": "similarities are divided by this",
    "threads": "CPU threads of PyTorch",
    "out": "directory of epochs.csv and figure.png",
    "quiet": "no progress bar",
}


class Epoch(NamedTuple):
    """Before an epoch is trained on: the towers as they are, on the batches that are to come."""

    batching: str
    seed: int
    epoch: int
    global_loss: float
    train_loss: float
    gap: float
    purity: float  # share of the pairs of batch-mates that are of one class; NaN without classes
    reciprocal_rank: float  # mean over both directions
    recall: float
    seconds: float  # that choosing the batches took, embeddings included


def train(settings: Settings, pairs: Pairs, batching: str, seed: int) -> Iterator[tuple[Epoch, tuple[Tensor, Tensor]]]:
    """One run: what stands before each epoch, and after the last, with the embeddings of that moment."""
    quantile = settings.batchings()[batching]
    towers, noise = pairs.towers(seed), torch.Generator().manual_seed(seed)
    options = {"drop_last": True, "seed": seed, "scope": settings.scope, "progress": False}
    sampler = GlobalContrastiveBatchSampler(
        len(pairs.train.left), settings.batch_size, quantile=quantile or 0, **options
    )
    loss_fn = ClipLoss(temperature=settings.temperature)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=settings.lr, weight_decay=1e-4)
    schedule = warmup_cosine(settings.epochs * len(sampler))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for epoch in range(settings.epochs + 1):
        start = time.perf_counter()
        embeddings = pairs.embed(towers)
        if quantile is not None:
            sampler.update(*embeddings)
        seconds = time.perf_counter() - start
        sampler.set_epoch(epoch)
        batches = [torch.tensor(batch) for batch in sampler]
        gap = global_train_gap(*embeddings, batches, settings.temperature)
        found = pairs.retrieval(towers)
        means = [statistics.fmean(getattr(side, field) for side in found) for field in ("reciprocal_rank", "recall")]
        yield Epoch(batching, seed, epoch, *gap, purity(pairs.classes, batches), *means, seconds), embeddings
        if epoch < settings.epochs:
            for items in batches:
                loss = loss_fn(*pairs.views(towers, items, noise))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()


def purity(classes: Tensor | None, batches: Sequence[Tensor]) -> float:
    """Share of the pairs of batch-mates that are of one class: false negatives, to a classifier."""
    if classes is None:
        return math.nan
    alike = [classes[items][:, None] == classes[items] for items in batches]
    return statistics.fmean((int(same.sum()) - len(same)) / (len(same) * (len(same) - 1)) for same in alike)


HEADER = ("", "gap untrained", "halfway", "gap", "global loss", "same class %", "MRR %", "@1 %", "s a choice")


def tabulate(settings: Settings, rows: Sequence[Epoch]) -> str:
    """Means and standard deviations over seeds, after the last epoch where nothing else is said."""

    def cell(batching: str, epoch: int, field: str, scale: float = 1) -> str:
        values = [scale * getattr(row, field) for row in rows if (row.batching, row.epoch) == (batching, epoch)]
        return "" if math.isnan(values[0]) else f"{statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f}"

    def line(batching: str) -> tuple[str, ...]:
        fields = (("gap", 1), ("global_loss", 1), ("purity", 100), ("reciprocal_rank", 100), ("recall", 100))
        last = (cell(batching, settings.epochs, *field) for field in fields)
        chosen = [row.seconds for row in rows if row.batching == batching]
        before = cell(batching, 0, "gap"), cell(batching, settings.epochs // 2, "gap")
        return batching, *before, *last, f"{statistics.median(chosen):.2f}"

    return table([HEADER, *map(line, settings.batchings())])


def plot(path: Path, title: str, rows: Sequence[Epoch], embeddings: tuple[Tensor, Tensor], quantile: float) -> None:
    """embeddings: (n, d) of both sides, whose similarities are shown as they lie and in the order of `quantile`."""
    x, y = (normalize(side, dim=1) for side in embeddings)
    order = consecutive_order(similarity_graph(x, y, quantile=quantile, progress=False).matrix)
    figure = Figure(figsize=(8.2, 6.9), layout="constrained")
    figure.suptitle(title)
    before, after, gap, rank = figure.subplots(2, 2).flat
    images = [_means(x, y), _means(x[order], y[order])]
    low, high = (bound(float(bound(image.flatten())) for image in images) for bound in (min, max))
    for axis, image, name in zip(
        (before, after), images, ("items as the data lie", f"items permuted, q = {quantile:g}"), strict=True
    ):
        shown = axis.imshow(image, vmin=low, vmax=high, cmap="viridis", extent=(0, len(x), len(x), 0))
        axis.set_title(name)
    figure.colorbar(shown, ax=after, label=f"left by right, cosine over {len(x) // BLOCKS or 1} items")
    _curves(gap, rows, "gap", "Global minus in-batch loss (nats)")
    _curves(rank, rows, "reciprocal_rank", "Mean reciprocal rank")
    figure.savefig(path, dpi=110)


def _means(x: Tensor, y: Tensor) -> Tensor:
    """Mean similarities of blocks, at most BLOCKS a side: the product of the blocks' means."""
    size = -(-len(x) // BLOCKS)
    means = [side[: len(side) // size * size].view(-1, size, side.shape[1]).mean(1) for side in (x, y)]
    return means[0] @ means[1].T


def _curves(axis: Axes, rows: Sequence[Epoch], field: str, label: str) -> None:
    """Mean over seeds, and the span of all of them, before each epoch."""
    for colour, batching in zip(COLOURS, dict.fromkeys(row.batching for row in rows), strict=False):
        by_epoch: dict[int, list[float]] = {}
        for row in rows:
            if row.batching == batching:
                by_epoch.setdefault(row.epoch, []).append(getattr(row, field))
        epochs, values = list(by_epoch), list(by_epoch.values())
        axis.plot(epochs, [statistics.fmean(found) for found in values], color=colour, label=batching)
        axis.fill_between(
            epochs, [min(found) for found in values], [max(found) for found in values], color=colour, alpha=0.2
        )
    axis.set_xlabel("Epochs trained")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def run(settings: Settings) -> str:
    pairs = DATASETS[settings.data]()
    if settings.batch_size > len(pairs.train.left):
        raise ValueError(f"--batch-size: expected at most {len(pairs.train.left)} (pairs), got {settings.batch_size}")
    batchings, rows = settings.batchings(), []
    shown = sorted(settings.shares())[len(settings.shares()) // 2]
    total = len(batchings) * settings.seeds * (settings.epochs + 1)
    with cpu_threads(settings.threads), tqdm(total=total, unit="epoch", disable=settings.quiet) as progress:
        for batching, quantile in batchings.items():
            for seed in range(settings.seeds):
                for row, embeddings in train(settings, pairs, batching, seed):
                    rows.append(row)
                    progress.update()
                    if (quantile, seed, row.epoch) == (shown, 0, settings.epochs):
                        pictured = embeddings
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "epochs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Epoch._fields, *rows])
    title = (
        f"{settings.data}: {len(pairs.train.left):,} pairs, batches of {settings.batch_size}, {settings.seeds} seeds"
    )
    plot(out / "figure.png", title, rows, pictured, shown)
    about = f"{title}, {settings.epochs} epochs; gap = global loss - in-batch loss, nats; a choice includes embedding"
    return "\n".join([tabulate(settings, rows), about, f"written: {out / 'epochs.csv'}, {out / 'figure.png'}"])


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.two_towers.gcbs"
    settings = parse_settings(program, __doc__.splitlines()[0], Settings, HELP, arguments)
    try:
        print(run(settings))
    except (ImportError, OSError, ValueError) as error:
        print(f"gcbs: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
