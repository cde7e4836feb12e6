"""Losses whose negatives are the batch's other rows: NT-Xent among all 2b views, CLIP's between two towers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import checks
from ..autograd import functorch_active, no_double_backward
from ..distributed.ring import ring_lse, ring_similarity
from ..distributed.shards import Shards, gather_views
from ..lse import NO_SECOND_DERIVATIVE, contrastive_lse, lse_gradients, lse_values, mean_similarity

if TYPE_CHECKING:
    from .anchors import Anchors


class InBatch(NamedTuple):
    value: Tensor  # () differentiable
    negative_similarity: Tensor | None  # () detached, if asked for


class _Batch(NamedTuple):
    """What the scores are made of; no tensor in it but the temperature is differentiated by torch."""

    ids: Tensor  # (2b,) int64: an anchor's negatives are the keys with other ids
    bimodal: bool
    dtype: torch.dtype | None
    backend: str

    def sides(self, embeddings: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Queries, keys (None: the queries) and ids of both of each log-sum-exp."""
        operands = embeddings if self.dtype is None or embeddings.is_cpu else embeddings.to(self.dtype)
        if not self.bimodal:
            return [(operands, None, self.ids)]
        view_0, view_1 = operands.chunk(2)
        ids = self.ids[: view_0.shape[0]]
        return [(view_0, view_1, ids), (view_1, view_0, ids)]


