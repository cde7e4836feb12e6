"""What the stores of a data set share: one slot for each (item, view), and writes in which the last duplicate wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..dispatch import operator
from ..distributed.agreement import Call
from .sharding import Sharding
from .strict_state import StrictState, wrong_kind


def _check_rows(table: Tensor, slots: Tensor) -> None:
    checks.vector("slots", slots, None, torch.int64, table.device)


@operator(
    "Tensor",
    check=_check_rows,
    fake=lambda table, slots: table.new_empty(slots.shape[0], *table.shape[1:]),
)
def read_rows(table: Tensor, slots: Tensor) -> Tensor:
    """(k, ...) rows at slots (k,) of what is written to afterwards.

    One step to a compiler, which it does not repeat: what it can, it may read again in the backward pass in place of
    keeping it, and finds there what has been written since (pytorch/pytorch#197039).
    """
    return table.index_select(0, slots)


class SlotTable(StrictState):
    """A module of tensors with ``num_items * views`` slots; slot = label = item * views + view.

    They are in ``state_dict`` and follow ``.to(device)`` as buffers do, and are none: before each forward pass
    DistributedDataParallel would send the first rank's to all others, gigabytes of them, and over other ranks' chains.

    Casting the module (``.half()``, ``.to(torch.bfloat16)``) leaves all dtypes alone.

    Args:
        num_items: items of the data set; num_items * views is at most 2^40.
        views: of an item.
        process_group: over whose ranks it lies with ``sharded``; None: the default group.
        sharded: each rank keeps a block of consecutive items. Reads and writes are then collectives.
    """

    saved_facts = ("num_items", "views")

    def __init__(
        self, num_items: int, views: int, *, process_group: dist.ProcessGroup | None = None, sharded: bool = False
    ) -> None:
        super().__init__()
        self.num_items = checks.at_least("num_items", num_items, 1)
        self.views = checks.at_least("views", views, 1)
        if self.num_slots > checks.MAX_CHAIN_ID:
            raise ValueError(f"num_items * views must be at most 2^40, the number of chain ids, got {self.num_slots}")
        checks.boolean("sharded", sharded)
        self.owners = Sharding.of(num_items, views, process_group) if sharded else None
        self._tables: dict[str, float] = {}  # what each begins with, by name

    def keep(self, name: str, value: float, dtype: torch.dtype, device: Any = None, width: int | None = None) -> None:
        """Makes ``self.name``: (num_slots,) or (num_slots, width), of the slots of this rank where they are sharded."""
        rows = self.num_slots if self.owners is None else self.owners.own * self.views
        self._tables[name] = value
        setattr(self, name, torch.full((rows,) if width is None else (rows, width), value, dtype=dtype, device=device))

    def rows(self, slots: Tensor, *names: str) -> list[Tensor]:
        """What is kept for slots (k,), which may be other ranks'. Of a store over ranks, slot -1 asks nobody: its row
        means nothing."""
        tables = [getattr(self, name) for name in names]
        if self.owners is not None:
            return self.owners.fetch(slots, tables, self._call("read", names))
        read = read_rows if torch.compiler.is_compiling() else read_rows.function
        return [read(table, slots) for table in tables]

    def whole(self, name: str) -> Tensor:
        """A copy of a table that is not over ranks."""
        table = getattr(self, name)
        if torch.compiler.is_compiling():  # for the reason of ``read_rows``
            return read_rows(table, torch.arange(table.shape[0], dtype=torch.int64, device=table.device))
        return table.clone()

    def put_whole(self, name: str, value: Tensor, only: Tensor | None = None) -> None:
        """Writes all of a table that is not over ranks, of its dtype. only: () bool; False: nothing is written."""
        table = getattr(self, name)
        if only is not None and not (checks.values_visible(only) and bool(only)):
            value = torch.where(only, value, table)
        table.copy_(value)

    def put(
        self,
        slots: Tensor,
        *,
        only: Tensor | None = None,
        distinct: bool = False,
        finite: bool = False,
        **values: Tensor,
    ) -> None:
        """Keeps values (k, ...) for slots (k,), which may be other ranks'; of a slot's rows the last one's, of the last
        rank.

        A row of which any value is not finite in the table's dtype is not written at all: what is kept would be wrong
        for good, where a training step that overflowed is skipped and forgotten. A number may be -inf, as at first.

        Args:
            slots: (k,) int64.
            only: () or (k,) bool; False: nothing is written, or nothing of that row.
            distinct: no slot is known to come twice.
            finite: all values are known to be, in the table's dtype.
            **values: (k, ...) by the table's name.
        """
        given = [value.detach().to(getattr(self, name).dtype) for name, value in values.items()]
        parts = [part for part in (only, *(map(_writable_rows, given) if not finite else ())) if part is not None]
        writable = reduce(torch.logical_and, parts).expand(slots.shape[0]) if parts else None
        if writable is not None and checks.values_visible(writable) and bool(writable.all()):
            writable = None
        if self.owners is not None:
            slots = slots if writable is None else torch.where(writable, slots, -1)
            (slots, given), writable = self.owners.send(slots, given, self._call("write", tuple(values))), None
            distinct = False
        last = None if distinct else last_duplicates(slots, writable)
        if last is not None and writable is not None:
            writable = writable[last]
        for name, value in zip(values, given, strict=True):
            table, new = getattr(self, name), value if last is None else value[last]
            if writable is not None:
                writes = writable.view(-1, *[1] * (new.dim() - 1))
                new = torch.where(writes, new, table[slots])
            if distinct:
                table.index_copy_(0, slots, new)
            else:
                table[slots] = new

    def report_errors(self) -> AbstractContextManager[None]:
        """For what a method does before ``rows`` or ``put``: where stores lie over ranks, an error in it ends the other
        ranks' calls, too."""
        if self.owners is None:
            return nullcontext()
        table = getattr(self, next(iter(self._tables)))
        return self.owners.report_errors(table.device)

    def _call(self, verb: str, names: tuple[str, ...]) -> Call:
        tables = {name: getattr(self, name) for name in names}
        rows = {f"a row of {name}": (table.dtype, tuple(table.shape[1:])) for name, table in tables.items()}
        form = {"num_items": self.num_items, "views": self.views} | rows
        return Call.of(f"{type(self).__name__}'s {verb} of {', '.join(names)}", form)

    @property
    def num_slots(self) -> int:
        return self.num_items * self.views

    def slots(self, index: Tensor, view: int | Tensor, device: torch.device) -> Tensor:
        """(b,) int64 slots of items ``index`` (b,), on any device, in their view: one number, or (b,) int64."""
        checks.vector("index", index, None, torch.int64, index.device if isinstance(index, Tensor) else device)
        index = checks.within("index", index, 0, self.num_items, on_gpu=True, before=self.buffers())
        if isinstance(view, Tensor):
            checks.vector("view", view, index.shape[0], torch.int64, view.device)
            view = checks.within("view", view, 0, self.views, on_gpu=True, before=self.buffers()).to(device)
        elif not 0 <= checks.integer("view", view) < self.views:
            raise ValueError(f"view must be in [0, {self.views}), got {view}")
        if not index.is_cpu:  # a negative one would be counted from the end: another item's slot
            index = torch.where(index < 0, self.num_items, index)
        return index.to(device) * self.views + view

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotTable:
        for name, initial in self._tables.items():
            setattr(self, name, self._moved(fn, getattr(self, name), initial))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._tables:
            table = getattr(self, name)
            destination[prefix + name] = table if self.owners is None else self.owners.as_dtensor(table)

    def _kept_here(self) -> list[str]:
        return [*super()._kept_here(), *self._tables]

    def _misfits(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> list[str]:
        """Puts what fits into the state, as ``_Fitted``, in place of what it was made of."""
        if any(isinstance(state_dict.get(prefix + name), _Fitted) for name in self._tables):
            return []  # the loss that this is a part of has been here
        wrong = super()._misfits(state_dict, prefix, metadata)
        for name in self._tables:
            if prefix + name in state_dict:
                fitted = self._fitted(prefix + name, state_dict[prefix + name], getattr(self, name))
                if isinstance(fitted, _Fitted):
                    state_dict[prefix + name] = fitted
                else:
                    wrong.append(fitted)
        tables = fitted_tables(state_dict, prefix, self._tables)
        return wrong if wrong or len(tables) < len(self._tables) else list(self._wrong_values(prefix, **tables))

    def _fitted(self, name: str, loaded: Any, table: Tensor) -> _Fitted | str:
        """What a state has for a table, as this rank keeps it; or what is wrong with it."""
        if not isinstance(loaded, Tensor):
            return f"{name} must be a tensor, got {checks.describe(loaded)}"
        by_item = hasattr(loaded, "full_tensor")  # a sharded store's
        whole = (self.num_items, self.views) if by_item else (self.num_slots,)
        # What has the wrong number of items must not fit by chance where a rank has a part of them.
        if tuple(loaded.shape) != (*whole, *table.shape[1:]):
            sizes = f"the checkpoint has {tuple(loaded.shape)}, this module {(*whole, *table.shape[1:])}"
            return f"size mismatch for {name}: {sizes}"
        for line in wrong_kind(name, loaded, table.dtype):
            return line
        if self.owners is not None:
            loaded = self.owners.own_part(loaded)
        elif by_item:
            loaded = loaded.full_tensor().flatten(0, 1)
        if loaded.shape != table.shape:
            ranks = "over another number of ranks: torch.distributed.checkpoint loads that"
            return f"{name} must lie over the ranks of this module, got a DTensor {ranks}"
        return _Fitted(loaded.detach().to(table.dtype))

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        """What no training can have left in the tables that a state has for this rank, a line each."""
        yield from ()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        of_module = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*of_module)
        mine = {prefix + name for name in self._tables}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in mine]
        tables = fitted_tables(state_dict, prefix, self._tables)
        missing_keys += [prefix + name for name in self._tables if name not in tables]
        for name, loaded in tables.items():
            if local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, loaded.contiguous())  # kernels take tables without gaps
            else:
                getattr(self, name).copy_(loaded)


