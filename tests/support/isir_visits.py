"""A data set so small that all its batches, queues and coins can be gone through, for the law of i-SIR's chains."""

from __future__ import annotations

from itertools import combinations, count, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from emc2_kernels import ops
from emc2_kernels.distributed.keys import LocalKeys
from emc2_kernels.losses import EMC2Loss, emc2_isir
from emc2_kernels.losses.anchors import Anchors
from emc2_kernels.losses.emc2_isir import Kept, Resampled
from emc2_kernels.stores.bank import EmbeddingBank

ITEMS, BATCH, DIM, TEMPERATURE = 5, 3, 6, 0.5
LABELS = torch.arange(2 * ITEMS)
ALONE = {"one": {"views": "one"}, "both": {"views": "both"}, "bimodal": {"bimodal": True}}
QUEUED = {f"{name}, queue": form | {"queue": 1} for name, form in ALONE.items()}
SETTINGS = ALONE | QUEUED
FEW = [*ALONE, "both, queue", "bimodal, queue"]  # where what takes long is tried


def unit_table() -> Tensor:
    """(2 * ITEMS, DIM) float64: an embedding for each label. Not random: how far off a bug is depends on it."""
    return functional.normalize(torch.arange(1, 2 * ITEMS * DIM + 1).double().square().sin().view(-1, DIM))


def symmetric_table() -> Tensor:
    """The same, of items that are alike: any two may be exchanged, and so may the two views, by a rotation of all. So
    all partition functions are equal."""
    corners = torch.linalg.svd(torch.eye(ITEMS, dtype=torch.float64) - 1 / ITEMS).U[:, : ITEMS - 1]
    views = torch.tensor([[1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    both = torch.cat((views.expand(ITEMS, 2, 2), corners[:, None].expand(ITEMS, 2, ITEMS - 1)), 2)
    return functional.normalize(both.flatten(0, 1))


def make_loss(setting: str, dtype: torch.dtype = torch.float64, table: Tensor | None = None, **options) -> EMC2Loss:
    """Its bank holds the table."""
    table = unit_table() if table is None else table
    options |= {"temperature": TEMPERATURE, "sampler": "isir", "bank_dtype": dtype, "queue": 0, **SETTINGS[setting]}
    loss = EMC2Loss(ITEMS, DIM, backend="reference" if dtype == torch.float64 else "auto", **options)
    loss.bank.update(LABELS // 2, LABELS % 2, table, 0)
    return loss


def negatives(loss: EMC2Loss, anchor: int) -> Tensor:
    """Labels among which the anchor's chain moves."""
    legal = anchor // 2 != LABELS // 2
    return LABELS[legal & (anchor % 2 != LABELS % 2)] if loss.bimodal else LABELS[legal]


def negative_scores(loss: EMC2Loss, anchor: int, table: Tensor) -> Tensor:
    return table[negatives(loss, anchor)] @ table[anchor] / TEMPERATURE


class Visit(NamedTuple):
    items: Tensor  # (BATCH,)
    queue: Tensor  # (loss.queue,)
    step: int  # at which their coins are the ones that are meant


def possible_visits(loss: EMC2Loss, item: int | None = None) -> list[Visit]:
    """All batches, or those that hold an item, with all that a queue of one may have beside them, or an item of theirs;
    with all outcomes of their items' coins: equally likely, all of them."""
    batches = [some for some in combinations(range(ITEMS), BATCH) if item is None or item in some]
    pairs = [(batch, queue) for batch in batches for queue in possible_queues(loss, batch)]
    if loss.views == "both" or loss.bimodal:
        return [Visit(torch.tensor(batch), torch.tensor(queue), 0) for batch, queue in pairs]
    step_of: dict[tuple[int, ...], int] = {}
    for step in count():
        coins = ops.view_coin(torch.arange(ITEMS), loss.seed, torch.tensor(step), "auto")
        step_of.setdefault(tuple(coins.tolist()), step)
        if len(step_of) == 2**ITEMS:
            break
    visits = []
    for (batch, queue), wanted in product(pairs, product((0, 1), repeat=BATCH + loss.queue)):
        tossed = (*batch, *beside(batch)[:1]) if set(queue) <= set(batch) else (*batch, *queue)  # as many coins for all
        coins = wanted[: BATCH + len(queue)]
        step = next(step for found, step in step_of.items() if [found[i] for i in tossed[: len(coins)]] == [*coins])
        visits.append(Visit(torch.tensor(batch), torch.tensor(queue, dtype=torch.int64), step))
    return visits


def beside(batch: tuple[int, ...]) -> list[int]:
    return [item for item in range(ITEMS) if item not in batch]


def possible_queues(loss: EMC2Loss, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(item,) for item in (*beside(batch), batch[-1])] if loss.queue else [()]


class OfAnyLabel:
    """A bank for chains of ids that it has not: their own embeddings do not matter."""

    def __init__(self, bank: EmbeddingBank) -> None:
        self.bank = bank

    def read(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.bank.read(torch.where(labels < 2 * ITEMS, labels, 0))


def step_chains(loss: EMC2Loss, visit: Visit, start: Tensor, ids: Tensor) -> tuple[Kept, Resampled]:
    """A visit of chains at labels (2, n) of item 0's two views; row by row, those of view 0 first."""
    table = loss.bank.embeddings
    anchors = Anchors(table[:2].repeat_interleave(start.shape[1], 0), torch.zeros_like(ids), ids)
    labels = torch.cat((visit.items * 2, visit.items * 2 + 1))
    keys = LocalKeys(table[labels], visit.items.repeat(2), labels)
    options = loss._walk_options(table, True)._replace(step=torch.tensor(visit.step))
    if loss.recent is not None:
        loss.recent.items.copy_(visit.queue)
    others = OfAnyLabel(loss.bank), options, loss.recent, loss.drift, visit.items, None
    kept = emc2_isir.bring_along(anchors, start.flatten(), *others)
    return kept, emc2_isir.resample(anchors, kept, keys, options)
