"""Gradients that cannot be differentiated again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, message: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise NotImplementedError(ctx.message)


def not_twice(message: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """A backward pass's results. With create_graph=True their own gradient is an error with this message: else a
    penalty on them would have none, and nobody would know."""
    if not torch.is_grad_enabled():
        return gradients
    given = iter(_Once.apply(message, *(gradient.requires_grad_() for gradient in gradients if gradient is not None)))
    return tuple(None if gradient is None else next(given) for gradient in gradients)
