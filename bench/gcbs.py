"""What choosing batches costs on the CPU: time by part and peak memory of graph and order, as the data set grows.

    python -m bench.gcbs

Each row is a process of its own, so that its peak memory is its own. Items are noisy copies of N / 100 centres (cosine
about 0.5 within a hundred), or independent. "product" is the N x N matrix product alone, in the same tiles.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.harness import machine
from bench.harness.memory import peak_resident
from emc2_kernels.batching import consecutive_order, graph, similarity_graph

HEADER = ("N", "data", "threshold s", "similarities s", "order s", "total s", "product s", "peak MB", "entries a row")


class Cost(NamedTuple):
    threshold: float  # seconds, as the following
    similarities: float  # products and what is kept of them
    order: float
    total: float
    product: float
    peak: float  # MB over what the process had with the embeddings in it
    entries: float  # a row, before symmetrising


def make_items(n: int, dim: int, data: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, dim, generator=generator)
    if data == "independent":
        return noise
    centres = torch.randn(max(1, n // 100), dim, generator=generator)
    return centres[torch.randint(len(centres), (n,), generator=generator)] + noise


def record_time(name: str, seconds: dict[str, float]) -> None:
    """Makes a function of the graph's module add its time to `seconds`."""
    inner = getattr(graph, name)

    def outer(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = inner(*arguments)
        seconds[name] = time.perf_counter() - start
        return result

    setattr(graph, name, outer)


def measure_cost(n: int, dim: int, data: str, quantile: float) -> Cost:
    x = make_items(n, dim, data)
    torch.mm(x[:64], x[:64].T)  # the library's own buffers
    consecutive_order(similarity_graph(x[:200]).matrix)  # SciPy's modules
    before, parts = peak_resident(), {}
    for name in ("_estimate_threshold", "_largest"):
        record_time(name, parts)
    start = time.perf_counter()
    found = similarity_graph(x, quantile=quantile, progress=False)
    middle = time.perf_counter()
    order = consecutive_order(found.matrix)
    end = time.perf_counter()
    most = (peak_resident() - before) / 2**20
    assert np.array_equal(np.sort(order), np.arange(n))
    product = time.perf_counter()
    for _ in graph._row_blocks(x, x, False):
        pass
    product = time.perf_counter() - product
    return Cost(*parts.values(), end - middle, end - start, product, most, found.facts.entries / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000], metavar="N")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--quantile", type=float, default=0.999)
    given = parser.parse_args()
    described = machine.describe(torch.device("cpu"))
    print(machine.heading(described, f"d = {given.dim}, q = {given.quantile:g}"))
    print("  ".join(f"{name:>14}" for name in HEADER))
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, **fresh) as pool:
        for n in given.sizes:
            for data in ("centres", "independent"):
                found = pool.submit(measure_cost, n, given.dim, data, given.quantile).result()
                cells = [*(f"{seconds:.2f}" for seconds in found[:5]), f"{found.peak:.0f}", f"{found.entries:.0f}"]
                print("  ".join(f"{cell:>14}" for cell in (f"{n:,}", data, *cells)), flush=True)


if __name__ == "__main__":
    main()
