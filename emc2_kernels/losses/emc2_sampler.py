"""One visit of EMC2's chains: what is proposed to a batch's anchors, the step, and the samples that it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import ops, rng
from ..backends.params import sample_points
from ..mh import mh_step
from ..transition import MHState
from .anchors import Anchors
from .negatives import Samples, by_label

if TYPE_CHECKING:
    from .emc2 import EMC2Loss


class Visit(NamedTuple):
    keys: Tensor  # (m, d) the batch's keys, of all ranks where they are gathered, differentiable
    samples: Samples
    state: MHState  # (2b,) the anchors' chains afterwards
    acceptance: Tensor | None  # () of proposals
    carry_share: Tensor  # () of the samples' weight: where the visit began


class Proposals(NamedTuple):
    """What is proposed to those anchors that are proposed the same keys: all of them, or those of one modality."""

    anchors: slice
    keys: Tensor  # (m, d)
    items: Tensor  # (m,) int64; an anchor's own item is never proposed to it
    labels: Tensor  # (m,) int64
    draws: int | None  # uniform, with replacement; None: the keys one after another
    first_row: int  # of the batch's keys, position of key 0; unused with draws


class _Walked(NamedTuple):
    positions: Tensor  # (n, S) int64 in the proposals' keys; -1: where the visit began
    weights: Tensor  # (n, S)
    state: MHState
    num_accepted: Tensor | None  # (n,)


def visit(
    loss: EMC2Loss, anchors: Anchors, dtype: torch.dtype, return_accepts: bool, whole: Anchors | None = None
) -> Visit:
    """Walks the chains of 2b anchors; changes nothing of the loss.

    Args:
        dtype: what scores are multiplied in; the bank's own where it is proposed from.
        whole: the anchors of all ranks, whose keys are proposed; None: there is one.
    """
    whole = anchors if whole is None else whole
    start = loss.chains.read(anchors.items, anchors.views, anchors.embeddings.detach(), loss.bank, loss.temperature)
    n = anchors.items.shape[0]
    keys, parts = _from_bank(loss, n, whole) if loss.proposals == "bank" else _from_batch(loss, n, whole, dtype)
    walked = [_walk(loss, anchors, part, start, return_accepts) for part in parts]
    samples = []
    for part, walk in zip(parts, walked, strict=True):
        found = walk.positions, walk.weights, start.key[part.anchors]
        of_bank = loss.proposals == "bank"
        samples.append(_of_bank(whole, part, *found) if of_bank else of_batch(loss.carry, part.first_row, *found))
    carried = torch.cat([torch.where(walk.positions < 0, walk.weights, 0).sum(1) for walk in walked])
    return Visit(
        keys,
        Samples(*(torch.cat(fields) for fields in zip(*samples, strict=True))),
        MHState(*(torch.cat(fields) for fields in zip(*(walk.state for walk in walked), strict=True))),
        _acceptance(anchors, parts, walked) if return_accepts else None,
        carried.mean() / walked[0].weights.sum(1).mean(),
    )


def _from_batch(loss: EMC2Loss, num_anchors: int, whole: Anchors, dtype: torch.dtype) -> tuple[Tensor, list[Proposals]]:
    embeddings, items, views = whole
    n, m = num_anchors, items.shape[0]
    anchors_of_view, keys_of_view = ((slice(0, k // 2), slice(k // 2, k)) for k in (n, m))
    if loss.bimodal:
        keys = embeddings
        proposed = [(anchors_of_view[view], keys_of_view[1 - view]) for view in (0, 1)]
    elif loss.views == "both":
        keys, proposed = embeddings, [(slice(0, n), slice(0, m))]
    else:
        items = items[: m // 2]
        views = ops.view_coin(items, *ops.integer_or_tensor(loss.seed), *ops.integer_or_tensor(loss.step), loss.backend)
        keys = torch.where(views[:, None] == 1, embeddings[m // 2 :], embeddings[: m // 2])
        proposed = [(slice(0, n), slice(0, m // 2))]
    compute, labels = keys.detach().to(dtype), items * 2 + views
    return keys, [
        Proposals(rows, compute[those], items[those], labels[those], None, those.start) for rows, those in proposed
    ]


def _from_bank(loss: EMC2Loss, num_anchors: int, whole: Anchors) -> tuple[Tensor, list[Proposals]]:
    """All that the bank holds; with two modalities, of the other one."""
    n, table = num_anchors, loss.bank.embeddings
    if not loss.bimodal:
        proposed = [(slice(0, n), table)]
    else:
        proposed = [(slice(0, n // 2), table[1::2]), (slice(n // 2, n), table[::2])]
    return whole.embeddings, [
        Proposals(rows, keys, items, labels, loss.num_proposals, 0)
        for (rows, keys), items, labels in zip(proposed, loss.slot_items, loss.slot_labels, strict=True)
    ]


def _walk(loss: EMC2Loss, anchors: Anchors, part: Proposals, start: MHState, return_accepts: bool) -> _Walked:
    embeddings, items, views = (field[part.anchors] for field in anchors)
    count = part.keys.shape[0] if part.draws is None else part.draws
    burn_in, num_samples = loss.schedule(count)
    recycled = loss.estimator == "recycled"
    # Recycling looks at the state before each sample's proposal too: the walk is asked for every state from there on.
    first = max(burn_in - 1, 0) if recycled else burn_in
    chain_ids = items * 2 + views
    queries = embeddings.detach().to(part.keys.dtype)
    state = MHState(start.key[part.anchors], start.score[part.anchors])
    proposal, drawn = "sweep" if part.draws is None else "uniform", None
    if recycled and part.draws is not None:  # which keys they are has to be known here
        proposal = drawn = rng.proposal_positions(
            chain_ids, range(count), part.keys.shape[0], seed=loss.seed, step=loss.step
        )
    result = mh_step(
        queries,
        part.keys,
        state,
        temperature=loss.temperature,
        seed=loss.seed,
        step=loss.step,
        chain_ids=chain_ids,
        query_ids=items,
        key_ids=part.items,
        key_labels=part.labels,
        proposal=proposal,
        num_proposals=count if isinstance(proposal, str) and proposal == "uniform" else None,
        burn_in=first,
        num_samples=count - first if recycled else num_samples,
        return_accepts=return_accepts,
        backend=loss.backend,
    )
    positions = result.samples.long()
    if not recycled:
        weights = torch.ones_like(positions, dtype=embeddings.dtype)
        return _Walked(positions, weights, result.state, result.num_accepted)
    points = positions.new_tensor(sample_points(count, burn_in, num_samples))
    proposed = (points.expand(len(items), -1)) if drawn is None else drawn[:, points]
    before = torch.cat((torch.full_like(positions[:, :1], -1), positions), 1)[:, points - first]
    move = _move_probability(queries, items, part, state, proposed, before, loss.temperature)
    return _Walked(torch.cat((proposed, before), 1), torch.cat((move, 1 - move), 1), result.state, result.num_accepted)


def _move_probability(
    queries: Tensor,
    items: Tensor,
    part: Proposals,
    start: MHState,
    proposed: Tensor,
    before: Tensor,
    temperature: float,
) -> Tensor:
    """(n, R): min(1, exp(s_j - s_c)) of the proposed keys j and the states c before them."""

    def scores(positions: Tensor) -> Tensor:
        return torch.einsum("nd,nrd->nr", queries.float(), part.keys[positions].float()) / temperature

    with torch.autocast(queries.device.type, enabled=False):
        proposed_score = scores(proposed)
        score = torch.where(before < 0, start.score.nan_to_num(nan=-torch.inf)[:, None], scores(before.clamp_min(0)))
    proposable = proposed_score.isfinite() & (part.items[proposed] != items[:, None])
    return torch.where(proposable, (proposed_score - score).clamp_max(0).exp(), 0)


def of_batch(carry: str, first_row: int, positions: Tensor, weights: Tensor, start: Tensor) -> Samples:
    """Samples in the batch by their row; what is left is the key that the chain began with."""
    inside = positions >= 0
    row_weights, left = weights * inside, (weights * ~inside).sum(1, keepdim=True) * (start >= 0)[:, None]
    if carry == "drop":
        left = torch.zeros_like(left)
    total = row_weights.sum(1, keepdim=True) + left
    scale = 1 / torch.where(total > 0, total, 1)
    return Samples(positions.clamp_min(0) + first_row, row_weights * scale, start[:, None], left * scale)


def _of_bank(whole: Anchors, part: Proposals, positions: Tensor, weights: Tensor, start: Tensor) -> Samples:
    """Samples by label, but by row where the label happens to be in the batch."""
    labels = torch.where(positions >= 0, part.labels[positions.clamp_min(0)], start[:, None])
    return by_label(labels, weights, whole.items * 2 + whole.views)


def _acceptance(anchors: Anchors, parts: list[Proposals], walked: list[_Walked]) -> Tensor:
    """Of the proposals that were not an anchor's own item; of all draws where they come from the bank."""
    accepted = torch.cat([walk.num_accepted for walk in walked]).sum()
    proposed = torch.zeros_like(accepted)
    for part in parts:
        items = anchors.items[part.anchors]
        proposed = proposed + (num_proposed(items, part.items) if part.draws is None else part.draws * items.shape[0])
    return accepted.float() / proposed.clamp_min(1)


def num_proposed(items: Tensor, key_items: Tensor) -> Tensor:
    """() how many of the keys are proposed to anchors of these items: those that are not their own."""
    ordered = key_items.sort().values
    own = torch.searchsorted(ordered, items, right=True) - torch.searchsorted(ordered, items)
    return items.shape[0] * key_items.shape[0] - own.sum()
