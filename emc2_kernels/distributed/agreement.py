"""What ranks make sure of before they exchange anything else: that all of them are in one call, of one form.

A rank whose options are others, or that has found an error, would leave the rest waiting, or hand them bytes that they
take for something else. So every exchange begins with a header of one size, whatever is called; where headers differ
all ranks see it, and tell each other what it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks

DIGEST_BYTES = 6  # a double holds it exactly


class Call(NamedTuple):
    """What a rank is about to do with the others."""

    form: dict[str, str]  # what must be the same on all ranks, as an error message shows it; "the call" first
    error: Exception | None = None  # that this rank has met instead; its form is then nobody else's

    @classmethod
    def of(cls, name: str, form: Mapping[str, Any]) -> Call:
        return cls({"the call": name} | {option: _shown(value) for option, value in form.items()})

    def digest(self) -> int:
        """What a header says of it."""
        return int.from_bytes(hashlib.blake2b(repr(self.form).encode(), digest_size=DIGEST_BYTES).digest())


def _shown(value: Any) -> str:
    return checks.describe(value) if isinstance(value, Tensor) else repr(value)  # a GPU's value would be waited for


def place(group: dist.ProcessGroup | None, argument: str) -> tuple[int, int]:
    """This process's rank in the group, and the number of ranks.

    Args:
        argument: what asks for a group, and its value that does not: ``gather must be "none"``.

    Raises:
        RuntimeError: no process group, or one that this process is not in.
    """
    if not is_member(None):
        raise RuntimeError(f"{argument} without a process group: call torch.distributed.init_process_group")
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError(f"process_group must have this process, of rank {dist.get_rank()}, got one without it")
    return rank, dist.get_world_size(group)


def is_member(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank(group) >= 0


def settle(call: Call, digests: list[float], group: dist.ProcessGroup | None) -> None:
    """A collective only where ranks have something to tell each other.

    Args:
        digests: of every rank's call.

    Raises:
        RuntimeError: where another rank has met an error; names the rank and the error.
        ValueError: ranks' forms differ; names what differs, and how, the same on all ranks.
    """
    if len(set(digests)) == 1:  # or all have met errors, of which each raises its own
        return
    error = call.error and f"{type(call.error).__name__}: {call.error}"
    everyone: list[Any] = [None] * len(digests)
    dist.all_gather_object(everyone, (call.form, error), group)
    for rank, (_, met) in enumerate(everyone):
        if met is not None:
            raise RuntimeError(f"rank {rank} failed: {met}")
    forms = [form for form, _ in everyone]
    for name in dict.fromkeys(name for form in forms for name in form):
        check_alike(name, [form.get(name, "nothing") for form in forms])


def check_alike(name: str, shown: list[str]) -> None:
    """Args: shown: each rank's value, as a message shows it."""
    for rank, value in enumerate(shown):
        if value != shown[0]:
            got = f"{shown[0]} on rank 0 and {value} on rank {rank}"
            raise ValueError(f"{name} must be the same on all ranks, got {got}")


class Reported:
    """A block without collectives beside an exchange: an error in it is raised here, and ends the ranks that are at
    that exchange, too. There they raise a RuntimeError with this rank's number and what it has met.

    Args:
        exchange: takes part in it with this call, which an error may have come in place of.
        closing: that call where all is well, if the exchange is at the block's end. None: it comes after the block.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, exchange: Callable[[Call], Any], closing: Call | None = None
    ) -> None:
        self._group, self._exchange, self._closing = group, exchange, closing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            if self._closing is not None:
                self._exchange(self._closing)
        elif isinstance(error, Exception) and is_member(self._group):
            with suppress(RuntimeError):  # what others have met, or that they have not come: this rank's goes first
                self._exchange(Call({}, error))


def first_exchange(exchange: Callable[[], Any], call: Call) -> None:
    """What ranks that do not come to it may have done is said in the error that follows from that."""
    try:
        exchange()
    except RuntimeError as error:
        error.add_note(
            f"Here {call.form.get('the call', 'a call')} waits for the other ranks, which must all make it, equally "
            'often. One may have ended, or have gather="none", sharded=False or another process_group: it then says '
            "nothing to this one."
        )
        raise


def header_device(preferred: torch.device | None, group: dist.ProcessGroup | None) -> torch.device:
    """Where a header is sent from. preferred: of the call's tensors, if it has any."""
    if preferred is not None and preferred.type != "meta":
        return preferred
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
