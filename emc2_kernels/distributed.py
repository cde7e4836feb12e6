"""A global batch over the ranks of a process group: contiguous shards, in rank order. All of it is torch.distributed's.

The keys of a global batch are ordered view by view and, within a view, rank by rank, as one process would have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .checks import OPERAND_DTYPES
from .once import not_twice

GATHERS = ("none", "all", "ring")
NO_SECOND_DERIVATIVE = "gathering over ranks has no second derivative"
ALIKE = 1e-3  # what two ranks' numbers may differ by: integers not at all, the log of a temperature by rounding


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


def shards_of(
    rows: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    alike: Mapping[str, float | torch.dtype | Tensor],
) -> Shards:
    """A collective: every rank says how many rows it has, and what it takes to be the same everywhere.

    Args:
        alike: numbers, dtypes or 0-d tensors by name. Ranks that differ in one would wait for each other for ever, or
            take each other's bytes for something else.

    Raises:
        RuntimeError: no process group, or one that this process is not in.
        ValueError: on every rank, if ranks differ in ``alike``; names what, and a rank that differs.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError('gather must be "none" without a process group: call torch.distributed.init_process_group')
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise RuntimeError(f"process_group must have this process, of rank {dist.get_rank()}, got one without it")
    on_device = {name: value.detach() for name, value in alike.items() if isinstance(value, Tensor)}
    here = {name: _as_number(value) for name, value in alike.items() if name not in on_device}
    # Doubles hold all of it exactly, a step below 2^32 too.
    mine = torch.tensor([rows, *here.values()], dtype=torch.float64, device=device)
    mine = torch.cat([mine, *(value.double().view(1) for value in on_device.values())])
    found = mine.new_empty(ranks * len(mine))
    _all_gather(found, mine, group)
    sizes, *columns = found.view(ranks, -1).T.tolist()
    for name, column in zip([*here, *on_device], columns, strict=True):
        _check_alike(name, column, alike[name])
    return Shards(group, rank, [int(size) for size in sizes])


def _all_gather(found: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> None:
    """mine (n, ...) of every rank into found (ranks n, ...)."""
    renamed = hasattr(dist, "all_gather_single")  # in torch 2.13, which warns of the other name
    (dist.all_gather_single if renamed else dist.all_gather_into_tensor)(found, mine, group)


def _as_number(value: float | torch.dtype) -> float:
    return OPERAND_DTYPES.index(value) if isinstance(value, torch.dtype) else value


def _check_alike(name: str, column: list[float], mine: float | torch.dtype | Tensor) -> None:
    """column: every rank's number."""
    differs = next((rank for rank, value in enumerate(column) if abs(value - column[0]) > ALIKE), None)
    if differs is not None:
        first, other = (_shown(column[rank], mine) for rank in (0, differs))
        raise ValueError(f"{name} must be the same on all ranks, got {first} on rank 0 and {other} on rank {differs}")


def _shown(number: float, like: float | torch.dtype | Tensor) -> float | torch.dtype:
    if isinstance(like, torch.dtype):
        return OPERAND_DTYPES[int(number)]
    return int(number) if number.is_integer() else number


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


def true_on_all(flag: Tensor, shards: Shards) -> Tensor:
    """() bool: whether the flag () is set on every rank; a collective."""
    every = flag.int()
    dist.all_reduce(every, dist.ReduceOp.MIN, shards.group)
    return every.bool()


def each_rank(tensors: list[Tensor], shards: Shards) -> Iterator[list[Tensor]]:
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
        return *not_twice(NO_SECOND_DERIVATIVE, found.unflatten(0, (len(shards.sizes), own)).sum(0)), None
