"""One visit of EMC2's chains to the keys of all ranks, of which one rank's are here at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..distributed.ring import ring_bag, ring_transition
from ..distributed.shards import Shards, gather_views
from ..transition import MHState, apply
from .anchors import Anchors
from .emc2_sampler import of_batch
from .negatives import Samples

if TYPE_CHECKING:
    from .emc2 import EMC2Loss


class RingVisit(NamedTuple):
    inside: Tensor  # (2b, d) the part of each anchor's mean negative that is in the batch, differentiable
    samples: Samples  # of which rows are of the keys of all ranks
    state: MHState  # (2b,) the anchors' chains afterwards
    carry_share: Tensor  # () of the samples: where the visit began
    acceptance: Tensor  # () NaN: which proposals were taken is on no rank


def ring_visit(loss: EMC2Loss, anchors: Anchors, shards: Shards, dtype: torch.dtype) -> RingVisit:
    """``visit`` with proposals from the batch, and the sum of what it samples there; changes nothing of the loss.

    The embeddings go round twice, for the walk and for its samples, and their gradients once. Items are gathered: 8
    bytes a key of the whole batch.
    """
    embeddings, items, views = anchors
    start = loss.chains.read(items, views, embeddings.detach(), loss.bank, loss.temperature)
    found = []
    for rows, keys, key_items, labels in _proposals(loss, anchors, shards):
        burn_in, num_samples = loss.schedule(labels.shape[0])
        transition = ring_transition(
            embeddings[rows].detach().to(dtype),
            keys.detach().to(dtype),
            key_ids=key_items,
            shards=shards,
            temperature=loss.temperature,
            seed=loss.seed,
            step=loss.step,
            chain_ids=items[rows] * 2 + views[rows],
            query_ids=items[rows],
            burn_in=burn_in,
            num_samples=num_samples,
            backend=loss.backend,
        )
        entry = MHState(start.key[rows], start.score[rows])
        result = apply(transition, entry, labels)
        positions = result.samples.long()
        samples = of_batch(loss.carry, 0, positions, torch.ones_like(positions, dtype=keys.dtype), entry.key)
        inside = ring_bag(keys, samples.rows, samples.row_weights, shards)
        found.append((inside, *samples, *result.state, (positions < 0).float().mean(1)))
    inside, *samples, key, score, carried = (torch.cat(field) for field in zip(*found, strict=True))
    share = carried.mean()
    return RingVisit(inside, Samples(*samples), MHState(key, score), share, torch.full_like(share, torch.nan))


def _proposals(loss: EMC2Loss, anchors: Anchors, shards: Shards) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
    """Anchors that are proposed the same keys, this rank's keys, and items and labels of all ranks' keys."""
    embeddings, b = anchors.embeddings, anchors.items.shape[0] // 2
    items = gather_views(anchors.items[:b], shards)
    halves = slice(0, b), slice(b, 2 * b)
    if loss.bimodal:
        return [(halves[v], embeddings[halves[1 - v]], items, items * 2 + (1 - v)) for v in (0, 1)]
    everyone = slice(0, 2 * b)
    if loss.views == "both":
        return [(everyone, embeddings, items.repeat(2), torch.cat([items * 2, items * 2 + 1]))]
    coin = ops.view_coin(items, *ops.integer_or_tensor(loss.seed), *ops.integer_or_tensor(loss.step), loss.backend)
    mine = coin[shards.first : shards.first + b, None]
    return [(everyone, torch.where(mine == 1, embeddings[b:], embeddings[:b]), items, items * 2 + coin)]
