"""Row-wise log-sum-exp of scores and its gradient on CPUs: torch's matrix product by tiles that stay in the cache.

Needs no compiled library. Scores are in powers of two (torch's exp2 takes a third of its exp's time), float32 whatever
the operands are. What is not finite is found in the results, where it is cheap to look, and left to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..params import ScoreParams
from ..reference import lse as reference_lse
from .tiles import tile_buffer

TILE_ELEMENTS = 1 << 19  # 2 MB: what the product writes is still in the cache when the exponentials are made
TILE_KEYS = 4096
LOWEST = torch.finfo(torch.float32).min  # takes the place of -inf where -inf - -inf would be NaN
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
SMALL = 1 << 14  # pairs (row, key) up to which the time goes by the number of calls, not by what they do
# Excluded keys are looked up in a sorted list where that is less work than comparing each pair of ids, which takes two
# thirds of the product's time.
LISTED_SHARE = 1 / 64  # of the pairs (row, key) that are excluded at most


class _Tile(NamedTuple):
    number: int
    rows: slice
    keys: slice


def _sides(n: int, m: int) -> tuple[int, int]:
    """Rows and keys of a tile. Where m allows it, a tile has all keys."""
    columns = -(-m // max(1, -(-m // TILE_KEYS)))
    return min(n, TILE_ELEMENTS // max(1, columns)), columns


def _tiles(n: int, m: int) -> Iterator[_Tile]:
    """All keys of the first rows, then of the next."""
    if n * m == 0:
        return
    rows, columns = _sides(n, m)
    number = 0
    for row in range(0, n, rows):
        for key in range(0, m, columns):
            yield _Tile(number, slice(row, min(n, row + rows)), slice(key, min(m, key + columns)))
            number += 1


def _excluded_places(query_ids: Tensor, key_ids: Tensor) -> list[Tensor] | None:
    """The excluded elements of each tile, numbered row by row; None where they would be too many to list."""
    n, m = query_ids.shape[0], key_ids.shape[0]
    ordered, order = key_ids.sort()
    first = torch.searchsorted(ordered, query_ids)
    counts = torch.searchsorted(ordered, query_ids, right=True) - first
    total = int(counts.sum())
    if total > n * m * LISTED_SHARE:
        return None
    row = torch.repeat_interleave(counts, output_size=total)
    keys_before = (counts.cumsum(0) - counts)[row]
    key = order[first[row] + torch.arange(total, dtype=torch.int64, device="cpu") - keys_before]
    rows, columns = _sides(n, m)
    per_row = -(-m // columns)
    tile, to_tiles = (row // rows * per_row + key // columns).sort()
    width = (m - key // columns * columns).clamp_max(columns)  # the last keys' tile is narrower
    place = (row % rows * width + key % columns)[to_tiles]
    return list(place.split(torch.bincount(tile, minlength=-(-n // rows) * per_row).tolist()))


class _ScoreTiles:
    """Scores, tile by tile, in a buffer that the next tile overwrites: log2(e) * s_ij, -inf where key j is excluded."""

    def __init__(self, scores: ScoreParams) -> None:
        self.scores = scores
        self.keys = scores.keys.float()
        n, m = scores.queries.shape[0], scores.keys.shape[0]
        self.rows, columns = _sides(n, m)
        self.buffer = tile_buffer(self.rows * columns)
        excludes = scores.query_ids is not None
        self.places = _excluded_places(scores.query_ids, scores.key_ids) if excludes else None

    def __iter__(self) -> Iterator[tuple[_Tile, Tensor]]:
        scores, scaled, rows = self.scores, None, None
        for tile in _tiles(scores.queries.shape[0], scores.keys.shape[0]):
            if tile.rows != rows:
                rows, block = tile.rows, scores.slice_rows(tile.rows)
                scaled = block.queries.float() * _per_row(LOG2_E / block.temperature)
            keys = self.keys[tile.keys]
            values = self.buffer[: scaled.shape[0] * keys.shape[0]].view(scaled.shape[0], keys.shape[0])
            torch.mm(scaled, keys.T, out=values)
            if self.places is not None:
                values.view(-1).index_fill_(0, self.places[tile.number], -torch.inf)
            elif block.query_ids is not None:
                values.masked_fill_(block.query_ids[:, None] == scores.key_ids[tile.keys], -torch.inf)
            yield tile, values


def _per_row(value: float | Tensor) -> float | Tensor:
    return value[:, None] if isinstance(value, Tensor) else value


def _sound(total: Tensor) -> bool:
    """Whether a sum has no NaN and no +inf in it (or so large an element that it makes no difference)."""
    return float(total) < math.inf


def contrastive_lse(scores: ScoreParams) -> Tensor:
    """(n,) float32; see ``reference_lse``."""
    if scores.queries.shape[0] * scores.keys.shape[0] <= SMALL:
        lse = torch.logsumexp(_small_scores(scores), 1)
    else:
        lse = torch.full((scores.queries.shape[0],), -torch.inf, dtype=torch.float32, device="cpu")
        for tile, values in _ScoreTiles(scores):
            largest = values.amax(1).clamp_min_(LOWEST)
            part = values.sub_(largest[:, None]).exp2_().sum(1).log2_().add_(largest)
            torch.logaddexp2(lse[tile.rows], part, out=lse[tile.rows])
        lse.mul_(LN_2)
    return lse if _sound(lse.sum()) else reference_lse.contrastive_lse(scores)


def contrastive_lse_backward(grad: Tensor, lse: Tensor, scores: ScoreParams) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and temperatures; see ``reference_lse``."""
    small = scores.queries.shape[0] * scores.keys.shape[0] <= SMALL
    d_queries, d_keys = (_small_gradients if small else _gradients)(grad, lse, scores)
    total = d_queries.sum().abs_()
    if not _sound(total + d_keys.sum().abs_() if d_keys.numel() else total):
        return reference_lse.contrastive_lse_backward(grad, lse, scores)
    per_row = isinstance(scores.temperature, Tensor)
    d_temperature = (scores.queries * d_queries).sum(1).div_(-scores.temperature) if per_row else grad.new_empty(0)
    if scores.symmetric:
        if per_row:  # else both are in one already
            d_queries.add_(d_keys)
        d_keys = d_keys.new_empty(0)
    return d_queries.to(scores.queries.dtype), d_keys.to(scores.keys.dtype), d_temperature


