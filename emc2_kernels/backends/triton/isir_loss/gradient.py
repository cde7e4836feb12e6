"""The backward pass of a loss over all candidates: the gradient of each embedding, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..emc2_loss.rows import num_warps, row_block
from ..launch import NUMBERS, Kernel, device_guard, pointers, precision
from ..lse_backward import HEADROOM
from ..scores import LOG2_E, Operand, load_rows, store_rounded
from ..transition import NEG_INF
from .gather import OWN, Candidates
from .value import Loss

BLOCK_M = 16  # embeddings of a program, the fewest that a product takes: a small batch has few
TILE_BYTES = 32 << 10  # of a tile's keys at most, or as many as 16 have: two of them fit into the 99 KB of an sm_86


@triton.jit
def _shares(products, level, counted):
    """exp(score - level) in units of 2^-HEADROOM, of scores in powers of two; 0 where one is not finite."""
    return tl.exp2(tl.where(counted & (products < float("inf")), products - level, NEG_INF))


@triton.jit
def _tile_weights(
    products, row_id, row_carried_id, row_level, column, b, m, items_ptr, carried_items_ptr, log_proposal_ptr,
    levels_ptr,
):  # fmt: skip
    """What the anchors (BLOCK_M,) take from the keys ``column`` (BLOCK_N,), over their own coefficient: as queries,
    twice of a kept key, which has no gradient itself; and as keys of the batch's anchors."""
    there, in_batch = column < m, column < 2 * b
    ids = tl.load(items_ptr + column, there, other=-2)
    differs = ids[None, :] != row_id[:, None]
    usable = there
    if log_proposal_ptr is not None:
        usable = usable & (tl.load(log_proposal_ptr + column, there, other=float("inf")) == 0)
    as_query = differs & (ids[None, :] != row_carried_id[:, None]) & usable[None, :]
    weights = _shares(products, row_level[:, None], as_query) * tl.where(in_batch, 1.0, 2.0)[None, :]
    carried_ids = tl.load(carried_items_ptr + column, in_batch, other=-1)
    level = tl.load(levels_ptr + column, in_batch, other=float("inf")) * LOG2_E - HEADROOM
    as_key = differs & (carried_ids[None, :] != row_id[:, None]) & in_batch[None, :]
    return weights + _shares(products, level[None, :], as_key)


@triton.jit(do_not_specialize=NUMBERS)
def isir_gradient_kernel(
    grad_ptr,  # () of the loss
    anchors_ptr, lengths_ptr, keys_ptr, items_ptr, log_proposal_ptr,  # Candidates
    carried_scores_ptr, carried_items_ptr, carried_ptr,
    levels_ptr, pulls_ptr,  # Loss
    b: tl.int64, m: tl.int64, temperature: tl.float32, scale: tl.float32, floor: tl.float32,
    gradient_0_ptr, gradient_1_ptr,  # (b, d), written
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i: embeddings i * BLOCK_M and on, as queries, as keys, as their partner's positive and its anchor."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < 2 * b
    row_id = tl.load(items_ptr + row, row_ok, other=-3)
    row_carried_id = tl.load(carried_items_ptr + row, row_ok, other=-1)
    own_level = tl.load(levels_ptr + row, row_ok, other=float("inf"))
    row_level = own_level * LOG2_E - HEADROOM
    to_log2 = LOG2_E / temperature
    resident = load_rows(Operand(keys_ptr, D, row, row_ok), 0, D, BLOCK_D, D == BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, m, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        block = load_rows(Operand(keys_ptr, D, column, column < m), 0, D, BLOCK_D, D == BLOCK_D)
        products = tl.dot(resident, tl.trans(block), input_precision=PRECISION) * to_log2
        weights = _tile_weights(
            products, row_id, row_carried_id, row_level, column, b, m, items_ptr, carried_items_ptr, log_proposal_ptr,
            levels_ptr,
        )  # fmt: skip
        total = tl.dot(weights.to(block.dtype), block, total, input_precision=PRECISION)
    total *= tl.exp2(-HEADROOM)

    dim = tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (dim < D)[None, :]
    for c in tl.static_range(OWN):
        at = row * OWN + c
        score = tl.load(carried_scores_ptr + at, row_ok, other=NEG_INF)
        share = tl.exp(tl.where(tl.abs(score) < float("inf"), score - own_level, NEG_INF))
        embedding = tl.load(carried_ptr + at[:, None] * D + dim[None, :], mask, other=0.0).to(tl.float32)
        total += (2.0 * share)[:, None] * embedding
    partner = tl.where(row < b, row + b, row - b)
    pull = tl.load(pulls_ptr + row, row_ok, other=0.0) + tl.load(pulls_ptr + partner, row_ok, other=0.0)
    total -= pull[:, None] * tl.load(anchors_ptr + partner[:, None] * D + dim[None, :], mask, other=0.0)
    total *= tl.load(grad_ptr).to(tl.float32) * scale
    anchor = tl.load(anchors_ptr + row[:, None] * D + dim[None, :], mask, other=0.0)
    length = tl.load(lengths_ptr + row, row_ok, other=1.0)
    along = tl.where(length >= floor, tl.sum(total * anchor, 1), 0.0)  # below the floor nothing is normalised
    gradient = (total - along[:, None] * anchor) / tl.maximum(length, floor)[:, None]
    at = row[:, None] * D + dim[None, :]
    store_rounded(gradient_0_ptr + at, gradient, mask & (row < b)[:, None])
    store_rounded(gradient_1_ptr + (at - b * D), gradient, mask & (row >= b)[:, None])


ISIR_GRADIENT_KERNEL = Kernel(isir_gradient_kernel)


def embedding_gradients(
    grad: Tensor, candidates: Candidates, made: Loss, *, temperature: float, floor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients (b, d) of z0 and z1 in their ``dtype``.

    Roofline: for small batches, the launch and one program's way through the m keys, m / 32 tiles of two
    dependent products (expected). Each program loads all keys from the L2, so this is not for large batches.

    Args:
        grad: () of ``Loss.value``.
        temperature: as it was in the forward pass.
        floor: likewise.
    """
    n, d = candidates.anchors.shape
    b, block_d, keys, new = n // 2, row_block(d), candidates.keys, candidates.anchors.new_empty
    row_bytes = block_d * keys.element_size()
    block_n = min(32, max(16, TILE_BYTES // row_bytes))
    out = new(b, d, dtype=dtype), new(b, d, dtype=dtype)
    arguments = pointers(candidates) | pointers(made)
    arguments |= {
        "grad_ptr": grad,
        "b": b,
        "m": keys.shape[0],
        "temperature": temperature,
        "scale": 1.0 / (n * temperature),
        "floor": floor,
        "gradient_0_ptr": out[0],
        "gradient_1_ptr": out[1],
        "D": d,
        "BLOCK_D": block_d,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": block_n,
        "OWN": OWN,
        "PRECISION": precision(keys.dtype),
    }
    stages = 3 if 2 * block_n * row_bytes <= TILE_BYTES else 2
    options = {"num_warps": max(4, num_warps(BLOCK_M * block_d)), "num_stages": stages}
    with device_guard(grad):
        ISIR_GRADIENT_KERNEL((-(-n // BLOCK_M), 1, 1), arguments, options)
    return out
