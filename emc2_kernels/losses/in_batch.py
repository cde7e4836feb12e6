"""Losses whose negatives are the batch's other rows: an anchor's log-sum-exp over them beside its positive's score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import checks, ops
from ..autograd import functorch_active, no_double_backward
from ..backends.params import ScoreParams
from ..distributed.keys import Keys, LocalKeys
from ..lse import NO_SECOND_DERIVATIVE, mean_similarity
from .anchors import Anchors, number_pairs


class Form(NamedTuple):
    bimodal: bool  # negatives are rows of the other view alone; else of both views
    dtype: torch.dtype | None = None  # that a GPU multiplies in; None: the embeddings' own. On the CPU it is float32
    backend: str = "auto"

    def operands(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.dtype is None or embeddings.is_cpu else embeddings.to(self.dtype)

    def scores(self, embeddings: Tensor, ids: Tensor, temperature: float | Tensor) -> list[ScoreParams]:
        """Of all anchors among themselves, or of each view's and the other's."""
        operands, rows = self.operands(embeddings), checks.one_or_rows(temperature, embeddings)
        if not self.bimodal:
            return [ScoreParams.among(operands, rows, ids)]
        (view_0, view_1), (ids_0, ids_1) = operands.chunk(2), ids.chunk(2)
        rows_0, rows_1 = rows.chunk(2) if isinstance(rows, Tensor) else (rows, rows)
        return [ScoreParams(view_0, view_1, rows_0, ids_0, ids_1), ScoreParams(view_1, view_0, rows_1, ids_1, ids_0)]


class Contrast(NamedTuple):
    """What the 2b anchors' terms are made of, and torch's graph of it where there is one."""

    lse: Tensor  # (2b,) over the scores of an anchor's negatives, detached; -inf: it has none
    positive: Tensor  # (2b,) score of its positive, detached
    anchors: Anchors
    temperature: float | Tensor  # of all, a 0-d tensor that may be learnt, or (2b,) without gradient
    form: Form
    sides: list[tuple[Tensor, Tensor, Keys, float | Tensor]] | None  # None: the gradient is made by hand
    graph: tuple[Tensor, Tensor] | None  # lse and positive, differentiable

    def attach_gradient(self, value: Tensor, d_lse: Tensor, d_positive: Tensor) -> Tensor:
        """``value`` (), whose derivatives by ``lse`` and ``positive`` are given (2b,), as one that torch
        differentiates."""
        if self.graph is None:
            found = self.lse, self.positive, d_lse, d_positive, self.anchors.items
            return _ByHand.apply(self.anchors.embeddings, self.temperature, value, *found, self.form)
        lse, positive = self.graph
        moved = torch.where(self.lse > -torch.inf, lse - self.lse, 0)  # of value 0
        return value + (d_lse * moved).sum() + (d_positive * (positive - self.positive)).sum()

    def negative_similarity(self) -> Tensor:
        """(2b,) mean similarity of an anchor's negatives under their softmax, detached; 0 without any. It costs what a
        backward pass does."""
        if self.sides is None:
            scores = self.form.scores(self.anchors.embeddings.detach(), self.anchors.items, self.temperature)
            parts = zip(self.lse.chunk(len(scores)), scores, strict=True)
            return torch.cat([mean_similarity(lse, some, self.form.backend) for lse, some in parts])
        parts = zip(self.lse.chunk(len(self.sides)), self.sides, strict=True)
        return torch.cat(
            [keys.mean_similarity(lse, rows, ids, own, self.form.backend) for lse, (rows, ids, keys, own) in parts]
        )


def contrast(anchors: Anchors, temperature: float | Tensor, form: Form, keys: Keys | None = None) -> Contrast:
    """The log-sum-exps of anchors that have items. Memory is O(b d).

    Args:
        keys: of all ranks; None: there is one process.
    """
    b = anchors.embeddings.shape[0] // 2
    if keys is None and not functorch_active():
        with torch.no_grad():
            embeddings = anchors.embeddings.detach()
            scores = form.scores(embeddings, anchors.items, temperature)
            lse = [ops.contrastive_lse(some, form.backend) for some in scores]
            view_0, view_1 = embeddings.chunk(2)
            similarity = (view_0 * view_1).sum(1)
            positive = torch.cat((similarity, similarity)) / temperature
            lse = lse[0] if len(lse) == 1 else torch.cat(lse)
            return Contrast(lse, positive, anchors, temperature, form, None, None)
    queries = form.operands(anchors.embeddings)
    if keys is None or keys.embeddings is anchors.embeddings:
        keys = LocalKeys(queries, anchors.items, None) if keys is None else keys._replace(embeddings=queries)
    sides = [(queries, anchors.items, keys.cast(queries.dtype), temperature)]
    if form.bimodal:
        own = temperature.chunk(2) if isinstance(temperature, Tensor) and temperature.dim() else (temperature,) * 2
        others = keys.select_view(1), keys.select_view(0)
        sides = list(zip(queries.chunk(2), anchors.items.chunk(2), others, own, strict=True))
    lse = torch.cat([some.lse(rows, ids, own, form.backend) for rows, ids, some, own in sides])
    positive = (anchors.embeddings[:b] * anchors.embeddings[b:]).sum(1).repeat(2) / temperature
    return Contrast(lse.detach(), positive.detach(), anchors, temperature, form, sides, (lse, positive))


class _ByHand(torch.autograd.Function):
    """Hangs its gradient on a value that has been made: at batch 32 the nodes of an autograd graph cost most of it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        embeddings: Tensor,
        temperature: float | Tensor,
        value: Tensor,
        lse: Tensor,
        positive: Tensor,
        d_lse: Tensor,
        d_positive: Tensor,
        ids: Tensor,
        form: Form,
    ) -> Tensor:
        ctx.form, ctx.number = form, None if isinstance(temperature, Tensor) else temperature
        rows = temperature if ctx.number is None else None
        ctx.save_for_backward(embeddings, lse, positive, d_lse, d_positive, ids, rows)
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, *_, rows = saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _ByHand.gradients(ctx, grad, *saved)
        return *no_double_backward(NO_SECOND_DERIVATIVE, *gradients, of=(grad, embeddings, rows)), *[None] * 7

    @staticmethod
    def gradients(
        ctx: FunctionCtx,
        grad: Tensor,
        embeddings: Tensor,
        lse: Tensor,
        positive: Tensor,
        d_lse: Tensor,
        d_positive: Tensor,
        ids: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of the embeddings, and of the temperature where it is learnt."""
        embeddings, temperature = embeddings.detach(), ctx.number if rows is None else rows.detach()
        d_embeddings, d_temperature = _lse_gradient(d_lse * grad, lse, embeddings, ids, temperature, ctx.form)
        d_similarity = (d_positive * grad).div_(temperature).view(2, -1).sum(0)
        shape = 2, -1, embeddings.shape[1]
        d_embeddings.view(shape).addcmul_(embeddings.view(shape).flip(0), d_similarity[:, None])
        if not ctx.needs_input_grad[1]:
            return d_embeddings, None
        # One number for all; the views' positives are the same.
        d_positives = (d_similarity * positive[: len(d_similarity)]).sum()
        return d_embeddings, (d_temperature - d_positives).to(rows.dtype)


def _lse_gradient(
    d_lse: Tensor, lse: Tensor, embeddings: Tensor, ids: Tensor, temperature: float | Tensor, form: Form
) -> tuple[Tensor, Tensor | None]:
    """Of the embeddings (2b, d) and, where it is a tensor, of the temperature ()."""
    scores = form.scores(embeddings, ids, temperature)
    parts = zip(scores, d_lse.chunk(2), lse.chunk(2), strict=True) if form.bimodal else [(*scores, d_lse, lse)]
    found = [ops.contrastive_lse_backward(some, *of_side, True, form.backend) for some, *of_side in parts]
    total = found[0][0]
    if form.bimodal:
        (query_0, key_1, _), (query_1, key_0, _) = found
        total = torch.cat((query_0.add_(key_0), query_1.add_(key_1)))
    d_temperature = sum(rows.sum() for *_, rows in found) if isinstance(temperature, Tensor) else None
    return total.to(embeddings.dtype), d_temperature


def ntxent(of: Contrast, factor: float = 1.0) -> Tensor:
    """Mean over the 2b anchors of -s+ + log(exp(s+) + sum of exp(s-)), which is softplus(lse of s- less s+)."""
    excess = of.lse - of.positive
    weight = factor / excess.numel()
    value = torch.nn.functional.softplus(excess).sum() * weight
    share = excess.sigmoid() * weight
    return of.attach_gradient(value, share, -share)


def batch_stats(
    anchors: Anchors, temperature: float | Tensor, *, bimodal: bool = False, value: Tensor | None = None
) -> dict[str, Tensor]:
    """What every loss reports of its batch, detached 0-d tensors, whatever it minimises itself.

    ``ntxent``: the in-batch NT-Xent value, with ``bimodal`` the in-batch CLIP value, whose negatives are the other
    tower's. ``positive_similarity``: mean similarity of the pairs. ``mean_cosine``: mean similarity over pairs of
    different rows of one view; near 1 the encoder has collapsed.

    Args:
        value: that of ``ntxent``, where it is known already.
    """
    with torch.no_grad():
        detached = anchors._replace(embeddings=anchors.embeddings.detach())
        b = detached.embeddings.shape[0] // 2
        total = detached.embeddings.view(2, b, -1).sum(1).square().sum()
        diagonal = detached.embeddings.square().sum()
        return {
            "ntxent": ntxent(contrast(number_pairs(detached), temperature, Form(bimodal))) if value is None else value,
            "positive_similarity": (detached.embeddings[:b] * detached.embeddings[b:]).sum(1).mean(),
            "mean_cosine": (total - diagonal) / max(2 * b * (b - 1), 1),
        }
