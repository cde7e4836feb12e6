"""Checkpoints that are whole or refused: written under another name, sealed with a checksum, then renamed."""

from __future__ import annotations

import hashlib
import os
import pickle
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from .files import MARK, SEAL_BYTES, replacing, seal, why_not_whole

__all__ = ["MARK", "SEAL_BYTES", "CheckpointError", "load", "save"]


_EXPECTED = "state must be tensors, numbers, strings and containers of them"


class CheckpointError(RuntimeError):
    """The file is missing, damaged, or not what was asked for."""


class _Digested:
    """What torch.save takes for a file: passes on what is written and takes its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Writes ``state``, as ``torch.save`` does, so that at any moment ``path`` is the whole checkpoint from before or
    the whole new one, through a killed process or a power cut.

    Args:
        path: written first beside it, as ``path`` + ".<8 hexadecimal digits>.partial"; what a killed process leaves of
            that, the next ``save`` removes. A symbolic link stays, and the file behind it is replaced. A file that is
            there keeps its permissions. Of several processes that save to one path, the last has it.
        state: tensors, numbers, strings, and containers of them: what ``torch.load(weights_only=True)`` takes.

    Raises:
        TypeError: there is something else in ``state``, or a sharded store's tensors, of which this process has a part.
        OSError: the disk is full, say, or ``path`` is no regular file. ``path`` is as it was.
    """
    _check_whole(state)
    with replacing(path) as file:
        digested = _Digested(file)
        _write(state, digested)
        file.write(seal(digested.sha256))
        file.seek(0)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if others:  # better found here than when it is needed
            raise TypeError(f"{_EXPECTED}, got {', '.join(others)}")


def _write(state: Any, digested: _Digested) -> None:
    try:
        torch.save(state, digested)
    except Exception as error:
        # Of a write that failed, torch's own writer says that, as it closes, its position is another than expected.
        if digested.failure is not None:
            raise digested.failure from None
        if isinstance(error, (pickle.PicklingError, TypeError, AttributeError, RecursionError)):
            raise TypeError(f"{_EXPECTED}, got what cannot be pickled: {error}") from error
        raise


def _check_whole(state: Any) -> None:
    try:
        leaves = tree_leaves(state)
    except RecursionError:
        raise TypeError(f"{_EXPECTED}, got them nested too deep, or in themselves") from None
    for leaf in leaves:
        if hasattr(leaf, "to_local"):
            expected = "whole tensors (a sharded store is torch.distributed.checkpoint's to save)"
            raise TypeError(f"state must have {expected}, got a DTensor of shape {tuple(leaf.shape)}")


def load(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> Any:
    """The state that ``save`` wrote. The whole file is checked first: torch.load by itself takes flipped bits.

    Args:
        path: of a file that ``save`` wrote.
        map_location: the device that tensors come to. One that is not there is torch's error, before the file is read.

    Raises:
        CheckpointError: there is no such file, or it is not whole (truncated, damaged, or not written by ``save``), or
            this PyTorch does not read it.
    """
    torch.empty(0, dtype=torch.uint8, device=map_location)
    try:
        with open(path, "rb") as file:
            damage = why_not_whole(file, "checkpoint")
            if damage is not None:
                raise CheckpointError(f"{path}: expected a whole checkpoint, found {damage}")
            return _read(path, file, map_location)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file") from None
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: expected a checkpoint, found what cannot be read: {reason}") from error


def _read(path: str | os.PathLike[str], file: BinaryIO, map_location: torch.device | str) -> Any:
    try:
        # weights_only: a checkpoint is data; unpickling arbitrary objects would run code from the file.
        return torch.load(file, map_location=map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):  # says nothing of the file
        raise
    except Exception as error:  # a zip file and a pickle of any content: there is nothing that torch might not raise
        reason = f"found another: {type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: expected a checkpoint that this PyTorch reads, {reason}") from error
