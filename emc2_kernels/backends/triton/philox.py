"""The random-number contract of ``emc2_kernels.rng`` and the exponential draw, for Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

ACCEPTANCE = tl.constexpr(0)
POSITION = tl.constexpr(1)
GUMBEL = tl.constexpr(2)
VIEW_COIN = tl.constexpr(3)
CARRIED = tl.constexpr(4)

_ROUNDS = tl.constexpr(7)
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)

_ONE_BITS = tl.constexpr(0x3F800000)
_ONE_LESS_HALF_STEP = tl.constexpr(1.0 - 2.0**-24)
_MINUS_TWO_TO_MINUS_5 = tl.constexpr(-(2.0**-5))
SCALE_AND_CLAMP = tl.constexpr("mul.sat.f32 $0, $1, 0fBD000000;")  # by it, and to [0, 1]
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_TO_MINUS_33 = tl.constexpr(2.0**-33)


@triton.jit
def _multiply_wide(word, multiplier: tl.constexpr):
    """High and low word of a product; as one 64-bit product it is one instruction, as mulhi and mul two."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


class Generator(NamedTuple):
    """What all random words of a call share: scalars, uint32."""

    step: tl.tensor
    key_0: tl.tensor  # low word of the seed
    key_1: tl.tensor  # high word


@triton.jit
def load_generator(seed_ptr, seed_low, seed_high, step_ptr, step):
    """Seed and step from 0-d int64 tensors, or, where these are None, from int32 numbers with their words' bits."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key_0, key_1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        key_0, key_1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    return Generator(step.to(tl.uint32), key_0, key_1)


@triton.jit
def chain_words(chain, stream: tl.constexpr):
    """Second and third counter word of chains; ids have 40 bits."""
    return (chain & 0xFFFFFFFF).to(tl.uint32), (((chain >> 32) & 0xFF) << 8 | stream).to(tl.uint32)


@triton.jit
def in_stream(tag, stream: tl.constexpr):
    """The third counter word of chains in another stream, sample 0."""
    return (tag & 0xFF00) | stream


@triton.jit
def zeros_like(scores):
    """uint32 zeros in the registers where ``scores`` are.

    The compiler lays the draws out as it likes and would send each threshold through shared memory to the score that it
    belongs to. Zeros that it cannot see through tie the two together; the assembler removes them.
    """
    if INTERPRETED:
        return tl.zeros(scores.shape, tl.uint32)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,f", [scores], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def random_words(block, chain_low, tag, generator, zeros):
    """Philox4x32-7 of counter (block, chain_low, tag, step): four uint32 of the arguments' common shape.

    The arguments are left unbroadcast on purpose. A column of blocks and a row of chains meet only in the third round,
    so the products of rounds 1 and 2 are made once a column and once a row, and those of the rows leave the loop.
    ``zeros`` enter where the two meet.
    """
    c0, c1, c2, c3 = block, chain_low, tag, generator.step
    key_0, key_1 = generator.key_0, generator.key_1
    for i in tl.static_range(_ROUNDS):
        high_0, low_0 = _multiply_wide(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply_wide(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        if i == 1:
            c0 ^= zeros
            c2 ^= zeros
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _log2(x):
    """Of the magnitude of x, which the instruction takes for nothing."""
    if INTERPRETED:
        return tl.log2(tl.abs(x))
    else:  # tl.log2 is a software logarithm, which would double the cost of a proposal
        # Without ftz it handles denormal numbers, which u is not, in three more instructions.
        asm: tl.constexpr = "{ .reg .f32 a; abs.f32 a, $1; lg2.approx.ftz.f32 $0, a; }"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def scaled_exponential(word):
    """E / (32 ln 2), in [0, 1): E = -log u, u = (word >> 9) * 2^-23 + 2^-24, within 2^-22 of log2 u, or 2^-22 of itself
    if larger.

    The bits below a float's leading one give 1 + (word >> 9) * 2^-23, and the difference is exact: no conversion of
    integers, which is four times slower than any other instruction here. Near u = 1 the approximate logarithm may come
    out above 0, and a threshold below its score would break the composition of steps. So -log2 u, which is 24 at most,
    is multiplied by 2^-5, exactly, in a product that saturates to [0, 1]: a minimum would take the pipe that binds.
    """
    u = ((word >> 9) | _ONE_BITS).to(tl.float32, bitcast=True) - _ONE_LESS_HALF_STEP
    log2 = _log2(u)
    if INTERPRETED:
        return tl.maximum(log2 * _MINUS_TWO_TO_MINUS_5, 0.0)
    else:
        return tl.inline_asm_elementwise(SCALE_AND_CLAMP, "=f,f", [log2], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gumbel_log2(word):
    """log2 of E / ln 2, for v = (word + 0.5) * 2^-32 and E = -log1p(-v): Gumbel noise is its negative, up to a factor
    and a term that all keys share.

    Both tails count. A word's bits as a signed number make v below 1/2 and v - 1 above, the nearer of v and 1 - v exact
    but for one rounding; below 1/8 a polynomial (relative error 4e-8) stands for the logarithm, whose approximate
    version has an absolute error there. Altogether within 1e-5.
    """
    v = tl.fma(word.to(tl.int32, bitcast=True).to(tl.float32), _TWO_TO_MINUS_32, _TWO_TO_MINUS_33)  # or v - 1
    p = tl.fma(v, 0.37928685545921326, 0.3501330018043518)
    p = tl.fma(v, p, 0.4813832938671112)
    p = tl.fma(v, p, 0.7213398218154907)
    p = tl.fma(v, p, 1.4426950216293335)
    e = tl.where(word < 0x20000000, v * p, _log2(tl.where(v < 0, 0.0, 1.0) - v))  # or -e
    return _log2(e)


@triton.jit
def scale_to_range(low, high, count):
    """High 64 bits of (high, low) * count, for count < 2^32: uniform over 0 .. count - 1."""
    factor = count.to(tl.uint64)
    carried = (low.to(tl.uint64) * factor) >> 32
    return ((high.to(tl.uint64) * factor + carried) >> 32).to(tl.int64)
