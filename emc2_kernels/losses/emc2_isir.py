"""EMC2 by iterated sampling importance resampling (i-SIR): NT-Xent with the chain's own key in each denominator.

An anchor's candidates are the batch's keys and the key that its chain brings along. The chain's next key is drawn from
their softmax, and the log-sum-exp of their scores less the positive's is the anchor's loss: where the chain follows its
target, the mean gradient is that of the global loss for every batch size (docs/decisions.md; BR-SNIS, arXiv
2207.06364).

That is exact for batches drawn without replacement if candidates are made by *replacement*: what a chain brings stands
for all keys that the batch has of that item. With one view of each item, that is the key that it was drawn with; with
both views, both. Then whichever candidate is drawn would have had the same candidates, from the same batches.
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
from ..isir import carried_weights
from ..stores.bank import EmbeddingBank
from ..transition import MHState
from .anchors import Anchors
from .correction import BatchMeans
from .emc2_sampler import WalkOptions, toss_views
from .sampled import Encode, encoded

NO_SECOND_DERIVATIVE = 'EMC2Loss(sampler="isir") has no second derivative'


class Carried(NamedTuple):
    """What the 2b anchors' chains bring along, C candidates each."""

    labels: Tensor  # (2b, C) int64; -1: none
    items: Tensor  # (2b,) int64, one for all candidates of a chain; -1
    embeddings: Tensor  # (2b, C, d), differentiable where they are encoded again; zeros where there is none
    similarity: Tensor  # (2b, C) with the anchor, detached; 0 where there is none
    scores: Tensor  # (2b, C) detached; -inf: none


class MeansThenAndNow(NamedTuple):
    """Of the batch that a kept embedding came with, and of the present one."""

    then: BatchMeans
    now: Tensor  # (2, d) by view, detached


class Side(NamedTuple):
    """Anchors that have the same keys: all, or those of one modality."""

    queries: Tensor  # (n, d) detached, in the dtype to multiply in
    items: Tensor  # (n,)
    carried_items: Tensor  # (n,)
    keys: Keys  # differentiable
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
    encode: Encode | None,
    normalize: bool,
    means: MeansThenAndNow | None,
) -> Carried:
    """The candidates of chains at ``key`` (2b,), -1: not started.

    Args:
        encode: makes them, each distinct one once, with gradient. None: the bank gives them, without.
        means: by which the bank's are moved on, see losses/correction.py.
    """
    labels = key[:, None]
    if options.views == "both":
        other = torch.where(labels >= 0, labels ^ 1, -1)
        labels = torch.cat((labels, other), 1)
    flat, queries = labels.flatten(), anchors.embeddings.detach()
    held, kept = bank.read(flat)
    kept = kept.to(queries.dtype)
    if encode is not None:
        kept = _encode_again(kept, flat, held, encode, anchors.embeddings, normalize)
    elif means is not None:
        (then,) = means.then.rows(flat.clamp_min(0), "means")
        kept = kept + means.now[flat % 2] - then.to(kept.dtype)
    kept = kept.view(*labels.shape, -1)
    with torch.no_grad():
        similarity = (queries[:, None] * kept).sum(-1)  # no product for autocast to round
        held = held.view(labels.shape)
        if options.views == "both":  # a key that the bank does not hold stands for none of the batch's
            held = held & held[:, :1]
        scores = torch.where(held, similarity / options.temperature, -torch.inf)
        items = torch.where(held[:, 0], key >> 1, -1)
    return Carried(labels, items, kept, similarity, scores)


def _encode_again(kept: Tensor, labels: Tensor, held: Tensor, encode: Encode, like: Tensor, normalize: bool) -> Tensor:
    places = held.nonzero()[:, 0]
    if len(places) == 0:
        return kept
    distinct, inverse = labels[places].unique(return_inverse=True)
    again = encoded(encode, distinct, like, normalize)
    return torch.zeros_like(kept).index_copy(0, places, again[inverse])


def resample(anchors: Anchors, carried: Carried, keys: Keys, options: WalkOptions) -> Resampled:
    """Draws each chain's next key from the batch's and what it brought along; changes nothing of what is kept.

    Args:
        keys: of the whole batch, 2B, view by view.
    """
    queries = anchors.embeddings.detach()
    if not queries.is_cpu:  # where products are made in float32
        queries = queries.to(options.dtype)
    rows = queries, anchors.items, anchors.labels, carried.labels, carried.items, carried.scores
    if options.bimodal:
        halves = zip(*(field.chunk(2) for field in rows), strict=True)
        parts = [(*half, keys.select_view(view)) for half, view in zip(halves, (1, 0), strict=True)]
    elif options.views == "one":
        parts = [(*rows, toss_views(keys, options))]
    else:
        parts = [(*rows, keys)]
    drawn, sides = [], []
    for some, items, chains, labels, carried_items, scores, own_keys in parts:
        among = isinstance(own_keys, LocalKeys) and own_keys.embeddings is anchors.embeddings
        side = Side(some, items, carried_items, own_keys.cast(queries.dtype), among)
        brought = CarriedParams(labels, scores, own_keys.labels, chains, options.seed, options.step, 0)
        with torch.no_grad():
            walked = side.own_keys(side.keys.embeddings)
            found = walked.resample(*side[:3], options.temperature, brought, options.backend)
        drawn.append(found[:4])
        sides.append(side)
    position, key, score, lse = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn, strict=True))
    return Resampled(lse, MHState(key, score), position, sides)


