"""Walks on the GPU: the tensors of a step or of a transition, and the launches that fill them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..params import WalkParams
from .gathered import launch_gathered
from .launch import Arguments, dense, device_guard
from .sweep import launch_sweep
from .view_coin import view_coin

__all__ = ["step", "transition", "view_coin"]


def _launch(walk: WalkParams, outputs: Arguments) -> None:
    if walk.queries.is_cpu:  # the interpreter's
        walk.check_values()
    if walk.queries.shape[0] == 0:
        return
    with device_guard(walk.queries):
        (launch_sweep if walk.is_sweep else launch_gathered)(walk, outputs)


_STEP_ONLY = ("state_key_ptr", "state_score_ptr", "labels_ptr", "samples_ptr", "out_key_ptr", "accepted_ptr", "lse_ptr")


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    threshold = walk.queries.new_empty(walk.queries.shape[0], walk.num_samples, dtype=torch.float32)
    score, position = torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.int64)
    outputs = {"out_threshold_ptr": threshold, "out_score_ptr": score, "out_position_ptr": position}
    _launch(walk, dict.fromkeys(_STEP_ONLY) | outputs)
    return threshold, score, position


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    n, new = walk.queries.shape[0], walk.queries.new_empty
    key, score = dense(key), dense(score)
    samples, new_key = new(n, walk.num_samples, dtype=torch.int32), torch.empty_like(key)
    new_score, threshold = torch.empty_like(score), torch.empty_like(score)
    accepted = walk.queries.new_zeros(n, dtype=torch.int32) if return_accepts else None  # added to
    lse = new(n, dtype=torch.float32) if return_lse else None
    outputs = {
        "state_key_ptr": key,
        "state_score_ptr": score,
        "labels_ptr": dense(key_labels),
        "samples_ptr": samples,
        "out_key_ptr": new_key,
        "out_score_ptr": new_score,
        "out_threshold_ptr": threshold,
        "out_position_ptr": None,
        "accepted_ptr": accepted,
        "lse_ptr": lse,
    }
    _launch(walk, outputs)
    return [tensor for tensor in (samples, new_key, new_score, threshold, accepted, lse) if tensor is not None]
