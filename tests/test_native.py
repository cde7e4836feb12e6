"""The compiled core: ahead of time with CMake, for other instruction sets, and on first use.

What a process builds or imports is looked at in processes of their own, with a cache folder of their own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import emc2_kernels
from emc2_kernels.backends import native

ROOT = Path(__file__).resolve().parent.parent
BUILD_LIMIT = 60  # seconds, of the first use
MESSAGE = "compiling the CPU kernels"

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler to build with")


def environment(**changes: str | Path | None) -> dict[str, str]:
    """This process's environment with changes; None removes a variable."""
    package = Path(emc2_kernels.__file__).parents[1]
    changed = {**os.environ, "CXX": None, "TORCH_EXTENSIONS_DIR": None, "PYTHONPATH": package, **changes}
    return {name: str(value) for name, value in changed.items() if value is not None}


def start_python(code: str, *arguments: str | Path, **changes: str | Path | None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can be killed together with the compilers that it started
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Standard output and error of a process that must succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def run_checked(*command: str | Path, **changes: str | Path | None) -> str:
    done = subprocess.run(
        list(map(str, command)), env=environment(**changes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


# Ahead of time: three builds, one test program and one Python module each.

ARCHITECTURES = {"native": "-march=native", "baseline": "", "avx2": "-mavx2 -mfma"}
INSTRUCTION_SETS = {"native": ("AVX512", "AVX2", "DEFAULT"), "baseline": ("DEFAULT",), "avx2": ("AVX2",)}


def why_not_here(architecture: str) -> str | None:
    if architecture != "avx2":
        return None
    if platform.machine() != "x86_64":
        return "AVX2 is x86's"
    return None if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "this processor has no AVX2"


class Build(NamedTuple):
    architecture: str
    folder: Path
    log: str

    @property
    def module(self) -> Path:
        (module,) = self.folder.glob("emc2_native*.so")
        return module


@pytest.fixture(scope="session", params=ARCHITECTURES)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    reason = why_not_here(request.param)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(request.param)
    architecture = f"-DEMC2_ARCH={ARCHITECTURES[request.param]}"
    log = run_checked("cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", architecture)
    return Build(request.param, folder, log + run_checked("cmake", "--build", folder, "--parallel", "2", "--verbose"))


@needs_cmake
def test_cmake_builds_and_its_tests_pass(build: Build) -> None:
    report = run_checked("ctest", "--test-dir", build.folder, "--output-on-failure", "--no-tests=error", "--verbose")
    assert "100% tests passed" in report
    assert (build.folder / "libemc2_core.a").is_file()
    print(*(line for line in report.splitlines() if "at most" in line), sep="\n")


@needs_cmake
def test_cmake_has_the_flags_of_the_first_use(build: Build) -> None:
    """Or the two builds would differ in speed, or in rounding."""
    compiles = [line for line in build.log.splitlines() if " -c " in line and "/csrc/" in line]
    assert len(compiles) == len(native.sources()) - 1
    assert all(set(native.FLAGS) <= set(line.split()) for line in compiles)
    assert all(str(source) in build.log for source in native.sources())
    assert "torch/include" not in build.log


NAMES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("emc2_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
members = [name for name in dir(module) if not name.startswith("__")]
print(module.instruction_set)
print(json.dumps({name: [m for m in dir(getattr(module, name)) if not m.startswith("__")] for name in members}))
"""


@needs_cmake
def test_the_module_built_ahead_of_time_has_the_same_names(build: Build) -> None:
    """In a process without torch, which it must not need."""
    out, _ = finish(start_python(NAMES, build.module))
    said, out = out.splitlines()
    jit = native.library()
    assert said in INSTRUCTION_SETS[build.architecture]
    members = [name for name in dir(jit) if not name.startswith("__")]
    assert {"Recorder", "Sweep", "small_sweep", "walk_gathered", "view_coins", "philox_words"} <= set(members)
    expected = {name: [m for m in dir(getattr(jit, name)) if not m.startswith("__")] for name in members}
    assert json.loads(out) == expected


def walk_arguments() -> dict[str, tuple[tuple, dict]]:
    """Name -> positional and keyword arguments of mh_step.

    Components are small integers: scores are then exact in every order of addition, and all that may differ between
    builds is the rounding of E.
    """
    generator = torch.Generator().manual_seed(3)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def case(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, **changes: object) -> tuple[tuple, dict]:
        queries, keys = integers(-2, 3, n, d).to(dtype), integers(-2, 3, m, d).to(dtype)
        state = emc2_kernels.MHState(torch.arange(n) + 1000, integers(-4, 9, n).float())
        state.score[::5] = -torch.inf
        arguments = {
            "temperature": 0.5,
            "seed": 2**63 + 99,
            "step": 2**32 - 5,
            "chain_ids": integers(0, 2**40, n),
            "query_ids": integers(0, 5, n) << 33,
            "key_ids": integers(0, 5, m) << 33,
            "burn_in": 2,
            "num_samples": 4,
            "return_accepts": True,
            **changes,
        }
        return (queries, keys, state), arguments

    weights = integers(-2, 3, 45).float()
    return {
        "small sweep": case(37, 45, 19, return_lse=True, log_proposal=weights),
        "small sweep, float16": case(9, 21, 33, torch.float16, return_lse=True),
        "small sweep, bfloat16": case(40, 7, 8, torch.bfloat16, query_ids=None, chain_ids=None),
        "tiles": case(130, 300, 64, return_lse=True, num_samples=298),
        "uniform": case(37, 45, 19, proposal="uniform", num_proposals=111, log_proposal=weights),
        "uniform, float16": case(5, 45, 70, torch.float16, proposal="uniform", num_proposals=50),
        "positions": case(11, 45, 16, torch.bfloat16, proposal=integers(0, 45, 11, 29)),
    }


# The module at argv[1] in place of the one of the first use; arguments and results travel as files.
WALKS = """
import importlib.util, sys, torch, emc2_kernels
from emc2_kernels.backends import cpu, native
spec = importlib.util.spec_from_file_location("emc2_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
native.library = cpu.library = lambda: module
cases = torch.load(sys.argv[2], weights_only=False)
results = {name: emc2_kernels.mh_step(*a, **k, backend="cpu") for name, (a, k) in cases["walks"].items()}
words = torch.empty_like(cases["counters"])
module.philox_words(cases["counters"].data_ptr(), len(words), 2**63 + 7, words.data_ptr())
torch.save({"walks": results, "words": words}, sys.argv[3])
"""


@pytest.mark.one_seed
@needs_cmake
def test_every_instruction_set_walks_the_same_chains(build: Build, tmp_path: Path) -> None:
    walks = walk_arguments()
    counters = torch.randint(-(2**31), 2**31, (10_000, 4), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    torch.save({"walks": walks, "counters": counters}, tmp_path / "arguments")
    finish(start_python(WALKS, build.module, tmp_path / "arguments", tmp_path / "results"))
    got = torch.load(tmp_path / "results", weights_only=False)

    words = torch.empty_like(counters)
    native.library().philox_words(counters.data_ptr(), len(counters), 2**63 + 7, words.data_ptr())
    assert torch.equal(got["words"], words)
    for name, (arguments, options) in walks.items():
        result = got["walks"][name]
        for backend in ("reference", "cpu"):
            expected = emc2_kernels.mh_step(*arguments, **options, backend=backend)
            assert torch.equal(result.samples, expected.samples), (name, backend)
            assert torch.equal(result.state.key, expected.state.key), (name, backend)
            assert torch.equal(result.state.score, expected.state.score), (name, backend)
            assert torch.equal(result.num_accepted, expected.num_accepted), (name, backend)
            torch.testing.assert_close(result.threshold, expected.threshold, rtol=3e-7, atol=1e-6)
            if expected.lse is not None:
                torch.testing.assert_close(result.lse, expected.lse, rtol=1e-6, atol=1e-6)
        assert (result.samples >= 0).any()


# On first use.


def test_the_environment_chooses_the_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice is built for itself, in a folder of its own."""
    paths = set()
    for chosen, flags in ((None, ["-march=native"]), ("", []), ("-mavx2 -mfma", ["-mavx2", "-mfma"])):
        if chosen is None:
            monkeypatch.delenv("EMC2_ARCH", raising=False)
        else:
            monkeypatch.setenv("EMC2_ARCH", chosen)
        assert native.architecture_flags() == flags
        paths.add(native._library_path.__wrapped__())
    assert len(paths) == 3


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

seen += [name for name in ("torch.utils.cpp_extension", "emc2_native") if name in sys.modules]
print(json.dumps(seen))
"""


def test_importing_compiles_nothing_and_touches_no_gpu(tmp_path: Path) -> None:
    out, err = finish(start_python(IMPORT, TORCH_EXTENSIONS_DIR=tmp_path / "cache"))
    assert json.loads(out) == []
    assert err == ""
    assert not (tmp_path / "cache").exists()


# Steps with each backend that argv names; what came of them as JSON, for each call "ok" or the error's type and text.
STEPS = """
import json, sys, warnings
import torch, emc2_kernels

def attempt(backend, dtype=torch.float32):
    queries, keys = torch.ones(3, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype)
    try:
        emc2_kernels.mh_step(
            queries, keys, emc2_kernels.init_state(3), temperature=0.5, seed=1, step=0, backend=backend
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    before = emc2_kernels.backends()
    calls = [attempt(backend) for backend in sys.argv[1:]]
    if "auto" in sys.argv:
        calls.append(attempt("auto", torch.bfloat16))  # another choice of backend, by the same facts
print(json.dumps({
    "calls": calls,
    "warnings": [[warning.category.__name__, str(warning.message)] for warning in caught],
    "before": before,
    "after": emc2_kernels.backends(),
}))
"""


class Outcome(NamedTuple):
    calls: list[str]
    warnings: list[list[str]]
    before: dict[str, str]
    after: dict[str, str]
    err: str


def outcome(process: subprocess.Popen) -> Outcome:
    out, err = finish(process)
    return Outcome(**json.loads(out), err=err)


class FirstUse(NamedTuple):
    cache: Path
    left_over: list[Path]  # by the killed build
    racers: list[Outcome]
    seconds: float

    @property
    def library(self) -> Path:
        (library,) = self.cache.glob("emc2_kernels/*/emc2_native.so")
        return library


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> FirstUse:
    """A build is killed half way; then two processes that need the core start at once."""
    cache = tmp_path_factory.mktemp("first_use") / "cache"
    killed = start_python(STEPS, "cpu", TORCH_EXTENSIONS_DIR=cache)
    deadline = time.monotonic() + BUILD_LIMIT
    while not list(cache.glob("emc2_kernels/*/*/*.ninja")):
        assert killed.poll() is None, "the build that was to be killed has ended by itself"
        assert time.monotonic() < deadline, "no build within the time limit"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    left_over = list(cache.glob("emc2_kernels/*/*"))

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
    assert any(path.is_dir() for path in first_use.left_over), "the killed build left nothing: this tests nothing"
    assert any(path.name == "lock" for path in first_use.left_over)
    assert not any(path.name == first_use.library.name for path in first_use.left_over), "it looks finished"
    assert first_use.library.is_file()


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


def check_fallback(result: Outcome, backends: list[str], reason: str) -> None:
    """Each "auto" worked, with one warning in all; each "cpu" is a RuntimeError; both, and the table, say why."""
    assert [call for call, backend in zip(result.calls, backends, strict=True) if backend == "auto"] == ["ok"] * 3
    for call in (call for call, backend in zip(result.calls, backends, strict=True) if backend == "cpu"):
        assert call.startswith("RuntimeError: ")
        assert reason in call
    ((category, message),) = result.warnings
    assert category == "RuntimeWarning"
    assert reason in message
    assert "reference" in message
    assert reason in result.after["cpu"]
    assert result.after["reference"] == "available"


# torch asks a compiler that is not called g++ or the like what it is, before it compiles.
@pytest.mark.parametrize("name", ["g++", "compiler"])
@pytest.mark.parametrize("order", [("cpu", "cpu", "auto", "auto"), ("auto", "auto", "cpu")], ids="-".join)
def test_a_compiler_that_fails(name: str, order: tuple[str, ...], tmp_path: Path) -> None:
    compiler = tmp_path / name
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


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """Below a regular file: permissions would not stop root."""
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    result = outcome(start_python(STEPS, "cpu", "auto", "auto", TORCH_EXTENSIONS_DIR=cache))
    check_fallback(result, ["cpu", "auto", "auto", "auto"], "TORCH_EXTENSIONS_DIR")
    assert str(cache) in result.calls[0]
    assert MESSAGE not in result.err


def test_a_cached_core_that_does_not_load(first_use: FirstUse, tmp_path: Path) -> None:
    """Built with a newer C++ library, say, in a home directory that machines share."""
    cache = tmp_path / "cache"
    library = cache / first_use.library.relative_to(first_use.cache)
    library.parent.mkdir(parents=True)
    library.write_text("no shared object")
    result = outcome(start_python(STEPS, "auto", "cpu", "auto", TORCH_EXTENSIONS_DIR=cache))
    check_fallback(result, ["auto", "cpu", "auto", "auto"], f"delete {library}")
    assert MESSAGE not in result.err
