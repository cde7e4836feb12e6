"""What the stores of a data set share: one slot for each (item, view), and writes in which the last duplicate wins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import checks


class SlotStore(nn.Module):
    """A module of buffers with ``num_items * views`` slots; slot = label = item * views + view.

    Casting the module (``.half()``, ``.to(torch.bfloat16)``) moves its buffers and leaves their dtypes alone: a score
    rounded to half precision, or an item id through a float, would be another chain.
    """

    def __init__(self, num_items: int, views: int) -> None:
        super().__init__()
        self.num_items = checks.at_least("num_items", num_items, 1)
        self.views = checks.at_least("views", views, 1)
        if self.num_slots > checks.MAX_CHAIN_ID:
            raise ValueError(f"num_items * views must be at most 2^40, the number of chain ids, got {self.num_slots}")

    @property
    def num_slots(self) -> int:
        return self.num_items * self.views

    def slots(self, index: Tensor, view: int | Tensor, device: torch.device) -> Tensor:
        """(b,) int64 slots of items ``index`` (b,), on any device, in their view: one number, or (b,) int64."""
        checks.vector("index", index, None, torch.int64, index.device if isinstance(index, Tensor) else device)
        checks.within("index", index, 0, self.num_items, on_gpu=True)
        if isinstance(view, Tensor):
            checks.vector("view", view, index.shape[0], torch.int64, view.device)
            checks.within("view", view, 0, self.views, on_gpu=True)
            view = view.to(device)
        elif not 0 <= checks.integer("view", view) < self.views:
            raise ValueError(f"view must be in [0, {self.views}), got {view}")
        return index.to(device) * self.views + view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotStore:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)


def last_duplicates(slots: Tensor) -> Tensor:
    """(b,) row of the last entry with each row's slot.

    Rows of a slot that all write the last one's value may be written in any order, so a scatter is deterministic on
    every backend; and nothing here waits for a GPU.
    """
    ordered, order = slots.sort(stable=True)
    return order[torch.searchsorted(ordered, slots, right=True) - 1]
