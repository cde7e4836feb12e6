"""Losses, forward and backward, beside plain torch: time in turns in one process, peak memory in fresh ones.

`python bench/losses.py` prints, for each batch size, the median time of each loss and its ratio to plain NT-Xent, which
materialises all scores, and the peak extra memory of each at the largest batch. Data sets have four times as many items
as a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import machine
import memory
import timing
import torch
from torch import Tensor, nn

import emc2_kernels
from emc2_kernels import files
from emc2_kernels.losses import CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss

TEMPERATURE = 0.1
HOW = memory.HOW["cpu"]

# One batch comes again and again, as no training would have it.
warnings.filterwarnings("ignore", message="index seems to name classes")


class PlainNTXent(nn.Module):
    """What one writes first: all scores of the 2b anchors, their diagonal masked, and cross entropy."""

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean over the 2b anchors; `z0`, `z1` (b, d). `index` is taken and means nothing."""
        anchors = nn.functional.normalize(torch.cat((z0, z1)), dim=1)
        rows = torch.arange(len(anchors), device=anchors.device)
        scores = anchors @ anchors.T / TEMPERATURE
        scores = scores.masked_fill(rows[:, None] == rows, -torch.inf)
        return nn.functional.cross_entropy(scores, rows.roll(len(z0)))


LOSSES: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda b, d: PlainNTXent(),
    "NTXentLoss": lambda b, d: NTXentLoss(temperature=TEMPERATURE),
    "ClipLoss": lambda b, d: ClipLoss(temperature=TEMPERATURE),
    "SogCLRLoss": lambda b, d: SogCLRLoss(4 * b, temperature=TEMPERATURE),
    "iSogCLR": lambda b, d: SogCLRLoss(4 * b, temperature=TEMPERATURE, individual_temperature=True),
    "EMC2Loss": lambda b, d: EMC2Loss(4 * b, d, temperature=TEMPERATURE),
    "EMC2, bank": lambda b, d: EMC2Loss(4 * b, d, temperature=TEMPERATURE, proposals="bank"),
    "cache": lambda b, d: CachedSoftmaxLoss(4 * b, d, temperature=TEMPERATURE),
}


class Step:
    """Forward and backward of a loss on one batch."""

    def __init__(self, name: str, b: int, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.loss, self.index = LOSSES[name](b, d), torch.randperm(4 * b, generator=generator)[:b]
        self.z0, self.z1 = (torch.randn(b, d, generator=generator).requires_grad_() for _ in range(2))

    def __call__(self) -> tuple[Tensor, ...]:
        value = self.loss(self.z0, self.z1, self.index)
        return torch.autograd.grad(value, (self.z0, self.z1))


def time_batch(b: int, d: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each loss, and the median of its ratios to the plain one, with quartiles."""
    taken = timing.interleave({name: Step(name, b, d) for name in LOSSES}, rounds)
    rows = {}
    for name, seconds in taken.seconds.items():
        ratio = timing.summarize(timing.ratios(seconds, taken.seconds["plain"]))
        rows[name] = {
            "time_ms": 1e3 * timing.summarize(timing.figures(seconds)).median,
            "ratio_to_plain": ratio.median,
            "ratio_quartiles": [ratio.lower_quartile, ratio.upper_quartile],
        }
    return rows


def growth(name: str, b: int, d: int) -> int:
    """Peak extra bytes of one step, in this process."""
    for _ in range(2):
        Step(name, 64, d)()
    square = torch.ones(1024, 1024)
    (square @ square).exp_().sum()  # starts the threads of torch and of its matrix library, with their buffers
    return memory.peak_growth(Step(name, b, d), torch.device("cpu"))


def growth_in_fresh_process(name: str, b: int, d: int) -> int:
    library = str(Path(emc2_kernels.__file__).resolve().parent.parent)
    # Blocks from 64 KiB up then go back to the system when freed, and are counted when they are taken again.
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "PYTHONPATH": os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--growth-of", name, "--batches", str(b), "--dim", str(d)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 2048], help="pairs (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth-of", choices=list(LOSSES), help="print only the peak extra bytes of one step")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.growth_of:
        print(growth(options.growth_of, options.batches[0], options.dim))
        return
    described = machine.describe(torch.device("cpu"))
    print(f"{described['device']}, {options.threads} threads, load {described['load_average']}; d = {options.dim}")
    timed = {b: time_batch(b, options.dim, options.rounds) for b in options.batches}
    for b, rows in timed.items():
        for name, row in rows.items():
            low, high = row["ratio_quartiles"]
            print(
                f"b = {b:6}  {name:12}{row['time_ms']:10.3f} ms  {row['ratio_to_plain']:6.2f} ({low:.2f} to {high:.2f})"
            )
    largest = max(options.batches)
    taken = {name: growth_in_fresh_process(name, largest, options.dim) for name in LOSSES}
    for name, size in taken.items():
        print(f"b = {largest:6}  {name:12}{size / 1e6:10.1f} MB extra, {size / taken['plain']:.3f} of plain")
    print(f"memory: {HOW}")
    if options.json:
        results = {
            "machine": described,
            "dim": options.dim,
            "time": timed,
            "memory": {"pairs": largest, "bytes": taken},
        }
        files.write(options.json, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
