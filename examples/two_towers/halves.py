"""Two modalities: the left and the right half of each digit, a tower for each, and the one that belongs to the other.

python -m examples.two_towers.halves --method sogclr
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from emc2_kernels import losses
from examples.pretrain.config import expect, expect_choice
from examples.pretrain.data import digits
from examples.pretrain.images import batches
from examples.pretrain.optimizers import warmup_cosine
from examples.pretrain.processes import cpu_threads
from examples.pretrain.report import table
from examples.two_towers.arguments import parse_settings

# Of the losses that losses.get knows, those that have a setting for two modalities.
METHODS = ("clip", "sogclr", "isogclr", "emc2", "cached")
HEADER = ("", "L>R @1", "MRR", "R>L @1", "MRR", "CLIP value", "mean cosine", "seconds", "ms/step")
PIXELS, HIDDEN, NOISE = 32, 128, 0.1  # of a half; of a tower; standard deviation, against learning pairs by heart


@dataclass(frozen=True)
class Settings:
    """Defaults are one reasonable setting for all methods, tuned for none."""

    method: str = "all"
    batch_size: int = 32
    epochs: int = 40
    lr: float = 2e-3
    temperature: float = 0.1
    dim: int = 32
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        expect_choice("method", self.method, ("all", *METHODS))
        expect("batch_size", self.batch_size, "an integer of at least 2", self.batch_size >= 2)
        expect("epochs", self.epochs, "an integer of at least 1", self.epochs >= 1)
        expect("lr", self.lr, "a finite number above 0", 0 < self.lr < float("inf"))
        expect("temperature", self.temperature, "a finite number above 0", 0 < self.temperature < float("inf"))
        expect("dim", self.dim, "an integer of at least 2", self.dim >= 2)
        expect("seed", self.seed, "an integer from 0 to below 2**63", 0 <= self.seed < 2**63)


HELP = {
    "method": f"{', '.join(METHODS)}, or all of them one after the other",
    "batch_size": "digits per step",
    "epochs": "passes over the training digits",
    "lr": "peak learning rate of AdamW: linear warm-up over a tenth of the steps, then cosine to 0",
    "temperature": "similarities are divided by this",
    "dim": "size of the embeddings",
    "seed": "names the initial weights, the batches, the noise and the chains",
    "quiet": "no progress bar",
}


class Halves(NamedTuple):
    """(n, 32) float32 pixels in [0, 1] each; row i of the one belongs to row i of the other."""

    left: Tensor
    right: Tensor


class Retrieval(NamedTuple):
    """Of the n held-out halves asked for, 0 to 1."""

    recall: float  # share whose own other half comes first
    reciprocal_rank: float  # mean of 1 / its rank


def halves() -> tuple[Halves, Halves]:
    """1,257 digits to train on, 540 held out."""
    split = digits()
    train, test = (
        Halves(*(half.flatten(1) for half in images.chunk(2, dim=3)))
        for images in (split.train_images, split.test_images)
    )
    return train, test


def build_towers(dim: int, seed: int) -> nn.ModuleList:
    """One for left halves, one for right halves. The caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            nn.Sequential(
                nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, dim)
            )
            for _ in range(2)
        )


@torch.no_grad()
def retrieve(queries: Tensor, keys: Tensor) -> Retrieval:
    """queries, keys (n, d), row i of the one belongs to row i of the other."""
    similarities = normalize(queries, dim=1) @ normalize(keys, dim=1).T
    # Ties count against it: towers that map everything to one point have found nothing.
    rank = (similarities >= similarities.diagonal()[:, None]).sum(1).double()
    return Retrieval((rank == 1).double().mean().item(), (1 / rank).mean().item())


