"""The items of the latest batches, whose kept embeddings are the freshest that a bank has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from .strict_state import range_errors
from .table import SlotTable, last_duplicates


class ItemQueue(SlotTable):
    """Up to ``size`` items, each once, the latest last; in ``state_dict``.

    Where epochs are shuffled, they and the present batch are together one draw without replacement; only at the start
    of an epoch are some of them from the one before.
    """

    saved_facts: ClassVar[tuple[str, ...]] = ()
    items: Tensor  # (size,) int64  -1: none

    def __init__(self, num_items: int, size: int) -> None:
        super().__init__(size, views=1)
        self.end = num_items
        self.keep("items", -1, torch.int64)

    def outside(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """(size,) items, and which of them are some, and none of the batch's (b,)."""
        items = self.whole("items")
        ordered = batch.sort().values  # torch.isin waits for a GPU to count what is unique
        inside = torch.searchsorted(ordered, items, right=True) > torch.searchsorted(ordered, items)
        return items, (items >= 0) & ~inside

    def push(self, batch: Tensor, *, only: Tensor | None = None) -> None:
        """Appends a batch's items (b,); the oldest entries go, and of an item's all but the last are none.

        Args:
            only: () bool; False: nothing changes. It is not waited for.
        """
        items = torch.cat((self.whole("items"), batch))[-self.num_slots :]
        entries = torch.arange(self.num_slots, dtype=torch.int64, device=batch.device)
        self.put_whole("items", torch.where(last_duplicates(items) == entries, items, -1), only)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        items = tables["items"]
        yield from range_errors(f"{prefix}items", items, -1, self.end - 1)
        known = [] if items.is_meta else items[items >= 0].tolist()
        if len(set(known)) < len(known):
            yield f"{prefix}items must hold each item once, got one twice"

    def extra_repr(self) -> str:
        return f"size={self.num_slots}"
