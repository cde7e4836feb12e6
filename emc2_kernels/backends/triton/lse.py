"""Row-wise log-sum-exp of scores: a block of rows against all keys in one program, or against a split of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import ScoreParams
from . import tuning
from .epilogue import LN_2
from .launch import NUMBERS, Kernel, dense, dimensions, on_device, precision
from .lse_backward import contrastive_lse_backward
from .proposals import temperature_of
from .scores import LOG2_E, TILE, load_rows, multiply
from .transition import NEVER

__all__ = ["contrastive_lse", "contrastive_lse_backward"]


@triton.jit(do_not_specialize=NUMBERS)
def lse_kernel(
    queries_ptr, keys_ptr, stride_query: tl.int64, stride_key: tl.int64, n: tl.int64, m: tl.int64,
    d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32, query_ids_ptr, key_ids_ptr,
    split_length: tl.int64, lse_ptr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over keys z * split_length and on; lse_ptr is (n, splits)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    d = d_over_align * ALIGN_D
    scale = tl.full((BLOCK_M,), LOG2_E, tl.float32) / temperature_of(temperatures_ptr, temperature, row, row_ok)
    if key_ids_ptr is not None:
        query_id = tl.load(query_ids_ptr + row, row_ok, other=0)
    queries = row
    if WHOLE_D:
        queries = load_rows(queries_ptr, row, row_ok, stride_query, 0, d, BLOCK_D, EVEN_D)
    # The running maximum and sum of exponentials over it, in powers of two.
    largest, total = tl.full((BLOCK_M,), NEVER, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    column = split * split_length + tl.arange(0, TILE)
    for tile in range(0, (split_length // TILE).to(tl.int32)):
        key = column + tile * TILE
        there = key < m
        products = multiply(
            queries, queries_ptr, keys_ptr, row, row_ok, key, there, (stride_query, stride_key), d, BLOCK_D, WHOLE_D,
            EVEN_D, PRECISION,
        )  # fmt: skip
        scores = tl.fma(products, scale[:, None], tl.where(there, 0.0, NEVER)[None, :])
        counted = scores < float("inf")  # nor is NaN
        if key_ids_ptr is not None:
            counted &= tl.load(key_ids_ptr + key, there, other=0)[None, :] != query_id[:, None]
        scores = tl.where(counted, scores, NEVER)
        new = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new > NEVER, new, 0.0)
        total = total * tl.exp2(largest - origin) + tl.sum(tl.exp2(scores - origin[:, None]), 1)
        largest = new
    tl.store(lse_ptr + row * splits + split, (largest + tl.log2(total)) * LN_2, row_ok)


LSE_KERNEL = Kernel(lse_kernel)


def contrastive_lse(scores: ScoreParams) -> Tensor:
    """(n,) float32; see ``reference_lse``."""
    (n, d), m = scores.queries.shape, scores.keys.shape[0]
    generation, processors = tuning.device(scores.queries.device.index or 0)
    chosen = tuning.lse(generation, scores.queries.dtype != torch.float32)
    blocks, tiles = -(-n // chosen.block_m), -(-m // TILE.value)
    splits = tuning.splits(max(1, blocks), tiles, processors)
    parts = scores.queries.new_empty(n, splits, dtype=torch.float32)
    per_row = isinstance(scores.temperature, Tensor)
    arguments = {
        "queries_ptr": scores.queries,
        "keys_ptr": scores.keys,
        "stride_query": scores.queries.stride(0),
        "stride_key": scores.keys.stride(0),
        "n": n,
        "m": m,
        "temperatures_ptr": dense(scores.temperature) if per_row else None,
        "temperature": 1.0 if per_row else scores.temperature,
        "query_ids_ptr": dense(scores.query_ids),
        "key_ids_ptr": None if scores.query_ids is None else dense(scores.key_ids),
        "split_length": TILE.value * -(-tiles // splits),
        "lse_ptr": parts,
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(scores.queries.dtype),
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    with on_device(scores.queries):
        LSE_KERNEL((blocks, splits, 1), arguments, options)
        return parts.view(n) if splits == 1 else torch.logsumexp(parts, 1)