class Run:
    """Towers, loss and optimizer of one method."""

    def __init__(self, settings: Settings, method: str, train: Halves) -> None:
        self.settings, self.train = settings, train
        seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        self.order_generator, self.noise_generator = (torch.Generator().manual_seed(seed) for seed in seeds)
        self.towers = build_towers(settings.dim, settings.seed)
        self.loss = build_loss(settings, method, len(train.left), self.encode)
        self.steps = settings.epochs * (len(train.left) // settings.batch_size)
        # A loss may have parameters of its own: a temperature that is learned.
        parameters = [*self.towers.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=1e-4)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine(self.steps))

    def tower(self, side: int, items: Tensor) -> Tensor:
        """items (k,) -> (k, dim) embeddings of their left (0) or right (1) halves, noise added."""
        pixels = self.train[side][items]
        noise = torch.empty_like(pixels).normal_(std=NOISE, generator=self.noise_generator)
        return self.towers[side](pixels + noise)

    def encode(self, items: Tensor, views: Tensor) -> Tensor:
        """items (k,), views (k,) -> (k, dim) with gradient: what a loss wants to have encoded again."""
        sides = [views == side for side in range(2)]
        embeddings = torch.cat([self.tower(side, items[chosen]) for side, chosen in enumerate(sides)])
        order = torch.cat([chosen.nonzero().squeeze(1) for chosen in sides])
        return torch.zeros_like(embeddings).index_copy(0, order, embeddings)

    def epoch(self, progress: tqdm) -> dict[str, float]:
        """One pass over the digits. Returns means of the loss's statistics."""
        collected = []
        for index in batches(len(self.train.left), self.settings.batch_size, self.order_generator):
            loss, stats = self.loss(self.tower(0, index), self.tower(1, index), index, return_stats=True)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            progress.update()
            collected.append(stats)
        return {name: torch.stack([stats[name] for stats in collected]).mean().item() for name in collected[0]}


def build_loss(settings: Settings, method: str, num_items: int, encode: Any) -> nn.Module:
    common = {
        "num_items": num_items,
        "dim": settings.dim,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "bimodal": True,
    }
    takes = losses.TABLE[method].options()
    options = {name: value for name, value in common.items() if name in takes}
    if method == "cached":
        options["encode"] = encode
    return losses.get(method, **options)


def scores(towers: nn.ModuleList, test: Halves) -> tuple[str, ...]:
    """Retrieval of held-out halves, left to right and right to left, in %."""
    with torch.no_grad():
        left, right = (tower(half) for tower, half in zip(towers, test, strict=True))
    found = (*retrieve(left, right), *retrieve(right, left))
    return tuple(f"{100 * share:.1f}" for share in found)


def row(method: str, settings: Settings, train: Halves, test: Halves) -> tuple[str, ...]:
    """Trains with one method."""
    run = Run(settings, method, train)
    start = time.perf_counter()
    with tqdm(total=run.steps, desc=method, unit="step", mininterval=1, disable=settings.quiet) as progress:
        for _ in range(settings.epochs):
            stats = run.epoch(progress)
    seconds = time.perf_counter() - start
    cells = (f"{stats['ntxent']:.3f}", f"{stats['mean_cosine']:.3f}", f"{seconds:.1f}")
    return (method, *scores(run.towers, test), *cells, f"{1000 * seconds / run.steps:.1f}")


def compare(settings: Settings) -> str:
    train, test = halves()
    if settings.batch_size > len(train.left):
        raise ValueError(f"--batch-size: expected at most {len(train.left)} (digits), got {settings.batch_size}")
    methods = METHODS if settings.method == "all" else (settings.method,)
    blank = ("",) * 4
    with cpu_threads(1):  # a second thread does not pay with towers this small
        rows = [HEADER, ("untrained", *scores(build_towers(settings.dim, settings.seed), test), *blank)]
        rows += [row(method, settings, train, test) for method in methods]
    return "\n".join(
        [
            table(rows),
            f"Left halves of {len(test.left)} held-out digits ask for their right halves (L>R), and vice versa.",
            "@1: recall at 1, MRR: mean reciprocal rank, in %. In-batch CLIP value and mean cosine: of the last epoch.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m examples.two_towers.halves"
    settings = parse_settings(program, __doc__.splitlines()[0], Settings, HELP, arguments)
    try:
        print(compare(settings))
    except ValueError as error:
        print(f"halves: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
