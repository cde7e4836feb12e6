"""The sizes that the kernels are compiled with: a small table, so that no user's first step begins with a search.

`bench/gpu/tune.py` measures the candidates on a GPU and prints rows for these tables. A row says where it was measured.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Sweep(NamedTuple):
    block_m: int  # rows of a program
    block_d: int  # dimensions of one product
    num_warps: int
    num_stages: int  # tiles of keys in flight
    max_registers: int | None  # of a thread; None: as many as the compiler takes
    measured: str  # where


class Gathered(NamedTuple):
    block_k: int  # proposals of one scan
    block_d: int
    num_warps: int
    measured: str


class Lse(NamedTuple):
    block_m: int  # rows of a program; its tiles have 128 keys, as the sweep's
    block_d: int  # dimensions of one product
    num_warps: int
    num_stages: int
    measured: str


class LseGradient(NamedTuple):
    block_m: int
    block_n: int  # others of a tile
    block_d: int
    block_out: int  # dimensions of a program's result
    num_warps: int
    num_stages: int
    apart: bool  # whether the compiler is kept from seeing that its first product feeds the second
    measured: str


NOT_MEASURED = "not measured: chosen by registers and shared memory of the compiled code"

ANY = 1 << 62

# By (generation, half precision?, largest d, largest n). Generation is the major compute capability; of the newest that
# is not newer than the GPU, the tightest row that holds. How m is cut follows from `splits`.
#
# Up to d = 128 on Hopper and later one product takes whole rows: queries then stay in shared memory. On Ampere they
# would stay in registers, and push the walk out of them.
SWEEPS: dict[tuple[int, bool, int, int], Sweep] = {
    (8, True, ANY, ANY): Sweep(64, 64, 4, 3, None, NOT_MEASURED),
    (8, False, ANY, ANY): Sweep(32, 32, 4, 2, None, NOT_MEASURED),
    (9, True, 128, ANY): Sweep(64, 128, 4, 2, None, NOT_MEASURED),
    (9, True, ANY, 64): Sweep(64, 64, 4, 3, None, NOT_MEASURED),
    (9, True, ANY, ANY): Sweep(128, 64, 8, 3, None, NOT_MEASURED),
    (9, False, ANY, ANY): Sweep(32, 32, 4, 2, None, NOT_MEASURED),
    (10, True, 128, ANY): Sweep(64, 128, 4, 2, None, NOT_MEASURED),
    (10, True, ANY, ANY): Sweep(64, 64, 4, 3, None, NOT_MEASURED),
    (10, False, ANY, ANY): Sweep(32, 32, 4, 2, None, NOT_MEASURED),
}
GATHERED: dict[int, Gathered] = {8: Gathered(32, 256, 2, NOT_MEASURED)}

# By (generation, half precision?), as above; of gradients by the largest d, too.
#
# A gradient keeps the result of its owners in registers. Up to d = 512 on Hopper that is all of it: scores are made
# once, of a tile that is loaded once. 64 owners of 512 columns take 128 registers of 256 threads each, owners and two
# tiles of 64 others 192 KB of shared memory. Up to 256, two programs of 4 warps share a multiprocessor: one multiplies
# while the other makes weights. On Blackwell the compiler keeps accumulators elsewhere, and what is for Hopper spills.
LSES: dict[tuple[int, bool], Lse] = {
    (8, True): Lse(128, 128, 8, 2, NOT_MEASURED),
    (8, False): Lse(64, 32, 4, 2, NOT_MEASURED),
    (10, True): Lse(64, 64, 4, 3, NOT_MEASURED),
    (10, False): Lse(64, 32, 4, 2, NOT_MEASURED),
}
LSE_GRADIENTS: dict[tuple[int, bool, int], LseGradient] = {
    (8, True, ANY): LseGradient(64, 128, 64, 128, 8, 2, False, NOT_MEASURED),
    (8, False, ANY): LseGradient(32, 128, 32, 64, 4, 2, False, NOT_MEASURED),
    (9, True, 128): LseGradient(64, 128, 128, 128, 4, 2, True, NOT_MEASURED),
    (9, True, 256): LseGradient(64, 32, 256, 256, 4, 3, True, NOT_MEASURED),
    (9, True, 512): LseGradient(64, 64, 512, 512, 8, 2, True, NOT_MEASURED),
    (9, True, ANY): LseGradient(64, 64, 64, 512, 8, 3, True, NOT_MEASURED),
    (9, False, ANY): LseGradient(32, 128, 32, 64, 4, 2, False, NOT_MEASURED),
    (10, True, ANY): LseGradient(64, 128, 64, 128, 8, 2, False, NOT_MEASURED),
    (10, False, ANY): LseGradient(32, 128, 32, 64, 4, 2, False, NOT_MEASURED),
}

PROGRAMS_PER_PROCESSOR = 2  # of the sweep, at once
GATHERED_PROGRAMS = 4  # of the gathered walk, in the place of each of those
MAX_SPLITS = 511  # composed by one program of the last launch
ENDING = 2.0  # what the end of a program costs, in tiles
# Up to so many tiles of a program, or so many for each sample, a sweep records its samples on the way, in one launch.
# Beyond, the registers that recording takes from every tile cost more than a second launch, which walks the tiles of
# the samples again. Not measured.
TILES_ON_THE_WAY, TILES_PER_SAMPLE = 8, 2


@lru_cache(maxsize=256)
def sweep(generation: int, half: bool, d: int, n: int) -> Sweep:
    """The row for sweeps of n rows of d elements."""
    newest = max(row[0] for row in SWEEPS if row[0] <= max(generation, 8))
    rows = [row for row in SWEEPS if row[:2] == (newest, half) and d <= row[2] and n <= row[3]]
    return SWEEPS[min(rows)]


def records_on_the_way(tiles: int, samples: int) -> bool:
    """Whether a sweep takes one launch, whose programs walk so many tiles and take so many samples there."""
    return tiles <= max(TILES_ON_THE_WAY, TILES_PER_SAMPLE * samples)


@lru_cache(maxsize=16)
def gathered(generation: int) -> Gathered:
    return GATHERED[max(known for known in GATHERED if known <= max(generation, 8))]


@lru_cache(maxsize=16)
def lse(generation: int, half: bool) -> Lse:
    return LSES[_newest(LSES, generation), half]


@lru_cache(maxsize=64)
def lse_gradient(generation: int, half: bool, d: int) -> LseGradient:
    """The row for gradients of d elements each."""
    newest = _newest(LSE_GRADIENTS, generation)
    return LSE_GRADIENTS[min(row for row in LSE_GRADIENTS if row[:2] == (newest, half) and d <= row[2])]


def _newest(table: dict, generation: int) -> int:
    return max(row[0] for row in table if row[0] <= max(generation, 8))


@lru_cache(maxsize=8)
def device(index: int) -> tuple[int, int]:
    """(generation, multiprocessors) of a GPU; without one, for the interpreter, those of a small one."""
    if not torch.cuda.is_available():
        return 8, 1
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


@lru_cache(maxsize=1024)
def splits(blocks: int, tiles: int, processors: int) -> int:
    """Into how many programs each block of rows is split, so that all together fill whole waves of the GPU."""
    places = PROGRAMS_PER_PROCESSOR * processors

    def duration(count: int) -> float:
        return -(-blocks * count // places) * (-(-tiles // count) + ENDING)

    return min(range(1, max(1, min(MAX_SPLITS, tiles)) + 1), key=duration)
