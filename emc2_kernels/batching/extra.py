"""Packages that only batching needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(name: str, group: str = "batching") -> ModuleType:
    """The module, or an ImportError that says which of setup.py's extras has it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        message = f'emc2_kernels.batching: expected the package {package}: pip install "emc2_kernels[{group}]"; {error}'
        raise ImportError(message) from error
