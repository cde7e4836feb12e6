"""Exact draws from the softmax on the CPU: `gumbel_sample` beside the naive ways, and the matrix product alone.

    python -m bench.gumbel

Medians over interleaved rounds; the ratios are medians of the ratio within a round. On a machine that others use too,
`--process-time` with OMP_NUM_THREADS=1 counts the processor's time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import emc2_kernels as emc2
from bench.harness import machine
from bench.harness.timing import Call, cpu_timer, figures, interleave, ratios
from bench.peers import MatrixProduct

SIZES = [(2048, 2048, 128), (64, 100_000, 128)]
TEMPERATURE = 0.07
NAMES = ("torch.mm", "gumbel_sample", "softmax_sample", "exponential race")


def exponential_race(queries: Tensor, keys: Tensor, num_samples: int) -> Tensor:
    """argmax of softmax / E in plain torch: scores kept, and noise of their size for each sample."""
    weights = torch.softmax(queries @ keys.T / TEMPERATURE, 1)
    noise = torch.empty_like(weights)
    return torch.stack([(weights / noise.exponential_()).argmax(1) for _ in range(num_samples)], 1)


def contenders(n: int, m: int, d: int, num_samples: int) -> dict[str, Call]:
    queries, keys = (torch.nn.functional.normalize(torch.randn(rows, d), dim=1) for rows in (n, m))
    options = {"temperature": TEMPERATURE, "num_samples": num_samples}
    generator = torch.Generator().manual_seed(0)
    calls: tuple[Callable, ...] = (
        MatrixProduct(queries, keys),
        lambda: emc2.gumbel_sample(queries, keys, seed=0, step=0, **options),
        lambda: emc2.softmax_sample(queries, keys, generator=generator, **options),
        lambda: exponential_race(queries, keys, num_samples),
    )
    return dict(zip(NAMES, calls, strict=True))


def process_timer(call: Call, repeats: int) -> float:
    """Seconds of the processor per call, of all threads together."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--process-time", action="store_true")
    options = parser.parse_args()
    timer = process_timer if options.process_time else cpu_timer
    print(machine.heading(machine.describe(torch.device("cpu")), f"float32, temperature {TEMPERATURE}"))
    print(f"{'n':>6}{'m':>8}{'R':>4}  {'':18}{'ms':>9}{'over torch.mm':>15}{'over gumbel_sample':>20}")
    for size in SIZES:
        for num_samples in options.samples:
            seconds = interleave(contenders(*size, num_samples), options.rounds, timer=timer, warmup=1).seconds
            for name, own in seconds.items():
                over_product, over_ours = (statistics.median(ratios(own, seconds[other])) for other in NAMES[:2])
                print(f"{size[0]:6}{size[1]:8}{num_samples:4}  {name:18}", end="")
                print(f"{1e3 * statistics.median(figures(own)):9.2f}{over_product:15.2f}{over_ours:20.2f}", flush=True)


if __name__ == "__main__":
    main()
