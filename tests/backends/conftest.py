"""The CUDA backend's kernels on a CPU: g++'s build of the same sources with an emulator (tests/cpp/cuda_emulator.h),
which shows the arithmetic, the indices and the shuffles, and nothing of timing."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks
import torch
from first_use import run_checked
from helpers import poisoned

from emc2_kernels import mh, ops
from emc2_kernels.backends import extension
from emc2_kernels.backends.cuda import build as cuda_build
from emc2_kernels.backends.cuda import mh as cuda

ROOT = Path(__file__).resolve().parents[2]
EMULATOR_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-Wno-attributes",
)  # fmt: skip


def build_emulator(folder: Path) -> None:
    (folder / "cuda_runtime.h").write_text('#include "cuda_emulator.h"\n')
    flags = (*EMULATOR_FLAGS, "-I", folder, "-I", ROOT / "tests" / "cpp")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run_checked("g++", *flags, *extension.include_flags(), "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, cuda_build.sources()))
    run_checked("g++", "-shared", *objects, "-o", folder / "emc2_cuda.so")


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    folder = ranks.made_once(ranks.shared_folder(tmp_path_factory) / "emulator", build_emulator)
    module = extension.load("emc2_cuda", folder / "emc2_cuda.so")
    module.load(0)
    return module


@pytest.fixture
def rubbish_in_outputs(monkeypatch):
    """Buffers come with rubbish in them: whatever a kernel must fill, it fills."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **options: poisoned(real(*args, **options)))


@pytest.fixture
def emulated(emulated_module, rubbish_in_outputs, monkeypatch):
    """The backend's name while it takes CPU tensors."""
    resolve = ops.resolve
    monkeypatch.setattr(cuda, "library", lambda device: emulated_module)
    monkeypatch.setattr(cuda, "_current_stream", lambda device: 0)
    monkeypatch.setattr(ops, "resolve", lambda name, *a, **b: cuda if name == "emulated" else resolve(name, *a, **b))
    monkeypatch.setattr(mh, "NAMES", (*mh.NAMES, "emulated"))
    return "emulated"
