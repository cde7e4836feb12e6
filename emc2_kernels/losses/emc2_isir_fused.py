"""``EMC2Loss(sampler="isir")`` on a small batch on a GPU: five launches forward (gather, gate, the step over all
candidates, a mean, update) and one backward.

The plain path, ``emc2_isir.py``, says what is computed; this one computes the same, on the same random numbers, but for
rounding: it takes the batch's keys and the queue's in one step, where the plain path takes two. Nothing here waits for
the device.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops
from ..autograd import differentiable, no_double_backward
from ..backends.params import CarriedParams, ScoreParams
from ..distributed.keys import LocalKeys
from ..isir import Drawn
from ..stores.bank import EmbeddingBank
from ..stores.chains import ChainStore
from ..stores.queue import ItemQueue
from ..transition import MHState
from .anchors import NORM_FLOOR, SHRINKS
from .emc2_fused import runs
from .emc2_isir import NO_SECOND_DERIVATIVE, Carried, Kept, Resampled, Side
from .emc2_sampler import WalkOptions
from .staleness import MAX_STALENESS, MEMORY, Staleness

if TYPE_CHECKING:
    from ..backends.triton import isir_loss

# Up to here one program sums a batch, and each of a gradient's programs goes through all keys, in less time than the
# plain path's launches take the host (expected, not measured). Rows of more elements would not fit into registers.
MAX_PAIRS, MAX_DIM, MAX_QUEUE = 1024, 512, 128


class Stores(NamedTuple):
    """What the loss keeps."""

    chains: ChainStore
    bank: EmbeddingBank
    drift: Staleness
    recent: ItemQueue | None


class Made(NamedTuple):
    """A value, and what statistics are made of."""

    value: Tensor  # () differentiable
    candidates: isir_loss.Candidates
    drawn: Drawn


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Imported when first used: importing this package must not import Triton."""
    return tuple(import_module(f"..backends.triton.{name}", __package__) for name in ("isir_loss", "emc2_loss"))


def accepts(views: str, queue: int, normalize: bool, backend: str) -> bool:
    """Whether a loss with these options, no gathering and one modality can make its calls here."""
    return views == "both" and normalize and queue <= MAX_QUEUE and backend != "cuda"  # which has no such step


def runs_small(z0: Tensor, z1: Tensor, backend: str) -> bool:
    """Whether a call on these embeddings, checked already, can be made here; see ``emc2_fused.runs``."""
    return z0.shape[0] <= MAX_PAIRS and z0.shape[1] <= MAX_DIM and runs(z0, z1, backend)


def loss(
    z0: Tensor, z1: Tensor, index: Tensor, stores: Stores, options: WalkOptions, decoupled: bool, training: bool
) -> Made:
    """The forward pass of ``EMC2Loss`` on checked arguments, with sampler="isir", both views, carry="cached" and
    normalised embeddings; in training the stores and ``options.step`` move on."""
    kernels, shared = _kernels()
    chains, bank, drift, recent = stores
    queue = None if recent is None else recent.items
    tables = shared.Stores(chains.key, chains.score, bank.embeddings, bank.written_at, bank.last_step, options.step)
    candidates = kernels.gather_candidates(
        z0,
        z1,
        index.to(z0.device, non_blocking=True),
        tables,
        queue,
        temperature=options.temperature,
        floor=NORM_FLOOR,
        shrinks=SHRINKS[torch.float32],
        dtype=options.dtype,
    )
    kernels.gate_candidates(
        candidates, drift.sums, temperature=options.temperature, memory=MEMORY, max_staleness=MAX_STALENESS
    )
    drawn = _draw(candidates, options)
    kept = {"sums": drift.sums, "queue": queue} if training else {"sums": None, "queue": None}
    made = kernels.mean_loss(candidates, drawn.lse, temperature=options.temperature, decoupled=decoupled, **kept)
    if training:
        shared.update_stores(candidates, drawn.key, drawn.score, tables, candidates.totals)
    held = _Held(candidates, made, options.temperature)
    return Made(_Backward.apply(z0, z1, held), candidates, drawn)


def _draw(candidates: isir_loss.Candidates, options: WalkOptions) -> Drawn:
    """Of the batch's keys and the queue's together: their numbers go on from one to the other."""
    n = candidates.anchors.shape[0]
    scores = ScoreParams(
        candidates.keys[:n], candidates.keys, options.temperature, candidates.items[:n], candidates.items, False,
        candidates.carried_items, candidates.log_proposal,
    )  # fmt: skip
    carried = CarriedParams(
        candidates.carried_labels, candidates.carried_scores, candidates.labels, candidates.labels[:n], options.seed,
        options.step, 0,
    )  # fmt: skip
    return Drawn(*ops.isir_step(scores, carried, options.backend))


def as_plain(made: Made, temperature: float) -> tuple[Resampled, Kept]:
    """As the plain path has it, for its statistics."""
    candidates, drawn = made.candidates, made.drawn
    n = candidates.anchors.shape[0]
    keys = LocalKeys(candidates.keys, candidates.items, candidates.labels, candidates.log_proposal)
    batch, queue = (LocalKeys(*(None if f is None else f[part] for f in keys)) for part in (slice(n), slice(n, None)))
    batch, queue = batch._replace(log_proposal=None), None if candidates.queue_items is None else queue
    side = Side(batch.embeddings, batch.items, candidates.carried_items, batch, queue, among=True)
    scores = candidates.carried_scores
    similarity = torch.where(scores > -torch.inf, scores * temperature, 0)
    carried = Carried(candidates.carried_labels, candidates.carried_items, candidates.carried, similarity, scores)
    resampled = Resampled(drawn.lse, MHState(drawn.key, drawn.score), drawn.position, [side])
    return resampled, Kept(carried, candidates.pairs[0], queue, candidates.totals[1:])


class _Held(NamedTuple):
    """What the backward pass is made of."""

    candidates: isir_loss.Candidates
    made: isir_loss.Loss
    temperature: float


# Of ``Candidates``, what the backward pass has no use for.
_UNUSED = dict.fromkeys(("labels", "carried_labels", "pairs", "totals", "now", "queue_items"))


class _Backward(torch.autograd.Function):
    """Hangs the gradient on a value that has been computed already."""

    @staticmethod
    def forward(ctx: FunctionCtx, z0: Tensor, z1: Tensor, held: _Held) -> Tensor:
        candidates, made = held.candidates._replace(**_UNUSED), held.made
        ctx.save_for_backward(*differentiable(ctx, z0, z1), *candidates, made.levels, made.pulls)
        ctx.kinds, ctx.temperature, ctx.dtype = (type(candidates), type(made)), held.temperature, z0.dtype
        return made.value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z0, z1, *saved, levels, pulls = ctx.saved_tensors
        kind, loss_kind = ctx.kinds
        gradients = _kernels()[0].embedding_gradients(
            grad.detach(),
            kind(*saved),
            loss_kind(None, levels, pulls),
            temperature=ctx.temperature,
            floor=NORM_FLOOR,
            dtype=ctx.dtype,
        )
        return *no_double_backward(NO_SECOND_DERIVATIVE, *gradients, of=(grad, z0, z1)), None
