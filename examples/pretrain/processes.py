"""The processes of a run: those that torchrun started, or the only one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Made = TypeVar("Made")
# The longest that a process waits for another. It is for one that hangs: a dead one is noticed at once.
TIMEOUT = timedelta(seconds=30)


class LostProcess(RuntimeError):
    """Another process of the run is gone, or does not answer."""


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run, which all call these methods together.

    Attributes:
        local_rank, local_count: among those on this machine.
        job: torchrun's name of the run, the same after a restart; None without torchrun.
        restarts: how often torchrun has started all processes again.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    job: str | None = None
    restarts: int = 0

    @classmethod
    def launched(cls) -> Processes:
        """As torchrun says in the environment."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            count=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            job=os.environ.get("TORCHELASTIC_RUN_ID"),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    @property
    def first(self) -> bool:
        """The one that prints, evaluates and writes files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """In front of a message of this process."""
        return f"rank {self.rank}: " if self.count > 1 else ""

    def part(self, rows: Tensor) -> Tensor:
        """This process's rows of a whole batch: contiguous parts, in the order of ranks, the first ones of a row more
        where they cannot be equal."""
        return rows.tensor_split(self.count)[self.rank]

    def averaging(self, encoder: nn.Module) -> nn.Module:
        """The encoder, with its gradients averaged over the processes. The hooks for it sit on the parameters: passes
        through ``encoder`` itself count as well, as long as the returned module has one in the same step."""
        return encoder if self.count == 1 else DistributedDataParallel(encoder)

    def mean(self, values: Tensor) -> Tensor:
        """Of each process's values."""
        if self.count > 1:
            dist.all_reduce(values)
        return values / self.count

    def collect(self, value: Any) -> list[Any]:
        """By rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def share_first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, or the error that it meets, in all of them."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:  # the others wait for it
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """The process group in which they can talk, for work on `device`.

        Raises:
            LostProcess: another process is gone, or was not heard of for TIMEOUT.
        """
        if self.count == 1:
            yield
            return
        store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps its store when it restarts: without a prefix, the addresses of the dead would be found in it.
        store = dist.PrefixStore(f"restart {self.restarts}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise LostProcess(f"another process of the run is gone or hangs: {error}") from error
            raise
        finally:
            dist.destroy_process_group()

    @contextmanager
    def silence_others(self) -> Iterator[None]:
        """What all processes have to say is said once. Errors that nothing catches are shown by each."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Limits PyTorch, and the BLAS below scikit-learn: with matrices this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
