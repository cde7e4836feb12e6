"""EMC² beside SimCLR on a CPU in about a minute: the same encoder, batches, augmentations and settings, another loss.

python -m examples.demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from examples.pretrain.config import Config
from examples.pretrain.data import DATASETS
from examples.pretrain.encoders import build_encoder
from examples.pretrain.evaluate import FEW_LABELS, Accuracy, accuracy, encode, raw_pixels
from examples.pretrain.processes import cpu_threads
from examples.pretrain.report import plot_curves, table
from examples.pretrain.run import Run
from examples.pretrain.training import Results, train

NAMES = {"simclr": "SimCLR", "emc2": "EMC²"}
HEADER = ("", "probe", "1-NN", "probe*", "1-NN*", "NT-Xent", "mean cosine", "seconds", "ms/step")


def row(name: str, found: Accuracy, results: Results | None = None) -> tuple[str, ...]:
    cells = (name, *(f"{100 * share:.1f}" for share in found[:4]))
    if results is None:
        return (*cells, "", "", "", "")
    last = results.history[-1]
    speed = 1000 * results.seconds / results.steps
    return (*cells, f"{last['ntxent']:.3f}", f"{last['mean_cosine']:.3f}", f"{results.seconds:.1f}", f"{speed:.1f}")


def compare(base: Config) -> str:
    """Trains with every method, writes the runs and their curves below `base.directory`, returns what is printed."""
    split = DATASETS[base.data]()
    with cpu_threads(base.threads):
        pixels = accuracy(raw_pixels(split))
        untrained = accuracy(encode(build_encoder(base.dim, base.seed), split))
        for method in NAMES:
            # One step that nothing is kept of: the kernels are built on first use, and no run is to be charged for it.
            first_batch = torch.arange(base.batch_size, device=base.torch_device)
            Run(replace(base, method=method), split.to(base.torch_device)).train_step(first_batch)
    rows = [HEADER, row("raw pixels", pixels), row("untrained", untrained)]
    histories = {}
    for method, name in NAMES.items():
        results = train(replace(base, method=method, out=str(base.directory / method)))
        rows.append(row(name, results.accuracy, results))
        histories[name] = results.history
    curves = base.directory / "curves.png"
    title = f"{base.data}, batch {base.batch_size}, {base.epochs} epochs"
    plot_curves(curves, histories, title, untrained.few_nearest_neighbour)
    return "\n".join(
        [
            table(rows),
            f"Accuracy in % on {len(split.test_images)} held-out images; differences of less than a point are chance.",
            f"probe, 1-NN: all {len(split.train_images)} training labels; with *: {FEW_LABELS} labels a class.",
            "NT-Xent (in the batch) and mean cosine: means over the last epoch. Seconds: training alone.",
            f"Curves: {curves}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/demo", help="directory of runs and curves (default: runs/demo)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        base = Config(out=options.out)
    except ValueError as error:
        parser.error(str(error))
    print(compare(base))
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
