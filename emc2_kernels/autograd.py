"""Gradients that cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Once(torch.autograd.Function):
    """With ``setup_context``: torch.func takes no other Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise NotImplementedError(ctx.message)


def functorch_active() -> bool:
    """Whether a transform of torch.func sees what is done here."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def differentiable(ctx: FunctionCtx, *inputs: Tensor) -> list[Tensor | None]:
    """Of a Function's first inputs those with a gradient, the others as None: torch saves no tensor that was made in
    inference mode."""
    return [given if needed else None for given, needed in zip(inputs, ctx.needs_input_grad, strict=False)]


def no_double_backward(
    message: str, *gradients: Tensor | None, of: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """A backward pass's results. With create_graph=True their own gradient is an error with this message: else a
    penalty on them would have a wrong one or none, and nobody would know.

    Args:
        of: what they were made of, undetached, the incoming gradient among it: ``torch.autograd.grad`` goes only where
            what it was asked for lies, and torch.func only where tensors were made of others.
    """
    if not torch.is_grad_enabled():
        return gradients
    made = [gradient for gradient in gradients if gradient is not None]
    rest = iter(_Once.apply(message, len(made), *made, *(source for source in of if source is not None)))
    return tuple(None if gradient is None else next(rest) for gradient in gradients)
