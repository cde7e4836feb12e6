"""The backward pass of a loss whose negatives are samples: the gradient of each embedding, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, Kernel, device_guard, power_of_two
from ..scores import store_rounded
from .rows import key_anchor, num_warps, row_block, tile_rows

TILE_ELEMENTS = 4096  # of the anchors, or of their samples, that a program looks at at a time: no spills up to d = 4096
# Tiles that a program goes through one after another to find its key's hits, at some 1 us each. Where there are more,
# torch sorts the samples. Not measured.
MAX_TILES = 32


@triton.jit
def _sum_hits(
    anchors_ptr, shares_ptr, samples_ptr, position, rows, num_samples,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D,): the anchors that have samples at this key, by their weights; in ascending order, so deterministic."""
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, rows, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        hits = tl.zeros((BLOCK_N,), tl.int32)
        for begin in range(0, num_samples, BLOCK_R):
            sample = begin + tl.arange(0, BLOCK_R)
            there = (row < rows)[:, None] & (sample < num_samples)[None, :]
            taken = tl.load(samples_ptr + row[:, None] * num_samples + sample[None, :], there, other=-1)
            hits += tl.sum((taken == position).to(tl.int32), 1)
        weight = hits.to(tl.float32) * tl.load(shares_ptr + row, hits > 0, other=0.0)
        there = (hits > 0)[:, None] & (dim < D)[None, :]  # the other rows are not read
        total += weight[:, None] * tl.load(anchors_ptr + row[:, None] * D + dim[None, :], there, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=NUMBERS)
def embedding_gradient_kernel(
    grad_ptr,  # () of the loss
    anchors_ptr,  # (2b, d) float32
    lengths_ptr,  # (2b,) float32; None: embeddings were not normalised
    means_ptr, shares_ptr,  # (2b, d), (2b,) float32
    samples_ptr,  # (2b, R) int32
    coin_labels_ptr,  # (b,) int64; None: all anchors are keys
    key_gradient_ptr,  # (m, d) float32; None: added up here
    b: tl.int64, num_samples: tl.int64, scale: tl.float32, floor: tl.float32,
    gradient_0_ptr, gradient_1_ptr,  # (b, d), written
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, view): one embedding, as a query, as its partner's positive, and as a key of other rows' samples."""
    i, view = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, partner = view * b + i, (1 - view) * b + i
    dim = tl.arange(0, BLOCK_D)
    mask = dim < D
    # As a query it is drawn to its partner, as a positive too.
    gradient = tl.load(means_ptr + row * D + dim, mask, other=0.0)
    gradient -= 2 * tl.load(anchors_ptr + partner * D + dim, mask, other=0.0)
    position = row
    if coin_labels_ptr is not None:
        position = i
    if key_anchor(position, True, coin_labels_ptr, b) == row:
        if key_gradient_ptr is not None:
            gradient += tl.load(key_gradient_ptr + position * D + dim, mask, other=0.0)
        else:
            gradient += _sum_hits(
                anchors_ptr, shares_ptr, samples_ptr, position, 2 * b, num_samples, D, BLOCK_D, BLOCK_N, BLOCK_R
            )
    gradient *= tl.load(grad_ptr).to(tl.float32) * scale
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row)
        anchor = tl.load(anchors_ptr + row * D + dim, mask, other=0.0)
        along = tl.where(length >= floor, tl.sum(gradient * anchor, 0), 0.0)  # below the floor nothing is normalised
        gradient = tl.div_rn(gradient - along * anchor, tl.maximum(length, floor))
    at = i * D + dim
    if view == 0:
        store_rounded(gradient_0_ptr + at, gradient, mask)
    else:
        store_rounded(gradient_1_ptr + at, gradient, mask)


EMBEDDING_GRADIENT_KERNEL = Kernel(embedding_gradient_kernel)


def _key_gradient(anchors: Tensor, shares: Tensor, samples: Tensor, m: int) -> Tensor:
    """(m, d): the same sum over a key's hits where there are many; torch sorts the samples, so it is deterministic."""
    rows, num_samples = samples.shape
    in_batch = samples >= 0
    bag = torch.arange(rows, dtype=torch.int32, device=samples.device)
    return torch.ops.aten._embedding_bag_dense_backward(
        anchors,
        samples.clamp_min(0).view(-1),
        bag[:, None].expand(rows, num_samples).reshape(-1),
        bag,  # sizes and maxima of bags do not enter a sum
        bag,
        m,
        False,
        0,
        torch.where(in_batch, shares[:, None], 0.0).view(-1),
    )


def embedding_gradients(
    grad: Tensor,
    anchors: Tensor,
    lengths: Tensor,
    samples: Tensor,
    means: Tensor,
    shares: Tensor,
    coin_labels: Tensor | None,
    *,
    temperature: float,
    floor: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients (b, d) of z0 and z1 in their ``dtype``.

    Roofline: for small batches, the launch, and then each program's search through all 2b * R samples, in the cache
    (expected): MAX_TILES bounds it. The rest is memory: three rows read and one written for each embedding.

    Args:
        grad: () of the mean of ``Negatives.terms``. The others are fields of ``Batch`` and ``Negatives``, and the
            walk's samples (2b, R).
        temperature: as it was in the forward pass.
        floor: likewise.
    """
    (rows, d), num_samples = anchors.shape, samples.shape[1]
    m = rows if coin_labels is None else rows // 2
    block_d, block_n = row_block(d), tile_rows(d, TILE_ELEMENTS, rows)
    block_r = min(power_of_two(num_samples), block_d)
    scans = -(-rows // block_n) * -(-num_samples // block_r) <= MAX_TILES
    out = anchors.new_empty(rows // 2, d, dtype=dtype), anchors.new_empty(rows // 2, d, dtype=dtype)
    arguments = {
        "grad_ptr": grad,
        "anchors_ptr": anchors,
        "lengths_ptr": None if floor is None else lengths,
        "means_ptr": means,
        "shares_ptr": shares,
        "samples_ptr": samples,
        "coin_labels_ptr": coin_labels,
        "key_gradient_ptr": None if scans else _key_gradient(anchors, shares, samples, m),
        "b": rows // 2,
        "num_samples": num_samples,
        "scale": 1.0 / (rows * temperature),
        "floor": 1.0 if floor is None else floor,
        "gradient_0_ptr": out[0],
        "gradient_1_ptr": out[1],
        "D": d,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "BLOCK_R": block_r,
    }
    with device_guard(samples):
        EMBEDDING_GRADIENT_KERNEL((rows // 2, 2, 1), arguments, {"num_warps": num_warps(block_n * block_d)})
    return out
