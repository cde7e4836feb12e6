"""A buffer of this thread that the CPU backends keep from call to call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def tile_buffer(elements: int) -> Tensor:
    """At least so many float32, with rubbish in them: fresh pages would cost as much as the work on them."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        with torch.inference_mode(False):  # or a later call outside inference mode could not write to it
            buffer = _kept.buffer = torch.empty(elements, dtype=torch.float32, device="cpu")
    return buffer
