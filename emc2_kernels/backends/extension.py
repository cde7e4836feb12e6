"""Modules that are compiled on first use, kept in a cache, and loaded from there afterwards.

The cache is ``$TORCH_EXTENSIONS_DIR`` or ``$XDG_CACHE_HOME`` or ``~/.cache``, in ``emc2_kernels/<key>``. The key covers
all that a build depends on, so a shared home directory serves different machines. What is loaded from it runs as this
user: so it must be whole, and nobody but this user and root may have been able to write it.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import importlib.machinery
import importlib.util
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ..files import private_folder, replacing, seal, why_not_whole

_PACKAGE = Path(__file__).resolve().parents[1]
_ANOTHER = "set TORCH_EXTENSIONS_DIR to another folder"  # the remedy for most that can be wrong with a cache
_MOST_OUTPUT = 4000  # characters of a compiler's, in messages
_PROGRESS_SECONDS = 10.0  # a build that goes on for longer says so each time

_lock = threading.Lock()  # one thread of a process builds and loads


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()  # or a child forked while another thread builds would wait for that thread for ever


os.register_at_fork(after_in_child=_new_lock)


class Unavailable(RuntimeError):
    """Why compiled kernels cannot be had here, and what helps."""


def source_root() -> Path:
    """The folder with csrc/ and python_bindings/: inside the package when installed, beside it in a checkout."""
    installed = _PACKAGE / "_sources"
    return installed if installed.is_dir() else _PACKAGE.parent


def headers(folder: str) -> list[Path]:
    """What the sources of csrc/<folder> and their binding may include."""
    folders = ("csrc", f"csrc/{folder}", "python_bindings")
    return [path for place in folders for path in source_root().glob(f"{place}/*.*") if path.suffix in (".h", ".cuh")]


def cache_root() -> Path:
    """Raises Unavailable where nothing says where: no variable, and a user without a home."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(named) if named else Path.home() / ".cache"
    except RuntimeError as error:
        raise Unavailable(f"no folder to build kernels in ({error}): set TORCH_EXTENSIONS_DIR to one") from None
    return Path(os.path.abspath(root)) / "emc2_kernels"


def source_digest(files: Iterable[Path], parts: Iterable[str]) -> str:
    """A folder name in the cache."""
    digest = hashlib.sha256()
    try:
        for file in sorted(files):
            digest.update(file.read_bytes())
    except OSError as error:
        raise Unavailable(f"the kernels' sources cannot be read ({error}): install emc2_kernels again") from error
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def shell_words(variable: str, otherwise: str) -> list[str]:
    """The words of an environment variable, split and unquoted as by a shell."""
    value = os.environ.get(variable, otherwise)
    try:
        return shlex.split(value)
    except ValueError as error:
        raise Unavailable(f"{variable} must be words as for a shell, got {value!r} ({error})") from None


def find_compiler(what: str, variable: str, usual: Sequence[str], install: str) -> list[str]:
    """The compiler's path, and arguments that go before all others.

    Args:
        what: as messages name it.
        variable: names the compiler, by a path or a command line such as "ccache g++"; empty or unset: the first of
            the usual ones that is there.

    Raises:
        Unavailable: it is not there.
    """
    chosen = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [chosen] if chosen else usual)), None)
    if found is not None:  # also where its path has spaces
        return [found]
    command = shell_words(variable, "")
    program = shutil.which(command[0]) if command else None
    if program is None:
        wanted = chosen if command else f"{variable}={chosen!r}" if chosen else ", ".join(usual)
        raise Unavailable(f"no {what} ({wanted}) found: install {install}, or set {variable} to one")
    return [program, *command[1:]]


