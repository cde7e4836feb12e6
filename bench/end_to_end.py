"""A whole training step of examples.pretrain with each method: its time, and what part of it is the loss.

`python -m bench.end_to_end` prints, for each batch size and method, the median time of a step (views, encoder, loss,
backward, optimizer), its ratio to the step with NT-Xent, the share of the loss, forward and backward by itself on
embeddings of the same batch, and the share of drawing negatives, from a trace.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import machine, report, timing
from examples.pretrain.config import Config
from examples.pretrain.data import DATASETS, load
from examples.pretrain.images import Split
from examples.pretrain.run import Run

METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"method": "simclr"},
    "emc2": {"method": "emc2"},
    "emc2, walk": {"method": "emc2", "sampler": "mh"},
    "emc2, bank": {"method": "emc2", "proposals": "bank"},
    "sogclr": {"method": "sogclr"},
    "isogclr": {"method": "isogclr"},
    "cached": {"method": "cached"},
}
TRACED = 5  # steps


class Training:
    """Steps of one method on one batch after another, as an epoch has them, without end."""

    def __init__(self, config: Config, split: Split) -> None:
        self.run = Run(config, split)
        self.batches = itertools.chain.from_iterable(iter(self.run.batches, None))

    def __call__(self) -> dict[str, Tensor]:
        with self.run.tracer.step():
            return self.run.train_step(next(self.batches))


class Loss:
    """The loss of such a step alone: forward and backward, down to the embeddings of the batch."""

    def __init__(self, config: Config, split: Split) -> None:
        self.run = Run(config, split)
        self.steps = self._steps()

    def _steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        kept = []
        for index in self.run.batches():
            with torch.no_grad():
                kept.append((*self.run.encoder(self.run.views(index)).chunk(2), index.to(self.run.config.torch_device)))
        yield from itertools.cycle(kept)

    def __call__(self) -> None:
        z0, z1, index = next(self.steps)
        self.run.optimizer.zero_grad()  # some methods encode items again
        self.run.loss(z0.detach().requires_grad_(), z1.detach().requires_grad_(), index).backward()


def time_batch(base: Config, split: Split, rounds: int) -> dict[str, dict[str, float]]:
    """Of each method: milliseconds of a step, ratio to simclr's, shares of the loss and of drawing negatives; medians
    over rounds with quartiles, but for drawing."""
    calls: dict[str, Training | Loss] = {}
    drawing = {}
    for name, options in METHODS.items():
        config = replace(base, **options)
        traced = Training(replace(config, profile=TRACED), split)
        while not traced.run.tracer.shares:
            traced()
        drawing[name] = traced.run.tracer.shares["drawing"]
        calls[name], calls[f"{name}: loss"] = Training(config, split), Loss(config, split)
    taken = timing.interleave(calls, rounds, timer=timing.choose_timer(base.torch_device)).seconds
    rows = {}
    for name in METHODS:
        ratio = timing.summarize(timing.ratios(taken[name], taken["simclr"]))
        share = timing.summarize(timing.ratios(taken[f"{name}: loss"], taken[name]))
        rows[name] = {
            "step_ms": 1e3 * timing.summarize(timing.figures(taken[name])).median,
            "ratio_to_simclr": ratio.median,
            "ratio_quartiles": [ratio.lower_quartile, ratio.upper_quartile],
            "loss_share": share.median,
            "loss_share_quartiles": [share.lower_quartile, share.upper_quartile],
            "drawing_share": drawing[name],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=list(DATASETS), default="digits")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 1024], help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = {}
    with tempfile.TemporaryDirectory() as out:
        base = Config(data=options.data, device=options.device, threads=options.threads, out=out, quiet=True)
        described = machine.describe(base.torch_device)
        print(machine.heading(described, options.data))
        split = load(options.data).to(base.torch_device)
        for b in options.batches:
            timed[b] = time_batch(replace(base, batch_size=b), split, options.rounds)
            for name, row in timed[b].items():
                spread = "({:.2f} to {:.2f})".format(*row["ratio_quartiles"])
                print(
                    f"b = {b:5}  {name:11}{row['step_ms']:8.1f} ms  {row['ratio_to_simclr']:5.2f} of simclr {spread}"
                    f"  loss {row['loss_share']:6.1%}  drawing {row['drawing_share']:6.1%}"
                )
    if options.json:
        results = {"machine": described, "data": options.data, "time": timed}
        report.write_json(results, options.json)


if __name__ == "__main__":
    main()