class _Value(torch.autograd.Function):
    """Mean of softplus(lse - s+), its gradient by hand: at batch 32 the nodes of an autograd graph cost most of it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, embeddings: Tensor, temperature: float | Tensor, batch: _Batch
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for queries, keys, ids in batch.sides(embeddings):
            number, temperatures = checks.number_or_rows(temperature, queries)
            parts.append(lse_values(queries, keys, number, temperatures, ids, ids, batch.backend))
        lse = torch.stack(parts) if batch.bimodal else parts[0].view(2, -1)
        view_0, view_1 = embeddings.view(2, lse.shape[1], -1).unbind()
        positive = (view_0 * view_1).sum(1).div_(temperature)
        excess = lse - positive
        ctx.batch, ctx.number = batch, None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(embeddings, batch.ids, lse, positive, excess, None if ctx.number else temperature)
        ctx.mark_non_differentiable(lse)
        return torch.nn.functional.softplus(excess).mean(), lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        embeddings, ids, lse, positive, excess, learnt = (x if x is None else x.detach() for x in ctx.saved_tensors)
        batch, temperature = ctx.batch._replace(ids=ids), learnt if ctx.number is None else ctx.number
        shares = excess.sigmoid().mul_(grad.detach() / excess.numel())  # d value / d lse
        d_embeddings, d_temperature = _lse_gradient(shares, lse, embeddings, temperature, batch)
        pull = shares.sum(0).div_(temperature)
        b = pull.shape[0]
        d_embeddings[:b].addcmul_(embeddings[b:], pull[:, None], value=-1)
        d_embeddings[b:].addcmul_(embeddings[:b], pull[:, None], value=-1)
        if learnt is not None:
            d_temperature = d_temperature.add_((pull * positive).sum()).to(learnt.dtype)
        return *no_double_backward(NO_SECOND_DERIVATIVE, d_embeddings, d_temperature), None


def _lse_gradient(
    shares: Tensor, lse: Tensor, embeddings: Tensor, temperature: float | Tensor, batch: _Batch
) -> tuple[Tensor, Tensor | None]:
    """Of the embeddings (2b, d) and, where it is learnt, of the temperature ()."""
    d_views, d_temperature = [], None
    for part, (queries, keys, ids) in enumerate(batch.sides(embeddings)):
        number, temperatures = checks.number_or_rows(temperature, queries)
        own = slice(None) if keys is None else part
        of_lse = shares[own].flatten(), lse[own].flatten()
        d_queries, d_keys, d_rows = lse_gradients(queries, keys, number, temperatures, ids, ids, *of_lse, batch.backend)
        d_views.append(d_queries if keys is None else torch.cat((d_keys, d_queries) if part else (d_queries, d_keys)))
        if temperatures is not None:
            d_temperature = d_rows.sum() if d_temperature is None else d_temperature + d_rows.sum()
    total = d_views[0] if len(d_views) == 1 else d_views[0].add_(d_views[1])
    return total.to(embeddings.dtype), d_temperature


def _log_sums(
    embeddings: Tensor, temperature: float | Tensor, batch: _Batch, gather: str, shards: Shards | None, similarity: bool
) -> tuple[Tensor, Tensor | None]:
    """(2, b) log-sum-exp of this rank's anchors over their negatives, of all ranks with shards, and the similarity of
    these."""
    parts, similarities = [], []
    for queries, keys, query_ids in batch.sides(embeddings):
        keys = queries if keys is None else keys
        options = {"temperature": temperature, "query_ids": query_ids, "backend": batch.backend}
        if gather == "ring":
            log_sum, mean = partial(ring_lse, shards=shards), partial(ring_similarity, shards=shards)
            options["key_ids"] = query_ids
        else:
            log_sum, mean, options["key_ids"] = contrastive_lse, mean_similarity, query_ids
            if shards is not None:
                keys, options["key_ids"] = (gather_views(rows, shards) for rows in (keys, query_ids))
        parts.append(log_sum(queries, keys, **options))
        if similarity:
            similarities.append(mean(parts[-1], queries, keys, **options))
    return torch.cat(parts).view(2, -1), torch.cat(similarities) if similarity else None


def in_batch(
    anchors: Anchors,
    temperature: float | Tensor,
    *,
    bimodal: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_similarity: bool = False,
    gather: str = "none",
    shards: Shards | None = None,
) -> InBatch:
    """Mean over the 2b anchors of -s+ + log(exp(s+) + sum of exp(s-)), which is softplus(lse of s- less s+).

    Negatives are all rows of other items (without items: of other pairs), of both views, or with ``bimodal`` of the
    other view alone. Memory is O(b d).

    Args:
        dtype: that a GPU multiplies in; None: the embeddings' own. On the CPU products are always float32's.
        return_similarity: also the mean, over the anchors that have negatives, of their negatives' similarity under
            softmax weights. It costs what a backward pass does.
        gather: "all" or "ring": negatives are those of all ranks, with ``shards``; the value is this rank's share of
            the mean over the anchors of all ranks, times their number, so that its mean over ranks is that mean.
    """
    embeddings, ids = anchors.embeddings, anchors.items
    if ids is None:
        ids = torch.arange(embeddings.shape[0], dtype=torch.int64, device=embeddings.device)
        ids %= embeddings.shape[0] // 2
        ids += 0 if shards is None else shards.first
    batch = _Batch(ids, bimodal, dtype, backend)
    if shards is not None or functorch_active():
        lse, similarity = _log_sums(embeddings, temperature, batch, gather, shards, return_similarity)
        view_0, view_1 = embeddings.view(2, lse.shape[1], -1).unbind()
        excess = lse - (view_0 * view_1).sum(1) / temperature
        value = torch.nn.functional.softplus(excess).mean() * (1 if shards is None else shards.ddp_factor)
        return InBatch(value, None if similarity is None else similarity.sum() / (lse > -torch.inf).sum().clamp_min(1))
    value, lse = _Value.apply(embeddings, temperature, batch)
    if not return_similarity:
        return InBatch(value, None)
    total = 0
    for part, (queries, keys, ids) in enumerate(batch.sides(embeddings.detach())):
        of_rows = lse.flatten() if keys is None else lse[part]
        keys = queries if keys is None else keys
        options = {"temperature": temperature, "query_ids": ids, "key_ids": ids, "backend": backend}
        total = total + mean_similarity(of_rows, queries, keys, **options).sum()
    counted = (lse > -torch.inf).sum()  # an anchor in a batch of one item has no negatives
    return InBatch(value, total / counted.clamp_min(1))
