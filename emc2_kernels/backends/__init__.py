"""What runs where: one table of backends, and the choice between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """Its module has ``step``, ``transition`` and ``view_coin`` with the reference's signatures."""

    module: str
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None  # None: any
    why_unavailable: Callable[[], str | None]  # on this machine; None: it can run


# Fastest first: "auto" takes the first that can run the operands.
TABLE = {
    "cpu": Backend("cpu", ("cpu",), HALF_AND_SINGLE, native.why_unavailable),
    "reference": Backend("reference", None, None, lambda: None),
}
NAMES = ("auto", *TABLE)


def backends() -> dict[str, str]:
    """Each backend's name, and "available" or the reason why it cannot run here. Builds nothing."""
    return {name: backend.why_unavailable() or "available" for name, backend in TABLE.items()}


@cache
def _module(name: str) -> ModuleType:
    return import_module(f".{TABLE[name].module}", __name__)


def _suits(backend: Backend, device: str, dtype: torch.dtype) -> bool:
    """Whether the backend takes such operands. Integer operands (item ids) suit every backend."""
    device_ok = backend.devices is None or device in backend.devices
    return device_ok and (backend.dtypes is None or dtype in backend.dtypes or dtype == torch.int64)


def resolve(name: str, operand: Tensor) -> ModuleType:
    """The module that runs ``name`` on operands like this one.

    Raises:
        ValueError: the named backend takes neither this device nor this dtype.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    if name == "auto":
        return _fastest(operand.device.type, operand.dtype)
    backend = TABLE[name]
    if not _suits(backend, operand.device.type, operand.dtype):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        takes = f"{' or '.join(backend.devices)} tensors of {dtypes}"
        raise ValueError(
            f"backend {name!r} takes {takes}, got {operand.dtype} on {operand.device}: use 'reference' or 'auto'"
        )
    reason = backend.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return _module(name)


@cache
def _fastest(device: str, dtype: torch.dtype) -> ModuleType:
    return next(_module(name) for name, backend in TABLE.items() if _suits(backend, device, dtype) and _can_run(name))


@cache
def _can_run(name: str) -> bool:
    """Whether "auto" may take it. A backend that should run here and cannot is reported once, not skipped silently."""
    reason = TABLE[name].why_unavailable()
    if reason is None and name == "cpu":
        try:
            native.library()
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(
            f"emc2_kernels: backend {name!r} cannot run here, so the much slower 'reference' does its work: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None
