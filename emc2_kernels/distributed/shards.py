"""A global batch over the ranks of a process group: contiguous shards, in rank order. All of it is torch.distributed's.

The keys of a global batch are ordered view by view and, within a view, rank by rank, as one process would have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..autograd import no_double_backward
from .agreement import Call, check_alike, first_exchange, place, settle

GATHERS = ("none", "all", "ring")
NO_SECOND_DERIVATIVE = "gathering over ranks has no second derivative"
NUMBERS = ("step", "log_scale")  # what ranks compare of their tensors
ALIKE = 1e-3  # what they may differ by: integers not at all, the log of a temperature by rounding


class Shards(NamedTuple):
    """How many rows each rank has of a batch that belongs to all of them."""

    group: dist.ProcessGroup | None  # None: the default group
    rank: int  # in the group
    sizes: list[int]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """Row of the whole batch that this rank's first row is."""
        return sum(self.sizes[: self.rank])

    @property
    def ddp_factor(self) -> float:
        """Times a mean over this rank's rows: DistributedDataParallel's mean over ranks is then the mean over all rows,
        however unequal the shards."""
        return len(self.sizes) * self.sizes[self.rank] / self.total


def exchange_sizes(
    rows: int, call: Call, device: torch.device, group: dist.ProcessGroup | None, **numbers: Tensor | None
) -> Shards:
    """A collective: every rank says how many rows it has, and what it takes to be the same everywhere.

    Args:
        numbers: see ``meet``.

    Raises:
        RuntimeError: no process group, or one that this process is not in; another rank has met an error.
        ValueError: on every rank, if ranks differ in the call or a number; names what, and a rank that differs.
    """
    rank, _ = place(group, 'gather must be "none"')
    return Shards(group, rank, meet(call, device, group, rows, **numbers))


def meet(
    call: Call, device: torch.device, group: dist.ProcessGroup | None, rows: int = 0, **numbers: Tensor | None
) -> list[int]:
    """The header's exchange, of one size for all calls. Returns every rank's rows.

    Args:
        numbers: one-element tensors by a name of NUMBERS, which are compared where they lie. None: there is none.
    """
    # Doubles hold all of it exactly, a step below 2^32 too.
    mine = torch.tensor([rows, call.digest(), *(0 for _ in NUMBERS)], dtype=torch.float64, device=device)
    for slot, name in enumerate(NUMBERS, len(mine) - len(NUMBERS)):
        if numbers.get(name) is not None:
            mine[slot : slot + 1] = numbers[name].detach()
    found = mine.new_empty(dist.get_world_size(group) * len(mine))
    first_exchange(lambda: _all_gather(found, mine, group), call)
    sizes, digests, *columns = found.view(-1, len(mine)).T.tolist()
    settle(call, digests, group)
    for name, column in zip(NUMBERS, columns, strict=True):
        near = [column[0] if abs(value - column[0]) <= ALIKE else value for value in column]
        check_alike(name, [str(int(value) if value.is_integer() else value) for value in near])
    return [int(size) for size in sizes]


def _all_gather(found: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> None:
    """mine (n, ...) of every rank into found (ranks n, ...)."""
    renamed = hasattr(dist, "all_gather_single")  # in torch 2.13, which warns of the other name
    (dist.all_gather_single if renamed else dist.all_gather_into_tensor)(found, mine, group)


def gather_rows(rows: Tensor, shards: Shards) -> Tensor:
    """(n of this rank, ...) -> (n of all ranks, ...). A rank's rows get the sum of all ranks' gradients."""
    return _GatherRows.apply(rows, shards)


def gather_views(rows: Tensor, shards: Shards) -> Tensor:
    """The same for rows that are view after view, (v b, ...) with shards of b: (v B, ...), view after view."""
    views = rows.shape[0] // shards.sizes[shards.rank]
    if views == 1:
        return gather_rows(rows, shards)
    whole = gather_rows(rows.unflatten(0, (views, -1)).transpose(0, 1), shards)
    return whole.transpose(0, 1).flatten(0, 1)


def all_true(flag: Tensor, shards: Shards) -> Tensor:
    """() bool: whether the flag () is set on every rank; a collective."""
    every = flag.int()
    dist.all_reduce(every, dist.ReduceOp.MIN, shards.group)
    return every.bool()


def sum_over_ranks(values: Tensor, shards: Shards) -> Tensor:
    """(k,) -> (k,) summed in rank order, so to the same bits everywhere; a collective."""
    found = values.new_empty(len(shards.sizes) * values.shape[0])
    _all_gather(found, values.contiguous(), shards.group)
    return found.view(-1, values.shape[0]).sum(0)


def broadcast_in_turn(tensors: list[Tensor], shards: Shards) -> Iterator[list[Tensor]]:
    """Every rank's tensors, in rank order, one rank's at a time; each has a whole multiple of its shard's rows."""
    own = shards.sizes[shards.rank]
    for rank, size in enumerate(shards.sizes):
        if rank == shards.rank:
            here = [tensor.detach().contiguous() for tensor in tensors]
        else:
            here = [tensor.new_empty(tensor.shape[0] // own * size, *tensor.shape[1:]) for tensor in tensors]
        source = rank if shards.group is None else dist.get_global_rank(shards.group, rank)
        for tensor in here:
            dist.broadcast(tensor, source, shards.group)
        yield here


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        most = max(shards.sizes)  # all_gather wants equal sizes
        if rows.shape[0] == most:
            padded = rows.contiguous()
        else:
            padded = rows.new_zeros(most, *rows.shape[1:])
            padded[: rows.shape[0]] = rows
        found = rows.new_empty(len(shards.sizes) * most, *rows.shape[1:])
        _all_gather(found, padded, shards.group)
        if min(shards.sizes) == most:
            return found
        return torch.cat([part[:size] for part, size in zip(found.split(most), shards.sizes, strict=True)])

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        shards = ctx.shards
        own = shards.sizes[shards.rank]
        # Every rank has a gradient of every row. All-to-all and a sum in rank order: the same bits on every run.
        found = grad.new_empty(len(shards.sizes) * own, *grad.shape[1:])
        dist.all_to_all_single(found, grad.contiguous(), [own] * len(shards.sizes), shards.sizes, shards.group)
        total = found.unflatten(0, (len(shards.sizes), own)).sum(0)
        return *no_double_backward(NO_SECOND_DERIVATIVE, total, of=(grad,)), None
