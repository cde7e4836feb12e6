"""The CPU backend: the compiled core, scores included."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import kernel_calls
from ..kernel_calls import Number
from ..params import WalkParams, check_items, check_step
from .build import library


def seed_number(seed: int | Tensor) -> Number:
    return int(seed) & ((1 << 64) - 1), 0


def step_number(step: int | Tensor) -> Number:
    check_step(step)
    return int(step), 0


def _run(core: ModuleType, walk: WalkParams, *input_and_outputs: Any) -> None:
    threads = torch.get_num_threads()
    params = kernel_calls.walk_params(core, walk, seed_number(walk.seed), step_number(walk.step), threads)
    run = core.walk_sweep if walk.is_sweep else core.walk_gathered
    try:
        run(params, kernel_calls.operands(core, walk.queries, walk.keys), *input_and_outputs)
    except ValueError:  # the core has refused a value, before it did anything
        walk.check_values()  # says which, and where it is
        raise


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    return kernel_calls.transition(library(), _run, walk)


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    return kernel_calls.step(library(), _run, walk, key, score, key_labels, return_accepts, return_lse)


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    items, core = items.contiguous(), library()
    views = torch.empty_like(items)
    streams = kernel_calls.stream_params(core, seed_number(seed), step_number(step), items)
    try:
        core.view_coins(streams, items.numel(), views.data_ptr())
    except ValueError:
        check_items(items)
        raise
    return views
