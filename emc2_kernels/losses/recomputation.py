"""Whether a forward pass is one that activation checkpointing makes twice, which losses that keep state cannot take."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction


def refuse_recomputation(loss: nn.Module) -> None:
    """For the forward pass of a loss whose state moves in training mode: a second pass would start where the first has
    ended, and the gradient would be of other negatives or weights than the value. The first one is refused where it can
    be told, before anything has moved: inside torch.utils.checkpoint, of both kinds. Under ``torch.compile`` nobody
    looks, and the state of a compiled loss inside a checkpoint moves twice.

    Raises:
        RuntimeError: the loss is in training mode and inside torch.utils.checkpoint, or a backward pass is under way.
    """
    if not loss.training or torch.compiler.is_compiling():
        return
    if torch._C._current_graph_task_id() != -1:
        where = "during a backward pass"
    elif _in_checkpoint():
        where = "inside torch.utils.checkpoint"
    else:
        return
    name = type(loss).__name__
    raise RuntimeError(
        f"{name} must be called once a step in training mode, since its state moves, got a call {where}, which makes a "
        "forward pass twice: checkpoint the encoder, and call the loss on what comes out"
    )


def _in_checkpoint() -> bool:
    if torch.is_grad_enabled():  # use_reentrant=False puts hooks on saved tensors
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None and getattr(hooks[0], "__module__", None) == CheckpointFunction.__module__
    # use_reentrant=True: its first pass is without gradient, as others are that are made once
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None
