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

from . import gpu
from .cpu import build as cpu_build
from .cuda import build as cuda_build
from .extension import Unavailable
from .params import WalkParams

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """Module ``backends.<name>.<operation>`` has the functions of the reference's, with their signatures."""

    operations: tuple[str, ...]  # of OPERATIONS, those that it has
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None  # None: any
    why_unavailable: Callable[[], str | None]  # on this machine; None: it can run
    # Whether "auto" should give it this walk; and whether more is wanted of it than its samples and states.
    prefers: Callable[[WalkParams, bool], bool] = lambda walk, more_results: True
    also: Callable[[], tuple[str, ...]] = tuple  # devices that it takes when asked for by name

    def why_not(self) -> str | None:
        """Why it cannot run on this machine, as far as is known without building it. Whatever is wrong with a backend
        is such a reason, and no error: the others have to work."""
        try:
            return self.why_unavailable()
        except Exception as error:
            return _told(error)


OPERATIONS = ("mh", "lse", "gumbel", "isir")  # mh: step, transition, view_coin

# Fastest first: "auto" takes the first that can run the operands.
TABLE = {
    "cuda": Backend(("mh",), ("cuda",), HALF_AND_SINGLE, cuda_build.why_unavailable_here, gpu.prefers_cuda_kernels),
    "triton": Backend(OPERATIONS, ("cuda",), HALF_AND_SINGLE, gpu.why_no_triton, also=gpu.interpreted_devices),
    "cpu": Backend(OPERATIONS, ("cpu",), HALF_AND_SINGLE, cpu_build.why_unavailable),
    "reference": Backend(OPERATIONS, None, None, lambda: None),
}
NAMES = ("auto", *TABLE)


def backends() -> dict[str, str]:
    """Each backend's name, and "available" or the reason why it cannot run here. Builds nothing, raises nothing."""
    return {name: backend.why_not() or "available" for name, backend in TABLE.items()}


@cache
def _module(name: str, op: str) -> ModuleType:
    return import_module(f".{name}.{op}", __name__)


def _suits(backend: Backend, op: str, device: str, dtype: torch.dtype, by_name: bool = False) -> bool:
    """Whether the backend takes such operands. Integer operands (item ids) suit every backend."""
    if op not in backend.operations:
        return False
    device_ok = backend.devices is None or device in backend.devices or (by_name and device in backend.also())
    return device_ok and (backend.dtypes is None or dtype in backend.dtypes or dtype == torch.int64)


def resolve(
    name: str, operand: Tensor, walk: WalkParams | None = None, op: str = "mh", more_results: bool = False
) -> ModuleType:
    """The module that runs ``name`` on operands like this one.

    "auto" is the fastest that can and, of those, the first that prefers this walk.

    Args:
        op: of OPERATIONS.
        more_results: whether accepted proposals or a log-sum-exp are wanted of the walk, too.

    Raises:
        ValueError: the named backend takes neither this device nor this dtype.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    if name == "auto":
        able = _able(operand.device.type, operand.dtype, op)
        if walk is None or len(able) == 1:
            return _module(able[0], op)
        return _module(next(candidate for candidate in able if TABLE[candidate].prefers(walk, more_results)), op)
    return _named(name, operand.device.type, operand.dtype, op)


@cache
def _named(name: str, device: str, dtype: torch.dtype, op: str) -> ModuleType:
    """What has been found to run is not asked again at each call; what cannot run raises each time."""
    backend = TABLE[name]
    if op not in backend.operations:
        those = ", ".join(repr(other) for other in TABLE if op in TABLE[other].operations)
        raise ValueError(f"backend must be 'auto' or one of {those} for this operation, got {name!r}")
    if not _suits(backend, op, device, dtype, by_name=True):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        takes = f"{' or '.join(backend.devices)} tensors of {dtypes}"
        # Of the two only what is wrong: a loss hands over copies, whose dtype the caller may never have seen.
        device_suits = device in backend.devices or device in backend.also()
        came = f"operands of {str(dtype).removeprefix('torch.')}" if device_suits else f"tensors on {device}"
        raise ValueError(f"backend {name!r} takes {takes}, got {came}: use 'reference' or 'auto'")
    reason = backend.why_not() or _failure(name, op)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return _module(name, op)


@cache
def _able(device: str, dtype: torch.dtype, op: str) -> tuple[str, ...]:
    """The backends that can run such operands here, fastest first. The reference always can.

    Nothing is skipped silently: a failed build is reported, and that only the reference is left. A compiler that is
    not there is no failure where another fast backend does the work.
    """
    suited = [name for name, backend in TABLE.items() if _suits(backend, op, device, dtype)]
    missing = {name: reason for name in suited if (reason := TABLE[name].why_not()) is not None}
    failed = {name: reason for name in suited if name not in missing and (reason := _failure(name, op)) is not None}
    able = tuple(name for name in suited if name not in missing and name not in failed)
    if able[0] == "reference" and len(suited) > 1:
        _warn(missing | failed, "the much slower 'reference'")
    elif failed:
        _warn(failed, repr(able[0]))
    return able


def _warn(reasons: dict[str, str], instead: str) -> None:
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    _warn_once(f"emc2_kernels: a fast backend cannot run here, so {instead} does its work. {why}")


@cache
def _warn_once(message: str) -> None:
    """In a process, whatever the operands were."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _failure(name: str, op: str) -> str | None:
    """Why a backend cannot be built or imported, after an attempt."""
    try:
        _BUILDS.get(name, lambda: None)()
        _module(name, op)
    except Exception as error:
        return _told(error)
    return None


def _told(error: Exception) -> str:
    return str(error) if type(error) in (Unavailable, RuntimeError) else f"{type(error).__name__}: {error}"


_BUILDS: dict[str, Callable[[], object]] = {"cpu": cpu_build.library, "cuda": cuda_build.library_here}
