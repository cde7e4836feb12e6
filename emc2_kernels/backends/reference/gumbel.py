"""Exact draws from the softmax by Gumbel noise in plain torch: the formulas, and the oracle of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import rng
from ..params import ScoreParams, check_chains, check_step
from .lse import masked_scores, row_blocks


def gumbel_sample(
    scores: ScoreParams, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r, -1 for a row without keys.

    Noise and sum are float64 whatever the scores are, so that their rounding alone decides a tie.

    Args:
        chain_ids: (n,) int64; None: the row numbers.
    """
    check_values(scores, chain_ids, step)
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    positions = torch.full((n, num_samples), -1, dtype=torch.int64, device=scores.queries.device)
    if m == 0:
        return positions
    chains = torch.arange(n, dtype=torch.int64, device=positions.device) if chain_ids is None else chain_ids
    draw = {"seed": seed, "step": step, "dtype": torch.float64}
    with torch.autocast(positions.device.type, enabled=False):
        for rows, block in row_blocks(scores):
            values = masked_scores(block).double()
            for r in range(num_samples):
                noisy = values + rng.gumbel(chains[rows], range(m), sample=r, **draw)
                first = noisy.argmax(1)  # of equal ones the lowest
                positions[rows, r] = torch.where(noisy.amax(1) > -torch.inf, first, -1)
    return positions


def check_values(scores: ScoreParams, chain_ids: Tensor | None, step: int | Tensor) -> None:
    """Names what is out of range, and where it is; on a GPU the device looks.

    Raises:
        ValueError: as ``gumbel_sample``.
    """
    check_chains(chain_ids, scores.query_ids)
    check_step(step)
    scores.check_values()
