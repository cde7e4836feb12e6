"""What every loss does with its arguments: two views of a batch, checked, normalised, and stacked into 2b anchors."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.agreement import Call, Reported, header_device
from ..distributed.shards import Shards, gather_rows, gather_views, meet, shards_of
from .in_batch import in_batch

NORM_FLOOR = 1e-6  # below it an embedding is left short: dividing by less would blow its gradient up past 10^6
OF_A_RANK = ("process_group", "encode", "backend")  # options that cannot be compared, or change no result
# An element above the first has a square, or a row of them a sum of squares, that could overflow: its row is made
# smaller by the second, exactly. It is then longer than NORM_FLOOR still, and no sum of d <= 2^17 squares overflows.
SHRINKS = {torch.float32: (2.0**54, 2.0**-73), torch.float64: (2.0**503, 2.0**-522)}


class Anchors(NamedTuple):
    """View 0 of the batch, then view 1. Row i's positive is row (i + b) % 2b."""

    embeddings: (
        Tensor  # (2b, d) float32 (float64 for float64 inputs), differentiable, of unit length unless normalize=False
    )
    items: Tensor | None  # (2b,) int64
    views: Tensor  # (2b,) int64

    @property
    def positives(self) -> Tensor:
        """(2b, d)."""
        return self.embeddings.roll(self.embeddings.shape[0] // 2, 0)


def over_ranks(
    loss: nn.Module, z0: Tensor, index: Tensor | None, *, log_scale: Tensor | None = None, **form: bool
) -> Shards | None:
    """How the batch of a loss's call lies over the ranks; None where the loss keeps to this process's part.

    Args:
        log_scale: the parameter, if it is learnt. form: what else must be the same on all ranks, beside the loss's
            options, its step and the arguments' own form.

    Raises:
        RuntimeError, ValueError: see ``shards_of``.
    """
    if loss.gather == "none":
        return None
    form |= {
        "z0.shape[1]": z0.shape[1],
        "z0.dtype": compute_dtype(z0),
        "z0.device.type": z0.device.type,
        "index is None": index is None,
        "encode is None": getattr(loss, "encode", None) is None,
        "training": loss.training,
    }
    numbers = {"step": getattr(loss, "step", None), "log_scale": log_scale}
    return shards_of(len(z0), _call(loss, **form), z0.device, loss.process_group, **numbers)


def reported(loss: nn.Module, z0: Tensor) -> AbstractContextManager[None]:
    """For all that a loss does before ``over_ranks``: an error in it is an error on the ranks that wait there, too."""
    if loss.gather == "none":
        return nullcontext()
    return Reported(loss.process_group, partial(_meet, loss, z0))


def confirmed(loss: nn.Module, z0: Tensor, *, encodes: bool = False) -> AbstractContextManager[None]:
    """For what can go wrong on one rank after that, and before ranks exchange what they keep: at the block's end all of
    them go on, or none does.

    It costs an exchange where anything can: the user's encoder, and similarities that overflow, which only the CPU
    looks at. So the ranks must be of one mind about that, and of one kind of device.
    """
    if loss.gather == "none" or not (encodes or (z0.is_cpu and not loss.normalize)):
        return nullcontext()
    return Reported(loss.process_group, partial(_meet, loss, z0), _call(loss))


def _meet(loss: nn.Module, z0: Tensor, call: Call) -> None:
    devices = [x.device for x in (getattr(loss, "step", None), z0) if isinstance(x, Tensor)]
    meet(call, header_device(devices[0] if devices else None, loss.process_group), loss.process_group)


def _call(loss: nn.Module, **form: Any) -> Call:
    options = {name: getattr(loss, name, None) for name in _option_names(type(loss))}
    return Call.of(type(loss).__name__, options | form)


def _option_names(kind: type) -> tuple[str, ...]:
    """What a loss's constructor takes and ranks must agree on; each is kept under its name. A user's class on top of
    the loss may take what it likes."""
    ours = next(each for each in kind.__mro__ if each.__module__.startswith(__package__))
    code = ours.__init__.__code__  # and not its signature, which takes longer to ask for than the digest to make
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return tuple(name for name in names if name not in OF_A_RANK)


def of_all_ranks(anchors: Anchors, shards: Shards | None) -> Anchors:
    """The anchors of the whole batch, view by view, differentiable; the same ones where there is one rank's only."""
    if shards is None:
        return anchors
    items = gather_rows(anchors.items[: anchors.items.shape[0] // 2], shards)
    views = torch.arange(2 * shards.total, dtype=torch.int64, device=items.device) // shards.total
    return Anchors(gather_views(anchors.embeddings, shards), items.repeat(2), views)


def check(z0: Tensor, z1: Tensor, index: Tensor | None, *, dim: int | None, num_items: int | None) -> None:
    """Checks a loss's arguments.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came. Values are looked at on the CPU only.
    """
    _check_embeddings("z0", z0, dim)
    _check_embeddings("z1", z1, dim)
    if z1.shape != z0.shape or z1.dtype != z0.dtype or z1.device != z0.device:
        raise ValueError(
            f"z1 must have the shape, dtype and device of z0, {checks.describe(z0)}, got {checks.describe(z1)}"
        )
    if index is not None:
        _check_index(index, z0, num_items)


def stack(z0: Tensor, z1: Tensor, index: Tensor | None, *, normalize: bool) -> Anchors:
    """The anchors of checked arguments."""
    if index is not None:
        index = index.to(z0.device, non_blocking=True)
    b = z0.shape[0]
    embeddings = unit(torch.cat((wide(z0), wide(z1))), normalize)
    views = torch.arange(2 * b, dtype=torch.int64, device=z0.device) // b
    return Anchors(embeddings, None if index is None else index.repeat(2), views)


def finite_batch(anchors: Anchors, temperature: float) -> Tensor | None:
    """() bool whether a batch's embeddings, of all ranks where they are gathered, and their scores are finite: what a
    loss keeps of one that is not is nothing, as the optimizer's step is none where torch.amp.GradScaler finds that it
    has overflowed. None: they are known to be.
    """
    embeddings = anchors.embeddings.detach()
    if checks.values_visible(embeddings):
        return None
    return (embeddings.square().sum() / temperature).isfinite()  # no score is larger


def wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def unit(z: Tensor, normalize: bool = True) -> Tensor:
    """z in float32 (float64 stays), its rows divided by their lengths if asked to, shorter ones by NORM_FLOOR."""
    z = wide(z)
    if not normalize:
        return z
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True) if checks.values_visible(z) else None
    if length is None or not math.isfinite(length.detach().sum()):  # a row may be too long to be squared
        z = _squarable(z)
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / length.clamp_min(NORM_FLOOR)


def _squarable(z: Tensor) -> Tensor:
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


def _check_embeddings(name: str, z: Tensor, dim: int | None) -> None:
    checks.tensor(name, z)
    if z.dim() != 2 or z.shape[0] == 0 or z.shape[1] == 0 or (dim is not None and z.shape[1] != dim):
        raise ValueError(f"{name} must have shape (b, {'d' if dim is None else dim}), b >= 1, got {checks.describe(z)}")
    checks.operand_dtype(name, z)
    if z.device.type == "meta":
        raise ValueError(f"{name} must have values, got {checks.describe(z)}")
    checks.finite(name, z.detach())


def _check_index(index: Tensor, z0: Tensor, num_items: int | None) -> None:
    checks.tensor("index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {checks.describe(index)}")
    if index.shape != (z0.shape[0],):
        raise ValueError(
            f"index must have shape ({z0.shape[0]},), one item for each row of z0, got {checks.describe(index)}"
        )
    if index.device != z0.device and index.device.type != "cpu":
        raise ValueError(f"index must be on the CPU or on {z0.device}, got {checks.describe(index)}")
    checks.within("index", index, 0, checks.MAX_CHAIN_ID if num_items is None else num_items)


def batch_stats(
    anchors: Anchors, temperature: float | Tensor, *, bimodal: bool = False, ntxent: Tensor | None = None
) -> dict[str, Tensor]:
    """What every loss reports of its batch, detached 0-d tensors, whatever it minimises itself.

    ``ntxent``: the in-batch NT-Xent value, with ``bimodal`` the in-batch CLIP value, whose negatives are the other
    tower's. ``positive_similarity``: mean similarity of the pairs. ``mean_cosine``: mean similarity over pairs of
    different rows of one view; near 1 the encoder has collapsed.

    Args:
        ntxent: that value, where it is known already.
    """
    with torch.no_grad():
        detached = anchors._replace(embeddings=anchors.embeddings.detach())
        b = detached.embeddings.shape[0] // 2
        total = detached.embeddings.view(2, b, -1).sum(1).square().sum()
        diagonal = detached.embeddings.square().sum()
        return {
            "ntxent": in_batch(detached, temperature, bimodal=bimodal).value if ntxent is None else ntxent,
            "positive_similarity": (detached.embeddings[:b] * detached.embeddings[b:]).sum(1).mean(),
            "mean_cosine": (total - diagonal) / max(2 * b * (b - 1), 1),
        }
