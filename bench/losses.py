"""Losses, forward and backward, beside plain torch: time in turns in one process, peak memory in fresh ones.

`python -m bench.losses` prints, for each batch size, the median time of each loss and its ratio to plain NT-Xent, which
materialises all scores, and the peak extra memory of each at the largest batch. Data sets have four times as many items
as a batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.harness import machine, memory, report, timing
from bench.peers import LossStep
from emc2_kernels.losses import CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss

TEMPERATURE = 0.1
HOW = memory.HOW["cpu"]


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
    "EMC2Loss, walk": lambda b, d: EMC2Loss(4 * b, d, temperature=TEMPERATURE, sampler="mh"),
    "EMC2Loss, bank": lambda b, d: EMC2Loss(4 * b, d, temperature=TEMPERATURE, proposals="bank"),
    "cache": lambda b, d: CachedSoftmaxLoss(4 * b, d, temperature=TEMPERATURE),
}


def make_step(name: str, b: int, d: int) -> LossStep:
    """Forward and backward of a loss on one batch."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(4 * b, generator=generator)[:b]
    z0, z1 = (torch.randn(b, d, generator=generator) for _ in range(2))
    return LossStep(LOSSES[name](b, d), z0, z1, index)


def time_batch(b: int, d: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each loss, and the median of its ratios to the plain one, with quartiles."""
    taken = timing.interleave({name: make_step(name, b, d) for name in LOSSES}, rounds)
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
    return memory.warm_growth(make_step(name, 64, d), make_step(name, b, d), torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 2048], help="pairs (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    described = machine.describe(torch.device("cpu"))
    print(machine.heading(described, f"d = {options.dim}"))
    timed = {b: time_batch(b, options.dim, options.rounds) for b in options.batches}
    for b, rows in timed.items():
        for name, row in rows.items():
            low, high = row["ratio_quartiles"]
            print(
                f"b = {b:6}  {name:12}{row['time_ms']:10.3f} ms  {row['ratio_to_plain']:6.2f} ({low:.2f} to {high:.2f})"
            )
    largest = max(options.batches)
    taken = {name: memory.call_isolated("bench.losses", "growth", name, largest, options.dim) for name in LOSSES}
    for name, size in taken.items():
        print(f"b = {largest:6}  {name:12}{size / 1e6:10.1f} MB extra, {size / max(taken['plain'], 1):.3f} of plain")
    print(f"memory: {HOW}")
    if options.json:
        results = {
            "machine": described,
            "dim": options.dim,
            "time": timed,
            "memory": {"pairs": largest, "bytes": taken},
        }
        report.write_json(results, options.json)


if __name__ == "__main__":
    main()
