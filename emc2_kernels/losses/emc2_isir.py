"""EMC2 by iterated sampling importance resampling (i-SIR): NT-Xent with the chain's own key in each denominator.

An anchor's candidates are the batch's keys, kept keys of the latest batches (the queue), and the key that its chain
brings along. The chain's next key is drawn from their softmax, and the log-sum-exp of their scores less the positive's
is the anchor's loss: where the chain follows its target, the mean gradient is that of the global loss for every batch
size (docs/development/decisions.md; BR-SNIS, arXiv 2207.06364).

That is exact for batches drawn without replacement if candidates are made by *replacement*: what a chain brings stands
for all keys that batch and queue have of that item. With one view of each item, that is the key that it was drawn with;
with both views, both. Then whichever candidate is drawn would have had the same candidates, from the same batches.

A kept key has no gradient of its own: the anchor has it twice instead. What anchor i does to key j, anchor j does to
key i at another time; were both in the batch, i would get p_ij k_j as an anchor and p_ji k_j as a key, and p_ji is p_ij
where their partition functions are alike. With one of the two missing, what all embeddings share is drawn together by
both ends of each positive pair and pushed apart by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..autograd import functorch_active, no_double_backward
from ..backends.params import CarriedParams
from ..distributed.keys import Keys, LocalKeys
from ..distributed.shards import Shards
from ..isir import carried_weights
from ..stores.bank import EmbeddingBank
from ..stores.queue import ItemQueue
from ..transition import MHState
from .anchors import Anchors
from .emc2_sampler import WalkOptions, toss_views
from .sampled import Encode, encoded
from .staleness import Staleness, is_fresh, staleness

NO_SECOND_DERIVATIVE = 'EMC2Loss(sampler="isir") has no second derivative'


class Carried(NamedTuple):
    """What the 2b anchors' chains bring along, C candidates each."""

    labels: Tensor  # (2b, C) int64; -1: none
    items: Tensor  # (2b,) int64, one for all candidates of a chain; -1
    embeddings: Tensor  # (2b, C, d), differentiable where they are encoded again; zeros where there is none
    similarity: Tensor  # (2b, C) with the anchor, detached; 0 where there is none
    scores: Tensor  # (2b, C) detached; -inf: none


class Kept(NamedTuple):
    """What there is from earlier batches, and what that is compared with."""

    carried: Carried
    positive: Tensor  # (b,) similarity of the anchors' pairs, detached
    queue: LocalKeys | None  # for all anchors, view by view; None: there is none
    drift: Tensor | None  # (2,) the sums of ``Staleness`` with this batch's; None: nothing is kept that could be stale


class Side(NamedTuple):
    """Anchors that have the same keys: all, or those of one modality."""

    queries: Tensor  # (n, d) detached, in the dtype to multiply in
    items: Tensor  # (n,)
    carried_items: Tensor  # (n,)
    keys: Keys  # of the batch, differentiable
    queue: LocalKeys | None  # detached
    among: bool  # whether the queries are all of the keys, which have one gradient then

    def own_keys(self, embeddings: Tensor | None) -> Keys:
        """With the embeddings given, None: the queries."""
        return self.keys._replace(embeddings=self.queries if self.among else embeddings)


class Resampled(NamedTuple):
    """A step of the 2b anchors' chains."""

    lse: Tensor  # (2b,) over an anchor's candidates, detached; -inf: it has none
    state: MHState  # (2b,) the chains afterwards
    position: Tensor  # (2b,) int64 of the next key in the side's; -1: the chain stays; -2: at its key's other view
    sides: list[Side]


