"""Optimizers and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from lars import LARS
from torch import nn

OPTIMIZERS = ("adamw", "adam", "sgd", "lars")


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """momentum: of sgd and lars."""
    options = {"lr": lr, "weight_decay": weight_decay}
    if name in ("adamw", "adam"):
        return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](parameters, **options)
    return {"sgd": torch.optim.SGD, "lars": LARS}[name](parameters, momentum=momentum, **options)


def warmup_cosine(total: int, warmups: float = 10) -> Callable[[int], float]:
    """Step -> factor of the peak learning rate: a linear warm-up, times a cosine from 1 to 0.

    Args:
        total: steps.
        warmups: how many times the warm-up fits into them; infinity: there is none.
    """
    return lambda step: min(1.0, warmups * (step + 1) / total) * (0.5 + 0.5 * math.cos(math.pi * step / total))
