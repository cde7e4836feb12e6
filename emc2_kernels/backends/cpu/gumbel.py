"""Exact draws from the softmax on the CPU: torch's matrix product for a tile of scores, the compiled core for the race
of its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..params import ScoreParams
from ..reference.gumbel import check_values
from .build import library
from .mh import address, contiguous, seed_bits, step_number
from .tiles import ROW_ALIGNMENT, score_tiles

RACES = 1 << 18  # (row, sample) of a block of rows, 17 bytes each


def gumbel_sample(
    scores: ScoreParams, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r; see ``reference_gumbel``."""
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    positions = torch.empty(n, num_samples, dtype=torch.int64, device="cpu")
    vectors = (scores.temperature if isinstance(scores.temperature, Tensor) else None, chain_ids, scores.query_ids)
    temperatures, chain_ids, query_ids = map(contiguous, vectors)
    key_ids = contiguous(scores.key_ids)
    arguments = (
        n,
        m,
        num_samples,
        seed_bits(seed),
        step_number(step),
        1.0 if temperatures is not None else scores.temperature,
        *map(address, (temperatures, chain_ids, query_ids, key_ids)),
        torch.get_num_threads(),
        positions.data_ptr(),
    )
    try:
        sampler = library().GumbelSampler(*arguments)
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