def bring_along(
    anchors: Anchors,
    key: Tensor,
    bank: EmbeddingBank,
    options: WalkOptions,
    recent: ItemQueue | None,
    drift: Staleness,
    batch: Tensor,
    shards: Shards | None,
) -> Kept:
    """The candidates of chains at ``key`` (2b,), -1: not started, and of the queue; all from the bank.

    What has become too stale is no candidate: such a chain starts again.

    Args:
        batch: (B,) items of the whole batch, of all ranks.
    """
    labels = _brought(key, options)
    wanted, counts = [labels.flatten(), anchors.labels], [labels.numel(), len(key)]
    if recent is not None:
        items, usable = recent.outside(batch)
        items = items.clamp_min(0)  # of an entry without one nothing is used
        wanted += [items * 2, items * 2 + 1]
        counts.append(2 * len(items))
    held, kept = bank.read(torch.cat(wanted))
    held, kept = held.split(counts), kept.to(anchors.embeddings.dtype).split(counts)
    positive = _pair_similarity(anchors)
    sums = drift.with_batch(anchors, positive, held[1], kept[1], shards)
    fresh = is_fresh(sums)
    carried = _score(anchors, labels, held[0] & fresh, kept[0], options)
    if recent is None:
        return Kept(carried, positive, None, sums)
    usable = usable & held[2].view(2, -1).all(0) & fresh
    left_out = torch.where(usable, 0.0, torch.inf).to(torch.float32).repeat(2)
    queue = LocalKeys(kept[2], items.repeat(2), torch.cat(wanted[2:]), left_out)
    return Kept(carried, positive, queue, sums)


def encode_along(
    anchors: Anchors, key: Tensor, bank: EmbeddingBank, options: WalkOptions, encode: Encode, normalize: bool
) -> Kept:
    """The candidates of chains at ``key`` (2b,), each distinct one encoded once, with gradient."""
    labels = _brought(key, options)
    held, kept = bank.read(labels.flatten())
    again = _encode_again(kept.to(anchors.embeddings.dtype), labels.flatten(), held, encode, anchors, normalize)
    return Kept(_score(anchors, labels, held, again, options), _pair_similarity(anchors), None, None)


def _pair_similarity(anchors: Anchors) -> Tensor:
    view_0, view_1 = anchors.embeddings.detach().chunk(2)
    return (view_0 * view_1).sum(1)


def _brought(key: Tensor, options: WalkOptions) -> Tensor:
    """(2b, C) labels of what chains at ``key`` (2b,) bring along."""
    if options.views == "one":
        return key[:, None]
    return torch.stack((key, key ^ (key >= 0)), 1)  # -1 has no other view


def _score(anchors: Anchors, labels: Tensor, held: Tensor, kept: Tensor, options: WalkOptions) -> Carried:
    """held (2b C,), kept (2b C, d): row by row."""
    kept = kept.view(*labels.shape, -1)
    with torch.no_grad():
        similarity = (anchors.embeddings[:, None] * kept).sum(-1)  # no product for autocast to round
        held = held.view(labels.shape)
        if options.views == "both":  # a key that the bank does not hold stands for none of the batch's
            held = held & held[:, :1]
        scores = torch.where(held, similarity / options.temperature, -torch.inf)
        items = torch.where(held[:, 0], labels[:, 0] >> 1, -1)
        similarity = torch.where(held, similarity, 0)
    return Carried(labels, items, kept, similarity, scores)


def _encode_again(
    kept: Tensor, labels: Tensor, held: Tensor, encode: Encode, anchors: Anchors, normalize: bool
) -> Tensor:
    places = held.nonzero()[:, 0]
    if len(places) == 0:
        return kept
    distinct, inverse = labels[places].unique(return_inverse=True)
    again = encoded(encode, distinct, anchors.embeddings, normalize)
    return torch.zeros_like(kept).index_copy(0, places, again[inverse])


def resample(anchors: Anchors, kept: Kept, keys: Keys, options: WalkOptions) -> Resampled:
    """Draws each chain's next key from all candidates; changes nothing of what is kept.

    Args:
        keys: of the whole batch, 2B, view by view.
    """
    queries, carried = anchors.embeddings.detach(), kept.carried
    if not queries.is_cpu:  # where products are made in float32
        queries = queries.to(options.dtype)
    rows = queries, anchors.items, anchors.labels, carried.labels, carried.items, carried.scores
    own_keys = _by_side(keys, options)
    queues = [None] * len(own_keys) if kept.queue is None else _by_side(kept.queue, options)
    parts = [rows] if len(own_keys) == 1 else zip(*(field.chunk(2) for field in rows), strict=True)
    drawn, sides = [], []
    for (some, items, chains, labels, carried_items, scores), side_keys, queue in zip(
        parts, own_keys, queues, strict=True
    ):
        among = isinstance(side_keys, LocalKeys) and side_keys.embeddings is anchors.embeddings
        queue = None if queue is None else queue.cast(queries.dtype)
        side = Side(some, items, carried_items, side_keys.cast(queries.dtype), queue, among)
        with torch.no_grad():
            drawn.append(_draw(side, chains, labels, scores, options))
        sides.append(side)
    position, key, score, lse = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn, strict=True))
    return Resampled(lse, MHState(key, score), position, sides)


