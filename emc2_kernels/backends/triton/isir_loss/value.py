"""The loss of chains that have been resampled, and what is kept of the batch as a whole: its drift and its items."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..emc2_loss.rows import num_warps, row_block
from ..launch import NUMBERS, Kernel, device_guard, pointers
from .gather import Candidates

BLOCK_ROWS = 1024  # anchors that the program holds at a time


class Loss(NamedTuple):
    value: Tensor  # () float32
    levels: Tensor  # (2b,) float32  log-sum-exp that the gradient goes by; inf: of an anchor without candidates
    pulls: Tensor  # (2b,) float32  share of an anchor's own positive in its gradient: 0 to 1


@triton.jit
def _item_at(place, there, queue_items_ptr, items_ptr, num_kept):
    """Of the queue's items and, behind them, the batch's."""
    old = tl.load(queue_items_ptr + place, there & (place < num_kept), other=-1)
    new = tl.load(items_ptr + place - num_kept, there & (place >= num_kept), other=-1)
    return tl.where(place < num_kept, old, new)


@triton.jit
def _push_items(queue_ptr, queue_items_ptr, items_ptr, b, num_kept, BLOCK_Q: tl.constexpr):
    """Keeps the last ``num_kept`` of them; of an item's entries all but the last are none."""
    entry = tl.arange(0, BLOCK_Q)
    item = _item_at(entry + b, entry < num_kept, queue_items_ptr, items_ptr, num_kept)
    for later in range(1, num_kept):
        other = _item_at(later + b, later < num_kept, queue_items_ptr, items_ptr, num_kept)
        item = tl.where((other == item) & (entry < later), -1, item)
    tl.store(queue_ptr + entry, item, entry < num_kept)


@triton.jit
def _keep_batch(totals_ptr, sums_ptr, queue_ptr, queue_items_ptr, items_ptr, b, num_kept, BLOCK_Q: tl.constexpr):
    """Of a batch that is not finite nothing."""
    if tl.abs(tl.load(totals_ptr)) < float("inf"):
        lost, worth = tl.load(totals_ptr + 1), tl.load(totals_ptr + 2)
        # A sum may not be finite where no term overflows; one without the other means nothing.
        if (tl.abs(lost) < float("inf")) & (tl.abs(worth) < float("inf")):
            tl.store(sums_ptr, lost)
            tl.store(sums_ptr + 1, worth)
        if queue_ptr is not None:
            _push_items(queue_ptr, queue_items_ptr, items_ptr, b, num_kept, BLOCK_Q)


@triton.jit(do_not_specialize=NUMBERS)
def mean_loss_kernel(
    lse_ptr,  # (2b,) float32, -inf: no candidates
    pairs_ptr,  # (PER_PAIR, b) float32, of which the first are the positives' similarities
    totals_ptr,  # (3,) float32
    items_ptr,  # (m,) int64, the batch's first
    queue_items_ptr,  # (num_kept,) int64
    b: tl.int64, num_kept: tl.int64, temperature: tl.float32, scale: tl.float32,
    value_ptr, levels_ptr, pulls_ptr,  # Loss, written
    sums_ptr, queue_ptr,  # of the stores, written; None: in evaluation, and where there is no queue
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, 2 * b, BLOCK):
        row = first + tl.arange(0, BLOCK)
        there = row < 2 * b
        lse = tl.load(lse_ptr + row, there, other=float("-inf"))
        similarity = tl.load(pairs_ptr + tl.where(row < b, row, row - b), there, other=0.0)
        positive = tl.div_rn(similarity, tl.full((BLOCK,), 1.0, tl.float32) * temperature)
        counted = lse > float("-inf")
        over = tl.where(counted, lse, positive) - positive
        pull = tl.full((BLOCK,), 1.0, tl.float32)
        level = lse
        if not DECOUPLED:  # log(exp(lse) + exp(positive)), and its derivative in the first
            pull = 1.0 / (1.0 + tl.exp(-over))
            over = tl.maximum(over, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(over)))
            level = positive + over
        total += tl.where(counted, over, 0.0)
        tl.store(levels_ptr + row, tl.where(counted, level, float("inf")), there)
        tl.store(pulls_ptr + row, tl.where(counted, pull, 0.0), there)
    tl.store(value_ptr, tl.sum(total, 0) * scale)
    if sums_ptr is not None:
        _keep_batch(totals_ptr, sums_ptr, queue_ptr, queue_items_ptr, items_ptr, b, num_kept, BLOCK_Q)


MEAN_LOSS_KERNEL = Kernel(mean_loss_kernel)


def mean_loss(
    candidates: Candidates,
    lse: Tensor,
    *,
    temperature: float,
    decoupled: bool,
    sums: Tensor | None,
    queue: Tensor | None,
) -> Loss:
    """Mean over the anchors of their log-sum-exp less the positive, in one launch; in training it also keeps the sums
    of ``Staleness`` and pushes the queue.

    Roofline: the launch itself (expected), and for a long queue its loads, one after another.

    Args:
        lse: (2b,) over each anchor's candidates; -inf: it has none, and no loss.
        decoupled: the positive is no term of it.
        sums: (2,) of the loss's store; None: in evaluation.
        queue: (q,) likewise; None also where there is no queue.
    """
    n, new = lse.shape[0], lse.new_empty
    made = Loss(new((), dtype=torch.float32), new(n), new(n))
    q = 0 if candidates.queue_items is None else candidates.queue_items.shape[0]
    arguments = pointers(candidates) | pointers(made)
    arguments |= {
        "lse_ptr": lse,
        "b": n // 2,
        "num_kept": q,
        "temperature": temperature,
        "scale": 1.0 / n,
        "sums_ptr": sums,
        "queue_ptr": queue,
        "DECOUPLED": decoupled,
        "BLOCK": min(BLOCK_ROWS, row_block(n)),
        "BLOCK_Q": row_block(q),
    }
    with device_guard(lse):
        MEAN_LOSS_KERNEL((1, 1, 1), arguments, {"num_warps": num_warps(min(BLOCK_ROWS, n))})
    return made
