"""The CPU backend: torch's matrix product for the scores of a tile, the compiled core for the walk over it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import kernel_calls
from ..kernel_calls import Number
from ..params import WalkParams, check_items, check_step
from .build import library
from .tiles import score_tiles

SMALL_SWEEP_MULTIPLIES = 1 << 20  # n * m * d up to which one native call, products included, beats torch's product


def seed_number(seed: int | Tensor) -> Number:
    return int(seed) & ((1 << 64) - 1), 0


def step_number(step: int | Tensor) -> Number:
    check_step(step)
    return int(step), 0


def _run(core: ModuleType, walk: WalkParams, *input_and_outputs: Any) -> None:
    threads = torch.get_num_threads()
    params = kernel_calls.walk_params(core, walk, seed_number(walk.seed), step_number(walk.step), threads)
    try:
        _walk(core, walk, params, input_and_outputs)
    except ValueError:  # the core has refused a value, before it did anything
        walk.check_values()  # says which, and where it is
        raise


def _walk(core: ModuleType, walk: WalkParams, params: Any, input_and_outputs: tuple) -> None:
    queries, keys = walk.queries, walk.keys
    n, dim = queries.shape
    if not walk.is_sweep:
        core.walk_gathered(params, kernel_calls.operands(core, walk), *input_and_outputs)
    elif n * keys.shape[0] * dim <= SMALL_SWEEP_MULTIPLIES:
        core.walk_small_sweep(params, kernel_calls.operands(core, walk), *input_and_outputs)
    else:
        sweep = core.Sweep(params, *input_and_outputs)
        for tile in score_tiles(queries, keys):
            sweep.walk(*tile)


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
