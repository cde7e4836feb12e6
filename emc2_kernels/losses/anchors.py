"""What every loss does with its arguments: two views of a batch, checked, normalised, and stacked into 2b anchors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import checks
from ..autograd import functorch_active
from .recomputation import refuse_recomputation

NORM_FLOOR = 1e-6  # below it an embedding is left short: dividing by less would blow its gradient up past 10^6
# An element above the first has a square, or a row of them a sum of squares, that could overflow: its row is made
# smaller by the second, exactly. It is then longer than NORM_FLOOR still, and no sum of d <= 2^17 squares overflows.
SHRINKS = {torch.float32: (2.0**54, 2.0**-73), torch.float64: (2.0**503, 2.0**-522)}


class Anchors(NamedTuple):
    """View 0 of the batch, then view 1. Row i's positive is row (i + b) % 2b."""

    embeddings: (
        Tensor  # (2b, d) float32 (float64 for float64 inputs), differentiable, of unit length unless normalize=False
    )
    items: Tensor | None  # (2b,) int64
    labels: Tensor | None  # (2b,) int64  item * 2 + view
    finite: bool = False  # whether they are known to be: their values have been looked at, and cannot overflow
    repeats: int | None = None  # rows of the batch whose item an earlier one has; None: nobody has looked

    @classmethod
    def of(cls, z0: Tensor, z1: Tensor, index: Tensor | None, normalize: bool, repeats: int | None = None) -> Anchors:
        """Of arguments whose form ``check_batch`` has looked at, where it has counted the repeats.

        Raises:
            ValueError: z0 or z1 is not finite, where values are seen.
        """
        finite = normalize and checks.values_visible(z0)
        if normalize and not functorch_active():
            embeddings, _ = _StackUnit.apply(z0, z1)
        else:
            check_finite(z0, z1)
            embeddings = unit(torch.cat((wide(z0), wide(z1))), normalize)
        if index is None:
            return cls(embeddings, None, None, finite)
        items = index.to(z0.device, non_blocking=True)
        first = items * 2
        return cls(embeddings, torch.cat((items, items)), torch.cat((first, first + 1)), finite, repeats)

    @property
    def distinct(self) -> bool:
        """Whether no item is known to come twice."""
        return self.repeats == 0


def number_pairs(anchors: Anchors, first: int = 0) -> Anchors:
    """Anchors without items get the numbers of their pairs, from ``first`` on: rows of other pairs are negatives."""
    if anchors.items is not None:
        return anchors
    b = anchors.embeddings.shape[0] // 2
    pairs = torch.arange(first, first + b, dtype=torch.int64, device=anchors.embeddings.device)
    return anchors._replace(items=torch.cat((pairs, pairs)))


def check_batch(
    z0: Any, z1: Any, index: Any, *, dim: int | None, num_items: int | None, before: Iterable[Tensor] = ()
) -> tuple[Tensor | None, int | None]:
    """Checks a loss's arguments; returns the index to go on with, see ``checks.within``, and how many rows have an item
    that an earlier one has, where values are seen.

    Args:
        dim: of the embeddings; None: any.
        num_items: ``index`` is below it; None: any chain id.
        before: what the call writes to whatever the items.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values are looked at on the CPU only.
    """
    _check_embeddings("z0", z0, dim)
    _check_embeddings("z1", z1, dim)
    if z1.shape != z0.shape or z1.dtype != z0.dtype or z1.device != z0.device:
        raise ValueError(
            f"z1 must have the shape, dtype and device of z0, {checks.describe(z0)}, got {checks.describe(z1)}"
        )
    return (None, None) if index is None else _check_index(index, z0, num_items, before)


def check_call(
    loss: Any, z0: Any, z1: Any, index: Any, return_stats: Any, *, dim: int | None, state: tuple[Tensor, ...]
) -> tuple[Tensor, int | None]:
    """Checks a call of a loss that keeps ``state`` for each of its items, and lets its watch see the index.

    Returns and raises as ``check_batch``; also RuntimeError, see ``refuse_recomputation``.
    """
    refuse_recomputation(loss)
    checks.boolean("return_stats", return_stats)
    if index is None:
        raise TypeError("index must be an int64 tensor of the batch's items, got None")
    index, repeats = check_batch(z0, z1, index, dim=dim, num_items=loss.num_items, before=loss.buffers())
    check_state_device(z0, "state", *state)
    if loss.training:
        loss._watch.look(index, repeats)
    return index, repeats


def check_finite(z0: Tensor, z1: Tensor) -> None:
    checks.finite("z0", z0.detach())
    checks.finite("z1", z1.detach())


def check_state_device(z0: Tensor, what: str, *buffers: Tensor) -> None:
    """Raises ValueError where a loss's buffers are elsewhere than its arguments."""
    for buffer in buffers:
        if buffer.device != z0.device:
            expected = f"on {buffer.device}, where the loss keeps its {what}"
            raise ValueError(f"z0 must be {expected}, got {checks.describe(z0)}")


