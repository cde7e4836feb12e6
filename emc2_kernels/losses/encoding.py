"""What losses do with the user's ``encode(items (k,), views (k,)) -> (k, dim)``: ask it once for each key, and look at
what came."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from .anchors import unit

Encode = Callable[[Tensor, Tensor], Tensor]


def check_encode(encode: Encode | None) -> None:
    if encode is not None and not callable(encode):
        raise TypeError(f"encode must be a function, got {checks.describe(encode)}")


def encoded(encode: Encode, labels: Tensor, like: Tensor, normalize: bool) -> Tensor:
    """(k, dim) embeddings of distinct labels (k,) = item * 2 + view, as anchors are kept: of ``like``'s dim, device and
    dtype, of unit length where asked to.

    Raises:
        ValueError, TypeError: the result is not (k, dim) finite floats on that device.
    """
    result = encode(labels // 2, labels % 2)
    checks.tensor("encode's result", result)
    checks.operand_dtype("encode's result", result)
    if result.shape != (labels.shape[0], like.shape[1]) or result.device != like.device:
        expected = f"shape ({labels.shape[0]}, {like.shape[1]}) on {like.device}"
        raise ValueError(f"encode's result must have {expected}, got {checks.describe(result)}")
    checks.finite("encode's result", result.detach())
    return unit(result, normalize).to(like.dtype)


def encode_distinct(encode: Encode, labels: Tensor, like: Tensor, normalize: bool) -> Tensor:
    """(k, dim) embeddings of labels (k,), each distinct one encoded once; on a GPU this waits to know which."""
    if labels.numel() == 0:
        return like.new_empty(0, like.shape[1])
    distinct, inverse = labels.unique(return_inverse=True)
    return encoded(encode, distinct, like, normalize)[inverse]


def rows_of_labels(labels: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted label, of any shape, stands in labels (k,): of duplicates the last, as a bank keeps it; -1:
    nowhere."""
    ordered, order = labels.sort(stable=True)
    after = torch.searchsorted(ordered, wanted.contiguous(), right=True) - 1
    place = after.clamp_min(0)
    return torch.where((after >= 0) & (ordered[place] == wanted), order[place], -1)
