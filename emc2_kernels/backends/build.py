"""Modules that are compiled on first use, kept in a cache, and loaded from there afterwards.

The cache is ``$TORCH_EXTENSIONS_DIR`` or ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``emc2_kernels/<key>``. The key covers
all that a build depends on, so a shared home directory serves different machines.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NoReturn

_PACKAGE = Path(__file__).resolve().parents[1]


def source_root() -> Path:
    """The folder with csrc/ and python_bindings/: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "_sources"
    return installed if installed.is_dir() else _PACKAGE.parent


def cache_root() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "emc2_kernels"


def digest_of(files: Iterable[Path], parts: Iterable[str]) -> str:
    """A folder name in the cache."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()[:16]


@dataclass
class Extension:
    """One compiled module. A failure is remembered: a second try would only cost the time again."""

    module: str
    what: str  # as messages name it
    seconds: int  # that compiling it takes, about
    path: Callable[[], Path]  # where it lies in the cache
    compiler: Callable[[], str | None]
    no_compiler: Callable[[], str]  # the reason and the remedy
    compile: Callable[[Path], None]  # writes the module into a folder that is there, under its name in the cache
    _failure: str | None = field(default=None, init=False)
    _loaded: ModuleType | None = field(default=None, init=False)

    def why_unavailable(self) -> str | None:
        """None where the module can be had, as far as can be told without building it."""
        if self._failure is not None:
            return self._failure
        return None if self.compiler() is not None or self.path().exists() else self.no_compiler()

    def library(self) -> ModuleType:
        """The compiled module; builds it if it is not in the cache.

        Raises:
            RuntimeError: there is no compiler, or it failed; the message has the compiler's output.
        """
        if self._loaded is None:
            self._loaded = self._built_and_loaded()
        return self._loaded

    def _built_and_loaded(self) -> ModuleType:
        reason = self.why_unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        path = self.path()
        if not path.exists():
            self._build(path)
        try:
            return load(self.module, path)
        except ImportError as error:
            remedy = f"delete {path} to have them built again"
            self._fail(f"the {self.what} in the cache do not load ({error}): {remedy}", error)

    def _fail(self, reason: str, cause: Exception) -> NoReturn:
        self._failure = reason
        raise RuntimeError(reason) from cause

    def _build(self, path: Path) -> None:
        """Compiles into a folder of its own and renames the result into place.

        A killed build leaves nothing that looks finished, and the lock dies with its process (torch's own lock file
        does not: the next process would wait for it for ever).
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():  # another process built it while this one waited
                    return
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    self._compile(Path(folder))
                    os.replace(Path(folder) / path.name, path)
        except OSError as error:
            self._fail(
                f"the build cache {path.parent} cannot be written ({error}): set TORCH_EXTENSIONS_DIR to another", error
            )
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            self._fail(f"compiling the {self.what} with {self.compiler()} failed: {error}", error)

    def _compile(self, folder: Path) -> None:
        about = f"once on this machine (about {self.seconds} s)"
        print(f"emc2_kernels: compiling the {self.what}, {about}...", file=sys.stderr, flush=True)
        start = time.monotonic()
        self.compile(folder)
        print(f"emc2_kernels: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def load(module: str, path: Path) -> ModuleType:
    """The extension module at ``path``."""
    loader = importlib.machinery.ExtensionFileLoader(module, str(path))
    spec = importlib.util.spec_from_file_location(module, path, loader=loader)
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