def _by_side(keys: Keys, options: WalkOptions) -> list[Keys]:
    """Those of each side's anchors: the other modality's, one view of each item, or all."""
    if options.bimodal:
        return [keys.select_view(1), keys.select_view(0)]
    return [toss_views(keys, options) if options.views == "one" else keys]


def _draw(side: Side, chains: Tensor, labels: Tensor, scores: Tensor, options: WalkOptions) -> tuple[Tensor, ...]:
    """Position, key and score of the next states, and the log-sum-exp over all candidates.

    Args:
        chains: (n,) ids. labels, scores: (n, C) of what they bring along.
    """
    rows = *side[:3], options.temperature
    brought = CarriedParams(labels, scores, side.keys.labels, chains, options.seed, options.step, 0)
    found = side.own_keys(side.keys.embeddings).resample(*rows, brought, options.backend)
    if side.queue is not None:
        numbers = {"key_labels": side.queue.labels, "first_key": side.keys.items.shape[0]}
        nothing = brought._replace(key=labels[:, :0], score=scores[:, :0], **numbers)
        found = found.or_better(side.queue.resample(*rows, nothing, options.backend))
    return found[:4]


def mean_loss(
    anchors: Anchors, kept: Kept, resampled: Resampled, options: WalkOptions, *, decoupled: bool, factor: float
) -> Tensor:
    """Mean over the anchors of log-sum-exp - s+, times ``factor``; an anchor without candidates has none.

    Args:
        decoupled: s+ is no term of the log-sum-exp.
    """
    with torch.no_grad():
        positive = kept.positive / options.temperature
        lse = resampled.lse.view(2, -1)
        counted = lse > -torch.inf
        lse = lse if decoupled else torch.logaddexp(lse, positive)
        excess = torch.where(counted, lse, positive) - positive  # NaN where that is
        share = factor / excess.numel()
        value, d_lse = excess.sum() * share, counted.to(lse.dtype) * share
        d_positive = (d_lse if decoupled else d_lse * -torch.expm1(-excess)).sum(0)  # of both anchors of a pair
    keys = [None if side.among else side.keys.embeddings for side in resampled.sides]
    without = [side._replace(keys=side.keys._replace(embeddings=None)) for side in resampled.sides]
    form = Form(options.temperature, options.backend, without, twice=1 if kept.drift is None else 2)
    hang = _Transformed if functorch_active() else _ByHand
    carried = kept.carried
    found = value, lse.flatten(), carried.scores, d_lse.flatten(), d_positive
    return hang.apply(form, *found, anchors.embeddings, carried.embeddings, *keys)


class Form(NamedTuple):
    """How a mean loss was made, beside its tensors."""

    temperature: float
    backend: str
    sides: list[Side]  # their keys without embeddings
    twice: int  # of a kept key's gradient that its anchor has: 2 where the key has none


