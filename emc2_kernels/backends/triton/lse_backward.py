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
from .launch import (
    NUMBERS,
    Arguments,
    Kernel,
    dense,
    device_guard,
    dimensions,
    power_of_two,
    precision,
    temperature_arguments,
)
from .proposals import load_row_ids, load_temperature
from .scores import LOG2_E, TILE, Operand, load_resident, load_rows, multiply, store_rounded
from .transition import NEG_INF

# Weights are at most 1 and most are far below. float16 has no small numbers, but room above 1.
HEADROOM = tl.constexpr(14.0)


class QueryPointers(NamedTuple):
    """What the queries' log-sum-exp was made with, whichever role they have here."""

    temperatures_ptr: tl.tensor | None
    temperature: tl.tensor
    lse_ptr: tl.tensor
    coefficients_ptr: tl.tensor
    largest: tl.tensor  # of the coefficients


@triton.jit
def _load_queries(queries, at, ok):
    """(log2(e) / temperature, the log-sum-exp in powers of two, coefficient over the largest) of the queries ``at``."""
    temperature = load_temperature(queries.temperatures_ptr, queries.temperature, at, ok)
    scale = tl.full(at.shape, LOG2_E, tl.float32) / temperature
    lse = tl.load(queries.lse_ptr + at, ok, other=0.0)
    level = tl.where(lse > NEG_INF, lse * LOG2_E, 0.0) - HEADROOM  # without keys nothing is counted
    return scale, level, tl.load(queries.coefficients_ptr + at, ok, other=0.0) / queries.largest


@triton.jit
def _as_key(bias, log_proposal_ptr, at, ok, WANTED: tl.constexpr):
    """``bias`` of rows ``at``, and what comes to it where they are keys: -log g in powers of two."""
    if WANTED and log_proposal_ptr is not None:
        return bias - tl.load(log_proposal_ptr + at, ok, other=0.0) * LOG2_E
    else:
        return bias


@triton.jit
def _weights(products, scale, level, weight, key_bias, counted):
    """w_ij = weight * exp(s_ij - lse), of queries along either axis; 0 where a score is not finite or not counted."""
    exponent = tl.fma(products, scale, key_bias - level)
    return tl.exp2(tl.where(counted & (exponent < float("inf")), exponent, NEG_INF)) * weight


