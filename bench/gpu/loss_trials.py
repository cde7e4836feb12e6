"""The smoke stage's trials of EMC2Loss: each part of a step against float64, from what the part before it made.

A step prepares anchors, keys and incoming states, walks, makes a value and its gradient of the samples, and writes
chains and bank. The walk's operands and samples are recorded on their way through ``ops.mh_step``. So the operands are
compared with anchors normalised in float64, the walk with the literal one on those very operands, value and gradients
with autograd in float64 over the negatives that the walk chose, and the stores with what they must hold then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import emc2_kernels as emc2
from bench.gpu.oracle import ROUNDING, Problem, judge_walk, score_error, spread_rows
from bench.gpu.trial import Case, Context, Trial, capture, compare, compare_exactly, compare_rows, merge_cases
from emc2_kernels import ops, rng
from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses import emc2_fused as fused

SEED = 2**64 - 9
TEMPERATURE = 0.35
BURN_IN, MOST_SAMPLES = 0.5, 16  # of EMC2Loss by default
STEPS = 4  # so that items come again: chains are carried, rescored and moved


class Batch(NamedTuple):
    z0: Tensor  # (b, d)
    z1: Tensor
    index: Tensor  # (b,) int64; items may come twice


class Step(NamedTuple):
    """One step of a loss, and what was kept before and after it."""

    batch: Batch
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    arguments: tuple  # of ops.mh_step
    walked: list[Tensor]  # samples, key, score, threshold
    value: Tensor  # ()
    gradients: tuple[Tensor, Tensor]  # of z0 and z1


@contextmanager
def recorded_walks() -> Iterator[list[tuple[tuple, list[Tensor]]]]:
    """Arguments and results of every walk inside."""
    original, seen = ops.mh_step, []

    def recording(*arguments: object) -> list[Tensor]:
        seen.append((arguments, original(*arguments)))
        return seen[-1][1]

    ops.mh_step = recording
    try:
        yield seen
    finally:
        ops.mh_step = original


def batches(b: int, items: int, d: int, dtype: torch.dtype, device: torch.device) -> list[Batch]:
    """Views of items that barely move, of lengths between 1/2 and 2."""
    home, out = spread_rows(2 * items, d, 3).view(items, 2, d), []
    for number in range(STEPS):
        draw = torch.Generator().manual_seed(number)
        index = torch.randint(0, items, (b,), generator=draw)
        z = (home + 0.02 * torch.randn(items, 2, d, generator=draw))[index]
        z = (z * (0.5 + 1.5 * torch.rand(b, 2, 1, generator=draw))).to(dtype).to(device)
        out.append(Batch(z[:, 0].contiguous(), z[:, 1].contiguous(), index.to(device)))
    return out


def snapshot(loss: EMC2Loss) -> dict[str, Tensor]:
    """A copy of its chains, bank and step."""
    return {name: kept.clone() for name, kept in loss.state_dict().items()}


def make_loss(items: int, d: int, backend: str, device: torch.device, sampler: str = "mh") -> EMC2Loss:
    """With defaults but for the seed, whose highest bits count, too."""
    return EMC2Loss(items, d, sampler=sampler, temperature=TEMPERATURE, seed=SEED, backend=backend).to(device)


def check_fused(loss: EMC2Loss, batch: Batch) -> None:
    """Raises where the plain path would be tested in place of the fused kernels."""
    if loss.backend in ("triton", "cuda") and not fused.runs(batch.z0, batch.z1, loss.backend):
        raise RuntimeError("EMC2Loss does not take its fused path here")


def run_steps(items: int, data: list[Batch], backend: str) -> list[Step]:
    """Forward, backward and update of each batch."""
    loss, out = make_loss(items, data[0].z0.shape[1], backend, data[0].z0.device), []
    for batch in data:
        check_fused(loss, batch)
        before = snapshot(loss)
        z0, z1 = batch.z0.clone().requires_grad_(), batch.z1.clone().requires_grad_()
        with recorded_walks() as seen:
            value = loss(z0, z1, batch.index)
        value.backward()
        ((arguments, walked),) = seen
        out.append(Step(batch, before, snapshot(loss), arguments, walked, value.detach(), (z0.grad, z1.grad)))
    return out


class Truth(NamedTuple):
    """A step's anchors in float64, and what was kept for them."""

    leaves: tuple[Tensor, Tensor]  # (b, d) the embeddings, to take the gradient of
    anchors: Tensor  # (2b, d)
    keys: Tensor  # (b, d) the anchors that the view coin proposes
    coins: Tensor  # (b,)
    items: Tensor  # (2b,)
    slots: Tensor  # (2b,) item * 2 + view
    carried: Tensor  # (2b,) the incoming state's key, -1: none
    embedding: Tensor  # (2b, d) the bank's of that key, zeros for none