def run(command: Sequence[str], folder: Path) -> None:
    """Runs a compiler, whose own temporary files go to the folder.

    Raises:
        Unavailable: it does not start, or fails; with what it said.
    """
    settings = {**os.environ, "TMPDIR": str(folder)}
    try:
        done = subprocess.run(
            command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[:_MOST_OUTPUT]
        code = done.returncode
        how = f"ended with {code}" if code > 0 else f"was ended by signal {-code} ({signal.strsignal(-code)})"
        raise Unavailable(f"{command[0]} {how}:\n{said}")


def include_flags() -> list[str]:
    """Of Python and pybind11, which a binding alone needs."""
    import pybind11

    return ["-I", sysconfig.get_paths()["include"], "-I", pybind11.get_include()]


def compile_and_link(
    command: Sequence[str], link_flags: Sequence[str], sources: Iterable[Path], binding: Path, target: Path
) -> None:
    """Compiles sources side by side, and links a Python module.

    Args:
        command: compiler and flags.
        binding: the source that alone has Python's headers and pybind11's.
        target: what is made is put beside it.
    """

    def compiled(source: Path) -> str:
        made = str(target.with_name(f"{source.stem}.o"))
        headers = include_flags() if source == binding else []
        run([*command, *headers, "-c", str(source), "-o", made], target.parent)
        return made

    with ThreadPoolExecutor(usable_cores()) as pool:
        # The binding first: it takes nearly as long as all others, and would else be waited for at the end.
        started = [pool.submit(compiled, source) for source in (binding, *sources)]
        try:
            _wait_and_tell(started)
        finally:
            pool.shutdown(cancel_futures=True)  # of what has not begun when one has failed
    run([*command, *link_flags, *(future.result() for future in started), "-o", str(target)], target.parent)


def usable_cores() -> int:
    """Cores that this process may run on, which containers and ``taskset`` make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait_and_tell(started: Sequence[Future[str]]) -> None:
    """Until all files are compiled, with a line every few seconds; raises what the first that fails has raised."""
    start, waiting = time.monotonic(), set(started)
    while waiting:
        done, waiting = wait(waiting, _PROGRESS_SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if waiting:
            count = len(started) - len(waiting)
            _say(f"{count} of {len(started)} files compiled after {time.monotonic() - start:.0f} s")


@dataclass
class Extension:
    """One compiled module. A failure is remembered: a second try would only cost the time again."""

    module: str
    what: str  # as messages name it
    variable: str  # names the compiler
    path: Callable[[], Path]  # where it lies in the cache: a folder of the cache's root, and the module's name
    compiler: Callable[[], list[str]]
    compile: Callable[[list[str], Path], None]  # with this compiler, to that path
    _failure: str | None = field(default=None, init=False)
    _loaded: ModuleType | None = field(default=None, init=False)

    def why_unavailable(self) -> str | None:
        """None where the module can be had, as far as can be told without building it."""
        if self._loaded is not None or self._failure is not None:
            return self._failure
        try:
            self._look()
        except Unavailable as error:
            return str(error)
        return None

    def _look(self) -> tuple[Path, bool]:
        """Where the module lies, and whether it does or has to be built. Raises Unavailable where neither will do."""
        try:
            path = self.path()
            _check_trusted(path)
            is_there = _is_whole(path)
            if not is_there:
                self.compiler()
                _check_writable(path.parent)
        except OSError as error:
            raise Unavailable(f"the build cache cannot be used ({error}): {_ANOTHER}") from error
        return path, is_there

    def library(self) -> ModuleType:
        """The compiled module; builds it if it is not in the cache.

        Raises:
            Unavailable: there is no compiler, or it failed, or there is no cache; with what the compiler said.
        """
        if self._loaded is None:
            with _lock:
                if self._loaded is None:
                    self._loaded = self._built_and_loaded()
        return self._loaded

    def _built_and_loaded(self) -> ModuleType:
        if self._failure is not None:
            raise Unavailable(self._failure)
        path, was_there = self._look()
        if not was_there:
            self._build(path)
        try:
            return load(self.module, path)
        except ImportError as error:
            if not was_there:  # another compiler, in a later process, may do better
                path.unlink(missing_ok=True)
            remedy = f"delete {path} to have them built again, set {self.variable} to another compiler, or {_ANOTHER}"
            self._fail(f"the {self.what} in the cache do not load ({error}): {remedy}", error)

    def _fail(self, reason: str, cause: Exception) -> NoReturn:
        self._failure = reason
        raise Unavailable(reason) from cause

    def _build(self, path: Path) -> None:
        """Compiles in a folder beside it, and puts the result, sealed, in its place.

        A killed build leaves nothing that looks finished, and the lock dies with its process. What it does leave, the
        next build removes.
        """
        compiler: list[str] = []
        try:
            private_folder(path.parent)
            with _only_builder(path.parent / "lock", self.what):
                if _is_whole(path):  # another process built it while this one waited
                    return
                compiler = self.compiler()
                with _emptied(path.parent / "build") as folder:
                    self._compile(compiler, folder / path.name)
                    _install(folder / path.name, path)
        except OSError as error:
            self._fail(f"the build cache {path.parent} cannot be written ({error}): {_ANOTHER}", error)
        except (RuntimeError, ImportError) as error:
            remedy = f"set {self.variable} to another compiler or, where the disk is full, TORCH_EXTENSIONS_DIR"
            self._fail(f"compiling the {self.what} with {shlex.join(compiler)} failed ({remedy}): {error}", error)

    def _compile(self, compiler: list[str], target: Path) -> None:
        # No time: it is four times as long where other processes have the cores.
        kept = target.parents[1]
        _say(f"compiling the {self.what} with {shlex.join(compiler)}, once on this machine: they are kept in {kept}")
        start = time.monotonic()
        self.compile(compiler, target)
        _say(f"compiled in {time.monotonic() - start:.0f} s")


def _say(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # standard error may be full, closed, or not there
        sys.stderr.write(f"emc2_kernels: {text}\n")
        sys.stderr.flush()


def _check_trusted(path: Path) -> None:
    """Raises Unavailable where another user could have written what would be run, or could while it is loaded."""
    folder = path.parent
    for place in (folder.parent.parent, folder.parent, folder, path):  # from $TORCH_EXTENSIONS_DIR down
        try:
            found = os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            return
        me, owner, mode = os.geteuid(), found.st_uid, stat.S_IMODE(found.st_mode)
        sticky = stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX  # each one's files in it are safe, as in /tmp
        others = stat.S_IWOTH | (0 if mode & stat.S_IWGRP and _is_own_group(found.st_gid) else stat.S_IWGRP)
        if owner not in (0, me):
            wrong, command = f"belongs to user {owner}, neither root nor the user of this process ({me})", f"chown {me}"
        elif mode & others and not sticky:
            wrong, command = f"may be written by others (mode {mode:o})", "chmod go-w"
        else:
            continue
        remedy = f"if it is to be trusted, {command} {shlex.quote(str(place))}; else {_ANOTHER}"
        raise Unavailable(f"{place} {wrong}: what lies there would run as you; {remedy}")


def _is_own_group(number: int) -> bool:
    """Whether a group is the one of this user's name, with nobody else in it: many systems give each user one, and make
    what the user makes writable by it."""
    try:
        group, name = grp.getgrgid(number), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


def _check_writable(folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise Unavailable(f"the build cache {folder} cannot be written (because of {there}): {_ANOTHER}")


def _is_whole(path: Path) -> bool:
    """A module that was cut or damaged would end the process as it is loaded, or later, without a message."""
    try:
        with open(path, "rb") as file:
            return why_not_whole(file, "module") is None
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def _only_builder(path: Path, what: str) -> Iterator[None]:
    """Held by one process at a time."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process, which builds the {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has the file open too


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is there for the block."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(made: Path, path: Path) -> None:
    try:
        content = made.read_bytes()
    except FileNotFoundError:
        raise Unavailable("the compiler reports no error, and has written no module") from None
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask; who may come here, the folder says
        file.write(content)
        file.write(seal(hashlib.sha256(content)))


def load(module: str, path: Path) -> ModuleType:
    """The extension module at ``path``."""
    loader = importlib.machinery.ExtensionFileLoader(module, str(path))
    spec = importlib.util.spec_from_file_location(module, path, loader=loader)
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