@triton.jit(do_not_specialize=NUMBERS)
def lse_gradient_kernel(
    owners_ptr, others_ptr,  # (n, d), (m, d), elements that are not finite replaced by 0
    stride_owner_row: tl.int64, stride_other_row: tl.int64, n: tl.int64, m: tl.int64, d_over_align: tl.int32,
    owner_bias_ptr, other_bias_ptr,  # (n,), (m,): 0, or NaN where a row had such an element
    log_proposal_ptr,  # (keys,) float32 or None
    temperatures_ptr, temperature: tl.float32,  # (queries,) float32, or None and one for all
    lse_ptr,  # (queries,) float32
    coefficients_ptr, largest_ptr,  # (queries,), () float32
    owner_ids_ptr, other_ids_ptr,  # (n,), (m,) int64 or None
    carried_ids_ptr,  # (queries,) int64 or None
    split_length: tl.int64,
    out_ptr,  # (splits, n, d), written
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, ALIGN_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, AS_QUERY: tl.constexpr, AS_KEY: tl.constexpr,
):  # fmt: skip
    """Program (i, z, c): owners i * BLOCK_M and on, others z * split_length and on, columns c * BLOCK_OUT and on.

    Scores are made again for each chunk of columns: an accumulator of all of them would not
    fit into the registers.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n
    split, first_column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_OUT
    d = d_over_align * ALIGN_D
    largest = tl.load(largest_ptr)
    divisor = tl.where(largest == 0, 1.0, largest)
    queries = QueryPointers(temperatures_ptr, temperature, lse_ptr, coefficients_ptr, divisor)
    row_bias = tl.load(owner_bias_ptr + row, row_ok, other=0.0).to(tl.float32)
    if AS_QUERY:
        row_scale, row_level, row_weight = _load_queries(queries, row, row_ok)
        row_level += row_bias
    row_as_key = _as_key(row_bias, log_proposal_ptr, row, row_ok, AS_KEY)
    row_id, row_carried_id = load_row_ids(owner_ids_ptr, carried_ids_ptr if AS_QUERY else None, row, row_ok)
    owners = Operand(owners_ptr, stride_owner_row, row, row_ok)
    resident = load_resident(owners, d, BLOCK_D, WHOLE_D, EVEN_D)
    WHOLE_OUT: tl.constexpr = WHOLE_D and BLOCK_OUT == BLOCK_D
    total = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    column = split * split_length + tl.arange(0, TILE)
    for tile in range(0, (split_length // TILE).to(tl.int32)):
        other = column + tile * TILE
        there = other < m
        others = Operand(others_ptr, stride_other_row, other, there)
        if WHOLE_OUT:
            block = load_rows(others, 0, d, BLOCK_D, EVEN_D)
            products = tl.dot(resident, tl.trans(block), input_precision=PRECISION)
        else:
            products = multiply(resident, owners, others, d, BLOCK_D, WHOLE_D, EVEN_D, PRECISION)
            block = load_rows(others, first_column, d, BLOCK_OUT, False)
        bias = tl.load(other_bias_ptr + other, there, other=NEG_INF).to(tl.float32)
        counted = row_ok[:, None]
        if other_ids_ptr is not None:
            other_id = tl.load(other_ids_ptr + other, there, other=0)
            if owner_ids_ptr is not None:
                counted &= other_id[None, :] != row_id[:, None]
        weights = tl.zeros((BLOCK_M, TILE), tl.float32)
        if AS_QUERY:
            as_key, both = _as_key(bias, log_proposal_ptr, other, there, AS_QUERY), counted
            if carried_ids_ptr is not None:
                both &= other_id[None, :] != row_carried_id[:, None]
            weights += _weights(
                products, row_scale[:, None], row_level[:, None], row_weight[:, None], as_key[None, :], both
            )
        if AS_KEY:
            scale, level, weight = _load_queries(queries, other, there)
            level -= bias
            if carried_ids_ptr is not None:
                counted &= tl.load(carried_ids_ptr + other, there, other=0)[None, :] != row_id[:, None]
            weights += _weights(products, scale[None, :], level[None, :], weight[None, :], row_as_key[:, None], counted)
        total = tl.dot(weights.to(block.dtype), block, total, input_precision=PRECISION)
    dim = first_column + tl.arange(0, BLOCK_OUT)
    at = (split * n + row)[:, None] * d + dim[None, :]
    store_rounded(out_ptr + at, total * (largest * tl.exp2(-HEADROOM)), row_ok[:, None] & (dim < d)[None, :])


LSE_GRADIENT_KERNEL = Kernel(lse_gradient_kernel)


class _Operand:
    """A matrix whose rows own gradients, or are the others; elements that are not finite replaced by 0, and marked."""

    def __init__(self, matrix: Tensor, ids: Tensor | None) -> None:
        self.matrix = matrix.nan_to_num(0.0, 0.0, 0.0)
        self.bias = (matrix * 0).sum(1)  # 0 * inf is NaN
        self.ids = dense(ids)


def _gradient(owners: _Operand, others: _Operand, both: Arguments, dtype: torch.dtype, roles: Arguments) -> Tensor:
    """(n, d): the gradient of the owners' matrix."""
    (n, d), m = owners.matrix.shape, others.matrix.shape[0]
    generation, processors = tuning.device(owners.matrix.device.index or 0)
    chosen = tuning.lse_gradient(generation, owners.matrix.dtype != torch.float32)
    block_out = min(chosen.block_out, max(32, power_of_two(d)))
    blocks, chunks, tiles = -(-n // chosen.block_m), -(-d // block_out), -(-m // TILE.value)
    # Splits leave a float32 result each: there are none where the GPU is full without them.
    programs = max(1, blocks * chunks)
    most = max(1, tuning.PROGRAMS_PER_PROCESSOR * processors // programs)
    splits = min(most, tuning.splits(programs, tiles, processors))
    split_length = TILE.value * -(-tiles // splits)
    out = owners.matrix.new_empty(splits, n, d, dtype=dtype if splits == 1 else torch.float32)
    arguments = {
        "owners_ptr": owners.matrix,
        "others_ptr": others.matrix,
        "stride_owner_row": owners.matrix.stride(0),
        "stride_other_row": others.matrix.stride(0),
        "n": n,
        "m": m,
        "owner_bias_ptr": owners.bias,
        "other_bias_ptr": others.bias,
        **both,
        "owner_ids_ptr": owners.ids,
        "other_ids_ptr": others.ids,
        "split_length": split_length,
        "out_ptr": out,
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(owners.matrix.dtype),
        "BLOCK_OUT": block_out,
        **roles,
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    LSE_GRADIENT_KERNEL((blocks, splits, chunks), arguments, options)
    return out[0] if splits == 1 else out.sum(0).to(dtype)


def contrastive_lse_backward(grad: Tensor, lse: Tensor, scores: ScoreParams) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and temperatures; see ``reference_lse``.

    Roofline on an H100, for 131,072 queries and keys at d = 128 in bfloat16: loads from the L2, which predict 31.2 ms
    for each of the two launches, since owners come again with each tile; the ALU needs 15.7 and 18.7, the two products
    11.3. A symmetric call is one launch. Not measured.
    """
    per_row = isinstance(scores.temperature, Tensor)
    excludes = scores.query_ids is not None or scores.carried_ids is not None
    no_keys, no_temperature = scores.keys.new_empty(0), grad.new_empty(0)
    if scores.queries.shape[0] == 0 or scores.keys.shape[0] == 0:
        zeros = torch.zeros_like(scores.queries), torch.zeros_like(scores.keys)
        d_temperature = torch.zeros_like(lse) if per_row else no_temperature
        return zeros[0], no_keys if scores.symmetric else zeros[1], d_temperature
    with device_guard(scores.queries):
        coefficients = grad / scores.temperature
        queries = _Operand(scores.queries, scores.query_ids)
        keys = queries if scores.symmetric else _Operand(scores.keys, scores.key_ids if excludes else None)
        both_arguments = temperature_arguments(scores.temperature) | {
            "carried_ids_ptr": dense(scores.carried_ids),
            "log_proposal_ptr": dense(scores.log_proposal),
            "lse_ptr": dense(lse),
            "coefficients_ptr": dense(coefficients),
            "largest_ptr": coefficients.abs().amax(),
        }
        dtype = scores.queries.dtype
        as_query, as_key = {"AS_QUERY": True, "AS_KEY": False}, {"AS_QUERY": False, "AS_KEY": True}
        if scores.symmetric and not per_row:
            both = _gradient(queries, queries, both_arguments, dtype, as_query | {"AS_KEY": True})
            return both, no_keys, no_temperature
        # A temperature's gradient is made of the queries', unrounded.
        d_queries = _gradient(queries, keys, both_arguments, torch.float32 if per_row else dtype, as_query)
        d_keys = _gradient(keys, queries, both_arguments, dtype, as_key)
        d_temperature = no_temperature
        if per_row:
            d_temperature = (queries.matrix * d_queries).sum(1).div_(-scores.temperature)
        if scores.symmetric:
            return (d_queries + d_keys).to(dtype), no_keys, d_temperature
        return d_queries.to(dtype), d_keys, d_temperature
