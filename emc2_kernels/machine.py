"""What this machine is and has, as `python -m emc2_kernels` prints it. Nothing is compiled, and nothing raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__
from .backends import backends
from .backends.cpu import build as cpu_build
from .backends.cuda import build as cuda_build
from .backends.extension import Unavailable, cache_root, usable_cores

UNKNOWN = "unknown"
# What the CPU core's kernels are written for, as Linux names it.
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "asimd", "sve")
VARIABLES = (
    "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "EMC2_ARCH", "EMC2_DEVICE_ASSERTIONS",
    "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip


def package_version(name: str) -> str:
    """Version of an installed distribution, or "unknown"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def _cpu_listing() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpu_listing(), re.MULTILINE)
    name = found[1].strip() if found else _output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine() or UNKNOWN


def instruction_sets() -> list[str]:
    """Of INSTRUCTION_SETS, those that the processor has; none where the system does not say."""
    found = re.search(r"^(?:flags|features)\s*:\s*(.+)$", _cpu_listing(), re.MULTILINE | re.IGNORECASE)
    names = found[1].split() if found else []
    return [name for name in INSTRUCTION_SETS if name in names]


def _output(*command: str) -> str:
    """What a command says; nothing where it is missing, slow or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _compiler(find: Callable[[], list[str]]) -> str:
    """Its path, and the line of its own that has its version."""
    try:
        command = find()
    except Unavailable as error:
        return str(error)
    lines = _output(*command, "--version").splitlines()
    version = next((line for line in lines if re.search(r"\d+\.\d+", line)), UNKNOWN)
    return f"{' '.join(command)}: {version.strip()}"


def _torch() -> str:
    of_gpus = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    built = ", ".join(f"{name} {version}" for name, version in of_gpus.items() if version) or "CPUs only"
    return f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads"


def _cpu() -> str:
    sets = " ".join(instruction_sets()) or UNKNOWN
    runs = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {usable_cores()} of {os.cpu_count()} cores; {sets}; torch runs {runs}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    return "; ".join(_gpu(number) for number in range(torch.cuda.device_count()))


def _gpu(number: int) -> str:
    found = torch.cuda.get_device_properties(number)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 1e9:.0f} GB"


def _cache() -> str:
    try:
        root = cache_root()
    except Unavailable as error:
        return str(error)
    built = sorted(path.parent.name for path in root.glob("*/*.so"))
    return f"{root}, {len(built)} modules"


def _variables() -> str:
    return " ".join(f"{name}={os.environ[name]!r}" for name in VARIABLES if name in os.environ) or "none of note"


LINES: dict[str, Callable[[], str]] = {
    "emc2_kernels": lambda: f"{__version__}, {Path(__file__).parent}",
    "Python": lambda: f"{platform.python_version()}, {platform.python_implementation()}",
    "torch": _torch,
    "Triton": lambda: package_version("triton"),
    "pybind11": lambda: package_version("pybind11"),
    "system": platform.platform,
    "CPU": _cpu,
    "GPU": _gpus,
    "C++ compiler": lambda: _compiler(cpu_build.compiler),
    "CUDA compiler": lambda: _compiler(cuda_build.compiler),
    "cache": _cache,
    "variables": _variables,
}


def description() -> str:
    """A line for each of LINES, and one for each backend: whether it can run here, or why not."""
    lines = {name: _answer(line) for name, line in LINES.items()}
    lines |= {f"backend {name}": status for name, status in backends().items()}
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _answer(line: Callable[[], str]) -> str:
    """Whatever is broken here is what is asked for: it may end no other line."""
    try:
        return line()
    except Exception as error:
        return f"{UNKNOWN} ({type(error).__name__}: {error})"
