"""The temperature of a loss: a number, or a parameter that is learnt with the encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks


class TemperedLoss(nn.Module):
    """A loss that divides similarities by ``temperature``.

    Args:
        temperature: > 0, where learning starts if it is learnt.
        learn_temperature: keep log(1 / temperature) as the parameter ``log_scale``, as CLIP's logit_scale is kept.
        max_scale: a learnt 1 / temperature never exceeds it. As in CLIP the parameter itself is set back, in training
            mode before it is used, so that its gradient can still lead it away from the bound.
    """

    log_scale: nn.Parameter | None  # () float32

    def __init__(self, temperature: float, learn_temperature: bool, max_scale: float) -> None:
        super().__init__()
        self._fixed = checks.one_temperature(temperature)
        checks.boolean("learn_temperature", learn_temperature)
        self.max_scale = checks.number_in("max_scale", max_scale, 0, math.inf, open_low=True, open_high=True)
        if learn_temperature and self._fixed * self.max_scale < 1:
            expected = f"at least 1 / max_scale = {1 / self.max_scale} with learn_temperature=True"
            raise ValueError(f"temperature must be {expected}, got {self._fixed}")
        log_scale = torch.tensor(-math.log(self._fixed), dtype=torch.float32, device=None)
        self.register_parameter("log_scale", nn.Parameter(log_scale) if learn_temperature else None)

    @property
    def temperature(self) -> float | Tensor:
        """A number, or where it is learnt a differentiable 0-d tensor."""
        if self.log_scale is None:
            return self._fixed
        wide = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return wide.clamp(max=math.log(self.max_scale)).neg().exp()

    def _bound_scale(self) -> None:
        if self.log_scale is not None and self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
