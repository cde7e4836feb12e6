"""Which rank keeps what of a data set, and the exchange of it: all-to-all of torch.distributed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.agreement import Call, Reported, first_exchange, header_device, place, settle

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Sharding(NamedTuple):
    """Blocks of consecutive items, cut as DTensor's ``Shard(0)`` cuts: that makes a checkpoint loadable on another
    number of ranks."""

    group: dist.ProcessGroup | None  # None: the default group
    rank: int
    ranks: int
    num_items: int
    views: int

    @classmethod
    def of(cls, num_items: int, views: int, group: dist.ProcessGroup | None) -> Sharding:
        return cls(group, *place(group, "sharded must be False"), num_items, views)

    @property
    def block(self) -> int:
        """Items of a rank, but for the last ones."""
        return -(-self.num_items // self.ranks)

    @property
    def first(self) -> int:
        """Item with which this rank's begin."""
        return min(self.rank * self.block, self.num_items)

    @property
    def own(self) -> int:
        """Items of this rank."""
        return min((self.rank + 1) * self.block, self.num_items) - self.first

    def fetch(self, slots: Tensor, tables: list[Tensor], call: Call) -> list[Tensor]:
        """Rows of the tables at slots (k,) of any rank, zeros for slot -1: a collective, 2 exchanges and 1 a table."""
        order, here, there = self._plan(slots, call)
        asked = self._exchange(slots[order], here, there) - self.first * self.views
        results = []
        for table in tables:
            result = table.new_zeros(len(slots), *table.shape[1:])
            result[order] = self._exchange(table[asked], there, here)
            results.append(result)
        return results

    def send(self, slots: Tensor, values: list[Tensor], call: Call) -> tuple[Tensor, list[Tensor]]:
        """To their owners: what all ranks have for this one's slots, numbered from this rank's first, in rank order."""
        order, here, there = self._plan(slots, call)
        arrived = self._exchange(slots[order], here, there) - self.first * self.views
        return arrived, [self._exchange(value[order], here, there) for value in values]

    def report_errors(self, device: torch.device) -> Reported:
        """For what a store does before ``fetch`` or ``send``: an error in it ends the other ranks' calls, too."""
        nothing = torch.zeros(self.ranks, dtype=torch.int64, device=header_device(device, self.group))
        return Reported(self.group, partial(self._counts, nothing))

    def _plan(self, slots: Tensor, call: Call) -> tuple[Tensor, list[int], list[int]]:
        """The slots' order by owner, but for -1; how many go to each rank, and how many each rank has for this one."""
        owner = slots // (self.views * self.block)  # -1 stays -1
        counts = torch.bincount(owner + 1, minlength=self.ranks + 1)
        return owner.argsort(stable=True)[counts[0] :], *self._counts(counts[1:], call)

    def _counts(self, here: Tensor, call: Call) -> tuple[list[int], list[int]]:
        """How many rows go to each rank, and how many each rank has for this one; with it goes what ranks make sure of.

        Raises:
            RuntimeError, ValueError: see ``settle``.
        """
        mine = torch.stack((here, torch.full_like(here, call.digest())), 1)
        found = torch.empty_like(mine)
        first_exchange(lambda: dist.all_to_all_single(found, mine, group=self.group), call)
        there, digests = found.T.tolist()
        settle(call, digests, self.group)
        return here.tolist(), there

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, self.group)
        return arrived

    def as_dtensor(self, table: Tensor) -> DTensor:
        """A rank's table, sharing its memory, as its part of (num_items, views, ...)."""
        from torch.distributed.device_mesh import DeviceMesh  # late: they take longer to import than all the rest
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group or dist.group.WORLD, table.device.type)
        local = table.unflatten(0, (self.own, self.views))
        shape = torch.Size((self.num_items, *local.shape[1:]))
        stride = torch.empty(shape, dtype=table.dtype, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def own_part(self, whole: Tensor) -> Tensor:
        """This rank's table of a state: of the same ranks' DTensor, or of the whole table of one process."""
        if hasattr(whole, "to_local"):
            return whole.to_local().flatten(0, 1)
        return whole[self.first * self.views :][: self.own * self.views]
