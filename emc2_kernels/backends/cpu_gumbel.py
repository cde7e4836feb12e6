"""Exact draws from the softmax on the CPU: torch's matrix product for a tile of scores, the compiled core for the race
of its keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu import ROW_ALIGNMENT, TILE_ELEMENTS, TILE_ROWS, _address, _contiguous, _floats, _tile_buffer, _unsigned
from .native import library
from .scores import Scores

RACES = 1 << 18  # (row, sample) of a block of rows, 17 bytes each


def gumbel_sample(
    scores: Scores, chain_ids: Tensor | None, seed: int | Tensor, step: int | Tensor, num_samples: int
) -> Tensor:
    """(n, R) int64 positions argmax_j of s_ij + noise of sample r; see ``reference_gumbel``."""
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    positions = torch.empty(n, num_samples, dtype=torch.int64)
    if n == 0 or m == 0:
        return positions.fill_(-1)
    vectors = (scores.temperature if isinstance(scores.temperature, Tensor) else None, chain_ids, scores.query_ids)
    temperatures, chain_ids, query_ids = map(_contiguous, vectors)
    key_ids = _contiguous(scores.key_ids)
    sampler = library().GumbelSampler(
        n,
        m,
        num_samples,
        _unsigned(seed, 64),
        _unsigned(step, 32),
        1.0 if temperatures is not None else scores.temperature,
        *map(_address, (temperatures, chain_ids, query_ids, key_ids)),
        torch.get_num_threads(),
        positions.data_ptr(),
    )
    with torch.autocast("cpu", enabled=False):
        _scan_by_tiles(scores, sampler, num_samples)
    return positions


def _scan_by_tiles(scores: Scores, sampler: Any, num_samples: int) -> None:
    """Scores by tiles of (keys, rows): neighbouring rows, which share a vector, are neighbours in memory."""
    n, m = scores.queries.shape[0], scores.keys.shape[0]
    fitting = max(ROW_ALIGNMENT, RACES // num_samples // ROW_ALIGNMENT * ROW_ALIGNMENT)
    tile_rows = min(TILE_ROWS, fitting, n)
    stride = -(-tile_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
    tile_keys = min(m, TILE_ELEMENTS // stride)
    buffer = _tile_buffer(stride * tile_keys)
    for row in range(0, n, tile_rows):
        queries = _floats(scores.queries, row, tile_rows).T
        for key in range(0, m, tile_keys):
            keys = _floats(scores.keys, key, tile_keys)
            dots = buffer.as_strided((keys.shape[0], queries.shape[1]), (stride, 1))
            torch.mm(keys, queries, out=dots)
            sampler.scan(buffer.data_ptr(), stride, row, row + queries.shape[1], key, key + keys.shape[0])
