"""EMC2's sampler: what is proposed to a batch's anchors, the step of their chains, and the samples that it leaves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends.params import WalkParams
from ..distributed.keys import Keys, LocalKeys, Sweep
from ..transition import MHState
from .anchors import Anchors
from .sampled import Samples, samples_by_label


class WalkOptions(NamedTuple):
    """What a loss asks of a step of its chains."""

    temperature: float
    seed: int
    step: Tensor  # () int64
    burn_in: float  # share of the proposals
    num_samples: int | None  # None: min(16, those after burn-in)
    views: str  # of the batch's items that are proposed: "one" | "both"
    bimodal: bool
    dtype: torch.dtype  # to multiply the batch's keys in
    return_accepts: bool
    backend: str

    def schedule(self, num_proposals: int) -> tuple[int, int]:
        """Burn-in and number of samples of a walk over so many proposals."""
        burn_in = int(self.burn_in * num_proposals)
        most = num_proposals - burn_in
        if self.num_samples is None:
            return burn_in, min(16, most)
        if self.num_samples > most:
            expected = f"at most {most} with this batch ({num_proposals} proposals, burn-in {burn_in})"
            raise ValueError(f"num_samples must be {expected}, got {self.num_samples}")
        return burn_in, self.num_samples


class Walked(NamedTuple):
    samples: Samples
    state: MHState  # (2b,) the anchors' chains afterwards
    acceptance: Tensor | None  # () of proposals, if asked for; NaN in a ring, where no rank knows which were accepted
    carry_share: Tensor | None  # () of the samples' weight: where the walk began, if asked for


class BankSlots(NamedTuple):
    """The bank's entries that are proposed to one half of the anchors each, or one row of them to all."""

    items: Tensor  # (1 or 2, k) int64
    labels: Tensor  # (1 or 2, k) int64
    num_proposals: int  # uniform draws of an anchor


def sweep_batch(anchors: Anchors, start: MHState, carried: Tensor, keys: Keys, options: WalkOptions) -> Walked:
    """Proposes the batch's keys one after another; changes nothing of what is kept.

    Args:
        start: (2b,) incoming states.
        carried: (2b, d) the bank's embeddings of their keys.
        keys: of the whole batch, 2B, view by view.
    """
    rows = anchors.embeddings.detach().to(options.dtype), anchors.items, anchors.labels, *start
    if options.bimodal:
        halves = zip(*(field.chunk(2) for field in rows), strict=True)
        others = keys.select_view(1), keys.select_view(0)
        sides = [_sweep_side(*half, some, options) for half, some in zip(halves, others, strict=True)]
        swept = _Swept(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*sides, strict=True)))
    else:
        swept = _sweep_side(*rows, keys if options.views == "both" else toss_views(keys, options), options)
    samples = Samples(swept.inside, start.key[:, None], swept.outside, carried[:, None])
    state = MHState(swept.key, swept.score)
    if not options.return_accepts:
        return Walked(samples, state, None, None)
    carry_share = (swept.positions < 0).to(swept.inside.dtype).mean()
    if swept.accepted is None:
        return Walked(samples, state, torch.full_like(carry_share, torch.nan), carry_share)
    return Walked(samples, state, swept.accepted.sum().float() / swept.proposed.sum().clamp_min(1), carry_share)


class _Swept(NamedTuple):
    """What n anchors that were proposed the same keys are left with."""

    inside: Tensor  # (n, d) sum of the samples in the batch, weighted
    outside: Tensor  # (n, 1) weight of the others, which are still at the carried key
    key: Tensor
    score: Tensor
    positions: Tensor  # (n, R)
    accepted: Tensor | None  # (n,)
    proposed: Tensor | None  # (1,) how many were


def _sweep_side(
    queries: Tensor, items: Tensor, labels: Tensor, key: Tensor, score: Tensor, keys: Keys, options: WalkOptions
) -> _Swept:
    burn_in, num_samples = options.schedule(keys.items.shape[0])
    result = keys.walk(
        Sweep(
            queries, items, labels, MHState(key, score), options.temperature, options.seed, options.step, burn_in,
            num_samples, options.return_accepts, options.backend,
        )
    )  # fmt: skip
    positions = result.samples.long()
    in_batch = positions >= 0
    moved = in_batch.sum(1, keepdim=True, dtype=keys.embeddings.dtype)
    started = (key >= 0)[:, None]  # else there is nothing to stay at
    share = torch.where(started, num_samples, moved.clamp_min(1)).reciprocal_()
    inside = keys.bag(positions.clamp_min(0), in_batch * share)  # a bag wants legal indices
    stayed = torch.where(started, (num_samples - moved) * share, 0)
    proposed = count_proposals(items, keys.items)[None] if options.return_accepts else None
    return _Swept(inside, stayed, *result.state, positions, result.num_accepted, proposed)


def toss_views(keys: Keys, options: WalkOptions) -> Keys:
    """One view of each item, by its coin."""
    items = keys.items[: keys.items.shape[0] // 2]
    return keys.choose_views(ops.view_coin(items, options.seed, options.step, options.backend))


def draw_from_bank(
    anchors: Anchors, start: MHState, table: Tensor, slots: BankSlots, keys: LocalKeys, options: WalkOptions
) -> Walked:
    """Proposes uniform draws, with replacement, from all that the bank holds; with two modalities, of the other one.

    Args:
        start: (2b,) incoming states.
        table: (num_items * 2, d) the bank's embeddings, multiplied in their dtype.
        keys: of the whole batch: a sample that happens to be one of them has its gradient.
    """
    burn_in, num_samples = options.schedule(slots.num_proposals)
    rows = anchors.embeddings.detach().to(table.dtype), anchors.items, anchors.labels, *start
    halves = zip(*(field.chunk(2) for field in rows), strict=True) if options.bimodal else [rows]
    tables = (table[1::2], table[::2]) if options.bimodal else (table,)
    found = []
    for (queries, items, chain_ids, key, score), some, slot_items, slot_labels in zip(
        halves, tables, slots.items, slots.labels, strict=True
    ):
        walk = WalkParams(
            queries, some, options.temperature, options.seed, options.step, chain_ids, items, slot_items, None,
            slots.num_proposals, None, burn_in, num_samples, 0, slots.num_proposals,
        )  # fmt: skip
        samples, key_after, score_after, _, *accepted = ops.mh_step(
            walk, key, score, slot_labels, options.return_accepts, False, options.backend
        )
        positions = samples.long()
        labels = torch.where(positions >= 0, slot_labels[positions.clamp_min(0)], key[:, None])
        found.append((labels, key_after, score_after, positions, *accepted))
    labels, key, score, positions, *accepted = map(torch.cat, zip(*found, strict=True))
    samples, acceptance, carry_share = samples_by_label(labels, keys), None, None
    if options.return_accepts:
        acceptance = accepted[0].sum().float() / (slots.num_proposals * len(labels))
        carry_share = (positions < 0).to(samples.inside.dtype).mean()
    return Walked(samples, MHState(key, score), acceptance, carry_share)


def count_proposals(items: Tensor, key_items: Tensor) -> Tensor:
    """() how many of the keys are proposed to anchors of these items: those that are not their own."""
    ordered = key_items.sort().values
    own = torch.searchsorted(ordered, items, right=True) - torch.searchsorted(ordered, items)
    return items.shape[0] * key_items.shape[0] - own.sum()
