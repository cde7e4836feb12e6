"""The CPU backend: torch's matrix product for the scores of a tile, the compiled core for the walk over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..params import WalkParams, check_items, check_step
from .build import library
from .tiles import score_tiles

SMALL_SWEEP_MULTIPLIES = 1 << 20  # n * m * d up to which one native call, products included, beats torch's product

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def seed_bits(seed: int | Tensor) -> int:
    return int(seed) & ((1 << 64) - 1)


def step_number(step: int | Tensor) -> int:
    check_step(step)
    return int(step)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _dense(walk: WalkParams) -> WalkParams:
    """The walk with its vectors contiguous, as the core reads them; the caller keeps them alive."""
    names = ("chain_ids", "query_ids", "key_ids", "log_proposal", "positions")
    dense = {name: contiguous(value) for name in names if (value := getattr(walk, name)) is not None}
    if isinstance(walk.temperature, Tensor):
        dense["temperature"] = walk.temperature.contiguous()
    return walk._replace(**dense) if dense else walk


def _recorder(walk: WalkParams, step: tuple[int, ...] = (0,) * 9, transition: tuple[int, ...] = (0,) * 3) -> Any:
    """The walk and where its results go, by address; ``walk`` is dense."""
    per_row = isinstance(walk.temperature, Tensor)
    return library().Recorder(
        walk.queries.shape[0],
        walk.keys.shape[0],
        walk.total_proposals,
        walk.first_proposal,
        walk.num_proposals,
        walk.burn_in,
        walk.num_samples,
        seed_bits(walk.seed),
        step_number(walk.step),
        0.0 if per_row else walk.temperature,
        walk.temperature.data_ptr() if per_row else 0,
        address(walk.chain_ids),
        address(walk.query_ids),
        address(walk.key_ids),
        address(walk.log_proposal),
        torch.get_num_threads(),
        *step,
        *transition,
    )


def _run(walk: WalkParams, recorder: Any) -> None:
    try:
        _walk(walk, recorder)
    except ValueError:  # the core has refused a value, before it did anything
        walk.check_values()  # says which, and where it is
        raise


def _walk(walk: WalkParams, recorder: Any) -> None:
    queries, keys = walk.queries, walk.keys
    n, dim = queries.shape
    if walk.is_sweep and n * keys.shape[0] * dim > SMALL_SWEEP_MULTIPLIES:
        sweep = library().Sweep(recorder)
        for tile in score_tiles(queries, keys):
            sweep.walk(*tile)
        return
    operands = (queries.data_ptr(), keys.data_ptr(), queries.stride(0), keys.stride(0), dim, _DTYPES[queries.dtype])
    if walk.is_sweep:
        library().small_sweep(recorder, *operands)
    else:
        positions = walk.positions
        library().walk_gathered(
            recorder, *operands, address(positions), 0 if positions is None else positions.stride(0)
        )


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    walk = _dense(walk)
    threshold = walk.queries.new_empty(walk.queries.shape[0], walk.num_samples, dtype=torch.float32)
    score, position = torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.int64)
    _run(walk, _recorder(walk, transition=(threshold.data_ptr(), score.data_ptr(), position.data_ptr())))
    return threshold, score, position


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    walk, key, score, key_labels = _dense(walk), contiguous(key), contiguous(score), contiguous(key_labels)
    n = walk.queries.shape[0]
    new = walk.queries.new_empty
    samples, new_key = new(n, walk.num_samples, dtype=torch.int32), new(n, dtype=torch.int64)
    new_score, threshold = new(n, dtype=torch.float32), new(n, dtype=torch.float32)
    accepted = new(n, dtype=torch.int32) if return_accepts else None
    lse = new(n, dtype=torch.float32) if return_lse else None
    out = (samples, new_key, new_score, threshold, accepted, lse)
    _run(walk, _recorder(walk, step=tuple(map(address, (key, score, key_labels, *out)))))
    return [tensor for tensor in out if tensor is not None]


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    items = items.contiguous()
    views = torch.empty_like(items)
    try:
        library().view_coins(items.data_ptr(), items.numel(), seed_bits(seed), step_number(step), views.data_ptr())
    except ValueError:
        check_items(items)
        raise
    return views
