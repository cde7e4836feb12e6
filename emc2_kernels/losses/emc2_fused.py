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
from ..autograd import no_double_backward
from ..backends import HALF_AND_SINGLE, gpu
from ..transition import MHResult, MHState
from .anchors import NORM_FLOOR, SHRINKS, compute_dtype

if TYPE_CHECKING:
    from ..backends.triton import emc2_loss
    from .emc2 import EMC2Loss


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


def takes(loss: EMC2Loss, z0: Tensor, z1: Tensor) -> bool:
    """Whether a loss's call on these embeddings, checked already, is made here.

    Not where torch needs to see every operation: Inductor fuses the plain path by itself, and modes, transforms and
    subclasses of tensors have their own idea of an operation. Not with carry="recompute" either, whose encoder is in
    the middle of it.
    """
    if z0.is_cuda:
        runs = loss.backend in ("auto", "triton", "cuda")
    else:  # the interpreter, for tests
        runs = z0.is_cpu and loss.backend == "triton" and gpu.interpreting()
    return (
        runs
        and loss.carry in ("cached", "drop")
        and loss.proposals == "batch"
        and loss.gather == "none"
        and loss.estimator == "states"
        and not loss.bimodal
        and z0.dtype in HALF_AND_SINGLE
        and all(type(z) in (Tensor, torch.nn.Parameter) for z in (z0, z1))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _triton_runs()
    )


def surrogate(loss: EMC2Loss, z0: Tensor, z1: Tensor, index: Tensor, return_stats: bool) -> Surrogate:
    """The forward pass of ``EMC2Loss`` on checked arguments."""
    kernels, floor = _kernels(), NORM_FLOOR if loss.normalize else None
    chains, bank = loss.chains, loss.bank
    stores = kernels.Stores(chains.key, chains.score, bank.embeddings, bank.written_at, bank.last_step, loss.step)
    batch = kernels.gather_batch(
        _unit_last_stride(z0),
        _unit_last_stride(z1),
        index.to(z0.device, non_blocking=True),
        stores,
        temperature=loss.temperature,
        seed=loss.seed,
        floor=floor,
        shrinks=SHRINKS[torch.float32],
        both_views=loss.views == "both",
        dtype=compute_dtype(z0),
    )
    result = _walk(loss, batch, return_stats)
    made = kernels.mean_negatives(
        batch,
        result.samples,
        stores.bank if loss.carry == "cached" else None,
        temperature=loss.temperature,
        return_similarity=return_stats,
    )
    value = made.terms.mean()
    if not loss.normalize:  # unit vectors cannot overflow
        checks.finite("the similarities of z0 and z1", value)
    if loss.training:
        kernels.update_stores(batch, *result.state, stores, value)
    held = _Held(value, batch, result.samples, made, loss.temperature, floor)
    return Surrogate(_Backward.apply(z0, z1, held), batch, result, made.similarity)


def _unit_last_stride(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 or z.shape[1] == 1 else z.contiguous()


def _walk(loss: EMC2Loss, batch: emc2_loss.Batch, return_accepts: bool) -> MHResult:
    """``mh_step`` past its checks, which would cost a tenth of a small batch's time: the arguments were made here."""
    m = batch.keys.shape[0]
    burn_in, num_samples = loss.schedule(m)
    samples, key, score, threshold, *accepted = ops.mh_step(
        batch.queries,
        batch.keys,
        loss.temperature,
        None,
        *ops.integer_or_tensor(loss.seed),
        *ops.integer_or_tensor(loss.step),
        batch.chain_ids,
        batch.items,
        batch.items[:m],  # view 0 of the anchors first: the items in the batch's order
        None,  # a sweep
        None,
        None,
        burn_in,
        num_samples,
        0,
        m,
        batch.state_key,
        batch.state_score,
        batch.key_labels,
        return_accepts,
        False,
        loss.backend,
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
        ctx.save_for_backward(held.batch.anchors, held.batch.lengths, held.samples, held.made.means, held.made.shares)
        ctx.coin_labels = held.batch.coin_labels
        ctx.options = {"temperature": held.temperature, "floor": held.floor, "dtype": z0.dtype}
        return held.value

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gradients = _kernels().embedding_gradients(grad.detach(), *ctx.saved_tensors, ctx.coin_labels, **ctx.options)
        return *no_double_backward(NO_SECOND_DERIVATIVE, *gradients), None