def make_truth(step: Step) -> Truth:
    """What ``emc2_kernels.losses.emc2`` says that a step is made of."""
    z0, z1 = (z.double().requires_grad_() for z in step.batch[:2])
    stacked = torch.cat((z0, z1))
    anchors, b = stacked / stacked.norm(dim=1, keepdim=True), len(z0)
    coins = rng.view_coin(step.batch.index, seed=SEED, step=step.before["step"])
    items = step.batch.index.repeat(2)
    slots = items * 2 + torch.arange(2 * b, device=items.device) // b
    carried = step.before["chains.key"][slots]
    held = (carried >= 0)[:, None]
    embedding = torch.where(held, step.before["bank.embeddings"][carried.clamp_min(0)].double(), 0)
    keys = torch.where(coins[:, None] == 1, anchors[b:], anchors[:b])
    return Truth((z0, z1), anchors, keys, coins, items, slots, carried, embedding)


def judge_steps(found: list[Step]) -> list[Case]:
    """The cases of all steps, those of one name together."""
    cases = []
    for step in found:
        truth = make_truth(step)
        cases += judge_operands(step, truth) + judge_loss_walk(step, truth)
        cases += judge_gradients(step, truth) + judge_stores(step, truth)
    return merge_cases(cases)


def rounding_error(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a value of size <= 1 may be off that was made in float32 and rounded to a dtype."""
    return values.detach().abs() * torch.finfo(dtype).eps / 2 + 4 * ROUNDING


def judge_operands(step: Step, truth: Truth) -> list[Case]:
    """What the walk was given: anchors, keys and scores within rounding, ids, labels and states exactly."""
    walk, state_key, state_score, key_labels = step.arguments[:4]
    dtype, (b, d) = step.batch.z0.dtype, walk.keys.shape
    rescored = (truth.anchors.detach() * truth.embedding).sum(1) / TEMPERATURE
    expected_score = torch.where(truth.carried >= 0, rescored, step.before["chains.score"][truth.slots].double())
    of_score = score_error(d + 8, TEMPERATURE)  # anchors have rounded three times and their length is a sum
    names = {"chain ids": (walk.chain_ids, truth.slots), "query ids": (walk.query_ids, truth.items)}
    names |= {"key ids": (walk.key_ids, truth.items[:b]), "labels": (key_labels, truth.items[:b] * 2 + truth.coins)}
    return [
        compare("queries", walk.queries, truth.anchors.detach(), rounding_error(truth.anchors, dtype)),
        compare("keys", walk.keys, truth.keys.detach(), rounding_error(truth.keys, dtype)),
        compare("incoming scores", state_score, expected_score, of_score),
        *(compare_exactly("ids and states", *pair) for pair in names.values()),
        compare_exactly("ids and states", state_key, truth.carried),
    ]


def judge_loss_walk(step: Step, truth: Truth) -> list[Case]:
    """From the operands as the walk got them, with the loss's own schedule."""
    walk, b = step.arguments[0], len(truth.keys)
    burn_in = int(BURN_IN * b)
    options = {
        "chain_ids": truth.slots,
        "query_ids": truth.items,
        "key_ids": truth.items[:b],
        "key_labels": truth.items[:b] * 2 + truth.coins,
        "burn_in": burn_in,
        "num_samples": min(MOST_SAMPLES, b - burn_in),
    }
    number, state = int(step.before["step"]), emc2.MHState(*step.arguments[1:3])
    samples, key, score, threshold = step.walked
    result = emc2.MHResult(samples, emc2.MHState(key, score), None, threshold, None)
    return judge_walk("walk", Problem(walk.queries, walk.keys, TEMPERATURE, SEED, number, state, options), result)


def judge_gradients(step: Step, truth: Truth) -> list[Case]:
    """Value, and gradients by the length of a row's error, for the negatives that the walk chose.

    Terms are made of float32 anchors. A row of the gradient adds four vectors of about its own length, one of them a
    sum over the hits of a key, and takes a part of it away again: 4 (d + 64) roundings, and one to the inputs' dtype.
    """
    samples, d = step.walked[0].long(), truth.anchors.shape[1]
    inside = samples >= 0
    left = (~inside).sum(1) * (truth.carried >= 0)
    chosen = (truth.keys[samples.clamp_min(0)] * inside[..., None]).sum(1) + left[:, None] * truth.embedding
    negatives = chosen / (inside.sum(1) + left).clamp_min(1)[:, None]
    positives = truth.anchors.roll(len(truth.keys), 0)
    value = ((truth.anchors * (negatives - positives)).sum(1) / TEMPERATURE).mean()
    expected = torch.autograd.grad(value, truth.leaves)
    dtype = step.batch.z0.dtype
    of_gradient = torch.finfo(dtype).eps / 2 + 4 * (d + 64) * ROUNDING
    of_value = 2 * score_error(d + 8, TEMPERATURE)
    return [
        compare("value", step.value[None], value.detach()[None], of_value),
        *(compare_rows("gradients", *pair, of_gradient) for pair in zip(step.gradients, expected, strict=True)),
    ]


def judge_stores(step: Step, truth: Truth) -> list[Case]:
    """Chains and bank: the last row of each (item, view) wrote its slot, and nothing else has changed."""
    before, after, b = step.before, step.after, len(truth.keys)
    index, number = step.batch.index, torch.arange(b, device=truth.items.device)
    last = torch.full_like(before["chains.key"], -1).scatter_reduce(0, index, number, "amax")
    rows = (last[index] == number).nonzero()[:, 0]
    rows = torch.cat((rows, rows + b))
    slots = truth.slots[rows]
    expected = {name: table.clone() for name, table in before.items()}
    expected["chains.key"][slots], expected["chains.score"][slots] = (field[rows] for field in step.walked[1:3])
    expected["bank.written_at"][slots] = before["step"]
    expected["bank.last_step"], expected["step"] = before["step"], before["step"] + 1
    bank, allowed = before["bank.embeddings"].double(), torch.zeros_like(before["bank.embeddings"]).double()
    bank[slots] = truth.anchors.detach()[rows]
    allowed[slots] = rounding_error(truth.anchors[rows], before["bank.embeddings"].dtype)
    exactly = ("chains.key", "chains.score", "bank.written_at", "bank.last_step", "step")
    return [
        *(compare_exactly("stores", after[name], expected[name]) for name in exactly),
        compare("bank", after["bank.embeddings"], bank, allowed),
    ]


def losses(
    context: Context, backend: str, *, b: tuple[int, int], items: tuple[int, int], d: int, dtype: torch.dtype
) -> Iterator[Trial]:
    """Steps of b pairs; sizes are (on a GPU, in a rehearsal)."""
    b, items = context.choose(*((real, toy) for real, toy in zip(b, items, strict=True)))
    data = batches(b, items, d, dtype, context.device)
    yield Trial(f"b = {b}", partial(run_steps, items, data, backend), judge_steps)


def loss_graphs(context: Context, backend: str, *, sampler: str) -> Iterator[Trial]:
    """Replays of a captured forward and backward, against eager ones, and what they leave in chains and bank."""
    data = batches(32, 64, 128, torch.bfloat16, context.device)
    yield Trial("loss in a graph", partial(loss_replays, data, backend, context, sampler), judge_loss_replays)


def loss_replays(
    data: list[Batch], backend: str, context: Context, sampler: str
) -> list[tuple[tuple[Tensor, ...], ...]]:
    """(replayed, eager) of each step, (value, gradients); at the end of what the losses have kept."""
    eager, loss = (make_loss(64, 128, backend, context.device, sampler) for _ in range(2))
    start = snapshot(loss)
    z0, z1 = (z.clone().requires_grad_() for z in data[0][:2])
    index = data[0].index.clone()

    def advance(loss: EMC2Loss = loss, leaves: tuple = (z0, z1), index: Tensor = index) -> tuple[Tensor, ...]:
        value = loss(*leaves, index)
        return value.detach(), *torch.autograd.grad(value, leaves)

    replay = capture(advance, context)
    loss.load_state_dict(start)  # warming up has advanced it
    out = []
    for batch in data:
        with torch.no_grad():
            for held, new in zip((z0, z1, index), batch, strict=True):
                held.copy_(new)
        leaves = tuple(z.clone().requires_grad_() for z in batch[:2])
        out.append((replay(), advance(eager, leaves, batch.index)))
    kept = [snapshot(loss), snapshot(eager)]
    return [*out, tuple(tuple(kept[i][name] for name in kept[0]) for i in (0, 1))]


def judge_loss_replays(pairs: list[tuple[tuple[Tensor, ...], ...]]) -> list[Case]:
    """Bits of values and gradients, and of what is kept at the end."""
    *steps, kept = pairs
    cases = [compare_exactly("loss replays", *pair) for found in steps for pair in zip(*found, strict=True)]
    return merge_cases([*cases, *(compare_exactly("loss stores", *pair) for pair in zip(*kept, strict=True))])
