"""The CUDA kernels: built on first use with nvcc, for the one architecture asked for (``backends/extension.py``
says where they are kept).

nvcc is called directly. torch's own builder refuses where its CUDA version is another than nvcc's; these sources have
no header of torch, and a runtime of their own is linked in, so the two need not agree. The cache's key covers the
sources, the flags with the architecture, Python, and nvcc's version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch

from .. import gpu
from ..extension import (
    Extension,
    Unavailable,
    cache_root,
    compile_and_link,
    find_compiler,
    headers,
    source_digest,
    source_root,
)

MODULE = "emc2_cuda"
FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden")
LINK_FLAGS = ("-shared", "-cudart=static")


def sources() -> list[Path]:
    root = source_root()
    return sorted(root.glob("csrc/cuda/*.cu")) + [root / "python_bindings" / "cuda_module.cpp"]


def compiler() -> list[str]:
    """nvcc: ``$CUDACXX``, the one on the PATH, or that of ``$CUDA_HOME``, ``$CUDA_PATH`` or NVIDIA's default folder.

    Raises:
        Unavailable: there is none.
    """
    folders = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    usual = ("nvcc", *(str(Path(folder, "bin", "nvcc")) for folder in folders))
    return find_compiler("CUDA compiler", "CUDACXX", usual, "NVIDIA's CUDA toolkit")


def definitions() -> list[str]:
    """What the sources are told of the environment."""
    return [] if gpu.asserts() else ["-DEMC2_NO_DEVICE_ASSERTIONS"]


def gencode_flags(*architectures: int) -> list[str]:
    """nvcc's flags: code for exactly these, such as 90 for compute capability 9.0, with what only Hopper has."""
    names = [f"{a}a" if a == gpu.MATRIX_SWEEP_ARCHITECTURE else f"{a}" for a in architectures]
    return [flag for name in names for flag in ("-gencode", f"arch=compute_{name},code=sm_{name}")]


def why_unavailable_here() -> str | None:
    """None where the current device can run the kernels, and they can be had, as far as can be told without building
    them."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA"
    return gpu.why_no_gpu() or why_unavailable(gpu.architecture())


def library_here() -> ModuleType:
    """The kernels for the current device; builds them if they are not in the cache."""
    return library(gpu.architecture())


def why_unavailable(architecture: int) -> str | None:
    """None where the kernels can be had, as far as can be told without building them."""
    return extension(architecture).why_unavailable()


def library(architecture: int) -> ModuleType:
    """The kernels for an architecture; builds them if they are not in the cache.

    Raises:
        Unavailable: there is no nvcc, or it failed; the message has its output.
    """
    return extension(architecture).library()


def extension(architecture: int) -> Extension:
    path, compile = partial(_library_path, architecture), partial(_compile, architecture)
    made = Extension(MODULE, "CUDA kernels", "CUDACXX", path, compiler, compile)
    return _extensions.setdefault(architecture, made)  # the first one, also of threads that ask at once


_extensions: dict[int, Extension] = {}


@cache
def _library_path(architecture: int) -> Path:
    """In a folder named after the sources and nvcc's version; without nvcc, what the newest version has left there."""
    flags = (*FLAGS, *LINK_FLAGS, *definitions(), *gencode_flags(architecture))
    parts = (*flags, sys.implementation.cache_tag, sysconfig.get_platform())
    key = source_digest((*sources(), *headers("cuda")), parts)
    try:
        return cache_root() / f"{key}-nvcc{_version(tuple(compiler()))}" / f"{MODULE}.so"
    except Unavailable:
        built = sorted(cache_root().glob(f"{key}-nvcc*/{MODULE}.so"), key=lambda path: path.stat().st_mtime)
        return built[-1] if built else cache_root() / f"{key}-nvcc" / f"{MODULE}.so"


@cache
def _version(nvcc: tuple[str, ...]) -> str:
    """As in "release 13.0, V13.0.88"; an nvcc that does not say fails when it is used."""
    try:
        said = subprocess.run([*nvcc, "--version"], capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = re.search(r"\bV([\d.]+)", said)
    return found.group(1) if found else "unknown"


def _compile(architecture: int, compiler: list[str], target: Path) -> None:
    *kernels, binding = sources()
    flags = [*FLAGS, *definitions(), *gencode_flags(architecture)]
    compile_and_link([*compiler, *flags], LINK_FLAGS, kernels, binding, target)
