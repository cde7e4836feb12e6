"""Checkpoints that are whole or refused: written under another name, sealed with a checksum, then renamed."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

# At the end of the file, after the SHA-256 digest of all before it. torch.load reads the file all the same.
MARK = b"emc2_kernels:seal"
SEAL_BYTES = hashlib.sha256().digest_size + len(MARK)
CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """The file is missing, damaged, or not what was asked for."""


class _Digested:
    """What torch.save takes for a file: passes on what is written and takes its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Writes ``state``, as ``torch.save`` does, so that at any moment ``path`` is the whole checkpoint from before or
    the whole new one, through a killed process or a power cut. One process at a time may save to a path.

    Args:
        path: written first as ``path`` + ".partial", which a killed process may leave behind.
        state: tensors, numbers, strings, and containers of them: what ``torch.load(weights_only=True)`` takes.

    Raises:
        TypeError: there is something else in ``state``, or a sharded store's tensors, of which this process has a part.
        OSError: the disk is full, say. ``path`` is as it was.
    """
    _check_whole(state)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            digested = _Digested(file)
            torch.save(state, digested)
            file.write(digested.sha256.digest() + MARK)
            file.flush()
            # The rename may reach the disk before the data does: after a power cut the name would hold an empty file.
            os.fsync(file.fileno())
        others = torch.serialization.get_unsafe_globals_in_checkpoint(partial)
        if others:  # better found here than when it is needed
            raise TypeError(f"state must be tensors, numbers, strings and containers of them, got {', '.join(others)}")
        os.replace(partial, path)
        _sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _check_whole(state: Any) -> None:
    for leaf in tree_leaves(state):
        if hasattr(leaf, "to_local"):
            expected = "whole tensors (a sharded store is torch.distributed.checkpoint's to save)"
            raise TypeError(f"state must have {expected}, got a DTensor of shape {tuple(leaf.shape)}")


def _sync_directory(directory: Path) -> None:
    """A rename is a change of the directory: until that is on the disk, a power cut can take it back."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> Any:
    """The state that ``save`` wrote. The whole file is checked first: torch.load by itself takes flipped bits.

    Raises:
        CheckpointError: there is no such file, or it is not whole: truncated, damaged, or not written by ``save``.
    """
    try:
        with open(path, "rb") as file:
            _check_seal(path, file)
            # weights_only: a checkpoint is data; unpickling arbitrary objects would run code from the file.
            return torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, found what cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint that this PyTorch reads, found another: {error}"
        ) from error


def _check_seal(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Leaves the file at its beginning."""
    left = file.seek(0, os.SEEK_END) - SEAL_BYTES
    file.seek(max(left, 0))
    digest, mark = file.read(SEAL_BYTES - len(MARK)), file.read()
    if mark != MARK:
        reason = "a file without a checkpoint's end: truncated, damaged or of another kind"
        raise CheckpointError(f"{path}: expected a whole checkpoint, found {reason}")
    sha256 = hashlib.sha256()
    file.seek(0)
    while left > 0:
        chunk = file.read(min(left, CHUNK))
        sha256.update(chunk)
        left -= len(chunk)
    if sha256.digest() != digest:
        raise CheckpointError(f"{path}: expected a whole checkpoint, found a damaged one: its checksum is another")
    file.seek(0)
