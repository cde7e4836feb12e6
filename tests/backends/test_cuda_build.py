"""The CUDA kernels as nvcc compiles them: registers, shared memory and spills, and the build on first use.

No GPU is needed for any of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from first_use import run_checked

from bench.gpu import matrix_sweep
from emc2_kernels.backends.cuda import build as cuda_build
from emc2_kernels.backends.extension import Unavailable

ROOT = Path(__file__).resolve().parents[2]


def has_nvcc() -> bool:
    try:
        return bool(cuda_build.compiler())
    except Unavailable:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")

ARCHITECTURES = (80, 90, 100)
# Registers: a regression fails. The gathered walk needs 5 blocks of 128 threads on a multiprocessor (96 registers) to
# keep its loads in flight; a small sweep has a multiprocessor to itself, and holds a tile's loads in registers.
# That on matrix units has three warpgroups of 168, which they then share out anew.
MOST_REGISTERS = {
    "gathered_kernel": 96, "sweep_kernel": 240, "view_coin_kernel": 32, "matrix_sweep_kernel": 168,
    "sweep_epilogue_kernel": 64,
}  # fmt: skip
MOST_SHARED_BYTES = dict.fromkeys(MOST_REGISTERS, 0) | {"sweep_kernel": 40 * 1024}


class Usage(NamedTuple):
    architecture: int
    kernel: str
    arguments: str  # mangled template arguments
    registers: int
    shared_bytes: int
    stack: tuple[int, ...]  # bytes: frame, spill stores, spill loads


def parse_ptxas(log: str) -> list[Usage]:
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\d+)a?'.*?"
        r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for match in entry.finditer(log):
        kernel, arguments = re.search(r"\d([a-z_]+_kernel)(I.*?EEv|)", match["name"]).groups()
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        stack = tuple(int(match[name]) for name in ("frame", "stores", "loads"))
        shared_bytes = int(shared[1]) if shared else 0
        found.append(Usage(int(match["sm"]), kernel, arguments, int(match["registers"]), shared_bytes, stack))
    return found


@needs_nvcc
def test_registers_and_shared_memory(tmp_path):
    """Warnings are errors, there is no local memory at all, and registers stay within bounds on every architecture."""

    def usage(source: Path) -> list[Usage]:
        log = run_checked(
            *cuda_build.compiler(), *cuda_build.FLAGS, *cuda_build.gencode_flags(*ARCHITECTURES), "--threads", "2",
            "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v",
            "-c", source, "-o", tmp_path / f"{source.stem}.o",
        )  # fmt: skip
        return parse_ptxas(log)

    kernels = [source for source in cuda_build.sources() if source.suffix == ".cu"]
    found = sorted(entry for source in kernels for entry in usage(source))
    print(*(f"sm_{e[0]:<4}{e[1]:<18}{e[2]:<24}{e[3]:>4} registers{e[4]:>7} bytes shared, stack {e[5]}" for e in found),
          sep="\n")  # fmt: skip
    assert len(found) == len(ARCHITECTURES) * (6 + 6 + 1 + 2 + 1)
    for entry in found:
        assert entry.stack == (0, 0, 0), entry
        assert entry.registers <= MOST_REGISTERS[entry.kernel], entry
        assert entry.shared_bytes <= MOST_SHARED_BYTES[entry.kernel], entry


@needs_nvcc
def test_the_sweep_on_matrix_units():
    """Its products and copies are Hopper's own, asynchronous ones, and nothing else holds the walk up: no local memory,
    no fence of the whole GPU on the way, no product that the compiler has made wait for another."""
    kernels, log = matrix_sweep.compile_kernels()
    assert {kernel.element for kernel in kernels} == {"Bfloat16", "Float16"}
    assert "serialized" not in log and "Potential Performance Loss" not in log
    for element, code, opcodes, walk in kernels:
        print(element, walk)
        products = re.findall(r"HGMMA\.64x128x16\.F32[.\w]*", code)
        assert len(products) == 24  # of a chunk four; before the walk, at four places in it, and before a careful one
        assert set(products) == {"HGMMA.64x128x16.F32" + (".BF16" if element == "Bfloat16" else "")}
        copies = [opcode for opcode in opcodes if opcode.startswith("UTMALDG")]
        assert sorted(copies) == ["UTMALDG.2D", "UTMALDG.3D.MULTICAST"]
        assert opcodes.count("USETMAXREG.DEALLOC.CTAPOOL") == opcodes.count("USETMAXREG.TRY_ALLOC.CTAPOOL") == 1
        assert not [opcode for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")]
        assert opcodes.count("MEMBAR.ALL.GPU") == 2  # of the cluster's barriers, before all work and after it
        assert 10 < walk.issue <= 16.5
        assert 10 < walk.cycles <= 16.5
        assert walk.binding == "issue" and walk.unknown == 0


@needs_nvcc
@pytest.mark.parametrize("asserts", ["1", "0"])
def test_assertions_can_be_left_out(asserts, monkeypatch):
    """By one environment variable, and the build is another."""
    path = cuda_build._library_path.__wrapped__
    usual = path(90)
    monkeypatch.setenv("EMC2_DEVICE_ASSERTIONS", asserts)
    assert (path(90) == usual) == (asserts == "1")
    sources = [source for source in cuda_build.sources() if source.stem in ("sweep", "gathered")]
    for source in sources:
        text = run_checked(*cuda_build.compiler(), *cuda_build.definitions(), "-std=c++17", "-E", source)
        assert ("emc2_kernels: chain_ids" in text) == (asserts == "1")


NAMES = ["Operands", "StepInput", "StepOutput", "StreamParams", "TransitionOutput", "WalkParams"]
NAMES += ["load", "matrix_sweep_scratch", "view_coins", "walk_gathered", "walk_matrix_sweep", "walk_sweep"]

BUILD = """
import sys
from emc2_kernels.backends.cuda import build
try:
    module = build.library(90)
    print(sorted(name for name in dir(module) if not name.startswith("__")))
