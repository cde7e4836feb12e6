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

from ..backends.params import CarriedParams
from ..distributed.keys import Keys
from ..isir import carried_weights
from ..stores.bank import EmbeddingBank
from ..transition import MHState
from .anchors import Anchors
from .correction import BatchMeans
from .emc2_sampler import WalkOptions, toss_views
from .in_batch import Form
from .sampled import Encode, encoded


class Carried(NamedTuple):
    """What the 2b anchors' chains bring along, C candidates each."""

    labels: Tensor  # (2b, C) int64; -1: none
    items: Tensor  # (2b,) int64 of all of a chain's candidates; -1
    similarity: Tensor  # (2b, C) with the anchor, differentiable
    scores: Tensor  # (2b, C) differentiable; -inf: none


class MeansThenAndNow(NamedTuple):
    """Of the batch that a kept embedding came with, and of the present one."""

    then: BatchMeans
    now: Tensor  # (2, d) by view, detached


class Resampled(NamedTuple):
    """A step of the 2b anchors' chains."""

    lse: Tensor  # (2b,) over an anchor's candidates, differentiable; -inf: it has none
    state: MHState  # (2b,) the chains afterwards
    weights: Tensor  # (2b, C) shares of what they brought along in the softmax
    moved: Tensor  # (2b,) bool: to another key, of the batch or of what it brought along
    sides: list[tuple[Tensor, Tensor, Tensor, Keys]]  # queries, items, carried items and their keys; two of modalities


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
    flat, queries = labels.flatten(), anchors.embeddings
    held, kept = bank.read(flat)
    kept = kept.to(queries.dtype)
    if encode is not None:
        places = held.nonzero()[:, 0]
        if len(places):
            distinct, inverse = flat[places].unique(return_inverse=True)
            again = encoded(encode, distinct, queries, normalize)
            kept = torch.zeros_like(kept).index_copy(0, places, again[inverse])
    elif means is not None:
        (then,) = means.then.rows(flat.clamp_min(0), "means")
        kept = kept + means.now[flat % 2] - then.to(kept.dtype)
    similarity = (queries[:, None] * kept.view(*labels.shape, -1)).sum(-1)  # no product for autocast to round
    held = held.view(labels.shape)
    started = held[:, 0]  # a key that the bank does not hold stands for none of the batch's
    scores = torch.where(held & started[:, None], similarity / options.temperature, -torch.inf)
    return Carried(labels, torch.where(started, key // 2, -1), similarity, scores)


def resample(anchors: Anchors, carried: Carried, keys: Keys, options: WalkOptions) -> Resampled:
    """Draws each chain's next key from the batch's and what it brought along; changes nothing of what is kept.

    Args:
        keys: of the whole batch, 2B, view by view.
    """
    queries = Form(options.bimodal, options.dtype).operands(anchors.embeddings)
    rows = queries, anchors.items, anchors.labels, *carried
    if options.bimodal:
        halves = zip(*(field.chunk(2) for field in rows), strict=True)
        others = keys.select_view(1), keys.select_view(0)
        sides = [(*half, some.cast(queries.dtype)) for half, some in zip(halves, others, strict=True)]
    else:
        some = keys if options.views == "both" else toss_views(keys, options)
        if some.embeddings is anchors.embeddings:
            some = some._replace(embeddings=queries)
        sides = [(*rows, some.cast(queries.dtype))]
    drawn = []
    for some_queries, items, chains, labels, carried_items, _, scores, own_keys in sides:
        brought = CarriedParams(labels, scores, own_keys.labels, chains, options.seed, options.step, 0)
        found = own_keys.resample(some_queries, items, carried_items, options.temperature, brought, options.backend)
        drawn.append(found[:4])
    position, key, score, lse = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn, strict=True))
    weights = carried_weights(carried.scores.detach(), lse.detach())
    of_sides = [(some_queries, items, own, keys) for some_queries, items, _, _, own, _, _, keys in sides]
    return Resampled(lse, MHState(key, score), weights, position != -1, of_sides)


def mean_loss(resampled: Resampled, anchors: Anchors, temperature: float) -> Tensor:
    """Mean over the anchors of log-sum-exp - s+; an anchor without candidates has none."""
    view_0, view_1 = anchors.embeddings.chunk(2)
    positive = (view_0 * view_1).sum(1) / temperature
    lse, positive = resampled.lse, positive.repeat(2)
    # Not 0: where nothing is finite, no score is a candidate's either, and the value must say so.
    return torch.where(lse > -torch.inf, lse - positive, 0 * positive).mean()


def lost_side(resampled: Resampled, options: WalkOptions) -> Tensor:
    """() of value 0, whose gradient is what the kept keys do not get: the batch's keys have it in their place, by their
    own softmax; see losses/correction.py."""
    lse = torch.cat(
        [
            keys.lse(queries.detach(), items, options.temperature, options.backend)
            for queries, items, _, keys in resampled.sides
        ]
    )
    lse = torch.where(lse > -torch.inf, lse, 0)
    return (resampled.weights.sum(1) * (lse - lse.detach())).mean()


@torch.no_grad()
def resampled_stats(
    resampled: Resampled, carried: Carried, num_items: int, options: WalkOptions
) -> tuple[dict[str, Tensor], Tensor]:
    """carried_weight, acceptance and log_partition, detached; and each anchor's mean similarity with its candidates
    under their softmax, (2b,)."""
    lse, weights = resampled.lse.detach(), resampled.weights
    parts = zip(lse.chunk(len(resampled.sides)), resampled.sides, strict=True)
    temperature, backend = options.temperature, options.backend
    of_keys = [
        keys.mean_similarity(some, queries, items, temperature, backend, carried_items)
        for some, (queries, items, carried_items, keys) in parts
    ]
    candidates = carried.scores.isfinite().sum(1)
    candidates += torch.cat([_count_keys(items, own, keys.items) for _, items, own, keys in resampled.sides])
    known = candidates > 0
    # Of each candidate's exponential the mean is that of all negatives, as an estimate of its inverse.
    negatives = (num_items - 1) * (1 if options.bimodal else 2)
    each = torch.where(known, lse - candidates.clamp_min(1).to(lse.dtype).log(), 0) + math.log(max(negatives, 1))
    stats = {
        "carried_weight": weights.sum(1).mean(),
        "acceptance": resampled.moved.to(lse.dtype).mean(),
        "log_partition": torch.where(known, each, 0).sum() / known.sum().clamp_min(1),
    }
    similarity = torch.where(weights > 0, carried.similarity.detach(), 0)
    return stats, torch.cat(of_keys) + (weights * similarity).sum(1)


def _count_keys(items: Tensor, carried_items: Tensor, key_items: Tensor) -> Tensor:
    """(n,) how many keys are candidates of rows with these items and these that they bring along."""
    ordered = key_items.sort().values

    def having(ids: Tensor) -> Tensor:
        return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)

    return len(key_items) - having(items) - torch.where(carried_items != items, having(carried_items), 0)
