"""Row-wise log-sum-exp of scores: a block of rows against all keys in one program, or against a split of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import ScoreParams
from . import tuning
from .epilogue import LN_2
from .launch import NUMBERS, Kernel, device_guard, dimensions, precision, score_arguments
from .lse_backward import contrastive_lse_backward
from .proposals import has_id, load_row_ids, load_temperature
from .scores import LOG2_E, TILE, Operand, key_bias, key_operand, larger, load_resident, multiply
from .transition import NEG_INF

__all__ = ["contrastive_lse", "contrastive_lse_backward"]


@triton.jit(do_not_specialize=NUMBERS)
def lse_kernel(
    queries_ptr, keys_ptr,  # (n, d), (m, d)
    stride_query_row: tl.int64, stride_key_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    temperatures_ptr, temperature: tl.float32,  # (n,) float32, or None and one for all
    query_ids_ptr, carried_ids_ptr, key_ids_ptr,  # (n,), (n,), (m,) int64 or None
    log_proposal_ptr,  # (m,) float32 or None
    split_length: tl.int64,
    lse_ptr,  # (n, splits) float32, written
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, z): rows i * BLOCK_M and on, over keys z * split_length and on."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    d = d_over_align * ALIGN_D
    scale = tl.full((BLOCK_M,), LOG2_E, tl.float32) / load_temperature(temperatures_ptr, temperature, row, row_ok)
    query_id, carried_id = load_row_ids(query_ids_ptr, carried_ids_ptr, row, row_ok)
    HAS_QUERY: tl.constexpr = query_ids_ptr is not None
    HAS_CARRIED: tl.constexpr = carried_ids_ptr is not None
    queries = Operand(queries_ptr, stride_query_row, row, row_ok)
    resident = load_resident(queries, d, BLOCK_D, WHOLE_D, EVEN_D)
    # The running maximum and sum of exponentials over it, in powers of two.
    largest, total = tl.full((BLOCK_M,), NEG_INF, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    column = split * split_length + tl.arange(0, TILE)
    for tile in range(0, (split_length // TILE).to(tl.int32)):
        number = (column + tile * TILE).to(tl.int32)
        there = number.to(tl.uint32) < m.to(tl.uint32)
        keys = key_operand(keys_ptr, stride_key_row, number, m)
        products = multiply(resident, queries, keys, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        scores = tl.fma(products, scale[:, None], key_bias(log_proposal_ptr, column + tile * TILE, there)[None, :])
        # Infinity becomes NaN, and NaN -inf below: one instruction of the ALU, where a choice takes two.
        scores = tl.fma(scores, 0.0, scores)
        if key_ids_ptr is not None:
            key_id = tl.load(key_ids_ptr + column + tile * TILE, there)  # where there is none it is never seen
            scores = tl.where(has_id(key_id, query_id, carried_id, HAS_QUERY, HAS_CARRIED), NEG_INF, scores)
        scores = larger(scores, NEG_INF)
        new = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new > NEG_INF, new, 0.0)
        total = total * tl.exp2(largest - origin) + tl.sum(tl.exp2(scores - origin[:, None]), 1)
        largest = new
    tl.store(lse_ptr + row * splits + split, (largest + tl.log2(total)) * LN_2, row_ok)


LSE_KERNEL = Kernel(lse_kernel)


def contrastive_lse(scores: ScoreParams) -> Tensor:
    """(n,) float32; see ``reference_lse``.

    Roofline on an H100: the schedulers, at 15.9 instructions for a warp's 32 (row, key) at d = 128, counted in the code
    of Triton 3.9, which predict 9.5 ms for 131,072 rows and keys in bfloat16; loads from the L2 6.3, products 5.7.
    Without ids they are 10.6, and with a second id of a row the ALU binds, at 21.4 cycles. Not measured.
    """
    (n, d), m = scores.queries.shape, scores.keys.shape[0]
    generation, processors = tuning.device(scores.queries.device.index or 0)
    chosen = tuning.lse(generation, scores.queries.dtype != torch.float32)
    blocks, tiles = -(-n // chosen.block_m), -(-m // TILE.value)
    splits = tuning.splits(max(1, blocks), tiles, processors)
    parts = scores.queries.new_empty(n, splits, dtype=torch.float32)
    arguments = score_arguments(scores) | {
        "split_length": TILE.value * -(-tiles // splits),
        "lse_ptr": parts,
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(scores.queries.dtype),
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    with device_guard(scores.queries):
        LSE_KERNEL((blocks, splits, 1), arguments, options)
        return parts.view(n) if splits == 1 else torch.logsumexp(parts, 1)
