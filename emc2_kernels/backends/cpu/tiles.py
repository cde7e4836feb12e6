"""Scores by tiles on the CPU, for a compiled core that looks at each of them once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A tile of scores stays in the second- and third-level cache between the product that writes it and the core that reads
# it.
TILE_ELEMENTS = 1 << 19
TILE_ROWS = 512
ROW_ALIGNMENT = 64  # of a tile's rows: a multiple of the lanes, so that the last group may read past the rows


class Tile(NamedTuple):
    """As the core takes it: scores of keys first_key .. end_key - 1, each with its rows first_row .. end_row - 1 beside
    one another, since neighbouring rows share a vector."""

    address: int  # of float32
    stride: int  # from key to key
    first_row: int
    end_row: int
    first_key: int
    end_key: int


def score_tiles(queries: Tensor, keys: Tensor, most_rows: int = TILE_ROWS) -> Iterator[Tile]:
    """Products of queries (n, d) and keys (m, d), n > 0, m > 0. A tile is gone with the next.
    Rows in blocks, and for each of them all keys in turn."""
    n, m = queries.shape[0], keys.shape[0]
    tile_rows = min(TILE_ROWS, most_rows, n)
    stride = -(-tile_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
    tile_keys = min(m, TILE_ELEMENTS // stride)
    buffer = tile_buffer(stride * tile_keys)
    for row in range(0, n, tile_rows):
        some_queries = _floats(queries, row, tile_rows).T
        for key in range(0, m, tile_keys):
            some_keys = _floats(keys, key, tile_keys)
            dots = buffer.as_strided((some_keys.shape[0], some_queries.shape[1]), (stride, 1))
            torch.mm(some_keys, some_queries, out=dots)
            yield Tile(buffer.data_ptr(), stride, row, row + some_queries.shape[1], key, key + some_keys.shape[0])


def _floats(operand: Tensor, first: int, count: int) -> Tensor:
    """Rows of an operand in float32, so that half-precision products are exact."""
    return (operand if count >= operand.shape[0] else operand[first : first + count]).float()


_kept = threading.local()


def tile_buffer(elements: int) -> Tensor:
    """At least so many float32, with rubbish in them: fresh pages would cost as much as the work on them."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(False):  # or a later call outside inference mode could not write to it
            buffer = _kept.buffer = torch.empty(elements, dtype=torch.float32, device="cpu")
    return buffer
