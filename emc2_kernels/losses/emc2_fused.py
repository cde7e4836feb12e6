"""``EMC2Loss`` on a GPU: five launches forward (gather, walk, mean negatives, a mean, update) and one backward.

A walk that is long, or split over the GPU, is two.

The plain path in ``emc2.py`` says what is computed; this one computes the same, on the same random numbers. At batch 32
nearly all of the plain path's time is that of starting some 200 small kernels. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import checks, ops
from ..autograd import differentiable, no_double_backward
from ..backends import HALF_AND_SINGLE, gpu
from ..backends.params import WalkParams
from ..stores.bank import EmbeddingBank
from ..stores.chains import ChainStore
from ..stores.table import last_duplicates
from ..transition import MHResult, MHState
from .anchors import NORM_FLOOR, SHRINKS
from .emc2_sampler import WalkOptions

if TYPE_CHECKING:
    from ..backends.triton import emc2_loss

NO_SECOND_DERIVATIVE = 'EMC2Loss has no second derivative on this backend: use backend="reference"'


class Surrogate(NamedTuple):
    """The value, and what statistics are made of."""

    value: Tensor  # () differentiable
    batch: emc2_loss.Batch
    result: MHResult
    negative_similarity: Tensor | None  # (2b,) if asked for


@cache
def _triton_runs() -> bool:
    return gpu.why_no_triton() is None


@cache
def _kernels() -> ModuleType:
    """Imported when first used: importing this package must not import Triton."""
    return import_module("..backends.triton.emc2_loss", __package__)


def runs(z0: Tensor, z1: Tensor, backend: str) -> bool:
    """Whether a call on these embeddings, checked already, can be made here.

    Not where torch needs to see every operation: Inductor fuses the plain path by itself, and modes, transforms and
    subclasses of tensors have their own idea of an operation.
    """
    if z0.is_cuda:
        chosen = backend in ("auto", "triton", "cuda")
    else:  # the interpreter, for tests
        chosen = z0.is_cpu and backend == "triton" and gpu.interpreting()
    return (
        chosen
        and z0.dtype in HALF_AND_SINGLE
        and all(type(z) in (Tensor, torch.nn.Parameter) for z in (z0, z1))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _triton_runs()
    )


def surrogate(
    z0: Tensor,
    z1: Tensor,
    index: Tensor,
    chains: ChainStore,
    bank: EmbeddingBank,
    options: WalkOptions,
    normalize: bool,
    training: bool,
) -> Surrogate:
    """The forward pass of ``EMC2Loss`` on checked arguments, with proposals from the batch and carry="cached"; in
    training the stores and ``options.step`` move on."""
    kernels, floor = _kernels(), NORM_FLOOR if normalize else None
    stores = kernels.Stores(chains.key, chains.score, bank.embeddings, bank.written_at, bank.last_step, options.step)
    batch = kernels.gather_batch(
        z0,
        z1,
        index.to(z0.device, non_blocking=True),
        stores,
        temperature=options.temperature,
        seed=options.seed,
        floor=floor,
        shrinks=SHRINKS[torch.float32],
        both_views=options.views == "both",
        dtype=options.dtype,
    )
    result = _walk(batch, options)
    made = kernels.mean_negatives(
        batch,
        result.samples,
        stores.bank,
        temperature=options.temperature,
        return_similarity=options.return_accepts,
    )
    value = made.terms.mean()
    if not normalize:  # unit vectors cannot overflow
        checks.finite("the similarities of z0 and z1", value)
    if training:
        items = batch.items[: z0.shape[0]]
        last = last_duplicates(items) if len(items) > kernels.SCAN_ROWS else None
        kernels.update_stores(batch, *result.state, stores, value, last)
    held = _Held(value, batch, result.samples, made, options.temperature, floor)
    return Surrogate(_Backward.apply(z0, z1, held), batch, result, made.similarity)


def _walk(batch: emc2_loss.Batch, options: WalkOptions) -> MHResult:
    m = batch.keys.shape[0]
    burn_in, num_samples = options.schedule(m)
    key_items = batch.items[:m]  # view 0 of the anchors first: the items in the batch's order
    walk = WalkParams(
        batch.queries, batch.keys, options.temperature, options.seed, options.step, batch.chain_ids, batch.items,
        key_items, None, None, None, burn_in, num_samples, 0, m,
    )  # fmt: skip
    samples, key, score, threshold, *accepted = ops.mh_step(
        walk, batch.state_key, batch.state_score, batch.key_labels, options.return_accepts, False, options.backend
    )
    return MHResult(samples, MHState(key, score), accepted[0] if accepted else None, threshold, None)


class _Held(NamedTuple):
    """What the backward pass is made of."""

    value: Tensor
    batch: emc2_loss.Batch
    samples: Tensor
    made: emc2_loss.Negatives
    temperature: float
    floor: float | None


class _Backward(torch.autograd.Function):
    """Hangs the gradient on a value that has been computed already."""

    @staticmethod
    def forward(ctx: FunctionCtx, z0: Tensor, z1: Tensor, held: _Held) -> Tensor:
        batch, made = held.batch, held.made
        embeddings = differentiable(ctx, z0, z1)
        ctx.save_for_backward(*embeddings, batch.anchors, batch.lengths, held.samples, made.means, made.shares)
        ctx.coin_labels = batch.coin_labels
        ctx.options = {"temperature": held.temperature, "floor": held.floor, "dtype": z0.dtype}
        return held.value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z0, z1, *saved = ctx.saved_tensors
        gradients = _kernels().embedding_gradients(grad.detach(), *saved, ctx.coin_labels, **ctx.options)
        return *no_double_backward(NO_SECOND_DERIVATIVE, *gradients, of=(grad, z0, z1)), None
