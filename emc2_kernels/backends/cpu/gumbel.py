"""Exact draws from the softmax on the CPU: torch's matrix product for a tile of scores, the compiled core for the race
of its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_calls import address, contiguous, temperature_fields
from ..params import ScoreParams
from ..reference.gumbel import check_values
from .build import library
from .mh import seed_number, step_number
from .tiles import ROW_ALIGNMENT, score_tiles

RACES = 1 << 18  # (row, sample) of a block of rows, 17 bytes each


def gumbel_sample(
    scores: ScoreParams, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r; see ``reference_gumbel``."""
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    positions = torch.empty(n, num_samples, dtype=torch.int64, device="cpu")
    chain_ids, query_ids, key_ids = map(contiguous, (chain_ids, scores.query_ids, scores.key_ids))
    temperature, temperatures, temperature_stride = temperature_fields(scores.temperature)
    (seed_value, _), (step_value, _) = seed_number(seed), step_number(step)
    core = library()
    params = core.GumbelParams(
        num_rows=n,
        num_keys=m,
        temperature=temperature,
        temperatures=temperatures,
        temperature_stride=temperature_stride,
        query_ids=address(query_ids),
        key_ids=address(key_ids),
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
        sampler = core.GumbelSampler(params)
    except ValueError:  # the core has refused a value
        check_values(scores, chain_ids, step)  # says which, and where it is
        raise
    if n == 0 or m == 0:
        return positions.fill_(-1)
    fitting = max(ROW_ALIGNMENT, RACES // num_samples // ROW_ALIGNMENT * ROW_ALIGNMENT)
    with torch.autocast("cpu", enabled=False):
        for tile in score_tiles(scores.queries, scores.keys, fitting):
            sampler.scan(*tile)
    return positions
