"""The shapes that tune.py tunes for, the most important first, and the settings that could be the best for each.

A candidate costs seconds of compiling, so only those stand here that can win. What rules the others out is known
before they run, from what the kernels compile to for sm_90 (compiled.py):

- A product leaves block_m x 128 scores in the registers of its threads. With 64 a thread the walk just fits; with 128
  it spills. So a sweep has 64 rows for 4 warps or 128 for 8, and a log-sum-exp, which keeps less, may have 128 for 4.
- Less than 16 rows a warp, or 32 dimensions a product, leave the matrix unit half empty in half precision.
- All stages of keys (and of queries, where they do not stay) must lie in a program's shared memory, 227 KB on sm_90.
  On other GPUs what is too large fails when it is compiled, and is told.
- A limit on registers that lets a third program of 4 warps on a multiprocessor (168 of a thread) makes the sweep spill
  340 to 420 bytes a thread, instead of 50.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """What to tune for. `kind` is the table's name in tuning.py; `draws` are proposals of a gathered walk."""

    kind: str
    dtype: torch.dtype
    n: int
    m: int
    d: int
    draws: int = 0

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32


HALF = torch.bfloat16
SHAPES = [
    Shape("sweep", HALF, 32768, 32768, 128),
    Shape("sweep", HALF, 32768, 32768, 512),
    Shape("lse_gradient", HALF, 32768, 32768, 128),
    Shape("lse_gradient", HALF, 32768, 32768, 512),
    Shape("lse", HALF, 32768, 32768, 128),
    Shape("lse", HALF, 32768, 32768, 512),
    Shape("sweep", HALF, 2048, 2048, 128),
    Shape("gathered", HALF, 32768, 1_000_000, 128, draws=256),
    Shape("sweep", HALF, 64, 1_000_000, 128),
    Shape("sweep", torch.float32, 8192, 8192, 128),
]
TOYS = [
    Shape("lse", torch.float32, 2, 12, 4),
    Shape("lse_gradient", torch.float32, 2, 12, 4),
    Shape("gathered", torch.float32, 2, 12, 4, draws=6),
    Shape("sweep", torch.float32, 2, 12, 4),
]


def sweep_candidates(tuning: ModuleType, shape: Shape) -> Iterator[Any]:
    if shape.half:
        blocks = [(64, 4)] if shape.n <= 2048 else [(64, 4), (128, 8)]  # few rows: more programs
        sizes = itertools.product(blocks, [(64, 2), (64, 3), (64, 4), (128, 2), (128, 3)])
    else:
        sizes = itertools.product([(32, 4), (64, 8)], [(32, 2), (32, 3), (64, 2), (64, 3)])
    for (block_m, warps), (block_d, stages) in sizes:
        yield tuning.Sweep(block_m, block_d, warps, stages, None, "")


def gathered_candidates(tuning: ModuleType, shape: Shape) -> Iterator[Any]:
    for block_k, warps in itertools.product((16, 32, 64, 128), (1, 2, 4)):
        numbers = block_k * shape.d // (32 * warps)  # of the keys, a thread: fewer leave loads too narrow, more spill
        if 32 <= numbers <= 128:
            yield tuning.Gathered(block_k, 256, warps, "")


def lse_candidates(tuning: ModuleType, shape: Shape) -> Iterator[Any]:
    """128 rows for 4 warps fit in where one product takes whole rows; else they spill 250 bytes a thread and more."""
    blocks = [(64, 4), (128, 8), (128, 4)] if shape.d <= 128 else [(64, 4), (128, 8)]
    for (block_m, warps), (block_d, stages) in itertools.product(blocks, [(64, 3), (64, 4), (128, 2), (128, 3)]):
        spills = (block_m, warps) == (128, 4) and block_d < shape.d
        if not spills:
            yield tuning.Lse(block_m, block_d, warps, stages, "")


def lse_gradient_candidates(tuning: ModuleType, shape: Shape) -> Iterator[Any]:
    """Two accumulators, scores and result: all of the result at once, so that a tile is loaded, and its scores made,
    once.

    Few others a tile leave room for more of them in flight; but then the first product waits for shared memory, which
    gives it all 64 owners for each 16, 32 or 64 others of a warp group. Left out is what spills within the loop: 128
    owners with 128 others, or with all of 256 columns in both roles; and the one product for what the other sees
    (`apart`), 150 to 370 times of 64 others in Triton 3.6.
    """
    if shape.d <= 128:
        sizes = [(64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)]
    elif shape.d <= 256:
        sizes = [(64, 32, 4, 3), (64, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 32, 4, 4)]
    else:
        sizes = [(64, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 4), (64, 32, 8, 2)]
        # Owners again with each tile, but little shared memory.
        yield tuning.LseGradient(64, 64, 64, 512, 8, 3, True, "")
    width = 128 if shape.d <= 128 else 256 if shape.d <= 256 else 512
    for block_m, block_n, warps, in_flight in sizes:
        yield tuning.LseGradient(block_m, block_n, width, width, warps, in_flight, True, "")


CANDIDATES = {
    "sweep": sweep_candidates,
    "gathered": gathered_candidates,
    "lse": lse_candidates,
    "lse_gradient": lse_gradient_candidates,
}


def toy_candidates(tuning: ModuleType, shape: Shape) -> list[Any]:
    """For a rehearsal: one that runs in Triton's interpreter, and one that does not (24 is no power of two)."""
    return {
        "sweep": [tuning.Sweep(16, 16, 4, 1, None, ""), tuning.Sweep(24, 16, 4, 1, None, "")],
        "gathered": [tuning.Gathered(8, 16, 1, ""), tuning.Gathered(5, 16, 1, "")],
        "lse": [tuning.Lse(16, 16, 4, 1, ""), tuning.Lse(24, 16, 4, 1, "")],
        "lse_gradient": [tuning.LseGradient(size, 128, 16, 32, 4, 1, False, "") for size in (16, 24)],
    }[shape.kind]


def shipped(tuning: ModuleType, shape: Shape, generation: int) -> Any:
    """The table's row for such a shape."""
    key = {
        "sweep": (generation, shape.half, shape.d, shape.n),
        "gathered": (generation,),
        "lse": (generation, shape.half),
        "lse_gradient": (generation, shape.half, shape.d),
    }[shape.kind]
    return getattr(tuning, shape.kind)(*key)


def candidates(tuning: ModuleType, shape: Shape, generation: int, rehearsal: bool = False) -> list[Any]:
    """What is measured for a shape: the table's row first, then what could beat it. The last field says nothing."""
    make = toy_candidates if rehearsal else CANDIDATES[shape.kind]
    first = shipped(tuning, shape, generation)._replace(measured="")
    return [first, *(one for one in make(tuning, shape) if one != first)]
