"""The kernels' approximate logarithm by itself, on every value that an acceptance draw can have."""

import triton
import triton.language as tl
from torch import Tensor

from emc2_kernels.backends.triton.philox import _log2, scaled_exponential

BLOCK = 1024


@triton.jit
def log2_kernel(raw_ptr, clamped_ptr, count, stride, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """For k = i * stride, i < count: log2 of u = (k + 1/2) * 2^-23, and what a walk takes for it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = i * stride
    u = (k.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23; 24 bits hold it
    word = (k.to(tl.uint32) << 9) | 0x155  # the low bits are not looked at
    tl.store(raw_ptr + i, _log2(u), i < count)
    tl.store(clamped_ptr + i, scaled_exponential(word) * -32.0, i < count)


def fill_log2(raw: Tensor, clamped: Tensor, stride: int) -> None:
    """Fills (count,) float32 each."""
    count = raw.numel()
    log2_kernel[(triton.cdiv(count, BLOCK),)](raw, clamped, count, stride, BLOCK=BLOCK)
