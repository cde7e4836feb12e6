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
        start: (2b,) incoming states. carried: (2b, d) the bank's embeddings of their keys.
        keys: of the whole batch, 2B, view by view.
    """
    results, inside, outside, proposed = [], [], [], 0
    for rows, some in _proposed_keys(keys, anchors, options):
        burn_in, num_samples = options.schedule(some.items.shape[0])
        items, entry = anchors.items[rows], MHState(start.key[rows], start.score[rows])
        result = some.walk(
            Sweep(
                anchors.embeddings.detach()[rows].to(options.dtype),
                items,
                anchors.labels[rows],
                entry,
                options.temperature,
                options.seed,
                options.step,
                burn_in,
                num_samples,
                options.return_accepts,
                options.backend,
            )  # fmt: skip
        )
        positions = result.samples.long()
        in_batch = positions >= 0
        moved = in_batch.sum(1, keepdim=True)
        stayed = torch.where(entry.key[:, None] >= 0, num_samples - moved, 0)
        share = 1 / (moved + stayed).clamp_min(1).to(anchors.embeddings.dtype)
        inside.append(some.bag(positions.clamp_min(0), in_batch * share))  # a bag wants legal indices
        outside.append(stayed * share)
        results.append((*result.state, positions))
        if options.return_accepts:
            accepted = None if result.num_accepted is None else result.num_accepted.sum()
            proposed = proposed + count_proposals(items, some.items)
            results[-1] += (accepted,)
    key, score, positions, *accepted = (_joined(parts) for parts in zip(*results, strict=True))
    samples = Samples(_joined(inside), start.key[:, None], _joined(outside), carried[:, None])
    if not options.return_accepts:
        return Walked(samples, MHState(key, score), None, None)
    carry_share = (positions < 0).to(samples.inside.dtype).mean()
    acceptance = torch.full_like(carry_share, torch.nan)
    if accepted[0] is not None:
        acceptance = accepted[0].sum().float() / proposed.clamp_min(1)
    return Walked(samples, MHState(key, score), acceptance, carry_share)


def _joined(parts: tuple[Tensor | None, ...] | list[Tensor]) -> Tensor | None:
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    return torch.cat(parts) if parts[0].dim() else torch.stack(parts)


def _proposed_keys(keys: Keys, anchors: Anchors, options: WalkOptions) -> list[tuple[slice, Keys]]:
    """Anchors that are proposed the same keys, and these."""
    everyone, b = slice(None), anchors.items.shape[0] // 2
    if options.bimodal:
        return [(slice(0, b), keys.select_view(1)), (slice(b, None), keys.select_view(0))]
    if options.views == "both":
        return [(everyone, keys)]
    items = keys.items[: keys.items.shape[0] // 2]
    return [(everyone, keys.choose_views(ops.view_coin(items, options.seed, options.step, options.backend)))]


def draw_from_bank(
    anchors: Anchors, start: MHState, table: Tensor, slots: BankSlots, keys: LocalKeys, options: WalkOptions
) -> Walked:
    """Proposes uniform draws, with replacement, from all that the bank holds; with two modalities, of the other one.

    Args:
        start: (2b,) incoming states. table: (num_items * 2, d) the bank's embeddings, multiplied in their dtype.
        keys: of the whole batch: a sample that happens to be one of them has its gradient.
    """
    b, bimodal = anchors.items.shape[0] // 2, len(slots.items) == 2
    halves = (slice(0, b), slice(b, None)) if bimodal else (slice(None),)
    results = []
    for rows, some, items, labels in zip(
        halves, (table[1::2], table[::2]) if bimodal else (table,), slots.items, slots.labels, strict=True
    ):
        burn_in, num_samples = options.schedule(slots.num_proposals)
        walk = WalkParams(
            anchors.embeddings.detach()[rows].to(table.dtype), some, options.temperature, options.seed, options.step,
            anchors.labels[rows], anchors.items[rows], items, None, slots.num_proposals, None, burn_in, num_samples,
            0, slots.num_proposals,
        )  # fmt: skip
        samples, key, score, _, *accepted = ops.mh_step(
            walk, start.key[rows], start.score[rows], labels, options.return_accepts, False, options.backend
        )
        positions = samples.long()
        sampled = torch.where(positions >= 0, labels[positions.clamp_min(0)], start.key[rows, None])
        results.append((key, score, positions, sampled, *accepted))
    key, score, positions, sampled, *accepted = map(_joined, zip(*results, strict=True))
    samples = samples_by_label(sampled, keys)
    if not options.return_accepts:
        return Walked(samples, MHState(key, score), None, None)
    acceptance = accepted[0].sum().float() / (slots.num_proposals * len(key))
    return Walked(samples, MHState(key, score), acceptance, (positions < 0).to(samples.inside.dtype).mean())


def count_proposals(items: Tensor, key_items: Tensor) -> Tensor:
    """() how many of the keys are proposed to anchors of these items: those that are not their own."""
    ordered = key_items.sort().values
    own = torch.searchsorted(ordered, items, right=True) - torch.searchsorted(ordered, items)
    return items.shape[0] * key_items.shape[0] - own.sum()