except RuntimeError as error:
    print("first:", error)
    try:
        build.library(90)
    except RuntimeError as again:
        print("again:", str(again) == str(error), build.why_unavailable(90) == str(error))
"""


def python(code: str, **changes: str | Path) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in changes.items()}}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


@needs_nvcc
def test_the_module_is_built_once_and_loads_without_a_gpu(tmp_path):
    """Later processes need no nvcc, because they take what is in the cache."""
    first = python(BUILD, TORCH_EXTENSIONS_DIR=tmp_path)
    assert first.stdout == f"{NAMES}\n", first.stderr
    assert first.stderr.count("compiling the CUDA kernels") == 1
    later = python(BUILD, TORCH_EXTENSIONS_DIR=tmp_path, CUDACXX="/nonexistent/nvcc")
    assert later.stdout == first.stdout and later.stderr == ""


def test_an_nvcc_that_fails_or_is_missing(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho boom >&2\nexit 1\n")
    compiler.chmod(0o755)
    failed = python(BUILD, TORCH_EXTENSIONS_DIR=tmp_path / "cache", CUDACXX=compiler)
    assert "first: compiling the CUDA kernels with" in failed.stdout and "boom" in failed.stdout
    assert failed.stdout.endswith("again: True True\n")
    assert failed.stderr.count("compiling the CUDA kernels") == 1
    missing = python(BUILD, TORCH_EXTENSIONS_DIR=tmp_path / "cache", CUDACXX="/nonexistent/nvcc")
    assert "no CUDA compiler (/nonexistent/nvcc) found" in missing.stdout


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    """Paths with spaces, command lines, and what cannot be one: a name with the reason, never an IndexError."""
    home = tmp_path / "CUDA with spaces"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf '\\377 release 12.9, V12.9.86\\n'\n")  # whatever it says may be no UTF-8
    nvcc.chmod(0o755)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))

    def found(**variables):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            return cuda_build.compiler(), cuda_build._library_path.__wrapped__(90).parent.name.partition("-")[2]

    expected = [str(nvcc)]
    for variables in ({"CUDA_HOME": home}, {"CUDA_PATH": home}, {"CUDACXX": nvcc}, {"CUDACXX": f"'{nvcc}'"}):
        assert found(**variables) == (expected, "nvcc12.9.86"), variables
    assert found(CUDACXX=f"'{nvcc}' -Xptxas -O2") == ([*expected, "-Xptxas", "-O2"], "nvcc12.9.86")
    for variables, reason in (
        ({"CUDACXX": " "}, r"no CUDA compiler \(CUDACXX=' '\) found: install .*, or set CUDACXX to one"),
        ({"CUDACXX": f"{nvcc} '"}, "CUDACXX must be words as for a shell, got .*No closing quotation"),
        ({"CUDACXX": "nowhere"}, r"no CUDA compiler \(nowhere\) found"),
    ):
        with pytest.raises(Unavailable, match=reason):
            found(**variables)
        monkeypatch.setenv("CUDACXX", variables["CUDACXX"])
        assert re.search(
            reason, cuda_build.extension(91).why_unavailable()
        )  # an architecture that nothing else asks for
        monkeypatch.delenv("CUDACXX")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(Unavailable, match=r"\(nvcc, '?/none/bin/nvcc'?, /usr/local/cuda/bin/nvcc\) found"):
            found(CUDA_HOME="/none")
