"""A loss's call over the ranks of a process group: how the batch lies over them, and one error on all where one has
it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.agreement import Call, Reported, header_device
from ..distributed.keys import Keys, LocalKeys, RingKeys
from ..distributed.shards import Shards, exchange_sizes, gather_rows, gather_views, meet
from .anchors import Anchors, compute_dtype

OF_A_RANK = ("process_group", "encode", "backend")  # options that cannot be compared, or change no result


def batch_shards(
    loss: nn.Module, z0: Tensor, index: Tensor | None, *, log_scale: Tensor | None = None, **form: bool
) -> Shards | None:
    """How the batch of a loss's call lies over the ranks; None where the loss keeps to this process's part.

    Args:
        log_scale: the parameter, if it is learnt.
        form: what else must be the same on all ranks, beside the loss's options, its step and the arguments' own form.

    Raises:
        RuntimeError, ValueError: see ``exchange_sizes``.
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
    return exchange_sizes(len(z0), _call(loss, **form), z0.device, loss.process_group, **numbers)


def batch_keys(anchors: Anchors, shards: Shards | None, gather: str, *, walked: bool = True) -> Keys:
    """The keys of the whole batch, view by view, differentiable: here, gathered from all ranks, or going round.

    Args:
        walked: chains will walk over them, which needs the items of all keys at once.
    """
    if shards is None:
        return LocalKeys(*anchors[:3])
    if gather == "ring" and not walked:
        return RingKeys(anchors.embeddings, anchors.items, None, None, shards)
    items = gather_rows(anchors.items[: anchors.items.shape[0] // 2], shards)
    labels = None if anchors.labels is None else torch.cat((items * 2, items * 2 + 1))
    if gather == "ring":
        return RingKeys(anchors.embeddings, anchors.items, items.repeat(2), labels, shards)
    return LocalKeys(gather_views(anchors.embeddings, shards), items.repeat(2), labels)


def report_errors(loss: nn.Module, z0: Tensor) -> AbstractContextManager[None]:
    """For all that a loss does before ``batch_shards``: an error in it is an error on the ranks that wait there,
    too."""
    if loss.gather == "none":
        return nullcontext()
    return Reported(loss.process_group, partial(_meet, loss, z0))


def confirm_on_all(loss: nn.Module, z0: Tensor, *, encodes: bool = False) -> AbstractContextManager[None]:
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
