"""A kernel's launch without Triton's per-call work, and the arguments that all kernels take in the same way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import gpu
from ..params import ScoreParams, WalkParams

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_HERE = nullcontext()
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

    Binaries that are there are given addresses: of each tensor Triton's launcher would ask the driver whose it is. The
    caller keeps the tensors until the call returns; then the launch is on the stream, and torch's allocator hands their
    memory to later work of that stream only.
    """

    def __init__(self, function: triton.JITFunction) -> None:
        self.function = function
        self.names = function.arg_names
        self.pointers = [name for name in self.names if name.endswith("_ptr")]
        self.strides = [name for name in self.names if name.startswith("stride")]
        self.constants = [name for name in self.names if name.isupper()]
        places = {name: place for place, name in enumerate(self.names)}
        self._pointers, self._strides, self._constants = (
            [places[name] for name in names] for names in (self.pointers, self.strides, self.constants)
        )
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, grid: tuple[int, int, int], arguments: Arguments, options: Arguments) -> None:
        if 0 in grid:
            return
        values = [arguments[name] for name in self.names]
        if _INTERPRETED:
            self.function[grid](*values)
            return
        key, addresses = self.bind(values, options)
        kernel = self.compiled.get(key)
        if kernel is None:
            self.compiled[key] = self.function[grid](*values, **options, **ALWAYS)
        elif _hooks_are_set():
            kernel[grid](*values)
        else:
            stream = triton.runtime.driver.active.get_current_stream(key[-1])
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *addresses)

    def bind(self, values: list[Any], options: Arguments) -> tuple[tuple, list[Any]]:
        """What the binary depends on, its device last, and the arguments with addresses in the place of tensors.

        Args:
            values: of all arguments, in order.
            options: for the compiler, always in the same order.
        """
        addresses, key = values.copy(), []
        for place in self._pointers:
            tensor = values[place]
            if tensor is None:
                key.append(None)
            else:
                here, address = tensor, tensor.data_ptr()
                addresses[place] = address
                key.append((tensor.dtype, address % _ALIGNMENT == 0))
        for place in self._strides:
            stride = values[place]
            key.append((stride % _ALIGNMENT == 0, stride == 1))
        for place in self._constants:
            key.append(values[place])
        return (*key, *options.values(), here.get_device()), addresses


def _hooks_are_set() -> bool:
    """Whether somebody, a profiler say, wants to be told of launches. Of a chain of hooks there may be none."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


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
    queries, keys = params.queries, params.keys
    arguments = temperature_arguments(params.temperature)
    arguments |= {
        "queries_ptr": queries,
        "keys_ptr": keys,
        "stride_query_row": queries.stride(0),
        "stride_key_row": keys.stride(0),
        "n": queries.shape[0],
        "m": keys.shape[0],
        "query_ids_ptr": dense(params.query_ids),
        "key_ids_ptr": dense(params.key_ids) if excludes else None,
        "log_proposal_ptr": dense(params.log_proposal),
    }
    return arguments


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
    arguments, count = _operand_arguments(walk, walk.query_ids is not None), walk.num_proposals
    arguments |= random_arguments(walk.seed, walk.step)
    arguments |= {
        "chain_ids_ptr": dense(walk.chain_ids),
        "positions_ptr": dense(walk.positions),
        "stride_position_row": count,
        "first_proposal": walk.first_proposal,
        "num_proposals": count,
        "burn_in": walk.burn_in,
        "num_kept": walk.total_proposals - walk.burn_in,
        "num_samples": walk.num_samples,
    }
    return arguments


def pointers(tensors: tuple) -> Arguments:
    """A NamedTuple of tensors by the kernels' names for its fields."""
    return dict(zip(_pointer_names(type(tensors)), tensors, strict=True))


@cache
def _pointer_names(kind: type) -> list[str]:
    return [f"{name}_ptr" for name in kind._fields]


def dense(tensor: Tensor | None) -> Tensor | None:
    """Kernels take vectors, and rows of positions, without gaps."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def device_guard(operand: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be the operand's."""
    if not operand.is_cuda or operand.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(operand.get_device())


@lru_cache(maxsize=256)
def dimensions(d: int, largest: int) -> Arguments:
    """How rows of d elements are cut; a binary serves every d with the same answers.

    d comes as a multiple of ALIGN_D, so that the compiler knows how wide its loads may be. What is returned is kept for
    the next call: it is not for changing.
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
