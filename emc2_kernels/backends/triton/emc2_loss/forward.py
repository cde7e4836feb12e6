"""The forward pass of a loss around its walk: what the walk is given, and the mean of the negatives it has sampled.

Before it, unit anchors, the keys that the view coin proposes, and the rescored incoming states; after it, the terms of
the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, Kernel, device_guard, pointers, random_arguments
from ..philox import load_generator
from ..scores import store_rounded
from ..view_coin import draw_view
from .rows import key_anchor, num_warps, pair_arguments, row_block, tile_rows, unit_row


class Stores(NamedTuple):
    """The buffers of a loss; slot = label = item * 2 + view."""

    chain_key: Tensor  # (num_items * 2,) int64
    chain_score: Tensor  # (num_items * 2,) float32
    bank: Tensor  # (num_items * 2, d) any floating dtype
    written_at: Tensor  # (num_items * 2,) int64
    last_step: Tensor  # () int64
    step: Tensor  # () int64


class Batch(NamedTuple):
    """b pairs as 2b anchors, view 0 first, and the m keys that they are proposed: b, or with both views all anchors."""

    anchors: Tensor  # (2b, d) float32
    lengths: Tensor  # (2b,) float32  of the embeddings before they were divided by them
    queries: Tensor  # (2b, d) anchors in the dtype to multiply in
    keys: Tensor  # (m, d) of that dtype
    items: Tensor  # (2b,) int64
    chain_ids: Tensor  # (2b,) int64  item * 2 + view
    key_labels: Tensor  # (m,) int64  item * 2 + view
    state_key: Tensor  # (2b,) int64   the incoming states
    state_score: Tensor  # (2b,) float32
    now: Tensor  # () int64  the step before it advances

    @property
    def coin_labels(self) -> Tensor | None:
        """For the kernels: None where all anchors are keys."""
        return None if self.keys.shape[0] == self.anchors.shape[0] else self.key_labels


@triton.jit(do_not_specialize=NUMBERS)
def gather_batch_kernel(
    z0_ptr, stride_z0_row: tl.int64,  # (b, d)
    z1_ptr, stride_z1_row: tl.int64,  # (b, d)
    index_ptr, stride_index: tl.int64,  # (b,) int64
    b: tl.int64, num_items: tl.int64, temperature: tl.float32, floor: tl.float32,
    seed_ptr, seed_low: tl.int32, seed_high: tl.int32,  # () int64, or None and its words
    step_ptr,  # () int64
    chain_key_ptr, chain_score_ptr, bank_ptr, written_at_ptr, last_step_ptr,  # Stores
    anchors_ptr,  # (2b, d) float32; this and all that follow are written: Batch
    lengths_ptr,  # (2b,) float32; None: the embeddings are taken as they are
    queries_ptr,  # (2b, d); None: the anchors serve
    keys_ptr, coin_labels_ptr,  # (b, d), (b,) int64; None: both views are proposed
    items_ptr, chain_ids_ptr, state_key_ptr, state_score_ptr,  # (2b,)
    now_ptr,  # () int64
    D: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr, SHRINK: tl.constexpr,
):  # fmt: skip
    """Program (i, view) makes one anchor and loads the state of its chain."""
    i, view = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = view * b + i
    item = tl.load(index_ptr + i * stride_index)
    tl.device_assert((item >= 0) & (item < num_items), "index must hold values in [0, num_items)")
    slot = item * 2 + view
    tl.store(items_ptr + row, item)
    tl.store(chain_ids_ptr + row, slot)
    if row == 0:
        tl.store(now_ptr, tl.load(step_ptr))

    dim = tl.arange(0, BLOCK_D)
    mask = dim < D
    if view == 0:
        z = tl.load(z0_ptr + i * stride_z0_row + dim, mask, other=0.0).to(tl.float32)
    else:
        z = tl.load(z1_ptr + i * stride_z1_row + dim, mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        z = unit_row(z, lengths_ptr + row, floor, LARGE, SHRINK)
    at = row * D + dim
    tl.store(anchors_ptr + at, z, mask)
    if queries_ptr is not None:
        store_rounded(queries_ptr + at, z, mask)
    if keys_ptr is not None:
        generator = load_generator(seed_ptr, seed_low, seed_high, step_ptr, 0)
        coin = draw_view(item, tl.full((), 0, tl.uint32), generator)
        store_rounded(keys_ptr + i * D + dim, z, dim < tl.where(coin == view, D, 0))
        if view == 0:
            tl.store(coin_labels_ptr + i, item * 2 + coin)

    key = tl.load(chain_key_ptr + slot)
    tl.device_assert(key < 2 * num_items, "chains.key must hold labels, below num_items * 2")
    started = key >= 0
    written_at = tl.load(written_at_ptr + key, started, other=-1)
    held = started & (written_at >= 0) & (tl.load(last_step_ptr) >= written_at)
    embedding = tl.load(bank_ptr + key * D + dim, dim < tl.where(held, D, 0), other=0.0).to(tl.float32)
    rescored = tl.div_rn(tl.sum(z * embedding, 0), temperature)
    tl.store(state_key_ptr + row, key)
    tl.store(state_score_ptr + row, tl.where(held, rescored, tl.load(chain_score_ptr + slot)))


GATHER_BATCH_KERNEL = Kernel(gather_batch_kernel)


def gather_batch(
    z0: Tensor,
    z1: Tensor,
    index: Tensor,
    stores: Stores,
    *,
    temperature: float,
    seed: int,
    floor: float | None,
    shrinks: tuple[float, float],
    both_views: bool,
    dtype: torch.dtype,
) -> Batch:
    """Normalizes b pairs and reads their chains, in one launch.

    Roofline: for small batches, the launch itself (expected). Else memory, rows of d elements: for each anchor its
    embedding and that of its chain's key read; anchor, query and, of every other one, key written.

    Args:
        z0: (b, d), any strides.
        z1: (b, d), likewise.
        index: (b,) int64, any stride; checked on the device.
        floor: least length that embeddings are divided by; None: they are not normalised.
        shrinks: above which element a row's squares could overflow, and by what it is then multiplied first.
        both_views: all anchors are keys, not one view of each item.
        dtype: to multiply in.
    """
    (b, d), new = z0.shape, z0.new_empty
    anchors = new(2 * b, d, dtype=torch.float32)
    queries = anchors if dtype == torch.float32 else new(2 * b, d, dtype=dtype)
    items, chain_ids = new(2 * b, dtype=torch.int64), new(2 * b, dtype=torch.int64)
    batch = Batch(
        anchors=anchors,
        lengths=new(2 * b, dtype=torch.float32),
        queries=queries,
        keys=queries if both_views else new(b, d, dtype=dtype),
        items=items,
        chain_ids=chain_ids,
        key_labels=chain_ids if both_views else new(b, dtype=torch.int64),
        state_key=new(2 * b, dtype=torch.int64),
        state_score=new(2 * b, dtype=torch.float32),
        now=new((), dtype=torch.int64),
    )
    arguments = random_arguments(seed, stores.step) | pointers(stores) | pointers(batch)
    arguments |= pair_arguments(z0, z1, index)
    arguments |= {
        "num_items": stores.chain_key.shape[0] // 2,
        "temperature": temperature,
        "floor": 1.0 if floor is None else floor,
        "lengths_ptr": None if floor is None else batch.lengths,
        "queries_ptr": None if queries is anchors else queries,
        "keys_ptr": None if both_views else batch.keys,
        "coin_labels_ptr": batch.coin_labels,
        "LARGE": shrinks[0],
        "SHRINK": shrinks[1],
    }
    with device_guard(z0):
        GATHER_BATCH_KERNEL((b, 2, 1), arguments, {"num_warps": num_warps(row_block(d))})
    return batch


TILE_ELEMENTS = 2048  # of the samples' keys that a program holds at a time


class Negatives(NamedTuple):
    means: Tensor  # (2b, d) float32; zeros for an anchor without any
    shares: Tensor  # (2b,) float32  weight of one sample in its anchor's mean
    terms: Tensor  # (2b,) float32  (negative - positive similarity) / temperature
    similarity: Tensor | None  # (2b,) float32  of an anchor and its mean negative, if asked for


@triton.jit(do_not_specialize=NUMBERS)
def mean_negatives_kernel(
    anchors_ptr,  # (2b, d) float32
    samples_ptr,  # (2b, R) int32
    coin_labels_ptr,  # (b,) int64; None: all anchors are keys
    state_key_ptr,  # (2b,) int64
    bank_ptr,  # (num_items * 2, d)
    b: tl.int64, num_samples: tl.int64, temperature: tl.float32,
    means_ptr, shares_ptr, terms_ptr, similarity_ptr,  # Negatives, written; the last may be None
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program i: anchor i.

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
        anchor = key_anchor(position, in_batch, coin_labels_ptr, b)
        at = anchor[:, None] * D + dim[None, :]
        keys += tl.load(anchors_ptr + at, in_batch[:, None] & mask[None, :], other=0.0)
        moved += in_batch.to(tl.int32)
    total, counted = tl.sum(keys, 0), tl.sum(moved, 0).to(tl.int64)
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


MEAN_NEGATIVES_KERNEL = Kernel(mean_negatives_kernel)


def mean_negatives(
    batch: Batch, samples: Tensor, bank: Tensor, *, temperature: float, return_similarity: bool
) -> Negatives:
    """Averages the samples (2b, R) of each anchor, in one launch.

    Roofline: for small batches, the launch itself (expected). Else gathering: R rows of 4 d bytes for each anchor, from
    the L2 where the anchors fit into it.

    Args:
        bank: embeddings by label, for samples that are still at the carried key.
    """
    (rows, d), num_samples, new = batch.anchors.shape, samples.shape[1], batch.anchors.new_empty
    out = Negatives(new(rows, d), new(rows), new(rows), new(rows) if return_similarity else None)
    block_r = tile_rows(d, TILE_ELEMENTS, num_samples)
    arguments = pointers(batch) | pointers(out)
    arguments |= {
        "samples_ptr": samples,
        "coin_labels_ptr": batch.coin_labels,
        "bank_ptr": bank,
        "b": rows // 2,
        "num_samples": num_samples,
        "temperature": temperature,
        "D": d,
        "BLOCK_D": row_block(d),
        "BLOCK_R": block_r,
    }
    with device_guard(samples):
        MEAN_NEGATIVES_KERNEL((rows, 1, 1), arguments, {"num_warps": num_warps(block_r * row_block(d))})
    return out
