"""A step of iterated sampling importance resampling on the CPU: the compiled core, scores included."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel_calls import address, contiguous, contiguous_scores, operands, score_fields
from ..params import CarriedParams, ScoreParams
from .build import library
from .mh import seed_number, step_number


def isir_step(scores: ScoreParams, carried: CarriedParams) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Position, key, score, log-sum-exp and value (n,) of the next states; see ``reference_isir``."""
    n, num_carried = carried.key.shape
    position, score = (torch.empty(n, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float32))
    key, lse = torch.empty_like(position), torch.empty_like(score)
    value = torch.empty(n, dtype=torch.float64, device="cpu")
    scores = contiguous_scores(scores)
    chain_ids, key_labels = contiguous(carried.chain_ids), contiguous(carried.key_labels)
    own_key, own_score = carried.key.contiguous(), carried.score.contiguous()
    (seed_value, _), (step_value, _) = seed_number(carried.seed), step_number(carried.step)
    core = library()
    params = core.IsirParams(
        **score_fields(scores),
        seed=seed_value,
        seed_address=0,
        step=step_value,
        step_address=0,
        chain_ids=address(chain_ids),
        num_carried=num_carried,
        carried_key=own_key.data_ptr(),
        carried_score=own_score.data_ptr(),
        key_labels=address(key_labels),
        first_key=carried.first_key,
        position=position.data_ptr(),
        key=key.data_ptr(),
        score=score.data_ptr(),
        lse=lse.data_ptr(),
        value=value.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    try:
        core.isir_step(params, operands(core, scores.queries, scores.keys))
    except ValueError:  # the core has refused a value
        carried.check_values(scores)  # says which, and where it is
        raise
    return position, key, score, lse, value
