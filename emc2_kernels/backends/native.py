"""The compiled core: built on first use with the machine's C++ compiler, kept in a cache, loaded from there afterwards.

The cache is ``$TORCH_EXTENSIONS_DIR`` or ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``emc2_kernels/<key>``. The key covers
the sources, the flags, Python, torch and the processor's features, so a shared home directory serves different
machines.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

MODULE = "emc2_native"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-Wno-psabi")

_PACKAGE = Path(__file__).resolve().parents[1]
_failure: str | None = None  # of a build in this process; a second try would only cost the time again


def source_root() -> Path:
    """The folder with csrc/ and python_bindings/: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "_sources"
    return installed if installed.is_dir() else _PACKAGE.parent


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
    if _failure is not None:
        return _failure
    if _library_path().exists() or compiler() is not None:
        return None
    wanted = os.environ.get("CXX") or "c++, g++ or clang++"
    return f"no C++ compiler ({wanted}) found: install g++, or set CXX to one"


@cache
def library() -> ModuleType:
    """The compiled core; builds it if it is not in the cache.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has the compiler's output.
    """
    reason = why_unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    path = _library_path()
    if not path.exists():
        _build(path)
    try:
        return _load(path)
    except ImportError as error:
        _fail(f"the CPU kernels in the cache do not load ({error}): delete {path} to have them built again", error)


def _load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _fail(reason: str, cause: Exception) -> NoReturn:
    global _failure
    _failure = reason
    raise RuntimeError(reason) from cause


@cache
def _library_path() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256()
    headers = source_root().glob("csrc/**/*.h")
    for file in sorted((*sources(), *headers)):
        digest.update(file.read_bytes())
    for part in (*FLAGS, sys.implementation.cache_tag, torch.__version__, _processor()):
        digest.update(part.encode())
    return Path(root) / "emc2_kernels" / digest.hexdigest()[:16] / f"{MODULE}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _build(path: Path) -> None:
    """Compiles into a folder of its own and renames the result into place.

    A killed build leaves nothing that looks finished, and the lock dies with its process (torch's own lock file does
    not: the next process would wait for it for ever).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():  # another process built it while this one waited
                return
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                os.replace(_compile(folder), path)
    except OSError as error:
        _fail(f"the build cache {path.parent} cannot be written ({error}): set TORCH_EXTENSIONS_DIR to another", error)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        _fail(f"compiling the CPU kernels with {compiler()} failed: {error}", error)


def _compile(folder: str) -> Path:
    from torch.utils import cpp_extension  # slow to import, and needed only here

    print("emc2_kernels: compiling the CPU kernels, once on this machine (about 15 s)...", file=sys.stderr, flush=True)
    start = time.monotonic()
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
            extra_cflags=list(FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
        )
    print(f"emc2_kernels: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return Path(folder) / f"{MODULE}.so"


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