class _ByHand(torch.autograd.Function):
    """Hangs its gradient on a value that has been made: at batch 32 the nodes of an autograd graph cost most of it."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Form | Tensor | None) -> Tensor:
        value = inputs[1].clone()
        _keep(ctx, inputs, value)
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


class _Transformed(torch.autograd.Function):
    """The same for torch.func's transforms; see lse.py."""

    @staticmethod
    def forward(*inputs: Form | Tensor | None) -> Tensor:
        return inputs[1].clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def _keep(ctx: FunctionCtx, inputs: tuple, _: Tensor) -> None:
    ctx.form, _, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the anchors, of what their chains bring along, and of each side's keys; None for each input before them.

    With p_ij = exp(s_ij - lse_i): those of a log-sum-exp, of keys and of kept ones alike, less those of s+.
    """
    saved = ctx.saved_tensors
    temperature, backend, sides, twice = ctx.form
    with torch.no_grad():
        lse, scores, d_lse, d_positive, embeddings, kept, *keys = saved
        d_lse = d_lse * grad
        parts = zip(d_lse.chunk(len(sides)), lse.chunk(len(sides)), sides, keys, strict=True)
        of_sides = []
        for d_some, some, side, given in parts:
            rows = *side[:3], temperature, d_some, some, backend
            d_own, d_given = side.own_keys(given).lse_gradient(*rows)
            if side.queue is not None:
                d_own = d_own.add(side.queue.lse_gradient(*rows, keys_wanted=False)[0], alpha=twice)
            of_sides.append((d_own, d_given))
        d_queries, d_keys = zip(*of_sides, strict=True)
        total = (d_queries[0] if len(sides) == 1 else torch.cat(d_queries)).to(embeddings.dtype)
        d_similarity = (carried_weights(scores, lse) * (d_lse / temperature)[:, None])[..., None]
        total.add_((d_similarity * kept).sum(1), alpha=twice)
        d_kept = d_similarity * embeddings[:, None] if ctx.needs_input_grad[7] else None
        by_view = 2, -1, embeddings.shape[1]
        along_positive = (d_positive * (grad / -temperature))[:, None]
        total.view(by_view).addcmul_(embeddings.view(by_view).flip(0), along_positive)
    made = no_double_backward(NO_SECOND_DERIVATIVE, total, d_kept, *d_keys, of=(grad, *saved[4:]))
    return *[None] * 6, *made


@torch.no_grad()
def resampled_stats(
    resampled: Resampled, kept: Kept, num_items: int, options: WalkOptions
) -> tuple[dict[str, Tensor], Tensor]:
    """carried_weight, acceptance, log_partition and, with kept embeddings, staleness, detached; and each anchor's mean
    similarity with its candidates under their softmax, (2b,)."""
    lse, sides, carried = resampled.lse, resampled.sides, kept.carried
    of_keys = [_mean_similarity(side, some, options) for some, side in zip(lse.chunk(len(sides)), sides, strict=True)]
    candidates = torch.cat([_count_keys(side) for side in sides]) + carried.scores.isfinite().sum(1)
    known = candidates > 0
    # The mean of the candidates' exponentials, inverted, is an unbiased estimate of that of all negatives, inverted.
    negatives = max((num_items - 1) * (1 if options.bimodal else 2), 1)
    each = lse - candidates.clamp_min(1).to(lse.dtype).log() + math.log(negatives)
    weights = carried_weights(carried.scores, lse)
    stats = {
        "acceptance": (resampled.position != -1).to(lse.dtype).mean(),
        "carried_weight": weights.sum(1).mean(),
        "log_partition": torch.where(known, each, 0).sum() / known.sum().clamp_min(1),
    }
    if kept.drift is not None:
        stats["staleness"] = staleness(kept.drift)
    return stats, torch.cat(of_keys) + (weights * carried.similarity).sum(1)


def _mean_similarity(side: Side, lse: Tensor, options: WalkOptions) -> Tensor:
    """(n,) with batch and queue, by their part of the softmax."""
    rows = lse, *side[:2], options.temperature, options.backend, side.carried_items
    of_batch = side.own_keys(side.keys.embeddings).mean_similarity(*rows)
    return of_batch if side.queue is None else of_batch + side.queue.mean_similarity(*rows)


def _count_keys(side: Side) -> Tensor:
    """(n,) how many keys are candidates of each row."""
    of_carried = torch.where(side.carried_items == side.items, -1, side.carried_items)  # counted once
    ordered = side.keys.items.sort().values
    found = len(ordered) - _count(ordered, side.items) - _count(ordered, of_carried)
    if side.queue is None:
        return found
    usable = side.queue.log_proposal == 0  # none is of the batch, and so of a row's item
    ordered = torch.where(usable, side.queue.items, -2).sort().values
    return found + usable.sum() - _count(ordered, of_carried)


def _count(ordered: Tensor, ids: Tensor) -> Tensor:
    """(n,) how often ids (n,) are in ordered (k,)."""
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
