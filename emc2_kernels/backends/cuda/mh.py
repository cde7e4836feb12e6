"""The CUDA backend: one launch a call, of a sweep on matrix units two, on the current stream. The kernels are in
csrc/cuda; nothing here waits for the device.

A step on a small batch is a few microseconds on the GPU, so this side of it is kept to one allocation for each output
and one call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import gpu, kernel_calls
from ..kernel_calls import Number
from ..params import WalkParams
from . import build

_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # missing where torch was built without CUDA


@cache
def library(device_index: int) -> ModuleType:
    """The kernels, loaded on this device; builds them if they are not in the cache."""
    module = build.library(gpu.architecture(device_index))
    module.load(device_index)
    return module


def _number(value: int | Tensor, bits: int) -> Number:
    """Looking at one in device memory here would wait."""
    return (0, value.data_ptr()) if isinstance(value, Tensor) else (value & ((1 << bits) - 1), 0)


def _run(core: ModuleType, walk: WalkParams, *input_and_outputs: Any, on_matrix_units: bool = False) -> None:
    index = walk.queries.get_device()
    params = kernel_calls.walk_params(core, walk, _number(walk.seed, 64), _number(walk.step, 32))
    operands = kernel_calls.operands(core, walk.queries, walk.keys)
    # Once a launch is on the stream, torch's allocator hands the memory of what it reads to later work only.
    call = index, _current_stream(index), params, operands, *input_and_outputs
    if not walk.is_sweep:
        core.walk_gathered(*call)
    elif on_matrix_units:
        size = core.matrix_sweep_scratch(walk.queries.shape[0], walk.keys.shape[0], walk.num_samples, index)
        scratch = torch.empty(size, dtype=torch.uint8, device=walk.queries.device)
        core.walk_matrix_sweep(*call, scratch.data_ptr(), size)
    else:
        core.walk_sweep(*call)


def _choose_run(walk: WalkParams, more_results: bool) -> Callable[..., None]:
    """Which kernel a sweep takes. A small one is all waiting, and matrix units are no help."""
    on_matrix_units = not gpu.is_small_sweep(walk) and gpu.takes_matrix_sweep(walk, more_results)
    return partial(_run, on_matrix_units=True) if on_matrix_units else _run


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    return kernel_calls.transition(library(walk.queries.get_device()), _choose_run(walk, False), walk)


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    core, run = library(walk.queries.get_device()), _choose_run(walk, return_accepts or return_lse)
    return kernel_calls.step(core, run, walk, key, score, key_labels, return_accepts, return_lse)


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    items, index = items.contiguous(), items.get_device()
    views, core = torch.empty_like(items), library(index)
    streams = kernel_calls.stream_params(core, _number(seed, 64), _number(step, 32), items)
    core.view_coins(index, _current_stream(index), streams, items.numel(), views.data_ptr())
    return views