def _gradients(grad: Tensor, lse: Tensor, scores: ScoreParams) -> tuple[Tensor, Tensor]:
    """Of queries and of keys, float32; of queries that are the keys, and whose temperature is a number, both in one."""
    tiles = _ScoreTiles(scores)
    coefficients = (grad / scores.temperature)[:, None]
    level = (lse * LOG2_E).clamp_min_(LOWEST)[:, None]
    d_keys = torch.zeros_like(tiles.keys)
    one = scores.symmetric and not isinstance(scores.temperature, Tensor)
    d_queries = d_keys if one else d_keys.new_zeros(scores.queries.shape)
    means = d_keys.new_empty(tiles.rows, d_keys.shape[1])  # autocast leaves products alone that have a place to go
    for tile, values in tiles:
        shares, own = values.sub_(level[tile.rows]).exp2_(), coefficients[tile.rows]
        d_queries[tile.rows].addcmul_(torch.mm(shares, tiles.keys[tile.keys], out=means[: len(own)]), own)
        d_keys[tile.keys].addmm_(shares.T, scores.queries[tile.rows] * own)
    return d_queries, d_keys.new_zeros(0) if one else d_keys


def _small_scores(scores: ScoreParams) -> Tensor:
    """(n, m) s_ij, -inf where key j is excluded: few pairs, whose time goes by the number of calls."""
    queries, keys = scores.queries.float(), scores.keys.float()
    values = tile_buffer(SMALL)[: queries.shape[0] * keys.shape[0]].view(queries.shape[0], keys.shape[0])
    torch.mm(queries / _per_row(scores.temperature), keys.T, out=values)
    if scores.query_ids is not None:
        values.masked_fill_(scores.query_ids[:, None] == scores.key_ids, -torch.inf)
    return values


def _small_gradients(grad: Tensor, lse: Tensor, scores: ScoreParams) -> tuple[Tensor, Tensor]:
    """Of queries and of keys, or of both together and nothing."""
    queries, keys = scores.queries.float(), scores.keys.float()
    weights = _small_scores(scores).sub_(lse.clamp_min(LOWEST)[:, None]).exp_()
    weights *= (grad / scores.temperature)[:, None]
    d_queries = torch.empty_like(queries)
    if scores.symmetric and not isinstance(scores.temperature, Tensor):
        return torch.mm(weights + weights.T, keys, out=d_queries), grad.new_zeros(0)
    d_keys = torch.empty_like(keys)
    return torch.mm(weights, keys, out=d_queries), torch.mm(weights.T, queries, out=d_keys)
