"""How far a chain with uniform proposals still is from its target, exactly, for any number of keys.

Proposals do not depend on where the chain is, and for such chains the law after any number of steps has a closed form
(Smith and Tierney 1996, Exact transition probabilities for the independence Metropolis sampler; Liu 1996): from key x a
chain is at y != x after n steps with probability T_n(max(w_x, w_y)) pi_y, and still at x with lambda(w_x)^n besides,
where w = m pi are importance weights,

    lambda(v) = sum over the keys with w_y <= v of (1 - w_y / v) / m      the share of proposals that v refuses
    T_n(w)    = integral from w to infinity of n lambda(v)^(n - 1) / v^2 dv

Between neighbouring weights d lambda = Pi dv / v^2, with Pi the target's share of the keys below, so that the integral
is a sum. O(m log m) a row, where the transition matrix would take m^2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class UniformWalk:
    """The chain of one row of scores (m,), already divided by the temperature, whose first proposal starts it."""

    def __init__(self, scores: Tensor) -> None:
        law = scores.double().softmax(0).clamp_min(torch.finfo(torch.float64).tiny)  # what is divided by below
        self.target = law.sort().values  # by weight, ascending
        m = len(self.target)
        self.below = self.target.cumsum(0)  # Pi
        self.rank = torch.arange(1, m + 1, dtype=torch.float64) / m
        self.refused = (self.rank - self.below / (m * self.target)).clamp(0, 1)  # lambda at each weight

    def law(self, proposals: int) -> Tensor:
        """(m,) where the chain is after so many proposals, by ascending probability in the target."""
        m = len(self.target)
        power = self.refused ** (proposals - 1)
        steps = torch.diff(power, append=power.new_ones(1)) / self.below
        reached = steps.flip(0).cumsum(0).flip(0)  # T at each weight
        beyond = reached.flip(0).cumsum(0).flip(0) - reached  # sum of T over the larger weights
        return self.target * (self.rank * reached + beyond / m) + power / m

    def distance(self, proposals: int) -> float:
        """Total variation to the target after so many proposals, in 0 .. 1."""
        return (self.law(proposals) - self.target).abs().sum().item() / 2

    def proposals_to(self, distance: float) -> int:
        """The fewest after which the total variation is at most that; it never rises."""
        enough = 1
        while self.distance(enough) > distance:
            enough *= 2
        too_few = enough // 2
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            if self.distance(middle) > distance:
                too_few = middle
            else:
                enough = middle
        return enough
