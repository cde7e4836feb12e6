"""The best of what the splits of a row's keys have found, where rows are too few to fill the GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import NUMBERS, Kernel, power_of_two
from .walk import NEVER

ELEMENTS = 1024  # of a program

_PAST_ALL = tl.constexpr(2**31 - 1)  # there are fewer keys


@triton.jit
def lowest_of_best(values, numbers):
    """(rows,) largest value of (rows, places) and the lowest of its numbers; -1 where no place has one.

    Two commutative reductions: ``tl.reduce`` takes its operands in any order.
    """
    best = tl.max(values, 1)
    lowest = tl.min(tl.where((values == best[:, None]) & (numbers >= 0), numbers, _PAST_ALL), 1)
    return best, tl.where(lowest == _PAST_ALL, -1, lowest)


@triton.jit(do_not_specialize=NUMBERS)
def gumbel_combine_kernel(
    values_ptr, numbers_ptr, positions_ptr, n: tl.int64, splits: tl.int64, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr
):
    """positions (n,) of values and numbers (n, splits)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, WIDTH)
    ok = (row < n)[:, None] & (split < splits)[None, :]
    at = row[:, None] * splits + split[None, :]
    values, numbers = tl.load(values_ptr + at, ok, other=NEVER), tl.load(numbers_ptr + at, ok, other=-1)
    _best, number = lowest_of_best(values, numbers)
    tl.store(positions_ptr + row, number.to(tl.int64), row < n)


COMBINE_KERNEL = Kernel(gumbel_combine_kernel)


def combine(values: Tensor, numbers: Tensor, positions: Tensor) -> None:
    """Writes positions (n, R) int64 from values and numbers (n, R, splits)."""
    count, splits = positions.numel(), values.shape[2]
    width = power_of_two(splits)
    rows = max(1, ELEMENTS // width)
    arguments = {
        "values_ptr": values,
        "numbers_ptr": numbers,
        "positions_ptr": positions,
        "n": count,
        "splits": splits,
        "BLOCK_M": rows,
        "WIDTH": width,
    }
    COMBINE_KERNEL((-(-count // rows), 1, 1), arguments, {"num_warps": 4})