class _Fitted(NamedTuple):
    """A table in a state that is about to be loaded, looked at already."""

    table: Tensor


def fitted_tables(state_dict: dict[str, Any], prefix: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Those that a state has and that fit, by name."""
    found = {name: state_dict.get(prefix + name) for name in names}
    return {name: fitted.table for name, fitted in found.items() if isinstance(fitted, _Fitted)}


def _writable_rows(value: Tensor) -> Tensor | None:
    """(k,) bool which rows of (k, ...) values may be kept; None: all."""
    if not value.is_floating_point() or (checks.values_visible(value) and math.isfinite(value.sum())):
        return None
    return value < torch.inf if value.dim() == 1 else value.isfinite().flatten(1).all(1)


def last_duplicates(slots: Tensor, counted: Tensor | None = None) -> Tensor:
    """(b,) row of the last entry with each row's slot, of those that are counted (b,) where there are any.

    Rows of a slot that all write the last one's value may be written in any order, so a scatter is deterministic on
    every backend; and nothing here waits for a GPU.
    """
    if counted is not None:
        entries = slots * 2 + counted  # sorted, those of a slot that count come last
        ordered, order = entries.sort(stable=True)
        return order[torch.searchsorted(ordered, slots * 2 + 1, right=True) - 1]
    ordered, order = slots.sort(stable=True)
    return order[torch.searchsorted(ordered, slots, right=True) - 1]
