"""What every loss does with its arguments: two views of a batch, checked, normalised, and stacked into 2b anchors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks

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
        """Of arguments that ``check_batch`` has looked at, which has counted the repeats."""
        embeddings = unit(torch.cat((wide(z0), wide(z1))), normalize)
        finite = normalize and checks.values_visible(z0)
        if index is None:
            return cls(embeddings, None, None, finite)
        first = index.to(z0.device, non_blocking=True) * 2
        labels = torch.cat((first, first + 1))
        return cls(embeddings, labels >> 1, labels, finite, repeats)

    @property
    def positives(self) -> Tensor:
        """(2b, d)."""
        return self.embeddings.roll(self.embeddings.shape[0] // 2, 0)

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
    return anchors._replace(items=pairs.repeat(2))


def check_batch(z0: Any, z1: Any, index: Any, *, dim: int | None, num_items: int | None) -> int | None:
    """Checks a loss's arguments; returns how many rows have an item that an earlier one has, where values are seen.

    Args:
        dim: of the embeddings; None: any. num_items: ``index`` is below it; None: any chain id.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values are looked at on the CPU only.
    """
    _check_embeddings("z0", z0, dim)
    _check_embeddings("z1", z1, dim)
    if z1.shape != z0.shape or z1.dtype != z0.dtype or z1.device != z0.device:
        raise ValueError(
            f"z1 must have the shape, dtype and device of z0, {checks.describe(z0)}, got {checks.describe(z1)}"
        )
    return None if index is None else _check_index(index, z0, num_items)


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
    checks.finite(name, z.detach())


def _check_index(index: Any, z0: Tensor, num_items: int | None) -> int | None:
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
        checks.within("index", index, 0, end)
        return None
    ordered = index.sort().values  # one look for the bounds and the repeats
    if int(ordered[0]) < 0 or int(ordered[-1]) >= end:
        checks.within("index", index, 0, end)  # says which, and where it is
    return len(ordered) - 1 - int((ordered[1:] != ordered[:-1]).sum())


def finite_batch(embeddings: Tensor, temperature: float) -> Tensor:
    """() bool whether a batch's embeddings, of all ranks where they are gathered, and their scores are finite: what a
    loss keeps of one that is not is nothing, as the optimizer's step is none where torch.amp.GradScaler finds that it
    has overflowed."""
    return (embeddings.detach().square().sum() / temperature).isfinite()  # no score is larger


def wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def unit(z: Tensor, normalize: bool = True) -> Tensor:
    """z in float32 (float64 stays), its rows divided by their lengths if asked to, shorter ones by NORM_FLOOR."""
    z = wide(z)
    if not normalize:
        return z
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True) if checks.values_visible(z) else None
    if length is None or not math.isfinite(length.detach().sum()):  # a row may be too long to be squared
        z = _shrink_long_rows(z)
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / length.clamp_min(NORM_FLOOR)


def _shrink_long_rows(z: Tensor) -> Tensor:
    """z (n, d) in the directions of its rows, of which none is so long that its squares overflow."""
    large, shrink = SHRINKS[z.dtype]
    largest = torch.linalg.vector_norm(z.detach(), torch.inf, dim=1, keepdim=True)
    return z * torch.ones_like(largest).masked_fill(largest > large, shrink)


def compute_dtype(z: Tensor) -> torch.dtype:
    """What the kernels should multiply in: autocast's choice where it is on, else the inputs' own."""
    device = z.device.type
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and z.dtype != torch.float64 else z.dtype
    )
