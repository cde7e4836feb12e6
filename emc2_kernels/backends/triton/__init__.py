"""The Triton backend: one launch for all chains, on GPUs (on CPU tensors in the interpreter: TRITON_INTERPRET=1)."""

from .run import step, transition, view_coin

__all__ = ["step", "transition", "view_coin"]
