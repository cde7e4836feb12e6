"""What batches hide from a contrastive loss, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..losses.anchors import unit
from ..lse import contrastive_lse


class Gap(NamedTuple):
    """What batches hide from a loss, in nats an anchor.

    Attributes:
        global_loss: each item against all others.
        train_loss: against those of its batch.
        gap: their difference; at least 0 for an anchor whose batch has no item twice.
    """

    global_loss: float
    train_loss: float
    gap: float


def global_train_gap(
    x: Tensor,
    y: Tensor,
    batches: Iterable[Sequence[int] | Tensor],
    temperature: float,
    *,
    normalize: bool = True,
) -> Gap:
    """L_global - L_train, which GCBS makes small (arXiv 2210.12874), exact and in tiles.

    Both losses are the mean over anchors, items of the one side and of the other, of ``-s⁺ + log sum exp s`` with s the
    similarity over the temperature, the positive among the sum (the loss of CLIP). An anchor that several batches have
    counts in each of them, in both losses; one that none has counts in neither.

    Args:
        x: (N, d) float32, bfloat16, float16 or float64.
        y: (N, d), dtype and device of ``x``; row i belongs to row i of x.
        batches: of items in [0, N), each a list of integers or a (k,) int64 tensor: a sampler, say, which counts this
            pass as an epoch.
        temperature: > 0.
        normalize: cosine similarities.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """
    temperature = checks.one_temperature(temperature)
    checks.boolean("normalize", normalize)
    with torch.no_grad():
        x, y = _towers(x, y, normalize)
        for tower in (x, y):  # no product is larger; one that is not finite would be left out of its sum
            checks.finite("the similarities of x and y", tower.square().sum(1) / temperature)
        everything = _denominators(x, y, temperature)
        seen = torch.zeros_like(everything)
        visits = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for items in batches:
            if not isinstance(items, Tensor):
                items = torch.as_tensor(items, device="cpu")  # without a dtype: it would make numbers of a mask
            checks.vector("batches' entries", items, None, torch.int64, items.device)
            checks.within("batches' entries", items, 0, len(x))
            items = items.to(x.device)
            seen.index_add_(0, items, _denominators(x[items], y[items], temperature))
            visits.index_add_(0, items, torch.ones_like(items))
        if not visits.any():
            raise ValueError("batches must have at least one item, got none")
        positive = 2 * (x.double() * y.double()).sum(1) / temperature
        anchors = 2 * int(visits.sum())
        whole = float((visits * (everything - positive)).sum()) / anchors
        gap = float((visits * everything - seen).sum()) / anchors
    return Gap(whole, whole - gap, gap)


def _towers(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Checked, and in the dtype that the losses compute in."""
    checks.matrix("x", x)
    checks.matrix("y", y)
    if x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y must have the same shape (N, d), N >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(f"y must be {x.dtype} on {x.device}, as x, got {checks.describe(y)}")
    checks.finite("x", x)
    checks.finite("y", y)
    return unit(x, normalize), unit(y, normalize)


def _denominators(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """(n,) float64: log-sum-exp of each row of x over y, plus that of each row of y over x."""
    return sum(contrastive_lse(*pair, temperature=temperature).double() for pair in ((x, y), (y, x)))
