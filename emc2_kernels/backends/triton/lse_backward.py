"""The gradient of a log-sum-exp of scores: one kernel for queries and for keys, which swap their roles.

Row i of the result belongs to an *owner*, and sums w_ij times the *others*, in a fixed order: nothing is added
atomically. An owner counts as a query, as a key, or, where queries and keys are one matrix, as both at once, for one
pair of products instead of two. Then a pair has two weights: a row's second id leaves keys out for it as a query only,
and log g belongs to the key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import ScoreParams
from . import tuning
from .launch import NUMBERS, Arguments, Kernel, dense, device_guard, dimensions, power_of_two, precision
from .proposals import load_row_ids
from .scores import LOG2_E, key_operand, larger, load_resident, load_rows, multiply, store_rounded
from .transition import NEG_INF

# Weights are at most 1 and most are far below. float16 has no small numbers, but room above 1.
HEADROOM = tl.constexpr(14.0)
SMALLEST = tl.constexpr(2.0**-100)  # that coefficients are divided by: its reciprocal is finite


class Queries(NamedTuple):
    """What the queries' log-sum-exp was made with, whichever role they have here."""

    scales_ptr: tl.tensor | None
    scale: tl.tensor
    levels_ptr: tl.tensor
    coefficients_ptr: tl.tensor
    largest: tl.tensor


@triton.jit
def _load_queries(queries, at, there):
    """(scale, level, coefficient over the largest) of the queries ``at``; nothing is counted for one that is none."""
    level = tl.load(queries.levels_ptr + at, there, other=float("inf"))
    share = tl.load(queries.coefficients_ptr + at, there, other=0.0) * (1 / queries.largest)
    if queries.scales_ptr is None:
        return tl.full(at.shape, queries.scale, tl.float32), level, share
    else:
        return tl.load(queries.scales_ptr + at, there, other=0.0), level, share


@triton.jit
def _exponents(products, scale, offset):
    """products * scale + offset; -inf where that is not finite."""
    exponent = tl.fma(products, scale, offset)
    # Infinity becomes NaN, and NaN -inf: one instruction of the ALU, where a choice takes two.
    return larger(tl.fma(exponent, 0.0, exponent), NEG_INF)


@triton.jit
def _weigh(exponents, share, key_id, query_id, carried_id, HAS_IDS: tl.constexpr, HAS_CARRIED: tl.constexpr):
    """2 ** exponents times ``share``; 0 where a key has one of its query's ids. A query is a row, or a column."""
    weights = tl.exp2(exponents) * share
    if HAS_IDS:
        weights = tl.where(key_id == query_id, 0.0, weights)
    if HAS_CARRIED:
        weights = tl.where(key_id == carried_id, 0.0, weights)
    return weights


