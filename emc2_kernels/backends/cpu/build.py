"""The compiled core: built on first use with the machine's C++ compiler (``backends/extension.py`` says where it is
kept).

What is compiled for one processor may not run on another: the cache's key covers the sources, the flags, Python and the
processor's features. It leaves torch out: the core includes no header of torch and calls nothing in it, addresses and
numbers are all that is passed, and its threads are those of the compiler's own OpenMP library.
"""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from ..extension import (
    Extension,
    cache_root,
    compile_and_link,
    find_compiler,
    headers,
    shell_words,
    source_digest,
    source_root,
)

MODULE = "emc2_cpu"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-Wno-psabi")


def architecture_flags() -> list[str]:
    """Which instruction sets: ``$EMC2_ARCH``, as for CMake; by default this processor's. Empty: what all of its kind
    have."""
    return shell_words("EMC2_ARCH", "-march=native")


def sources() -> list[Path]:
    root = source_root()
    return sorted(root.glob("csrc/cpu/*.cpp")) + [root / "python_bindings" / "cpu_module.cpp"]


def compiler() -> list[str]:
    """The C++ compiler: ``$CXX``, or the first of c++, g++ and clang++ that is there.

    Raises:
        Unavailable: there is none.
    """
    return find_compiler("C++ compiler", "CXX", ("c++", "g++", "clang++"), "g++")


def why_unavailable() -> str | None:
    """None where the core can be had, as far as can be told without building it."""
    return _extension.why_unavailable()


@cache  # asked at every step
def library() -> ModuleType:
    """The compiled core; builds it if it is not in the cache.

    Raises:
        Unavailable: there is no compiler, or it failed; the message has the compiler's output.
    """
    return _extension.library()


@cache
def _library_path() -> Path:
    files = (*sources(), *headers("cpu"))
    parts = (*FLAGS, *architecture_flags(), sys.implementation.cache_tag, _processor())
    key = source_digest(files, parts)
    return cache_root() / key / f"{MODULE}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _compile(compiler: list[str], target: Path) -> None:
    *core, binding = sources()
    # Hidden: pybind11 wants its own names to stay in the module.
    flags = [*FLAGS, *architecture_flags(), "-fPIC", "-fvisibility=hidden"]
    compile_and_link([*compiler, *flags], ["-shared"], core, binding, target)


_extension = Extension(MODULE, "CPU kernels", "CXX", _library_path, compiler, _compile)
