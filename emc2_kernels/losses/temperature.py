"""The temperature of a loss: a number, or a parameter that is learnt with the encoder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .. import checks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

UNUSUAL = 10.0  # a temperature above it is warned of
LEAST = 2.0**-63  # of a loss: its derivative in the temperature is divided by the square, and a statistic is made of it


class _AtMost(torch.autograd.Function):
    """min(x, most), whose gradient above ``most`` is the one that lowers x, and else 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.clamp(max=most)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.most = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x > ctx.most, grad.clamp(min=0), grad), None


def fixed_temperature(value: Any) -> float:
    """Of a loss: a number, or a 0-d tensor, which is read once. Nothing would learn one that requires a gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        instead = "NTXentLoss and ClipLoss learn one of their own with learn_temperature=True"
        raise ValueError(f"temperature must not require a gradient ({instead}), got {checks.describe(value)} that does")
    return checks.one_temperature(value, LEAST)


def warn_uniform_weights(temperature: float, normalize: bool, frames: int = 3) -> None:
    """For a loss's constructor; the warning points at its caller, so many frames up. Similarities of unit vectors lie
    in [-1, 1]: here no negative weighs more than exp(2 / UNUSUAL) = 1.2 times another."""
    if normalize and temperature > UNUSUAL:
        warnings.warn(
            f"temperature={temperature} gives all negatives nearly one weight; if it is a scale of similarities, as in "
            f"open_clip, then the temperature is its inverse, {1 / temperature:.3g}",
            stacklevel=frames,
        )


class TemperedLoss(nn.Module):
    """A loss that divides similarities by ``temperature``.

    Args:
        temperature: in [2^-63, 2^100], where learning starts if it is learnt.
        learn_temperature: keep log(1 / temperature) as the parameter ``log_scale``, as CLIP's logit_scale is kept. It
            has shape (1,), since FSDP2's ``fully_shard`` takes no 0-d parameters; checkpoints with a 0-d one load.
        max_scale: a learnt 1 / temperature never exceeds it. The value is bounded, not the parameter: no forward pass
            writes to that. Where a step of the optimizer has taken ``log_scale`` past log(max_scale), its gradient is
            the one that lowers it, and 0 where it would be raised further: it overshoots by what an optimizer's
            momentum still holds, and comes back when a smaller scale would be better.

    Attributes:
        log_scale: (1,) float32 parameter; None where the temperature is not learnt.
    """

    log_scale: nn.Parameter | None

    def __init__(self, temperature: float, learn_temperature: bool, max_scale: float) -> None:
        super().__init__()
        self._fixed = fixed_temperature(temperature)
        checks.boolean("learn_temperature", learn_temperature)
        self.max_scale = checks.number_in("max_scale", max_scale, 1 / checks.MAX_TEMPERATURE, 1 / LEAST)
        if learn_temperature and self._fixed * self.max_scale < 1:
            expected = f"at least 1 / max_scale = {1 / self.max_scale} with learn_temperature=True"
            raise ValueError(f"temperature must be {expected}, got {self._fixed}")
        log_scale = nn.Parameter(torch.empty(1, dtype=torch.float32, device=None)) if learn_temperature else None
        self.register_parameter("log_scale", log_scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to where learning starts: for a loss that was made on the meta device, after ``to_empty``."""
        if self.log_scale is not None:
            self.log_scale.fill_(-math.log(self._fixed))

    @property
    def temperature(self) -> float | Tensor:
        """A number, or where it is learnt a differentiable 0-d tensor."""
        if self.log_scale is None:
            return self._fixed
        wide = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return _AtMost.apply(wide, math.log(self.max_scale)).neg().exp().squeeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemperedLoss:
        unmade = self.log_scale is not None and self.log_scale.is_meta
        super()._apply(fn, recurse)
        if unmade and not self.log_scale.is_meta:  # what ``to_empty`` gives it is any memory's content
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *of_module: Any) -> None:
        loaded, mine = state_dict.get(prefix + "log_scale"), self.log_scale
        if mine is not None and isinstance(loaded, Tensor) and loaded.dim() == 0:
            loaded = loaded.view(1)
            if hasattr(mine, "placements"):  # torch cuts a state over ranks for fully_shard, but no 0-d tensor of it
                loaded = _distributed_as(loaded, mine)
            state_dict[prefix + "log_scale"] = loaded
        super()._load_from_state_dict(state_dict, prefix, *of_module)


def _distributed_as(loaded: Tensor, parameter: DTensor) -> DTensor:
    """A tensor that each rank has whole, as its parameter lies over the ranks."""
    from torch.distributed.tensor import distribute_tensor  # late: it takes longer to import than all the rest

    if hasattr(loaded, "redistribute"):
        return loaded.redistribute(parameter.device_mesh, parameter.placements)
    return distribute_tensor(loaded, parameter.device_mesh, parameter.placements, src_data_rank=None)
