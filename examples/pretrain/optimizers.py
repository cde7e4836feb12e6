"""Optimizers, LARS among them, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "adam", "sgd", "lars")


class LARS(torch.optim.Optimizer):
    """Stochastic gradient descent with a learning rate for each layer, for large batches.

    Source: You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, arXiv 1708.03888, algorithm 1:

        local = trust |w| / (|g| + weight_decay |w|)
        v <- momentum v + lr local (g + weight_decay w)
        w <- w - v

    with local = 1 where |w| or |g| is 0. Biases and norms, of one dimension, have local = 1 and no weight decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        parameters = list(parameters)
        layers = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": layers}, {"params": others, "weight_decay": 0.0, "trust": None}]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Nothing is read back from the device."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, **group)
        return value

    def _update(
        self, parameter: nn.Parameter, lr: float, momentum: float, weight_decay: float, trust: float | None, **_: object
    ) -> None:
        gradient = parameter.grad + weight_decay * parameter
        if trust is not None:
            weight, norm = parameter.norm(), parameter.grad.norm()
            local = trust * weight / (norm + weight_decay * weight)
            gradient *= torch.where((weight > 0) & (norm > 0), local, 1.0)
        state = self.state[parameter]
        if not state:
            state["velocity"] = torch.zeros_like(parameter)
        parameter.sub_(state["velocity"].mul_(momentum).add_(gradient, alpha=lr))


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
