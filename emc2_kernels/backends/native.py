"""The compiled core: built on first use with the machine's C++ compiler (``build.py`` says where it is kept).

What is compiled for one processor may not run on another: the cache's key covers the sources, the flags, Python, torch
and the processor's features.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .build import Extension, cache_root, digest_of, source_root

MODULE = "emc2_native"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-Wno-psabi")


def architecture_flags() -> list[str]:
    """Which instruction sets: ``$EMC2_ARCH``, as for CMake; by default this processor's. Empty: what all of its kind
    have."""
    return shlex.split(os.environ.get("EMC2_ARCH", "-march=native"))


def sources() -> list[Path]:
    root = source_root()
    return sorted(root.glob("csrc/cpu/*.cpp")) + [root / "python_bindings" / "module.cpp"]


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that is there."""
    chosen = os.environ.get("CXX")
    if chosen:  # may be a command line, such as "ccache g++"
        return chosen if shutil.which(shlex.split(chosen)[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def why_unavailable() -> str | None:
    """None where the core can be had, as far as can be told without building it."""
    return _extension.why_unavailable()


@cache
def library() -> ModuleType:
    """The compiled core; builds it if it is not in the cache.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has the compiler's output.
    """
    return _extension.library()


def _no_compiler() -> str:
    wanted = os.environ.get("CXX") or "c++, g++ or clang++"
    return f"no C++ compiler ({wanted}) found: install g++, or set CXX to one"


@cache
def _library_path() -> Path:
    root = source_root()
    files = (*sources(), *root.glob("csrc/*.h"), *root.glob("csrc/cpu/*.h"))
    parts = (*FLAGS, *architecture_flags(), sys.implementation.cache_tag, torch.__version__, _processor())
    key = digest_of(files, parts)
    return cache_root() / key / f"{MODULE}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _compile(folder: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and needed only here

    # The ninja that pip installed lies beside this Python, which need not be on the PATH. The core has no header of
    # torch, so the ABI that torch would ask the compiler about does not matter.
    settings = {
        "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))),
        "CXX": compiler(),
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
    }
    with _environment(settings):
        cpp_extension.load(
            MODULE,
            [str(source) for source in sources()],
            extra_cflags=[*FLAGS, *architecture_flags()],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
        )


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_extension = Extension(MODULE, "CPU kernels", 15, _library_path, compiler, _no_compiler, _compile)
