"""One walk on the GPU: room for what the launches leave each other, the launches, and the results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..params import WalkParams, check_items, check_step
from . import proposals, scores, sweep, tuning
from .epilogue import close_kernel
from .gathered import gathered_kernel
from .launch import (
    Arguments,
    Kernel,
    dense,
    dimensions,
    on_device,
    power_of_two,
    precision,
    random_arguments,
    transitions,
    walk_arguments,
)
from .transition import room_for
from .view_coin import coin_kernel

SWEEP_KERNEL = Kernel(sweep.sweep_kernel)
GATHERED_KERNEL = Kernel(gathered_kernel)
CLOSE_KERNEL = Kernel(close_kernel)
COIN_KERNEL = Kernel(coin_kernel)

SWEEP, DRAWN, GIVEN = proposals.SWEEP.value, proposals.DRAWN.value, proposals.GIVEN.value
WALK, RECORD, REPLAY, COUNT = sweep.WALK.value, sweep.RECORD.value, sweep.REPLAY.value, sweep.COUNT.value
SEGMENTS, STEPS, TILE = scores.SEGMENTS.value, scores.STEPS.value, scores.TILE.value

# What the last launch of a walk writes, and others need not be compiled for.
RESULTS = (
    "state_key_ptr", "state_score_ptr", "labels_ptr", "samples_ptr", "out_key_ptr",
    "out_threshold_ptr", "out_score_ptr", "out_position_ptr",
)  # fmt: skip

COIN_BLOCK = 256
CLOSE_ELEMENTS = 1024  # transitions that a program of the close holds at a time
BLOCK_R = 16  # samples that the end of a walk handles at a time


class Plan(NamedTuple):
    """A kernel for a walk, how the proposals are cut into programs, and the launches that this takes."""

    kernel: Kernel
    kind: int
    grid: tuple[int, int, int]
    arguments: Arguments
    options: Arguments
    splits: int
    split_length: int  # proposals
    lead: int  # by which the first split starts before the first proposal
    segments: int  # of a split, each walked from the identity; 0: the split is one itself
    launches: tuple[Arguments, ...]  # what differs between those that make the transitions
    count: Arguments  # the same of one that counts accepted proposals, of walks that are split


def _plan_sweep(walk: WalkParams, wants_lse: bool) -> Plan:
    (n, d), m = walk.queries.shape, walk.keys.shape[0]
    generation, processors = tuning.device(walk.queries.device.index or 0)
    chosen = tuning.sweep(generation, walk.queries.dtype != torch.float32, d, n)
    blocks, lead = -(-n // chosen.block_m), walk.first_proposal % 4
    splits = tuning.splits(blocks, -(-(m + lead) // TILE), processors)
    segment_length = STEPS * max(1, -(-(m + lead) // (splits * TILE)))
    arguments = {
        "segment_length": segment_length,
        "lse_parts_ptr": walk.queries.new_empty(n, splits, 2, dtype=torch.float32)
        if wants_lse and splits > 1
        else None,
        "BLOCK_M": chosen.block_m,
        **dimensions(d, chosen.block_d),
        "PRECISION": precision(walk.queries.dtype),
    }
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.max_registers}
    launches: tuple[Arguments, ...] = ({"MODE": RECORD},)
    kept, proposals = walk.total_proposals - walk.burn_in, SEGMENTS * segment_length
    samples = min(walk.num_samples, -(-walk.num_samples * proposals // max(kept, 1)))  # of a program, at most
    if not tuning.records_on_the_way(segment_length // STEPS, samples):
        launches = {"MODE": WALK, **dict.fromkeys(RESULTS)}, {"MODE": REPLAY, "lse_ptr": None}
    return Plan(
        SWEEP_KERNEL, SWEEP, (blocks, splits, 1), arguments, options, splits, proposals, lead, SEGMENTS,
        launches, {"MODE": COUNT, "lse_ptr": None},
    )  # fmt: skip


def _plan_gathered(walk: WalkParams) -> Plan:
    n, d = walk.queries.shape
    generation, processors = tuning.device(walk.queries.device.index or 0)
    chosen = tuning.gathered(generation)
    blocks = -(-walk.num_proposals // chosen.block_k)
    splits = tuning.splits(n, blocks, tuning.GATHERED_PROGRAMS * processors)
    length = chosen.block_k * max(1, -(-blocks // splits))
    arguments = {
        "split_length": length,
        "BLOCK_K": chosen.block_k,
        **dimensions(d, chosen.block_d),
    }
    kind = DRAWN if walk.positions is None else GIVEN
    return Plan(
        GATHERED_KERNEL, kind, (n, splits, 1), arguments, {"num_warps": chosen.num_warps}, splits, length, 0, 0,
        ({"RECORD": True},), {"RECORD": False},
    )  # fmt: skip


def run(walk: WalkParams, outputs: Arguments) -> None:
    """Launches a walk; ``outputs`` are the tensors of a step or of a transition, by the kernels' names for them."""
    n = walk.queries.shape[0]
    if walk.queries.is_cpu:  # the interpreter's
        walk.check_values()
    if n == 0:
        return
    plan = _plan_sweep(walk, outputs["lse_ptr"] is not None) if walk.is_sweep else _plan_gathered(walk)
    split = plan.splits > 1
    arguments = (
        walk_arguments(walk)
        | plan.arguments
        | outputs
        | {
            "KIND": plan.kind,
            "SPLIT": split,
            "BLOCK_R": BLOCK_R,
            "scratch_ptr": transitions(walk.queries, room_for(n, plan.splits, walk.num_samples, plan.segments)),
        }
    )
    counts_apart = split or walk.is_sweep  # the state in which a chain enters a segment is known after a first launch
    first = arguments | {"accepted_ptr": None} if counts_apart else arguments
    for launch in plan.launches:
        plan.kernel(plan.grid, first | launch, plan.options)
    if split:
        _close(walk, plan, arguments)
    if counts_apart and outputs["accepted_ptr"] is not None:
        plan.kernel(plan.grid, arguments | plan.count, plan.options)


