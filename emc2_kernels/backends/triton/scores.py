"""Products of a block of rows and a tile of keys on the matrix units, and their columns as steps of eight segments."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import INTERPRETED
from .transition import NEG_INF

SEGMENTS = tl.constexpr(8)  # of a program: the columns of one step
STEPS = tl.constexpr(16)  # of each segment in one product
TILE = tl.constexpr(128)  # keys of a product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _halves(scores, COUNT: tl.constexpr):
    """(BLOCK_M, COUNT, 8) into its first and its last COUNT / 2 steps. Bits of a register's number: nothing moves."""
    ROWS: tl.constexpr = scores.shape[0]
    pairs = tl.reshape(scores, (ROWS, 2, COUNT // 2, SEGMENTS))
    return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def _four_steps(scores):
    """(BLOCK_M, 4, 8) as four (BLOCK_M, 8)."""
    ROWS: tl.constexpr = scores.shape[0]
    low, high = _halves(scores, 4)
    s0, s1 = _halves(low, 2)
    s2, s3 = _halves(high, 2)
    return (
        tl.reshape(s0, (ROWS, SEGMENTS)),
        tl.reshape(s1, (ROWS, SEGMENTS)),
        tl.reshape(s2, (ROWS, SEGMENTS)),
        tl.reshape(s3, (ROWS, SEGMENTS)),
    )


@triton.jit
def sixteen_steps(products):
    """(BLOCK_M, 128) as four groups of four (BLOCK_M, 8), one a step of all segments."""
    ROWS: tl.constexpr = products.shape[0]
    low, high = _halves(tl.reshape(products, (ROWS, STEPS, SEGMENTS)), 16)
    g0, g1 = _halves(low, 8)
    g2, g3 = _halves(high, 8)
    return _four_steps(g0), _four_steps(g1), _four_steps(g2), _four_steps(g3)


class Operand(NamedTuple):
    """Rows of a matrix."""

    ptr: tl.tensor
    stride_row: tl.tensor
    row: tl.tensor  # which ones, (rows,)
    row_ok: tl.tensor | None  # whether there is one; None: all are there


@triton.jit
def key_operand(keys_ptr, stride_key_row, number, m):
    """Rows of keys (m, d), m > 0, by their int32 numbers; of a number outside, the nearest key's. So no load has a
    mask, and whoever makes scores of them leaves those out."""
    row = tl.maximum(tl.minimum(number, (m - 1).to(tl.int32)), 0).to(tl.uint32).to(tl.int64)
    return Operand(keys_ptr, stride_key_row, row, tl.full(number.shape, True, tl.int1))


@triton.jit
def key_bias(log_proposal_ptr, key, there):
    """(keys,) what is added to the products of keys: -log g in powers of two, -inf where there is none."""
    if log_proposal_ptr is None:
        return tl.where(there, 0.0, NEG_INF)
    else:
        return tl.load(log_proposal_ptr + key, there, other=float("inf")) * -LOG2_E


@triton.jit
def larger(a, b):
    """Of two numbers; of a number and NaN the number, for which a GPU has one instruction."""
    if INTERPRETED:  # whose maximum is NaN there in Triton 3.6
        return tl.where(a != a, b, tl.where(a < b, b, a))
    else:
        return tl.maximum(a, b)


@triton.jit
def load_rows(operand, begin, d, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix with d columns, from column ``begin`` on; zeros where there is nothing."""
    dim = begin + tl.arange(0, BLOCK_D)
    if operand.row_ok is None:  # all that differs between threads in one term, which may leave a loop
        at = operand.ptr + (operand.row[:, None] * operand.stride_row + dim[None, :])
        block = tl.load(at) if EVEN_D else tl.load(at, (dim < d)[None, :], other=0.0)
    else:
        at = operand.ptr + operand.row[:, None] * operand.stride_row + dim[None, :]
        row_ok = operand.row_ok[:, None]
        block = tl.load(at, row_ok if EVEN_D else row_ok & (dim < d)[None, :], other=0.0)
    if INTERPRETED:  # which would multiply the bits of bfloat16
        block = block.to(tl.float32)
    return block


@triton.jit
def load_resident(queries, d, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr):
    """The rows of a program for ``multiply``, loaded once, where one block holds them whole."""
    if WHOLE_D:
        return load_rows(queries, 0, d, BLOCK_D, EVEN_D)
    else:
        return queries.row


@triton.jit
def multiply(
    resident, queries, keys, d, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, rows) float32 inner products of two operands; ``resident`` is what ``load_resident`` made of the first.

    Longer rows come in chunks, queries too: all of 512 dimensions would not fit into shared memory.
    """
    products = tl.zeros((queries.row.shape[0], keys.row.shape[0]), tl.float32)
    if WHOLE_D:
        key_block = load_rows(keys, 0, d, BLOCK_D, EVEN_D)
        products = tl.dot(resident, tl.trans(key_block), products, input_precision=PRECISION)
    else:
        for begin in range(0, d, BLOCK_D):
            query_block = load_rows(queries, begin, d, BLOCK_D, EVEN_D)
            key_block = load_rows(keys, begin, d, BLOCK_D, EVEN_D)
            products = tl.dot(query_block, tl.trans(key_block), products, input_precision=PRECISION)
    return products


@triton.jit
def store_rounded(ptr, x, mask):
    """Stores float32 values in the pointer's dtype, rounded to the nearest as torch does."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask)
