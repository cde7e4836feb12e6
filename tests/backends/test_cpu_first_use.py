"""The compiled core on first use: built once, kept, found again, and done without where it cannot be had.

What a process builds or imports is looked at in processes of their own, with a cache folder of their own.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from first_use import MANY_STEPS, STEPS, Outcome, check_fallback, finish, outcome, start_python

from emc2_kernels import files
from emc2_kernels.backends.cpu import build as cpu_build

BUILD_LIMIT = 180  # seconds, of the first use, beside other tests
MESSAGE = "compiling the CPU kernels"

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler to build with"
)


def test_the_environment_chooses_the_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice is built for itself, in a folder of its own."""
    paths = set()
    for chosen, flags in ((None, ["-march=native"]), ("", []), ("-mavx2 -mfma", ["-mavx2", "-mfma"])):
        if chosen is None:
            monkeypatch.delenv("EMC2_ARCH", raising=False)
        else:
            monkeypatch.setenv("EMC2_ARCH", chosen)
        assert cpu_build.architecture_flags() == flags
        paths.add(cpu_build._library_path.__wrapped__())
    assert len(paths) == 3


def test_another_torch_does_not_build_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core has nothing of torch in it, which test_cpu_build.py looks at."""
    path = cpu_build._library_path.__wrapped__
    usual = path()
    monkeypatch.setattr(torch, "__version__", "2.99.0+other")
    assert path() == usual
    monkeypatch.setattr(cpu_build.sys.implementation, "cache_tag", "cpython-399")  # what it does depend on
    assert path() != usual


IMPORT = """
import importlib.abc, importlib.machinery, json, os, sys
import torch

seen = []

class Triton(importlib.abc.MetaPathFinder, importlib.abc.Loader):  # whether it is installed or not
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "triton" else None
    def exec_module(self, module):
        seen.append("import of " + module.__name__)

sys.meta_path.insert(0, Triton())
processes = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system")
sys.addaudithook(lambda event, arguments: seen.append(event) if event in processes else None)
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: seen.append("torch.cuda." + name))

import emc2_kernels
import emc2_kernels.losses

