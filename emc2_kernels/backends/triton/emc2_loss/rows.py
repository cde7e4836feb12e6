"""What the kernels around a loss's walk share: rows of embeddings, each held whole by one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Arguments, power_of_two


def row_block(dim: int) -> int:
    """Elements of a program's block for a row."""
    return max(32, power_of_two(dim))


def tile_rows(dim: int, elements: int, most: int) -> int:
    """Rows of a tile of about so many elements, a power of two."""
    return max(1, min(power_of_two(most), elements // row_block(dim)))


def num_warps(elements: int) -> int:
    """Enough that each thread holds some 16 elements."""
    return min(8, max(1, power_of_two(elements) // 512))


def pair_arguments(z0: Tensor, z1: Tensor, index: Tensor) -> Arguments:
    """What kernels that gather a batch are told of it: embeddings (b, d) and items (b,), each of any strides."""
    z0, z1 = (z if z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous() for z in (z0, z1))
    return {
        "z0_ptr": z0,
        "z1_ptr": z1,
        "stride_z0_row": z0.stride(0),
        "stride_z1_row": z1.stride(0),
        "index_ptr": index,
        "stride_index": index.stride(0),
        "b": z0.shape[0],
        "D": z0.shape[1],
        "BLOCK_D": row_block(z0.shape[1]),
    }


@triton.jit
def unit_row(z, length_ptr, floor, LARGE: tl.constexpr, SHRINK: tl.constexpr):
    """An embedding (BLOCK_D,) over its length, a shorter one over ``floor``; its length is stored."""
    shrink = tl.where(tl.max(tl.abs(z), 0) > LARGE, SHRINK, 1.0)  # else its squares could overflow
    z *= shrink
    length = tl.sqrt_rn(tl.sum(z * z, 0))
    tl.store(length_ptr, tl.div_rn(length, shrink))
    return tl.div_rn(z, tl.maximum(length, floor))


@triton.jit
def key_anchor(position, mask, key_labels_ptr, b):
    """Which anchor is the key at ``position``: view 0 of item i is anchor i, view 1 is anchor b + i.

    Without labels all anchors are keys, in their order.
    """
    if key_labels_ptr is None:
        return position.to(tl.int64)
    else:
        return (tl.load(key_labels_ptr + position, mask, other=0) & 1) * b + position
