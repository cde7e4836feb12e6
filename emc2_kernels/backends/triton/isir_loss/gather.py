"""The candidates of a batch's chains: its own keys, behind them those of the queue, and what each chain brings."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..emc2_loss.forward import Stores
from ..emc2_loss.rows import num_warps, pair_arguments, row_block, tile_rows, unit_row
from ..launch import NUMBERS, Kernel, device_guard, pointers
from ..scores import store_rounded
from ..transition import NEG_INF

OWN = 2  # candidates that a chain brings along: both views of its key's item
PER_PAIR = 4  # numbers in ``Candidates.pairs``
BLOCK_B = 512  # items of the batch that a queue's item is compared with at a time
GATE_ELEMENTS = 4096  # of each view that the gate holds at a time
GATE_ROWS = 1024  # and of vectors


class Candidates(NamedTuple):
    """Of b pairs, 2b anchors, view 0 first. The first 2b of the m keys are they; q items of the queue follow, all in
    view 0, then all in view 1."""

    anchors: Tensor  # (2b, d) float32
    lengths: Tensor  # (2b,) float32  of the embeddings before they were divided by them
    keys: Tensor  # (m, d) in the dtype to multiply in
    items: Tensor  # (m,) int64
    labels: Tensor  # (m,) int64  item * 2 + view
    log_proposal: Tensor | None  # (m,) float32: 0, and inf where an entry of the queue is no candidate; None: no queue
    carried_labels: Tensor  # (2b, OWN) int64; -1: none
    carried_scores: Tensor  # (2b, OWN) float32; -inf: none
    carried_items: Tensor  # (2b,) int64; -1: none
    carried: Tensor  # (2b, OWN, d) as the bank keeps them; zeros for none
    # (PER_PAIR, b) float32: similarity of the views; by how much less similar they are to each other's kept embedding,
    # of those that there are; how many there are; squares of all elements.
    pairs: Tensor
    totals: Tensor  # (3,) float32: the squares over the temperature, and the two sums of ``Staleness`` with this batch
    now: Tensor  # (1,) int64  the step before it advances
    queue_items: Tensor | None  # (q,) int64  the queue before it is pushed


@triton.jit
def _gather_view(
    slot, row, unit, partner, num_items, temperature, chain_key_ptr, bank_ptr, written_at_ptr,
    carried_labels_ptr, carried_scores_ptr, carried_items_ptr, carried_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """Reads what an anchor's chain brings along; returns whether the bank holds the anchor itself, 0 or 1, and how
    similar its partner is to that."""
    dim = tl.arange(0, BLOCK_D)
    key = tl.load(chain_key_ptr + slot)
    tl.device_assert(key < 2 * num_items, "chains.key must hold labels, below num_items * 2")
    started = key >= 0
    held = started
    for c in tl.static_range(OWN):
        label = tl.where(started, key ^ c, -1)
        held = held & (tl.load(written_at_ptr + label, started, other=-1) >= 0)  # with the first goes the other
        embedding = tl.load(bank_ptr + label * D + dim, dim < tl.where(held, D, 0), other=0.0)
        at = row * OWN + c
        tl.store(carried_ptr + at * D + dim, embedding, dim < D)
        score = tl.div_rn(tl.sum(unit * embedding.to(tl.float32), 0), temperature)
        tl.store(carried_labels_ptr + at, label)
        tl.store(carried_scores_ptr + at, tl.where(held, score, NEG_INF))
        if c == 0:
            tl.store(carried_items_ptr + row, tl.where(held, label >> 1, -1))
    kept = tl.load(written_at_ptr + slot) >= 0
    before = tl.load(bank_ptr + slot * D + dim, dim < tl.where(kept, D, 0), other=0.0).to(tl.float32)
    return kept.to(tl.float32), tl.sum(partner * before, 0)


@triton.jit
def _store_key(
    unit, row, item, view: tl.constexpr, mask, anchors_ptr, keys_ptr, items_ptr, labels_ptr, log_proposal_ptr,
    log_proposal, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = row * D + tl.arange(0, BLOCK_D)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + at, unit, mask)
    store_rounded(keys_ptr + at, unit, mask)
    tl.store(items_ptr + row, item)
    tl.store(labels_ptr + row, item * 2 + view)
    if log_proposal_ptr is not None:
        tl.store(log_proposal_ptr + row, log_proposal)


@triton.jit
def _in_batch(item, index_ptr, stride_index, b, BLOCK_B: tl.constexpr):
    found = tl.zeros((BLOCK_B,), tl.int32)
    for begin in range(0, b, BLOCK_B):
        other = begin + tl.arange(0, BLOCK_B)
        found += (tl.load(index_ptr + other * stride_index, other < b, other=-1) == item).to(tl.int32)
    return tl.sum(found, 0) > 0


@triton.jit
def _gather_kept(
    entry, index_ptr, stride_index, b, num_kept, num_items, bank_ptr, written_at_ptr, queue_ptr, keys_ptr, items_ptr,
    labels_ptr, log_proposal_ptr, queue_items_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """An entry of the queue as two keys, which are candidates if the bank has both and the batch neither."""
    dim = tl.arange(0, BLOCK_D)
    item = tl.load(queue_ptr + entry)
    tl.store(queue_items_ptr + entry, item)
    there = (item >= 0) & (item < num_items)
    item = tl.where(there, item, 0)  # of an entry without one nothing is used
    usable = there & (tl.load(written_at_ptr + item * 2) >= 0) & (tl.load(written_at_ptr + item * 2 + 1) >= 0)
    usable = usable & ~_in_batch(item, index_ptr, stride_index, b, BLOCK_B)
    log_proposal = tl.where(usable, 0.0, float("inf"))
    for view in tl.static_range(2):
        slot = item * 2 + view
        embedding = tl.load(bank_ptr + slot * D + dim, dim < tl.where(usable, D, 0), other=0.0).to(tl.float32)
        _store_key(
            embedding, 2 * b + view * num_kept + entry, item, view, dim < D, None, keys_ptr, items_ptr, labels_ptr,
            log_proposal_ptr, log_proposal, D, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def gather_candidates_kernel(
    z0_ptr, stride_z0_row: tl.int64,  # (b, d)
    z1_ptr, stride_z1_row: tl.int64,  # (b, d)
    index_ptr, stride_index: tl.int64,  # (b,) int64
    b: tl.int64, num_kept: tl.int64, num_items: tl.int64, temperature: tl.float32, floor: tl.float32,
    step_ptr,  # () int64
    chain_key_ptr, bank_ptr, written_at_ptr,  # Stores
    queue_ptr,  # (num_kept,) int64; None: there is no queue
    anchors_ptr,  # (2b, d) float32; None: the keys serve. This and all that follow are written: Candidates
    lengths_ptr, keys_ptr, items_ptr, labels_ptr, log_proposal_ptr,
    carried_labels_ptr, carried_scores_ptr, carried_items_ptr, carried_ptr,
    pairs_ptr, now_ptr, queue_items_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, OWN: tl.constexpr, LARGE: tl.constexpr,
    SHRINK: tl.constexpr,
):  # fmt: skip
    """Program i: both anchors of pair i and what their chains bring along; from b on, an entry of the queue in both
    views."""
    i = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    mask = dim < D
    if i < b:
        item = tl.load(index_ptr + i * stride_index)
        tl.device_assert((item >= 0) & (item < num_items), "index must hold values in [0, num_items)")
        z0 = tl.load(z0_ptr + i * stride_z0_row + dim, mask, other=0.0).to(tl.float32)
        z1 = tl.load(z1_ptr + i * stride_z1_row + dim, mask, other=0.0).to(tl.float32)
        unit_0 = unit_row(z0, lengths_ptr + i, floor, LARGE, SHRINK)
        unit_1 = unit_row(z1, lengths_ptr + b + i, floor, LARGE, SHRINK)
        _store_key(
            unit_0, i, item, 0, mask, anchors_ptr, keys_ptr, items_ptr, labels_ptr, log_proposal_ptr, 0.0, D, BLOCK_D
        )
        _store_key(
            unit_1, b + i, item, 1, mask, anchors_ptr, keys_ptr, items_ptr, labels_ptr, log_proposal_ptr, 0.0, D,
            BLOCK_D,
        )  # fmt: skip
        kept_0, similar_0 = _gather_view(
            item * 2, i, unit_0, unit_1, num_items, temperature, chain_key_ptr, bank_ptr, written_at_ptr,
            carried_labels_ptr, carried_scores_ptr, carried_items_ptr, carried_ptr, D, BLOCK_D, OWN,
        )  # fmt: skip
        kept_1, similar_1 = _gather_view(
            item * 2 + 1, b + i, unit_1, unit_0, num_items, temperature, chain_key_ptr, bank_ptr, written_at_ptr,
            carried_labels_ptr, carried_scores_ptr, carried_items_ptr, carried_ptr, D, BLOCK_D, OWN,
        )  # fmt: skip
        positive, kept = tl.sum(unit_0 * unit_1, 0), kept_0 + kept_1
        tl.store(pairs_ptr + i, positive)
        tl.store(pairs_ptr + b + i, positive * kept - (similar_0 + similar_1))
        tl.store(pairs_ptr + 2 * b + i, kept)
        tl.store(pairs_ptr + 3 * b + i, tl.sum(unit_0 * unit_0 + unit_1 * unit_1, 0))
        if i == 0:
            tl.store(now_ptr, tl.load(step_ptr))
    elif queue_ptr is not None:
        _gather_kept(
            i - b, index_ptr, stride_index, b, num_kept, num_items, bank_ptr, written_at_ptr, queue_ptr, keys_ptr,
            items_ptr, labels_ptr, log_proposal_ptr, queue_items_ptr, D, BLOCK_D, BLOCK_B,
        )  # fmt: skip


GATHER_CANDIDATES_KERNEL = Kernel(gather_candidates_kernel)


def _empty_candidates(z0: Tensor, q: int, bank_dtype: torch.dtype, dtype: torch.dtype) -> Candidates:
    (b, d), new, long, floats = z0.shape, z0.new_empty, torch.int64, torch.float32
    n, m = 2 * b, 2 * (b + q)
    keys = new(m, d, dtype=dtype)
    return Candidates(
        anchors=keys[:n] if dtype == floats else new(n, d, dtype=floats),
        lengths=new(n, dtype=floats),
        keys=keys,
        items=new(m, dtype=long),
        labels=new(m, dtype=long),
        log_proposal=new(m, dtype=floats) if q else None,
        carried_labels=new(n, OWN, dtype=long),
        carried_scores=new(n, OWN, dtype=floats),
        carried_items=new(n, dtype=long),
        carried=new(n, OWN, d, dtype=bank_dtype),
        pairs=new(PER_PAIR, b, dtype=floats),
        totals=new(3, dtype=floats),
        now=new(1, dtype=long),
        queue_items=new(q, dtype=long) if q else None,
    )


def gather_candidates(
    z0: Tensor,
    z1: Tensor,
    index: Tensor,
    stores: Stores,
    queue: Tensor | None,
    *,
    temperature: float,
    floor: float,
    shrinks: tuple[float, float],
    dtype: torch.dtype,
) -> Candidates:
    """Normalizes b pairs and reads their chains and the queue, in one launch; ``totals`` are left to the gate.

    Roofline: for small batches, the launch itself (expected). Else memory, rows of d elements: for each anchor its
    embedding, its own kept one and two of its chain's key read; anchor, key and those two written.

    Args:
        z0: (b, d), any strides.
        z1: (b, d), likewise.
        index: (b,) int64, any stride; checked on the device.
        queue: (q,) int64 items of the latest batches, -1: none; None: there is no queue.
        floor: least length that embeddings are divided by.
        shrinks: above which element a row's squares could overflow, and by what it is then multiplied first.
        dtype: to multiply in.
    """
    (b, d), q = z0.shape, 0 if queue is None else queue.shape[0]
    candidates = _empty_candidates(z0, q, stores.bank.dtype, dtype)
    arguments = pointers(stores) | pointers(candidates) | pair_arguments(z0, z1, index)
    arguments |= {
        "num_kept": q,
        "num_items": stores.chain_key.shape[0] // 2,
        "temperature": temperature,
        "floor": floor,
        "queue_ptr": queue,
        "BLOCK_B": BLOCK_B,
        "OWN": OWN,
        "LARGE": shrinks[0],
        "SHRINK": shrinks[1],
    }
    if dtype == torch.float32:
        arguments["anchors_ptr"] = None  # the keys serve
    with device_guard(z0):
        GATHER_CANDIDATES_KERNEL((b + q, 1, 1), arguments, {"num_warps": num_warps(row_block(d))})
    return candidates


@triton.jit
def _close(ptr, first, end, value, BLOCK: tl.constexpr):
    for begin in range(first, end, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(ptr + at, tl.full((BLOCK,), value, ptr.dtype.element_ty), at < end)


@triton.jit(do_not_specialize=NUMBERS)
def gate_candidates_kernel(
    anchors_ptr,  # (2b, d) float32
    pairs_ptr,  # (PER_PAIR, b) float32
    sums_ptr,  # (2,) float32, of earlier batches
    b: tl.int64, num_kept: tl.int64, temperature: tl.float32,
    totals_ptr,  # (3,) float32, written
    carried_scores_ptr, carried_items_ptr, log_proposal_ptr,  # Candidates, written where the bank is stale
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
    MEMORY: tl.constexpr, MAX_STALENESS: tl.constexpr,
):  # fmt: skip
    """One program: sums over the batch, and from them whether what is kept may be a candidate at all."""
    dim = tl.arange(0, BLOCK_D)
    total_0, total_1 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, b, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        at, there = row[:, None] * D + dim[None, :], (row < b)[:, None] & (dim < D)[None, :]
        total_0 += tl.load(anchors_ptr + at, there, other=0.0)
        total_1 += tl.load(anchors_ptr + b * D + at, there, other=0.0)
    across = tl.sum(tl.sum(total_0, 0) * tl.sum(total_1, 0), 0)  # of all pairs of rows of the two views
    positive, lost = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    seen, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, b, BLOCK):
        row = first + tl.arange(0, BLOCK)
        positive += tl.load(pairs_ptr + row, row < b, other=0.0)
        lost += tl.load(pairs_ptr + b + row, row < b, other=0.0)
        seen += tl.load(pairs_ptr + 2 * b + row, row < b, other=0.0)
        squares += tl.load(pairs_ptr + 3 * b + row, row < b, other=0.0)
    similar, pairs = tl.sum(positive, 0), b.to(tl.float32)
    negative = (across - similar) / tl.maximum(pairs * (pairs - 1.0), 1.0)
    # Without a negative nothing says what a difference is worth.
    before_lost, before_worth = tl.load(sums_ptr), tl.load(sums_ptr + 1)
    new_lost = tl.sum(lost, 0) + MEMORY * before_lost
    new_worth = (similar / pairs - negative) * tl.sum(seen, 0) + MEMORY * before_worth
    new_lost, new_worth = tl.where(b < 2, before_lost, new_lost), tl.where(b < 2, before_worth, new_worth)
    tl.store(totals_ptr, tl.sum(squares, 0) / temperature)
    tl.store(totals_ptr + 1, new_lost)
    tl.store(totals_ptr + 2, new_worth)
    fresh = (new_worth > 0) & (new_lost / tl.where(new_worth > 0, new_worth, 1.0) < MAX_STALENESS)
    if not fresh:
        _close(carried_scores_ptr, 0, 2 * b * OWN, NEG_INF, BLOCK)
        _close(carried_items_ptr, 0, 2 * b, -1, BLOCK)
        if log_proposal_ptr is not None:
            _close(log_proposal_ptr, 2 * b, 2 * (b + num_kept), float("inf"), BLOCK)


GATE_CANDIDATES_KERNEL = Kernel(gate_candidates_kernel)


def gate_candidates(
    candidates: Candidates, sums: Tensor, *, temperature: float, memory: float, max_staleness: float
) -> None:
    """Writes ``totals``, and leaves out what is kept where it has become stale, in one launch.

    Roofline: for small batches, the launch itself (expected). Else the loads of one multiprocessor, 8 b d bytes.

    Args:
        sums: (2,) of ``Staleness``, before this batch. memory: of them, from a batch to the next.
        max_staleness: at and above it nothing that is kept is a candidate.
    """
    n, d = candidates.anchors.shape
    b = n // 2
    block_n = tile_rows(d, GATE_ELEMENTS, b)
    arguments = pointers(candidates) | {
        "sums_ptr": sums,
        "b": b,
        "num_kept": 0 if candidates.queue_items is None else candidates.queue_items.shape[0],
        "temperature": temperature,
        "D": d,
        "BLOCK_D": row_block(d),
        "BLOCK_N": block_n,
        "BLOCK": min(GATE_ROWS, row_block(b)),
        "OWN": OWN,
        "MEMORY": memory,
        "MAX_STALENESS": max_staleness,
    }
    with device_guard(sums):
        GATE_CANDIDATES_KERNEL((1, 1, 1), arguments, {"num_warps": num_warps(2 * block_n * row_block(d))})
