"""The CUDA backend: one launch a call, on the current stream. The kernels are in csrc/cuda; nothing here waits for the
device.

A step on a small batch is a few microseconds on the GPU, so this side of it is kept to one allocation for each output
and one call.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import gpu
from ..params import WalkParams
from . import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_STEP, _NO_TRANSITION = (0,) * 9, (0,) * 3
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # missing where torch was built without CUDA


@cache
def library(device_index: int) -> ModuleType:
    """The kernels, loaded on this device; builds them if they are not in the cache."""
    module = build.library(gpu.architecture(device_index))
    module.load(device_index)
    return module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _number(value: int | Tensor, bits: int) -> tuple[int, int]:
    """A number, or the address of one that only the device reads: looking at it here would wait."""
    return (0, value.data_ptr()) if isinstance(value, Tensor) else (value & ((1 << bits) - 1), 0)


def _run(walk: WalkParams, step: tuple[int, ...], transition: tuple[int, ...]) -> None:
    queries, keys, positions = walk.queries, walk.keys, walk.positions
    n, dim = queries.shape
    temperature = walk.temperature
    if isinstance(temperature, Tensor):
        temperatures = (0.0, temperature.data_ptr(), temperature.stride(0))
    else:
        temperatures = (temperature, 0, 0)
    position_stride = 0
    if positions is not None:
        if positions.shape[1] > 1 and positions.stride(1) != 1:
            positions = positions.contiguous()
        position_stride = positions.stride(0)
    # Kept until the launch is on the stream; from then on torch's allocator hands their memory to later work only.
    vectors = tuple(map(_contiguous, (walk.chain_ids, walk.query_ids, walk.key_ids, walk.log_proposal)))
    index = queries.get_device()
    library(index).walk(
        not walk.is_sweep,
        index,
        _current_stream(index),
        queries.data_ptr(),
        keys.data_ptr(),
        queries.stride(0),
        keys.stride(0),
        dim,
        _DTYPES[queries.dtype],
        _address(positions),
        position_stride,
        n,
        keys.shape[0],
        walk.total_proposals,
        walk.first_proposal,
        walk.num_proposals,
        walk.burn_in,
        walk.num_samples,
        *_number(walk.seed, 64),
        *_number(walk.step, 32),
        *temperatures,
        *map(_address, vectors),
        *step,
        *transition,
    )


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    shape, device = (walk.queries.shape[0], walk.num_samples), walk.queries.device
    threshold = torch.empty(shape, dtype=torch.float32, device=device)
    score = torch.empty(shape, dtype=torch.float32, device=device)
    position = torch.empty(shape, dtype=torch.int64, device=device)
    _run(walk, _NO_STEP, (threshold.data_ptr(), score.data_ptr(), position.data_ptr()))
    return threshold, score, position


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    n, device, empty = walk.queries.shape[0], walk.queries.device, torch.empty
    out = [
        empty((n, walk.num_samples), dtype=torch.int32, device=device),
        empty(n, dtype=torch.int64, device=device),
        empty(n, dtype=torch.float32, device=device),
        empty(n, dtype=torch.float32, device=device),
    ]
    addresses = [tensor.data_ptr() for tensor in out]
    for is_asked_for, dtype in ((return_accepts, torch.int32), (return_lse, torch.float32)):
        if is_asked_for:
            out.append(empty(n, dtype=dtype, device=device))
        addresses.append(out[-1].data_ptr() if is_asked_for else 0)
    incoming = (_contiguous(key), _contiguous(score), _contiguous(key_labels))
    _run(walk, (*map(_address, incoming), *addresses), _NO_TRANSITION)
    return out


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    items = items.contiguous()
    views = torch.empty_like(items)
    index = items.get_device()
    library(index).view_coins(
        index,
        _current_stream(index),
        items.data_ptr(),
        items.numel(),
        *_number(seed, 64),
        *_number(step, 32),
        views.data_ptr(),
    )
    return views