seen += [name for name in ("torch.utils.cpp_extension", "emc2_cpu") if name in sys.modules]
print(json.dumps(seen))
"""


def test_importing_compiles_nothing_and_touches_no_gpu(tmp_path: Path) -> None:
    out, err = finish(start_python(IMPORT, TORCH_EXTENSIONS_DIR=tmp_path / "cache"))
    assert json.loads(out) == []
    assert err == ""
    assert not (tmp_path / "cache").exists()


class FirstUse(NamedTuple):
    cache: Path
    left_over: list[str]  # by the killed build, names
    racers: list[Outcome]
    seconds: float

    @property
    def library(self) -> Path:
        (library,) = self.cache.glob("emc2_kernels/*/emc2_cpu.so")
        return library


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> FirstUse:
    """A build is killed half way; then two processes that need the core start at once."""
    cache = tmp_path_factory.mktemp("first_use") / "cache"
    killed = start_python(STEPS, "cpu", TORCH_EXTENSIONS_DIR=cache)
    deadline = time.monotonic() + BUILD_LIMIT
    while not list(cache.glob("emc2_kernels/*/build/*")):
        assert killed.poll() is None, "the build that was to be killed has ended by itself"
        assert time.monotonic() < deadline, "no build within the time limit"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    left_over = sorted(path.name for path in cache.glob("emc2_kernels/*/*"))

    start = time.monotonic()
    racers = [start_python(STEPS, "cpu", TORCH_EXTENSIONS_DIR=cache) for _ in range(2)]
    outcomes = [outcome(racer) for racer in racers]
    return FirstUse(cache, left_over, outcomes, time.monotonic() - start)


@needs_compiler
def test_two_first_uses_at_once_build_once(first_use: FirstUse) -> None:
    assert [racer.calls for racer in first_use.racers] == [["ok"], ["ok"]]
    assert [racer.after["cpu"] for racer in first_use.racers] == ["available", "available"]
    assert sum(MESSAGE in racer.err for racer in first_use.racers) == 1
    print(f"first use: {first_use.seconds:.1f} s", *(racer.err for racer in first_use.racers), sep="\n")
    assert first_use.seconds < BUILD_LIMIT


@needs_compiler
def test_a_killed_build_does_not_block(first_use: FirstUse) -> None:
    assert first_use.left_over == ["build", "lock"]  # nothing that looks finished
    assert first_use.library.is_file()


@needs_compiler
def test_what_a_killed_build_left_is_gone_and_the_folders_are_private(first_use: FirstUse) -> None:
    assert sorted(path.name for path in first_use.library.parent.iterdir()) == ["emc2_cpu.so", "lock"]
    for folder in (first_use.cache, first_use.cache / "emc2_kernels", first_use.library.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_later_process_does_not_build_again(first_use: FirstUse) -> None:
    """Nor does it need a compiler."""
    written = first_use.library.stat().st_mtime_ns
    later = outcome(start_python(STEPS, "cpu", "auto", TORCH_EXTENSIONS_DIR=first_use.cache, CXX="/nonexistent/c++"))
    assert later.calls == ["ok"] * 3
    assert later.before["cpu"] == "available"
    assert later.warnings == []
    assert later.err == ""
    assert first_use.library.stat().st_mtime_ns == written


@pytest.mark.parametrize("order", [("cpu", "cpu", "auto", "auto"), ("auto", "auto", "cpu")], ids="-".join)
def test_a_compiler_that_fails(order: tuple[str, ...], tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho boom >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = outcome(start_python(STEPS, *order, TORCH_EXTENSIONS_DIR=tmp_path / "cache", CXX=compiler))
    assert result.before["cpu"] == "available"  # nothing was tried yet
    check_fallback(result, [*order, "auto"], "boom")
    assert result.err.count(MESSAGE) == 1  # a second try would fail as the first did


@pytest.mark.parametrize("missing", ["CXX", "PATH"])
def test_no_compiler(missing: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    changes = {"CXX": tmp_path / "nonexistent"} if missing == "CXX" else {"PATH": tmp_path / "empty"}
    result = outcome(start_python(STEPS, "auto", "cpu", "auto", TORCH_EXTENSIONS_DIR=tmp_path / "cache", **changes))
    check_fallback(result, ["auto", "cpu", "auto", "auto"], "no C++ compiler")
    assert "no C++ compiler" in result.before["cpu"]
    assert str(changes.get("CXX", "g++")) in result.before["cpu"]
    assert MESSAGE not in result.err


class Surroundings(NamedTuple):
    """In which nothing compiles."""

    variables: dict[str, str | None]
    reason: tuple[str, ...]  # parts of it
    at_once: bool = True  # the table has the reason before anything was tried
    user: int | None = None
    limit: int | None = None  # of a file's size


def broken_surroundings(folder: Path, nowhere: int) -> dict[str, Surroundings]:
    def compiler(name: str, text: str) -> str:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def of_compiler(chosen: str, *reason: str, at_once: bool = True, limit: int | None = None) -> Surroundings:
        return Surroundings({"CXX": chosen, "TORCH_EXTENSIONS_DIR": str(cache())}, reason, at_once, limit=limit)

    def cache() -> Path:
        path = folder / f"cache{len(list(folder.glob('cache*')))}"
        path.mkdir(mode=0o700)
        return path

    (folder / "file").touch()
    shared = cache()
    shared.chmod(0o777)
    below, no_home = {"TORCH_EXTENSIONS_DIR": str(folder / "file")}, {"XDG_CACHE_HOME": None, "HOME": None}
    writes = 'while test "$1" != -o; do shift; done; head -c 100000 /dev/zero > "$2" || exit 1'
    found = {
        "blank": of_compiler(" ", "no C++ compiler (CXX=' ')", "set CXX"),
        "open quotation": of_compiler("g++ '", "CXX must be words", '"g++ \'"', "No closing quotation"),
        "missing": of_compiler("/nonexistent/c++ -m64", "no C++ compiler (/nonexistent/c++ -m64)", "set CXX"),
        "flags": Surroundings({"EMC2_ARCH": "'"}, ("EMC2_ARCH must be words", "No closing quotation")),
        "crash": of_compiler(compiler("crash", "kill -SEGV $$"), "was ended by signal 11", "set CXX", at_once=False),
        "noise": of_compiler(compiler("noise", "printf '\\377' >&2; exit 1"), "ended with 1", "set CXX", at_once=False),
        "silence": of_compiler(compiler("silence", "exit 0"), "has written no module", "set CXX", at_once=False),
        "rubbish": of_compiler(compiler("rubbish", writes), "do not load", "set CXX", at_once=False),
        "full disk": of_compiler(
            compiler("full", writes), "failed", "TORCH_EXTENSIONS_DIR", at_once=False, limit=50_000
        ),
        "below a file": Surroundings(below, ("cannot be written", str(folder / "file"), "set TORCH_EXTENSIONS_DIR")),
        "others write": Surroundings(
            {"TORCH_EXTENSIONS_DIR": str(shared)}, (f"{shared} may be written by others", "chmod go-w")
        ),
    }
    if os.geteuid() == 0:
        found |= {
            "no home": Surroundings(
                no_home, ("no folder to build kernels in", "set TORCH_EXTENSIONS_DIR"), user=nowhere
            ),
            "a folder of root's": Surroundings(
                {"TORCH_EXTENSIONS_DIR": "/usr/lib"}, ("/usr/lib/emc2_kernels", "cannot be written"), user=nowhere
            ),
            "a closed folder": Surroundings(
                {"TORCH_EXTENSIONS_DIR": str(shared)}, ("cannot be used", "Permission denied"), user=nowhere
            ),
        }
    return found


def many_outcomes(cases: dict[str, tuple], **changes: str | Path | None) -> dict[str, Outcome]:
    """Of (variables, user, limit, what Triton's import raises, backends) by name; see MANY_STEPS."""
    process = start_python(MANY_STEPS, stdin=subprocess.PIPE, **changes)
    out, err = process.communicate(json.dumps(cases), timeout=300)
    assert process.returncode == 0, err[-3000:]
    found = json.loads(out)
    assert not [answer for answer in found.values() if isinstance(answer, str)], found
    return {name: Outcome(**answer, err="") for name, answer in found.items()}


def no_such_user() -> int:
    taken = {user.pw_uid for user in pwd.getpwall()}
    return next(number for number in range(12345, 65000) if number not in taken)


def test_where_nothing_can_be_compiled_the_reason_is_told_and_the_rest_works(tmp_path: Path) -> None:
    order = ["auto", "cpu", "auto"]
    cases = broken_surroundings(tmp_path, no_such_user())
    asked = {name: (case.variables, case.user, case.limit, None, order) for name, case in cases.items()}
    found = many_outcomes(asked, TORCH_EXTENSIONS_DIR=None)
    for name, case in cases.items():
        for reason in case.reason:
            check_fallback(found[name], [*order, "auto"], reason)
            assert not case.at_once or reason in found[name].before["cpu"], name
        assert found[name].calls[1].startswith("RuntimeError: backend 'cpu' cannot run here: "), name
        assert case.at_once or found[name].before["cpu"] == "available", name


@pytest.fixture
def core() -> Path:
    """The core in the cache of these tests."""
    cpu_build.library()
    return cpu_build._library_path()


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_cache_of_roots_serves_a_user_who_cannot_write_there(core: Path) -> None:
    """Nor has a home, nor a compiler. Another user's cache does not serve."""
    with tempfile.TemporaryDirectory() as folder:
        shared, others = (Path(folder) / name for name in ("shared", "others"))
        for cache in (shared, others):
            shutil.copytree(core.parent, cache / "emc2_kernels" / core.parent.name)
            for place in (Path(folder), cache, *cache.rglob("*")):
                place.chmod(place.stat().st_mode | (0o555 if place.is_dir() else 0o444))
        user, variables = no_such_user(), {"HOME": None, "CXX": "/nonexistent/c++"}
        for place in (others, *others.rglob("*")):
            os.chown(place, user + 1, -1)
        order = ["cpu", "auto"]
        cases = {
            name: (variables | {"TORCH_EXTENSIONS_DIR": str(Path(folder) / name)}, user, None, None, order)
            for name in ("shared", "others")
        }
        found = many_outcomes(cases)
    assert found["shared"].calls == ["ok"] * 3 and found["shared"].warnings == []
    assert found["shared"].before["cpu"] == found["shared"].after["cpu"] == "available"
    check_fallback(found["others"], [*order, "auto"], f"{others} belongs to user {user + 1}, neither root nor the user")


@needs_compiler
def test_a_core_that_was_cut_is_built_again_or_done_without(core: Path, tmp_path: Path) -> None:
    """Half of it maps without an error, and ends the process with a bus error when the rest is called for."""
    cache = tmp_path / "cache"
    library = cache / core.relative_to(core.parents[2])
    files.private_folder(library.parent)
    library.write_bytes(core.read_bytes()[: core.stat().st_size // 2])
    order = ["auto", "cpu"]
    variables = {"TORCH_EXTENSIONS_DIR": str(cache), "CXX": "/nonexistent/c++"}
    found = many_outcomes({"cut": (variables, None, None, None, order)})["cut"]
    check_fallback(found, [*order, "auto"], "no C++ compiler (/nonexistent/c++)")


@needs_compiler
def test_a_broken_triton_stops_no_other_backend(core: Path) -> None:
    errors = ("ImportError", "OSError", "AttributeError", "SyntaxError", "RuntimeError", "ModuleNotFoundError")
    order = ["triton", "auto", "cpu"]
    variables = {"TRITON_INTERPRET": "1"}
    cases = {error: (variables, None, None, error, order) for error in errors}
    for error, found in many_outcomes(cases, TORCH_EXTENSIONS_DIR=core.parents[2]).items():
        for said in (found.before["triton"], found.after["triton"], found.calls[0]):
            assert "Triton does not import (" in said and "planted" in said and "pip install" in said, error
        assert found.calls[0].startswith("RuntimeError: backend 'triton' cannot run here: "), error
        assert found.calls[1:] == ["ok"] * 3 and found.warnings == [], error


@needs_compiler
def test_threads_that_come_at_once_share_the_core(core: Path) -> None:
    out, _ = finish(start_python(THREADS, TORCH_EXTENSIONS_DIR=core.parents[2]))
    assert out == "16 ok, 1 module\n"


# Half of them take the core itself, half take a step.
THREADS = (
    STEPS
    + """
import threading
from emc2_kernels.backends.cpu import build
barrier, found = threading.Barrier(16), []
def use(number):
    barrier.wait()
    found.append((attempt("cpu" if number % 2 else "auto"), id(build.library())))
threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(outcome == "ok" for outcome, _ in found), "ok,", len({module for _, module in found}), "module")
"""
)
