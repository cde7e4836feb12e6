"""The compiled core, built ahead of time: with CMake, and for other instruction sets."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import ninja
import pytest
import torch
from first_use import finish, run_checked, start_python

import emc2_kernels
from emc2_kernels.backends.cpu import build as cpu_build

ROOT = Path(__file__).resolve().parents[2]

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")

# Ahead of time: three builds, one test program and one Python module each.

ARCHITECTURES = {"native": "-march=native", "baseline": "", "avx2": "-mavx2 -mfma"}
INSTRUCTION_SETS = {"native": ("AVX512", "AVX2", "NEON", "DEFAULT"), "baseline": ("NEON", "DEFAULT"), "avx2": ("AVX2",)}


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
        (module,) = self.folder.glob("emc2_cpu*.so")
        return module


@pytest.fixture(scope="session", params=ARCHITECTURES)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    reason = why_not_here(request.param)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(request.param)
    architecture = f"-DEMC2_ARCH={ARCHITECTURES[request.param]}"
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}")
    options = (f"-DPython_EXECUTABLE={sys.executable}", architecture, *generator)
    log = run_checked("cmake", "-S", ROOT, "-B", folder, *options)
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
    assert len(compiles) == len(cpu_build.sources()) - 1
    assert all(set(cpu_build.FLAGS) <= set(line.split()) for line in compiles)
    assert all(str(source) in build.log for source in cpu_build.sources())
    assert "torch/include" not in build.log


NAMES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("emc2_cpu", sys.argv[1])
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
    jit = cpu_build.library()
    assert said in INSTRUCTION_SETS[build.architecture]
    members = [name for name in dir(jit) if not name.startswith("__")]
    assert {
        "WalkParams",
        "GumbelParams",
        "LseParams",
        "LseGradientParams",
        "walk_sweep",
        "walk_gathered",
        "sample_gumbel",
        "contrastive_lse",
        "contrastive_lse_backward",
        "view_coins",
        "philox_words",
    } <= set(members)
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
from emc2_kernels.backends.cpu import build, mh
spec = importlib.util.spec_from_file_location("emc2_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
build.library = mh.library = lambda: module
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
    cpu_build.library().philox_words(counters.data_ptr(), len(counters), 2**63 + 7, words.data_ptr())
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


# For another kind of processor: a cross compiler, and an emulator of its user-mode programs.

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in (CROSS_COMPILER, EMULATOR) if shutil.which(program) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (g++-aarch64-linux-gnu, qemu-user)")
def test_neon_passes_the_cores_tests(tmp_path: Path) -> None:
    """With the flags of the first use, and warnings as errors: among them, that GCC takes an operation on lanes apart
    into operations on numbers. All of core_test, in an emulator, which says nothing of time."""
    strict = ("-Wall", "-Wextra", "-Wvector-operation-performance", "-Werror")
    core = [source for source in cpu_build.sources() if source.parent.name == "cpu"]
    test = ROOT / "tests" / "cpp" / "core_test.cpp"
    run_checked(
        CROSS_COMPILER, *cpu_build.FLAGS, *strict, "-static", "-I", ROOT / "csrc", *core, test, "-o", tmp_path / "test"
    )
    printed = run_checked(EMULATOR, tmp_path / "test")
    assert printed.startswith("NEON, 4 lanes\n")
