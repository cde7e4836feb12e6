"""What a backend is asked for: one walk, its arguments checked and its defaults filled in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Walk(NamedTuple):
    """n rows, m keys, and K proposals, numbers first_proposal .. first_proposal + K - 1 of total_proposals."""

    queries: Tensor  # (n, d)
    keys: Tensor  # (m, d)
    temperature: float | Tensor  # or (n,) float32
    seed: int | Tensor  # or 0-d int64, the bits of an unsigned number
    step: int | Tensor  # or 0-d int64
    chain_ids: Tensor | None  # (n,) int64; None: the row number
    query_ids: Tensor | None  # (n,) int64; None: nothing is excluded
    key_ids: Tensor | None  # (m,) int64
    positions: Tensor | None  # (n, K) int64 proposals given by the caller
    num_draws: int | None  # K uniform proposals drawn with replacement; None, and no positions: a sweep, K = m
    log_proposal: Tensor | None  # (m,) float32
    burn_in: int
    num_samples: int  # R
    first_proposal: int
    total_proposals: int

    @property
    def num_proposals(self) -> int:
        """K, of this shard."""
        if self.positions is not None:
            return self.positions.shape[1]
        return self.keys.shape[0] if self.num_draws is None else self.num_draws

    @property
    def is_sweep(self) -> bool:
        return self.positions is None and self.num_draws is None

    def sample_points(self) -> list[int]:
        return sample_points(self.total_proposals, self.burn_in, self.num_samples)


def sample_points(total: int, burn_in: int, num_samples: int) -> list[int]:
    """The proposal after which each sample is taken: burn_in + ceil((r + 1) * (M - burn_in) / R) - 1, r < R."""
    return [burn_in + -(-(r + 1) * (total - burn_in) // num_samples) - 1 for r in range(num_samples)]
