"""A kernel's launch without Triton's per-call work, and the arguments that all kernels take in the same way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .. import gpu
from ..params import ScoreParams, WalkParams

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_ALIGNMENT = 16  # bytes, on which Triton compiles wide loads
# Multiplications and additions fuse by default, which Triton 3.9 warns will change. Assertions on values that nobody
# has seen on the host are compiled in; Triton's own, on every addition, are not.
ALWAYS = {"enable_fp_fusion": True, "debug": gpu.asserts(), "sanitize_overflow": False}

# What kernels take as numbers, whatever they are: `@triton.jit(do_not_specialize=NUMBERS)`.
NUMBERS = (
    "n", "m", "d_over_align", "temperature", "seed_low", "seed_high", "step", "first_proposal", "num_proposals",
    "burn_in", "num_kept", "num_samples", "segment_length", "split_length", "lead", "splits", "first_key", "b",
    "num_items", "floor", "scale",
)  # fmt: skip

Arguments = dict[str, Any]


class Kernel:
    """A Triton kernel and what it was compiled to.

    Triton looks at every argument at every launch to find the right binary. Here the key is made of what can differ:
    the constants, which tensors are given, their dtype and alignment, and whether strides are multiples of 16. Numbers
    that are neither must be named in ``NUMBERS``, or Triton would compile for the divisibility of the first one seen.
    """

    def __init__(self, function: triton.JITFunction) -> None:
        self.function = function
        self.names = function.arg_names
        self.pointers = [name for name in self.names if name.endswith("_ptr")]
        self.strides = [name for name in self.names if name.startswith("stride")]
        self.constants = [name for name in self.names if name.isupper()]
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, int, int], arguments: Arguments, options: Arguments) -> None:
        if 0 in grid:
            return
        values = [arguments[name] for name in self.names]
        if _INTERPRETED:
            self.function[grid](*values)
            return
        key = self.key(arguments, options)
        kernel = self.compiled.get(key)
        if kernel is None:
            self.compiled[key] = self.function[grid](*values, **options, **ALWAYS)
        else:
            kernel[grid](*values)

    def key(self, arguments: Arguments, options: Arguments) -> tuple:
        """What the binary depends on, its device included."""
        tensors = [arguments[name] for name in self.pointers]
        return (
            next(tensor for tensor in tensors if tensor is not None).get_device(),
            *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % _ALIGNMENT == 0) for tensor in tensors],
            *[(stride % _ALIGNMENT == 0, stride == 1) for stride in [arguments[name] for name in self.strides]],
            *[arguments[name] for name in self.constants],
            *options.values(),
        )


def power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(0, number - 1).bit_length()


def int32_bits(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def random_arguments(seed: int | Tensor, step: int | Tensor) -> Arguments:
    """``seed`` and ``step`` as kernels take them: numbers as int32 words, tensors by address, read on the device."""
    by_address, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    step_address, step = (step, 0) if isinstance(step, Tensor) else (None, step)
    return {
        "seed_ptr": by_address,
        "seed_low": int32_bits(seed & 0xFFFFFFFF),
        "seed_high": int32_bits(seed >> 32 & 0xFFFFFFFF),
        "step_ptr": step_address,
        "step": int32_bits(step),
    }


def _operand_arguments(params: WalkParams | ScoreParams, excludes: bool) -> Arguments:
    """excludes: whether rows have ids that leave keys out."""
    return temperature_arguments(params.temperature) | {
        "queries_ptr": params.queries,
        "keys_ptr": params.keys,
        "stride_query_row": params.queries.stride(0),
        "stride_key_row": params.keys.stride(0),
        "n": params.queries.shape[0],
        "m": params.keys.shape[0],
        "query_ids_ptr": dense(params.query_ids),
        "key_ids_ptr": dense(params.key_ids) if excludes else None,
        "log_proposal_ptr": dense(params.log_proposal),
    }


def temperature_arguments(temperature: float | Tensor) -> Arguments:
    """One for all rows by value, one for each by address."""
    per_row = isinstance(temperature, Tensor)
    return {
        "temperatures_ptr": dense(temperature) if per_row else None,
        "temperature": 1.0 if per_row else temperature,
    }


def score_arguments(scores: ScoreParams) -> Arguments:
    """What the kernels are told of scores of all keys."""
    excludes = scores.query_ids is not None or scores.carried_ids is not None
    return _operand_arguments(scores, excludes) | {"carried_ids_ptr": dense(scores.carried_ids)}


def walk_arguments(walk: WalkParams) -> Arguments:
    """What the kernels are told of a walk, whatever its proposals."""
    own = {
        "chain_ids_ptr": dense(walk.chain_ids),
        "positions_ptr": dense(walk.positions),
        "stride_position_row": walk.num_proposals,
        "first_proposal": walk.first_proposal,
        "num_proposals": walk.num_proposals,
        "burn_in": walk.burn_in,
        "num_kept": walk.total_proposals - walk.burn_in,
        "num_samples": walk.num_samples,
    }
    return random_arguments(walk.seed, walk.step) | _operand_arguments(walk, walk.query_ids is not None) | own


def pointers(tensors: tuple) -> Arguments:
    """A NamedTuple of tensors by the kernels' names for its fields."""
    return {f"{name}_ptr": tensor for name, tensor in tensors._asdict().items()}


def dense(tensor: Tensor | None) -> Tensor | None:
    """Kernels take vectors, and rows of positions, without gaps."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def device_guard(operand: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be the operand's."""
    index = operand.device.index
    if not operand.is_cuda or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


def dimensions(d: int, largest: int) -> Arguments:
    """How rows of d elements are cut; a binary serves every d with the same answers.

    d comes as a multiple of ALIGN_D, so that the compiler knows how wide its loads may be.
    """
    block, align = min(largest, max(32, power_of_two(d))), min(16, d & -d) or 16
    return {
        "d_over_align": d // align,
        "BLOCK_D": block,
        "WHOLE_D": d <= block,
        "EVEN_D": d > 0 and d % block == 0,
        "ALIGN_D": align,
    }


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies operands of a dtype: "tf32" only for float32, where torch.mm may take that, too.

    torch's former getter raises where the setting was made by the one that came with torch 2.9.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
