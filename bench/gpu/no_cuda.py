"""A process that takes tensors on the CPU for a GPU's, and in which Triton launches into nothing.

Triton runs as on a GPU, its launcher in C included; the driver that this calls is no_cuda.c. Kernels are not compiled,
and nobody looks at tensors' values. The `cuda` backend's structs are those of the CPU's core, and its launch is
nothing. It needs a C compiler, and what it changes stays changed: a process of its own, please.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from emc2_kernels import checks
from emc2_kernels.backends import _BUILDS, TABLE, gpu, params
from emc2_kernels.backends.cpu import build as cpu_build
from emc2_kernels.backends.cuda import mh as cuda
from emc2_kernels.backends.triton import tuning

STREAM = 77
ARCHITECTURE, PROCESSORS = 90, 132
PARAMETER_BYTES = {"i32": 4, "i64": 8, "fp32": 4}  # of a launch, and 8 for each pointer


class NoCuda:
    """libcuda.so.1, as everybody in this process will find it."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="emc2-no-cuda-"))
        path, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".c")
        (folder / "libcuda.so").symlink_to(path)  # what -lcuda looks for
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", path, source], check=True)
        triton.knobs.nvidia.libcuda_path = str(folder)
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._launches = ctypes.c_uint64.in_dll(library, "launches")
        self._pointer_queries = ctypes.c_uint64.in_dll(library, "pointer_queries")
        self._sizes = (ctypes.c_int * 128).in_dll(library, "sizes")
        self._parameters = (ctypes.c_uint64 * 128).in_dll(library, "parameters")

    @property
    def launches(self) -> int:
        """So far."""
        return self._launches.value

    @property
    def pointer_queries(self) -> int:
        """How often the driver was asked whose memory a pointer's is."""
        return self._pointer_queries.value

    def keep(self, kernel: CompiledKernel) -> None:
        """The parameters of the next launches, which are of this kernel."""
        types = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        self._sizes[: len(types) + 1] = [*(8 if kind[0] == "*" else PARAMETER_BYTES[kind] for kind in types), 0]

    def parameters(self) -> list[int]:
        """Of the latest launch, their bits."""
        return self._parameters[: list(self._sizes).index(0)]


class Driver:
    """Triton's of NVIDIA, but that what it asks torch for on a GPU is known."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)


METADATA = {
    "num_ctas": 1,
    "num_warps": 4,
    "shared": 0,
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "tensordesc_meta": None,
    "instrumentation_mode": "",
}


def _do_compile(
    self: JITFunction, key: object, signature: dict, device: int, constants: dict, options: object, attrs: dict, _: bool
) -> CompiledKernel:
    """In place of ``JITFunction``'s: a kernel with its launcher, and no code."""
    kernel = object.__new__(CompiledKernel)
    kernel.src, kernel.metadata = self.ASTSource(self, signature, constants, attrs), SimpleNamespace(**METADATA)
    kernel.name, kernel.module, kernel.function, kernel._module_pid = self.__name__, object(), 1, None
    kernel.packed_metadata = METADATA["num_warps"], METADATA["num_ctas"], METADATA["shared"]
    kernel._run = nvidia.CudaLauncher(kernel.src, kernel.metadata)
    self.device_caches[device][0][key] = kernel
    return kernel


def pass_for_a_gpu() -> NoCuda:
    """From here on, in this process; returns what counts the launches."""
    library = NoCuda()
    sys.setdlopenflags(os.RTLD_LAZY)  # of the driver's functions, Triton's modules find only those of a launch
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = _do_compile
    CompiledKernel.__del__ = lambda self: None  # no driver has it
    gpu.interpreting = lambda: True  # tensors on the CPU are taken by name, though nothing is interpreted
    tuning.device = lambda index: (ARCHITECTURE // 10, PROCESSORS)
    checks.values_visible = lambda value: False
    checks.within = lambda name, value, *bounds, **more: value
    for each in (params.WalkParams, params.ScoreParams, params.CarriedParams):
        each.check_values = lambda self, *scores: None
    core = SimpleNamespace(**vars(cpu_build.library()))
    core.walk_sweep = core.walk_gathered = core.view_coins = lambda *launch: None
    cuda.library, cuda._current_stream = lambda index: core, lambda index: STREAM
    TABLE["cuda"] = TABLE["cuda"]._replace(devices=("cpu",), why_unavailable=lambda: None)
    _BUILDS["cuda"] = lambda: None
    return library
