"""What a loss makes of a walk: each anchor's mean negative, and its term of the surrogate."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import NUMBERS, Kernel, on_device
from .prepare import Batch
from .rows import anchor_of_key, row_block, tile_rows, warps

TILE_ELEMENTS = 2048  # of the samples' keys that a program holds at a time


class Negatives(NamedTuple):
    means: Tensor  # (2b, d) float32; zeros for an anchor without any
    shares: Tensor  # (2b,) float32  weight of one sample in its anchor's mean
    terms: Tensor  # (2b,) float32  (negative - positive similarity) / temperature
    similarity: Tensor | None  # (2b,) float32  of an anchor and its mean negative, if asked for


@triton.jit(do_not_specialize=NUMBERS)
def negatives_kernel(
    anchors_ptr, samples_ptr, coin_labels_ptr, state_key_ptr, bank_ptr,
    b: tl.int64, num_samples: tl.int64, temperature: tl.float32,
    means_ptr, shares_ptr, terms_ptr, similarity_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program i: anchor i. bank_ptr None: samples at the carried state are left out.

    A sample that was taken before the chain's first accept has no key. It is neither summed nor counted.
    """
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    mask = dim < D
    keys = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    moved = tl.zeros((BLOCK_R,), tl.int32)
    for begin in range(0, num_samples, BLOCK_R):
        sample = begin + tl.arange(0, BLOCK_R)
        position = tl.load(samples_ptr + row * num_samples + sample, sample < num_samples, other=-1)
        in_batch = position >= 0
        anchor = anchor_of_key(position, in_batch, coin_labels_ptr, b)
        at = anchor[:, None] * D + dim[None, :]
        keys += tl.load(anchors_ptr + at, in_batch[:, None] & mask[None, :], other=0.0)
        moved += in_batch.to(tl.int32)
    total, counted = tl.sum(keys, 0), tl.sum(moved, 0).to(tl.int64)
    if bank_ptr is not None:
        label = tl.load(state_key_ptr + row)
        carried = tl.where(label >= 0, num_samples - counted, 0)
        embedding = tl.load(bank_ptr + label * D + dim, dim < tl.where(carried > 0, D, 0), other=0.0).to(tl.float32)
        total += carried.to(tl.float32) * embedding
        counted += carried
    share = tl.div_rn(1.0, tl.maximum(counted, 1).to(tl.float32))
    mean = total * share
    query = tl.load(anchors_ptr + row * D + dim, mask, other=0.0)
    positive = tl.load(anchors_ptr + tl.where(row < b, row + b, row - b) * D + dim, mask, other=0.0)
    similarity = tl.sum(query * mean, 0)
    tl.store(means_ptr + row * D + dim, mean, mask)
    tl.store(shares_ptr + row, share)
    tl.store(terms_ptr + row, tl.div_rn(similarity - tl.sum(query * positive, 0), temperature))
    if similarity_ptr is not None:
        tl.store(similarity_ptr + row, similarity)


NEGATIVES_KERNEL = Kernel(negatives_kernel)


def negatives(
    batch: Batch, samples: Tensor, bank: Tensor | None, *, temperature: float, return_similarity: bool
) -> Negatives:
    """Averages the samples (2b, R) of each anchor, in one launch.

    Args:
        bank: embeddings by label, for samples that are still at the carried key; None leaves these out.
    """
    (rows, d), num_samples, new = batch.anchors.shape, samples.shape[1], batch.anchors.new_empty
    out = Negatives(new(rows, d), new(rows), new(rows), new(rows) if return_similarity else None)
    block_r = tile_rows(d, TILE_ELEMENTS, num_samples)
    arguments = {
        "anchors_ptr": batch.anchors,
        "samples_ptr": samples,
        "coin_labels_ptr": batch.coin_labels,
        "state_key_ptr": batch.state_key,
        "bank_ptr": bank,
        "b": rows // 2,
        "num_samples": num_samples,
        "temperature": temperature,
        "means_ptr": out.means,
        "shares_ptr": out.shares,
        "terms_ptr": out.terms,
        "similarity_ptr": out.similarity,
        "D": d,
        "BLOCK_D": row_block(d),
        "BLOCK_R": block_r,
    }
    with on_device(samples):
        NEGATIVES_KERNEL((rows, 1, 1), arguments, {"num_warps": warps(block_r * row_block(d))})
    return out
