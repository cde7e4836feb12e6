"""What a loss keeps of a batch: its chains' new states and the latest embeddings; of duplicates, the last row's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUMBERS, Kernel, device_guard, pointers
from ..scores import store_rounded
from .forward import Batch, Stores
from .rows import row_block

if TYPE_CHECKING:
    from ..isir_loss import Candidates

SCAN_ROWS = 2048  # pairs, up to which each program looks through the rows behind its own; beyond, one sort serves all
BLOCK_B = 512  # that it looks at at a time


@triton.jit(do_not_specialize=NUMBERS)
def update_stores_kernel(
    items_ptr,  # (2b,) int64
    last_ptr,  # (b,) int64, the last row with each row's item; None: looked for here
    anchors_ptr,  # (2b, d) float32
    new_key_ptr, new_score_ptr,  # (2b,) int64 and float32
    now_ptr,  # () int64
    value_ptr,  # float32
    b: tl.int64,
    chain_key_ptr, chain_score_ptr, bank_ptr, written_at_ptr, last_step_ptr, step_ptr,  # Stores, written
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Program (i, view) writes the slot of one anchor, unless a later row has the same item.

    The step comes from ``now_ptr``, because program 0 advances ``step_ptr`` while others run. value_ptr: what is not
    finite where an embedding or a score that counts is not, as the batch's loss; then nothing is written.
    """
    i, view = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    item = tl.load(items_ptr + i)
    now = tl.load(now_ptr)
    finite = tl.abs(tl.load(value_ptr)) < float("inf")
    if last_ptr is not None:
        is_last = tl.load(last_ptr + i) == i
    else:
        later = tl.zeros((BLOCK_B,), tl.int32)
        for begin in range(i + 1, b, BLOCK_B):
            other = begin + tl.arange(0, BLOCK_B)
            later += (tl.load(items_ptr + other, other < b, other=-1) == item).to(tl.int32)
        is_last = tl.sum(later, 0) == 0
    if is_last & finite:
        row, slot = view * b + i, item * 2 + view
        dim = tl.arange(0, BLOCK_D)
        embedding = tl.load(anchors_ptr + row * D + dim, dim < D, other=0.0)
        kept = embedding.to(bank_ptr.dtype.element_ty).to(tl.float32)
        fits = tl.max((tl.abs(kept) == float("inf")).to(tl.int32), 0) == 0  # in the bank's dtype
        store_rounded(bank_ptr + slot * D + dim, embedding, dim < tl.where(fits, D, 0))
        score = tl.load(new_score_ptr + row)
        moves = score < float("inf")  # a product that overflowed is no state to go on from
        tl.store(chain_key_ptr + slot, tl.load(new_key_ptr + row), moves)
        tl.store(chain_score_ptr + slot, score, moves)
        tl.store(written_at_ptr + slot, now, fits)
    if (i == 0) & (view == 0) & finite:
        tl.store(last_step_ptr, now)
        tl.store(step_ptr, now + 1)


UPDATE_STORES_KERNEL = Kernel(update_stores_kernel)


def update_stores(
    batch: Batch | Candidates,
    new_key: Tensor,
    new_score: Tensor,
    stores: Stores,
    value: Tensor,
    last: Tensor | None = None,
) -> None:
    """Writes the states (2b,) and embeddings of a batch, and advances the step, in one launch.

    Roofline: for small batches, the launch itself (expected). Else memory: an anchor read, 4 d bytes, and written to
    the bank in its dtype. Each program also looks at the items behind its own, b / 2 of them on average, in the cache.

    Args:
        batch: of which items, anchors and the step are taken.
        value: float32, of which the first number, the loss say, is looked at. If it is not finite, nothing is written.
        last: (b,) int64 the last row with each row's item; None: programs look for it, which is well up to SCAN_ROWS.
    """
    rows, d = batch.anchors.shape
    b = rows // 2
    arguments = pointers(batch) | pointers(stores)
    arguments |= {
        "last_ptr": last,
        "new_key_ptr": new_key,
        "new_score_ptr": new_score,
        "value_ptr": value,
        "b": b,
        "D": d,
        "BLOCK_D": row_block(d),
        "BLOCK_B": BLOCK_B,
    }
    with device_guard(new_key):
        UPDATE_STORES_KERNEL((b, 2, 1), arguments, {"num_warps": 4})
