"""The checkpoints of pretrain.py, which refuse to be mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emc2_kernels.checkpoint import CheckpointError, load

FIELDS = (
    "settings",
    "job",
    "epoch",
    "step",
    "encoder",
    "losses",
    "optimizer",
    "scheduler",
    "scaler",
    "sampler",
    "generators",
    "again_generators",
    "history",
    "seconds",
)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that was saved at `path`, on the CPU, by a run with exactly these `settings`."""
    state = load(path)
    missing = [field for field in FIELDS if not (isinstance(state, dict) and field in state)]
    if missing:
        raise CheckpointError(f"{path}: expected a checkpoint with the fields {', '.join(FIELDS)}; {missing} missing")
    if state["settings"] != settings:
        raise CheckpointError(f"{path}: the checkpoint is of another run: {_differences(state['settings'], settings)}")
    return state


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return "; ".join(f"{name}: expected {expected.get(name)!r}, found {found.get(name)!r}" for name in names)
