"""The smoke stage's trials of EMC2Loss by i-SIR: each step of its few launches against the plain path in float64.

The plain path starts at the state that the step has started at, so that errors do not add up. Which keys the chains
move to is compared where products are made in float32: in half precision rounding decides too many.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.loss_trials import SEED, TEMPERATURE, Batch, batches, rounding_error, snapshot
from bench.gpu.oracle import ROUNDING, score_error
from bench.gpu.trial import Case, Context, Trial, compare, compare_exactly, compare_rows, merge_cases
from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses import emc2_isir_fused as fused

OF_GRADIENT = 0.01  # with products and shares in bfloat16; interpreted, with exact shares, the largest is 0.0021


class Step(NamedTuple):
    """One step of a loss, and what was kept before and after it."""

    batch: Batch
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    value: Tensor  # ()
    gradients: tuple[Tensor, Tensor]  # of z0 and z1


def make_loss(items: int, d: int, backend: str, device: torch.device, decoupled: bool) -> EMC2Loss:
    """With defaults but for the seed, whose highest bits count, too."""
    options = {"temperature": TEMPERATURE, "seed": SEED, "decoupled": decoupled, "backend": backend}
    return EMC2Loss(items, d, **options).to(device)


def visit(loss: EMC2Loss, z0: Tensor, z1: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value and gradients of a step."""
    z0, z1 = z0.clone().requires_grad_(), z1.clone().requires_grad_()
    value = loss(z0, z1, index)
    value.backward()
    return value.detach(), (z0.grad, z1.grad)


def run_steps(items: int, data: list[Batch], backend: str, decoupled: bool) -> list[Step]:
    """Forward, backward and update of each batch."""
    loss, out = make_loss(items, data[0].z0.shape[1], backend, data[0].z0.device, decoupled), []
    for batch in data:
        if backend == "triton" and not (loss._fusable and fused.runs_small(batch.z0, batch.z1, backend)):
            raise RuntimeError("EMC2Loss does not take its fused path here")
        before = snapshot(loss)
        value, gradients = visit(loss, *batch)
        out.append(Step(batch, before, snapshot(loss), value, gradients))
    return out


def judge_steps(items: int, decoupled: bool, found: list[Step]) -> list[Case]:
    """The cases of all steps, those of one name together."""
    z0 = found[0].batch.z0
    exact = make_loss(items, z0.shape[1], "reference", z0.device, decoupled)
    cases = []
    for step in found:
        exact.load_state_dict(step.before)
        truth = visit(exact, step.batch.z0.double(), step.batch.z1.double(), step.batch.index)
        cases += judge_loss(step, *truth) + judge_kept(step, snapshot(exact))
    prefix = "" if decoupled else "coupled "
    return [replace(case, case=prefix + case.case) for case in merge_cases(cases)]


def judge_loss(step: Step, value: Tensor, gradients: tuple[Tensor, Tensor]) -> list[Case]:
    """A row of the gradient adds some hundred vectors, as in ``loss_trials``."""
    dtype, d = step.batch.z0.dtype, step.batch.z0.shape[1]
    single = dtype == torch.float32
    of_value = 2 * score_error(d + 8, TEMPERATURE) if single else torch.finfo(dtype).eps / (8 * TEMPERATURE)
    of_gradient = 2 * (d + 64) * ROUNDING if single else OF_GRADIENT
    return [
        compare("value", step.value[None], value[None], of_value),
        *(compare_rows("gradients", *pair, of_gradient) for pair in zip(step.gradients, gradients, strict=True)),
    ]


def judge_kept(step: Step, expected: dict[str, Tensor]) -> list[Case]:
    """All that is in the state; of chains in half precision only which of them have started."""
    after, single, d = step.after, step.batch.z0.dtype == torch.float32, step.batch.z0.shape[1]
    bank = expected["bank.embeddings"].double()
    sums = (d + 8) * ROUNDING * len(step.batch.index)
    cases = [
        *(compare_exactly("stores", after[name], expected[name]) for name in ("bank.written_at", "bank.last_step")),
        *(compare_exactly("stores", after[name], expected[name]) for name in ("recent.items", "step")),
        compare("bank", after["bank.embeddings"], bank, 2 * rounding_error(bank, after["bank.embeddings"].dtype)),
        compare("drift", after["drift.sums"], expected["drift.sums"].double(), sums),
        compare_exactly("started", after["chains.key"] >= 0, expected["chains.key"] >= 0),
    ]
    if not single:
        return cases
    of_score = score_error(d + 8, TEMPERATURE) + 64 * ROUNDING  # a score that is noise less noise again
    return [
        *cases,
        compare_exactly("chains", after["chains.key"], expected["chains.key"]),
        compare("scores", after["chains.score"], expected["chains.score"].double(), of_score),
    ]


def losses(
    context: Context, backend: str, *, b: tuple[int, int], items: tuple[int, int], d: int, dtype: torch.dtype
) -> Iterator[Trial]:
    """Steps of b pairs; sizes are (on a GPU, in a rehearsal)."""
    b, items = context.choose(*((real, toy) for real, toy in zip(b, items, strict=True)))
    data = batches(b, items, d, dtype, context.device)
    for decoupled in (True, False):
        name = f"i-SIR, b = {b}, {'de' if decoupled else ''}coupled"
        yield Trial(name, partial(run_steps, items, data, backend, decoupled), partial(judge_steps, items, decoupled))