def _check_embeddings(name: str, z: Any, dim: int | None) -> None:
    checks.tensor(name, z)
    if z.dim() != 2 or z.shape[0] == 0 or z.shape[1] == 0 or (dim is not None and z.shape[1] != dim):
        raise ValueError(f"{name} must have shape (b, {'d' if dim is None else dim}), b >= 1, got {checks.describe(z)}")
    checks.operand_dtype(name, z)
    if z.device.type == "meta":
        raise ValueError(f"{name} must have values, got {checks.describe(z)}")


def _check_index(index: Any, z0: Tensor, num_items: int | None, before: Iterable[Tensor]) -> tuple[Tensor, int | None]:
    checks.tensor("index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {checks.describe(index)}")
    if index.shape != (z0.shape[0],):
        raise ValueError(
            f"index must have shape ({z0.shape[0]},), one item for each row of z0, got {checks.describe(index)}"
        )
    if index.device != z0.device and index.device.type != "cpu":
        raise ValueError(f"index must be on the CPU or on {z0.device}, got {checks.describe(index)}")
    end = checks.MAX_CHAIN_ID if num_items is None else num_items
    if not checks.values_visible(index):
        return checks.within("index", index, 0, end, before=before), None
    items = index.tolist()  # one look, at batch 32 in less time than a reduction takes
    if min(items) < 0 or max(items) >= end:
        checks.within("index", index, 0, end)  # says which, and where it is
    return index, len(items) - len(set(items))


def finite_batch(embeddings: Tensor, temperature: float) -> Tensor | None:
    """() bool whether a batch's embeddings, of all ranks where they are gathered, and their scores are finite: what a
    loss keeps of one that is not is nothing, as the optimizer's step is none where torch.amp.GradScaler finds that it
    has overflowed. None: they are seen, and were looked at."""
    if checks.values_visible(embeddings.detach()):
        return None
    return (embeddings.detach().square().sum() / temperature).isfinite()  # no score is larger


def wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


class _StackUnit(torch.autograd.Function):
    """Both views' unit rows, view 0 first, and the rows' lengths: one node of the graph in the place of eight.

    Both are outputs, so that a gradient of the gradient goes through them, and the views need not be kept.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.cat((wide(z0), wide(z1)))
        lengths, divisors, shrink = _lengths(z, (z0, z1))
        rows = (z if shrink is None else z * shrink) / divisors
        ctx.all_long = divisors is lengths
        ctx.save_for_backward(rows, lengths, shrink)
        ctx.dtype = z0.dtype
        ctx.set_materialize_grads(False)  # of the lengths: mostly zeros that nobody reads
        return rows, lengths

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor | None, d_lengths: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, lengths, shrink = ctx.saved_tensors
        divisors, d_z = lengths if ctx.all_long else lengths.clamp_min(NORM_FLOOR), None
        if grad is not None:
            along = (grad * rows).sum(1, keepdim=True)
            if not ctx.all_long:
                along = torch.where(lengths >= NORM_FLOOR, along, 0)  # below it nothing is normalised
            d_z = torch.addcmul(grad, along, rows, value=-1) / divisors
        if d_lengths is not None:
            direction = rows * (divisors / torch.where(lengths > 0, lengths, torch.inf))
            d_z = d_lengths * direction if d_z is None else d_z + d_lengths * direction
        if d_z is None:
            return None, None
        return (d_z if shrink is None else d_z * shrink).to(ctx.dtype).tensor_split(2)


def _lengths(z: Tensor, views: tuple[Tensor, Tensor] = ()) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of rows (n, d): their lengths (n, 1), what they are to be divided by, and powers of two (n, 1) by which they were
    multiplied first, where one may be too long to be squared; None: none is. Where all are seen to be longer than
    NORM_FLOOR, the first two are one.

    Raises:
        ValueError: ``views``, of which the rows are, are not finite, where values are seen.
    """
    if z.shape[0] and checks.values_visible(views[0] if views else z):
        lengths = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        shortest, longest = (float(length) for length in torch.aminmax(lengths.detach()))
        if math.isfinite(longest):
            return lengths, lengths if shortest >= NORM_FLOOR else lengths.clamp_min(NORM_FLOOR), None
        if views:
            check_finite(*views)
    large, shrink = SHRINKS[z.dtype]
    largest = torch.linalg.vector_norm(z.detach(), torch.inf, dim=1, keepdim=True)
    factors = torch.ones_like(largest).masked_fill(largest > large, shrink)
    lengths = torch.linalg.vector_norm(z * factors, dim=1, keepdim=True)
    return lengths, lengths.clamp_min(NORM_FLOOR), factors


def unit(z: Tensor, normalize: bool = True) -> Tensor:
    """z in float32 (float64 stays), its rows divided by their lengths if asked to, shorter ones by NORM_FLOOR."""
    z = wide(z)
    if not normalize:
        return z
    _, divisors, shrink = _lengths(z)
    return (z if shrink is None else z * shrink) / divisors


def compute_dtype(z: Tensor) -> torch.dtype:
    """What the kernels should multiply in: autocast's choice where it is on, else the inputs' own."""
    device = z.device.type
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and z.dtype != torch.float64 else z.dtype
    )