def _close(walk: WalkParams, plan: Plan, arguments: Arguments) -> None:
    width = power_of_two(plan.splits + 1)
    rows = max(1, CLOSE_ELEMENTS // max(width, BLOCK_R))
    own = {
        "splits": plan.splits,
        "split_length": plan.split_length,
        "lead": plan.lead,
        "lse_parts_ptr": arguments.get("lse_parts_ptr"),
        "WIDTH": width,
        "BLOCK_M": rows,
    }
    CLOSE_KERNEL((-(-walk.queries.shape[0] // rows), 1, 1), arguments | own, {"num_warps": 4})


_STEP = ("state_key_ptr", "state_score_ptr", "labels_ptr", "samples_ptr", "out_key_ptr", "accepted_ptr", "lse_ptr")


def transition(walk: WalkParams) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, score and position of the prefixes at the sample points, (n, R) each."""
    threshold = walk.queries.new_empty(walk.queries.shape[0], walk.num_samples, dtype=torch.float32)
    score, position = torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.int64)
    outputs = {"out_threshold_ptr": threshold, "out_score_ptr": score, "out_position_ptr": position}
    with on_device(walk.queries):
        run(walk, dict.fromkeys(_STEP) | outputs)
    return threshold, score, position


def step(
    walk: WalkParams, key: Tensor, score: Tensor, key_labels: Tensor | None, return_accepts: bool, return_lse: bool
) -> list[Tensor]:
    """[samples, key, score, threshold], then accepted and lse if asked for; see ``emc2_kernels.mh_step``."""
    n, new = walk.queries.shape[0], walk.queries.new_empty
    samples, new_key = new(n, walk.num_samples, dtype=torch.int32), new(n, dtype=torch.int64)
    new_score, threshold = new(n, dtype=torch.float32), new(n, dtype=torch.float32)
    accepted = walk.queries.new_zeros(n, dtype=torch.int32) if return_accepts else None  # added to
    lse = new(n, dtype=torch.float32) if return_lse else None
    outputs = {
        "state_key_ptr": dense(key),
        "state_score_ptr": dense(score),
        "labels_ptr": dense(key_labels),
        "samples_ptr": samples,
        "out_key_ptr": new_key,
        "out_score_ptr": new_score,
        "out_threshold_ptr": threshold,
        "out_position_ptr": None,
        "accepted_ptr": accepted,
        "lse_ptr": lse,
    }
    with on_device(walk.queries):
        run(walk, outputs)
    return [tensor for tensor in (samples, new_key, new_score, threshold, accepted, lse) if tensor is not None]


def view_coin(items: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """(b,) int64 of 0 and 1; see ``emc2_kernels.rng.view_coin``."""
    if items.is_cpu:  # the interpreter's
        check_items(items)
        check_step(step)
    items = items.contiguous()
    coins = torch.empty_like(items)
    arguments = random_arguments(seed, step)
    arguments |= {"items_ptr": items, "coins_ptr": coins, "count": items.numel(), "BLOCK": COIN_BLOCK}
    with on_device(items):
        COIN_KERNEL((-(-items.numel() // COIN_BLOCK), 1, 1), arguments, {"num_warps": 4})
    return coins