@triton.jit
def _multiply_tile(
    resident, owners, others, first_column, d, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of owners and a tile of the others, and the others' columns for the second product."""
    if WHOLE_D and BLOCK_OUT == BLOCK_D:  # one load serves both
        block = load_rows(others, 0, d, BLOCK_D, EVEN_D)
        return tl.dot(resident, tl.trans(block), input_precision=PRECISION), block
    else:
        products = multiply(resident, owners, others, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
        return products, load_rows(others, first_column, d, BLOCK_OUT, False)


@triton.jit(do_not_specialize=NUMBERS)
def lse_gradient_kernel(
    owners_ptr, others_ptr,  # (n, d), (m, d), elements that are not finite replaced by 0
    stride_owner_row: tl.int64, stride_other_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    biases_ptr,  # (keys,) float32: -log g in powers of two, NaN where a key had such an element
    scales_ptr, scale: tl.float32,  # (queries,) float32, or None and one for all: log2(e) / temperature
    levels_ptr,  # (queries,) float32: the log-sum-exp in powers of two, NaN where a query had such an element
    coefficients_ptr, largest_ptr,  # (queries,), () float32: the largest without its sign
    owner_ids_ptr, other_ids_ptr,  # (n,), (m,) int64 or None
    carried_ids_ptr,  # (queries,) int64 or None
    split_length: tl.int64,
    out_ptr,  # (splits, n, d), written
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    ALIGN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, APART: tl.constexpr,
    AS_QUERY: tl.constexpr, AS_KEY: tl.constexpr,
):  # fmt: skip
    """Program (i, z, c): owners i * BLOCK_M and on, others z * split_length and on, columns c * BLOCK_OUT and on.

    Scores are made again for each chunk of columns: so there is one where all columns fit into the registers.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    split, first_column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_OUT
    d = d_over_align * ALIGN_D
    largest = tl.load(largest_ptr)
    largest = tl.where(largest < SMALLEST, SMALLEST, largest)  # NaN stays
    queries = Queries(scales_ptr, scale, levels_ptr, coefficients_ptr, largest)
    if AS_QUERY:
        row_scale, row_level, row_share = _load_queries(queries, row, row_ok)
    if AS_KEY:
        row_bias = tl.load(biases_ptr + row, row_ok, other=0.0)
    row_id, row_carried_id = load_row_ids(owner_ids_ptr, carried_ids_ptr if AS_QUERY else None, row, row_ok)
    HAS_IDS: tl.constexpr = other_ids_ptr is not None and owner_ids_ptr is not None
    HAS_CARRIED: tl.constexpr = carried_ids_ptr is not None
    owners = key_operand(owners_ptr, stride_owner_row, row, n)
    resident = load_resident(owners, d, BLOCK_D, WHOLE_D, EVEN_D)
    total = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    column = split * split_length + tl.arange(0, BLOCK_N)
    for tile in range(0, (split_length // BLOCK_N).to(tl.int32)):
        other = (column + tile * BLOCK_N).to(tl.int32)
        there = other.to(tl.uint32) < m.to(tl.uint32)
        others = key_operand(others_ptr, stride_other_row, other, m)
        products, block = _multiply_tile(
            resident, owners, others, first_column, d, BLOCK_D, WHOLE_D, EVEN_D, BLOCK_OUT, PRECISION
        )
        # Ids that are not given are never compared.
        other_id = tl.load(other_ids_ptr + other, there) if other_ids_ptr is not None else other
        other_carried_id = tl.load(carried_ids_ptr + other, there) if HAS_CARRIED and AS_KEY else other
        if AS_QUERY:
            offset = tl.load(biases_ptr + other, there, other=NEG_INF)[None, :] - (row_level - HEADROOM)[:, None]
            as_query = _exponents(products, row_scale[:, None], offset)
        if AS_KEY:
            other_scale, level, share = _load_queries(queries, other, there)
            as_key = _exponents(products, other_scale[None, :], (row_bias + HEADROOM)[:, None] - level[None, :])
        # Both hold always, which the compiler cannot know: so it does not see that one product feeds the other. If it
        # does, it gives each warp 16 rows for itself, and the warps beyond BLOCK_M / 16 make the same weights again;
        # and the next tile is loaded after the second product has begun, instead of after the first has ended.
        weighs, sums = (m > 0, n > 0) if APART else (True, True)
        weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if weighs:
            if AS_QUERY:
                factor = row_share[:, None] if AS_KEY else 1.0
                weights = _weigh(
                    as_query, factor, other_id[None, :], row_id[:, None], row_carried_id[:, None], HAS_IDS, HAS_CARRIED
                )
            if AS_KEY:
                key_weights = _weigh(
                    as_key, share[None, :], row_id[:, None], other_id[None, :], other_carried_id[None, :], HAS_IDS,
                    HAS_CARRIED,
                )  # fmt: skip
                weights = weights + key_weights if AS_QUERY else key_weights
        if sums:
            total = tl.dot(weights.to(block.dtype), block, total, input_precision=PRECISION)
    if AS_KEY:
        total *= largest * tl.exp2(-HEADROOM)
    else:  # all weights of a query have one factor
        total *= (tl.load(coefficients_ptr + row, row_ok, other=0.0) * tl.exp2(-HEADROOM))[:, None]
    dim = first_column + tl.arange(0, BLOCK_OUT)
    at = (split * n + row.to(tl.int64))[:, None] * d + dim[None, :]
    store_rounded(out_ptr + at, total, row_ok[:, None] & (dim < d)[None, :])


LSE_GRADIENT_KERNEL = Kernel(lse_gradient_kernel)


class _Operand:
    """A matrix whose rows own gradients, or are the others; elements that are not finite replaced by 0, and marked."""

    def __init__(self, matrix: Tensor, ids: Tensor | None) -> None:
        self.matrix = matrix.nan_to_num(0.0, 0.0, 0.0).contiguous()  # rows that overlap may have become columns
        self.mark = (matrix * 0).sum(1, dtype=torch.float32)  # 0 * inf is NaN
        self.ids = dense(ids)


def _gradient(owners: _Operand, others: _Operand, both: Arguments, dtype: torch.dtype, roles: Arguments) -> Tensor:
    """(n, d): the gradient of the owners' matrix."""
    (n, d), m = owners.matrix.shape, others.matrix.shape[0]
    generation, processors = tuning.device(owners.matrix.device.index or 0)
    chosen = tuning.lse_gradient(generation, owners.matrix.dtype != torch.float32, d)
    block_out = min(chosen.block_out, max(32, power_of_two(d)))
    blocks, chunks, tiles = -(-n // chosen.block_m), -(-d // block_out), -(-m // chosen.block_n)
    # Splits leave a float32 result each: there are none where the GPU is full without them.
    programs = max(1, blocks * chunks)
    most = max(1, tuning.PROGRAMS_PER_PROCESSOR * processors // programs)
    splits = min(most, tuning.splits(programs, tiles, processors))
    split_length = chosen.block_n * -(-tiles // splits)
    out = owners.matrix.new_empty(splits, n, d, dtype=dtype if splits == 1 else torch.float32)
    arguments = {
        "owners_ptr": owners.matrix,
        "others_ptr": others.matrix,
        "stride_owner_row": owners.matrix.stride(0),
        "stride_other_row": others.matrix.stride(0),
        "n": n,
        "m": m,
        **both,
        "owner_ids_ptr": owners.ids,
        "other_ids_ptr": others.ids,
        "split_length": split_length,
        "out_ptr": out,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(owners.matrix.dtype),
        "BLOCK_OUT": block_out,
        "APART": chosen.apart,
        **roles,
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    LSE_GRADIENT_KERNEL((blocks, splits, chunks), arguments, options)
    return out[0] if splits == 1 else out.sum(0).to(dtype)


def contrastive_lse_backward(
    grad: Tensor, lse: Tensor, scores: ScoreParams, keys_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and temperatures; see ``reference_lse``.

    Roofline on an H100, of each of the two launches for 32,768 queries and keys in bfloat16 (a symmetric call is one):

    - d = 128: loads from the L2 0.78 ms, the two products 0.70, the schedulers 0.54 to 0.58 at 14.4 to 15.7
      instructions for a warp's 32 pairs with ids, counted in the code of Triton 3.9 (9.8 to 11.0 without).
    - d = 512: loads from the L2 3.1 ms, products 2.8, the schedulers 1.4 to 1.6. With one program a multiprocessor they
      add up in part, and the first product, of 32 others for each warp group, waits for shared memory (1.5 of 1 cycle).
    - d = 1024: loads from the L2 31 ms, since there owners come again with each tile; products 8.5.

    Not measured.
    """
    per_row = isinstance(scores.temperature, Tensor)
    excludes = scores.query_ids is not None or scores.carried_ids is not None
    no_keys, no_temperature = scores.keys.new_empty(0), grad.new_empty(0)
    if scores.queries.shape[0] == 0 or scores.keys.shape[0] == 0:
        zeros = torch.zeros_like(scores.queries), torch.zeros_like(scores.keys)
        d_temperature = torch.zeros_like(lse) if per_row else no_temperature
        return zeros[0], zeros[1] if keys_wanted and not scores.symmetric else no_keys, d_temperature
    with device_guard(scores.queries):
        coefficients = (grad / scores.temperature).contiguous()
        queries = _Operand(scores.queries, scores.query_ids)
        keys = queries if scores.symmetric else _Operand(scores.keys, scores.key_ids if excludes else None)
        law = scores.log_proposal
        both_arguments = {
            "biases_ptr": keys.mark if law is None else keys.mark.sub(law, alpha=LOG2_E.value),
            "scales_ptr": dense(LOG2_E.value / scores.temperature) if per_row else None,
            "scale": 1.0 if per_row else LOG2_E.value / scores.temperature,
            "levels_ptr": queries.mark.add(lse, alpha=LOG2_E.value),
            "coefficients_ptr": coefficients,
            "largest_ptr": torch.linalg.vector_norm(coefficients, torch.inf),
            "carried_ids_ptr": dense(scores.carried_ids),
        }
        dtype = scores.queries.dtype
        as_query, as_key = {"AS_QUERY": True, "AS_KEY": False}, {"AS_QUERY": False, "AS_KEY": True}
        if scores.symmetric and not per_row:
            both = _gradient(queries, queries, both_arguments, dtype, as_query | {"AS_KEY": True})
            return both, no_keys, no_temperature
        # A temperature's gradient is made of the queries', unrounded.
        d_queries = _gradient(queries, keys, both_arguments, torch.float32 if per_row else dtype, as_query)
        as_keys = keys_wanted or scores.symmetric
        d_keys = _gradient(keys, queries, both_arguments, dtype, as_key) if as_keys else no_keys
        d_temperature = no_temperature
        if per_row:
            d_temperature = (queries.matrix * d_queries).sum(1).div_(-scores.temperature)
        if scores.symmetric:
            return (d_queries + d_keys).to(dtype), no_keys, d_temperature
        return d_queries.to(dtype), d_keys, d_temperature