def mean_loss(anchors: Anchors, carried: Carried, resampled: Resampled, options: WalkOptions, factor: float) -> Tensor:
    """Mean over the anchors of log-sum-exp - s+, times ``factor``; an anchor without candidates has none."""
    with torch.no_grad():
        view_0, view_1 = anchors.embeddings.chunk(2)
        positive = (view_0 * view_1).sum(1) / options.temperature
        lse = resampled.lse.view(2, -1)
        counted = lse > -torch.inf
        excess = torch.where(counted, lse, positive) - positive  # NaN where that is
        weight = factor / excess.numel()
        value = excess.sum() * weight
    keys = [None if side.among else side.keys.embeddings for side in resampled.sides]
    without = [side._replace(keys=side.keys._replace(embeddings=None)) for side in resampled.sides]
    form = Form(options.temperature, options.backend, without)
    hang = _Transformed if functorch_active() else _ByHand
    found = value, resampled.lse, carried.scores, counted.flatten().to(lse.dtype) * weight
    return hang.apply(form, *found, anchors.embeddings, carried.embeddings, *keys)


class Form(NamedTuple):
    """How a mean loss was made, beside its tensors."""

    temperature: float
    backend: str
    sides: list[Side]  # their keys without embeddings


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

    With p_ij = exp(s_ij - lse_i): those of a log-sum-exp, of keys and of carried ones alike, less that of s+.
    """
    saved = ctx.saved_tensors
    temperature, backend, sides = ctx.form
    with torch.no_grad():
        lse, scores, share, embeddings, kept, *keys = saved
        d_lse = share * grad
        parts = zip(d_lse.chunk(len(sides)), lse.chunk(len(sides)), sides, keys, strict=True)
        of_sides = []
        for d_some, some, side, given in parts:
            of_sides.append(side.own_keys(given).lse_gradient(*side[:3], temperature, d_some, some, backend))
        d_queries, d_keys = zip(*of_sides, strict=True)
        total = (d_queries[0] if len(sides) == 1 else torch.cat(d_queries)).to(embeddings.dtype)
        d_similarity = (carried_weights(scores, lse) * (d_lse / temperature)[:, None])[..., None]
        total += (d_similarity * kept).sum(1)
        d_kept = d_similarity * embeddings[:, None] if ctx.needs_input_grad[6] else None
        by_view = 2, -1, embeddings.shape[1]
        d_positive = d_lse.view(2, -1).sum(0) / -temperature
        total.view(by_view).addcmul_(embeddings.view(by_view).flip(0), d_positive[:, None])
    made = no_double_backward(NO_SECOND_DERIVATIVE, total, d_kept, *d_keys, of=(grad, *saved[3:]))
    return *[None] * 5, *made


def lost_side(resampled: Resampled, carried: Carried, options: WalkOptions) -> Tensor:
    """() of value 0, whose gradient is what the kept keys do not get: the batch's keys have it in their place, by their
    own softmax; see losses/correction.py."""
    lse = torch.cat(
        [side.keys.lse(side.queries, side.items, options.temperature, options.backend) for side in resampled.sides]
    )
    lse = torch.where(lse > -torch.inf, lse, 0)
    weights = carried_weights(carried.scores, resampled.lse).sum(1)
    return (weights * (lse - lse.detach())).mean()


@torch.no_grad()
def resampled_stats(
    resampled: Resampled, carried: Carried, num_items: int, options: WalkOptions
) -> tuple[dict[str, Tensor], Tensor]:
    """carried_weight, acceptance and log_partition, detached; and each anchor's mean similarity with its candidates
    under their softmax, (2b,)."""
    lse, sides = resampled.lse, resampled.sides
    temperature, backend = options.temperature, options.backend
    of_keys = [
        side.own_keys(side.keys.embeddings).mean_similarity(
            some, side.queries, side.items, temperature, backend, side.carried_items
        )
        for some, side in zip(lse.chunk(len(sides)), sides, strict=True)
    ]
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
    return stats, torch.cat(of_keys) + (weights * carried.similarity).sum(1)


def _count_keys(side: Side) -> Tensor:
    """(n,) how many of the keys are candidates of each row."""
    ordered = side.keys.items.sort().values
    of_carried = torch.where(side.carried_items == side.items, -1, side.carried_items)  # counted once

    def having(ids: Tensor) -> Tensor:
        return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)

    return len(ordered) - having(side.items) - having(of_carried)
