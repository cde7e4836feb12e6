"""How the compiled kernels are called: sizes, addresses and strides in the structs of csrc/params.h.

``core`` is a compiled module. Its structs have keyword constructors, and hold no tensors: whoever makes one keeps the
tensors until the kernels have run or, on a GPU, are on the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .params import ScoreParams, WalkParams

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Params = TypeVar("Params", ScoreParams, WalkParams)
Number = tuple[int, int]  # a number, or 0 and the address of one that only the device reads


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def contiguous_walk(walk: WalkParams) -> WalkParams:
    """The walk with its vectors contiguous, and positions beside one another in a row, as the kernels read them."""
    positions = walk.positions
    if positions is not None and positions.shape[1] > 1 and positions.stride(1) != 1:
        walk = walk._replace(positions=positions.contiguous())
    return _with_contiguous(walk, ("chain_ids", "query_ids", "key_ids", "log_proposal"))


def contiguous_scores(scores: ScoreParams) -> ScoreParams:
    """The scores with their vectors contiguous, as the kernels read them."""
    return _with_contiguous(scores, ("query_ids", "key_ids", "carried_ids", "log_proposal"))


def _with_contiguous(params: Params, names: tuple[str, ...]) -> Params:
    copies = {}
    for name in names:
        vector = getattr(params, name)
        if vector is not None and not vector.is_contiguous():
            copies[name] = vector.contiguous()
    return params._replace(**copies) if copies else params


def score_fields(scores: ScoreParams | WalkParams) -> dict[str, Any]:
    """All of csrc's ScoreParams; the vectors are contiguous."""
    temperature = scores.temperature
    per_row = isinstance(temperature, Tensor)
    return {
        "num_rows": scores.queries.shape[0],
        "num_keys": scores.keys.shape[0],
        "temperature": 0.0 if per_row else temperature,
        "temperatures": temperature.data_ptr() if per_row else 0,
        "temperature_stride": temperature.stride(0) if per_row else 0,
        "query_ids": address(scores.query_ids),
        "key_ids": address(scores.key_ids),
        "carried_ids": address(scores.carried_ids) if isinstance(scores, ScoreParams) else 0,  # a walk has none
        "log_proposal": address(scores.log_proposal),
    }


def operands(core: ModuleType, queries: Tensor, keys: Tensor) -> Any:
    return core.Operands(
        queries=queries.data_ptr(),
        keys=keys.data_ptr(),
        query_stride=queries.stride(0),
        key_stride=keys.stride(0),
        dim=queries.shape[1],
        dtype=_DTYPES[queries.dtype],
    )


def walk_params(core: ModuleType, walk: WalkParams, seed: Number, step: Number, num_threads: int = 0) -> Any:
    """``walk`` is contiguous."""
    positions = walk.positions
    return core.WalkParams(
        **score_fields(walk),
        seed=seed[0],
        seed_address=seed[1],
        step=step[0],
        step_address=step[1],
        chain_ids=address(walk.chain_ids),
        total_proposals=walk.total_proposals,
        first_proposal=walk.first_proposal,
        num_proposals=walk.num_proposals,
        burn_in=walk.burn_in,
        num_samples=walk.num_samples,
        positions=address(positions),
        position_stride=0 if positions is None else positions.stride(0),
        num_threads=num_threads,
    )


def stream_params(core: ModuleType, seed: Number, step: Number, chain_ids: Tensor) -> Any:
    return core.StreamParams(
        seed=seed[0], seed_address=seed[1], step=step[0], step_address=step[1], chain_ids=chain_ids.data_ptr()
    )


def step(
    core: ModuleType,
    run: Callable[..., None],
    walk: WalkParams,
    key: Tensor,
    score: Tensor,
    key_labels: Tensor | None,
    return_accepts: bool,
    return_lse: bool,
) -> list[Tensor]:
    """A backend's ``step``; ``run`` is called with core, walk, input, step output and transition output."""
    walk, key, score, key_labels = contiguous_walk(walk), contiguous(key), contiguous(score), contiguous(key_labels)
    n, device, empty = walk.queries.shape[0], walk.queries.device, torch.empty
    samples = empty(n, walk.num_samples, dtype=torch.int32, device=device)
    new_key = empty(n, dtype=torch.int64, device=device)
    new_score = empty(n, dtype=torch.float32, device=device)
    threshold = empty(n, dtype=torch.float32, device=device)
    accepted = empty(n, dtype=torch.int32, device=device) if return_accepts else None
    lse = empty(n, dtype=torch.float32, device=device) if return_lse else None
    given = core.StepInput(key=key.data_ptr(), score=score.data_ptr(), key_labels=address(key_labels))
    output = core.StepOutput(
        samples=samples.data_ptr(),
        key=new_key.data_ptr(),
        score=new_score.data_ptr(),
        threshold=threshold.data_ptr(),
        accepted=address(accepted),
        lse=address(lse),
    )
    run(core, walk, given, output, None)
    return [tensor for tensor in (samples, new_key, new_score, threshold, accepted, lse) if tensor is not None]


def transition(core: ModuleType, run: Callable[..., None], walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's ``transition``; ``run`` as for ``step``."""
    walk = contiguous_walk(walk)
    queries = walk.queries
    threshold = torch.empty(queries.shape[0], walk.num_samples, dtype=torch.float32, device=queries.device)
    score, position = torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.int64)
    output = core.TransitionOutput(threshold=threshold.data_ptr(), score=score.data_ptr(), position=position.data_ptr())
    run(core, walk, None, None, output)
    return threshold, score, position
