"""Exact draws from the softmax on the CPU: the compiled core, scores included."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_calls import address, contiguous, contiguous_scores, operands, score_fields
from ..params import ScoreParams
from ..reference.gumbel import check_values
from .build import library
from .mh import seed_number, step_number


def gumbel_sample(
    scores: ScoreParams, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r; see ``reference_gumbel``."""
    positions = torch.empty(scores.queries.shape[0], num_samples, dtype=torch.int64, device="cpu")
    scores, chain_ids = contiguous_scores(scores), contiguous(chain_ids)
    (seed_value, _), (step_value, _) = seed_number(seed), step_number(step)
    core = library()
    params = core.GumbelParams(
        **score_fields(scores),
        seed=seed_value,
        seed_address=0,
        step=step_value,
        step_address=0,
        chain_ids=address(chain_ids),
        num_samples=num_samples,
        positions=positions.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    try:
        core.sample_gumbel(params, operands(core, scores.queries, scores.keys))
    except ValueError:  # the core has refused a value
        check_values(scores, chain_ids, step)  # says which, and where it is
        raise
    return positions
