"""Checkpoints that are whole or absent, and that refuse to be mixed up."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FIELDS = ("settings", "epoch", "step", "encoder", "loss", "optimizer", "scheduler", "generators", "history", "seconds")


class CheckpointError(RuntimeError):
    """The file is missing, damaged, or of a run with other settings."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path`, then renames: an interrupted write leaves the checkpoint of the epoch before."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            # The rename may reach the disk before the data does: after a power cut the name would hold an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that was saved at `path`, on the CPU, by a run with exactly these `settings`."""
    try:
        # weights_only: a checkpoint is data; unpickling arbitrary objects would run code from the file.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a checkpoint to resume from, found no such file") from None
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, found a file that cannot be read (truncated or damaged?): {reason}"
        ) from error
    missing = [field for field in FIELDS if not (isinstance(state, dict) and field in state)]
    if missing:
        raise CheckpointError(f"{path}: expected a checkpoint with the fields {', '.join(FIELDS)}; {missing} missing")
    if state["settings"] != settings:
        raise CheckpointError(f"{path}: the checkpoint is of another run: {_differences(state['settings'], settings)}")
    return state


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return "; ".join(f"{name}: expected {expected.get(name)!r}, found {found.get(name)!r}" for name in names)
