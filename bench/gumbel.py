"""Exact draws from the softmax on the CPU: `gumbel_sample` beside the naive ways, and the matrix product alone.

    python bench/gumbel.py --rounds 15

Medians over interleaved rounds; the ratios are medians of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SIZES = [(2048, 2048, 128), (64, 100_000, 128)]
TEMPERATURE = 0.07


def exponential_race(queries: Tensor, keys: Tensor, num_samples: int) -> Tensor:
    """argmax of exp(s) / E in plain torch: scores kept, noise for each sample of the size of the scores."""
    weights = torch.softmax(queries @ keys.T / TEMPERATURE, 1)
    noise = torch.empty_like(weights)
    return torch.stack([(weights / noise.exponential_()).argmax(1) for _ in range(num_samples)], 1)


def contenders(n: int, m: int, d: int, num_samples: int) -> dict[str, Callable[[], Tensor]]:
    import emc2_kernels as emc2

    queries, keys = (torch.nn.functional.normalize(torch.randn(rows, d), dim=1) for rows in (n, m))
    product = torch.empty(n, m)
    options = {"temperature": TEMPERATURE, "num_samples": num_samples}
    generator = torch.Generator().manual_seed(0)
    return {
        "torch.mm": lambda: torch.mm(queries, keys.T, out=product),
        "gumbel_sample": lambda: emc2.gumbel_sample(queries, keys, seed=0, step=0, **options),
        "softmax_sample": lambda: emc2.softmax_sample(queries, keys, generator=generator, **options),
        "exponential race": lambda: exponential_race(queries, keys, num_samples),
    }


def measure(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'n':>6}{'m':>8}{'R':>4}  {'':18}{'ms':>9}{'over torch.mm':>15}{'over gumbel_sample':>20}")
    for size in SIZES:
        for num_samples in options.samples:
            seconds = measure(contenders(*size, num_samples), options.rounds)
            for name, own in seconds.items():
                over = [
                    statistics.median(a / b for a, b in zip(own, seconds[other], strict=True))
                    for other in ("torch.mm", "gumbel_sample")
                ]
                place = f"{size[0]:6}{size[1]:8}{num_samples:4}"
                print(f"{place}  {name:18}{1e3 * statistics.median(own):9.2f}{over[0]:15.2f}{over[1]:20.2f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
