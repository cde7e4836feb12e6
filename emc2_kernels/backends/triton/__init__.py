"""The Triton backend: all chains at once, on GPUs (on CPU tensors in the interpreter: TRITON_INTERPRET=1)."""

from .run import step, transition, view_coin

__all__ = ["step", "transition", "view_coin"]
