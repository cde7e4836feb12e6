"""What a figure was measured on and with: machine, versions, state of the source tree."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import emc2_kernels
from bench.harness import CHECKOUT
from emc2_kernels.backends.cpu import build
from emc2_kernels.backends.extension import Unavailable, usable_cores
from emc2_kernels.machine import UNKNOWN, cpu_name, package_version


def run_quietly(*command: str) -> str | None:
    """Standard output of a command run in the checkout, or None where it is missing, slow or fails."""
    # Without optional locks `git status` leaves the index alone: a benchmark never disturbs a commit in progress.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def ask_nvidia_smi(quantity: str) -> str | None:
    """Of the GPU that torch uses, by its UUID: nvidia-smi's numbers know nothing of CUDA_VISIBLE_DEVICES."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return run_quietly("nvidia-smi", f"--query-gpu={quantity}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}")


def source_version() -> dict[str, str | bool | None]:
    """Commit of the checkout that this file lies in, and whether files differ from it; bench/results does not count.

    Of a copy without .git, what ``$EMC2_COMMIT`` says: a hash, and "-dirty" after it where files differ.
    """
    root = run_quietly("git", "rev-parse", "--show-toplevel")
    commit = run_quietly("git", "rev-parse", "--verify", "HEAD")
    # A copy without .git inside of another project's checkout would otherwise report that project's commit.
    if root is None or commit is None or Path(root).resolve() != CHECKOUT:
        told = os.environ.get("EMC2_COMMIT", "")
        return {"commit": told.removesuffix("-dirty") or UNKNOWN, "dirty": told.endswith("-dirty") if told else None}
    changes = run_quietly("git", "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def load_average() -> float | None:
    """Mean number of runnable processes in the last minute; where it is well above `threads`, others interfered."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def core_instruction_set() -> str | None:
    """What the CPU backend's core is compiled for, which this does where it has not been; None: there is no core."""
    try:
        return build.library().instruction_set
    except Unavailable:
        return None


def describe(device: torch.device) -> dict[str, object]:
    """Everything that a figure depends on and that the figure's own record does not say."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "core_instruction_set": None if on_gpu else core_instruction_set(),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": package_version("triton"),
        "float32_matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        "emc2_kernels": package_version("emc2_kernels"),
        "emc2_kernels_from_checkout": Path(emc2_kernels.__file__).resolve().is_relative_to(CHECKOUT),
        **source_version(),
        **(describe_gpu(device) if on_gpu else {}),
    }


def describe_gpu(device: torch.device) -> dict[str, object]:
    """The card, its driver, the compiler."""
    properties = torch.cuda.get_device_properties(device)
    compiler = run_quietly("nvcc", "--version") or ""
    return {
        "driver": ask_nvidia_smi("driver_version") or UNKNOWN,
        "nvcc": next((line.strip() for line in compiler.splitlines() if "release" in line), None),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
    }


def instruction_sets(description: dict[str, object]) -> str:
    """The core's and torch's, in words."""
    core, in_torch = (description.get(name, UNKNOWN) for name in ("core_instruction_set", "cpu_capability"))
    return f"core {core or 'not compiled'}, torch {in_torch}"


def heading(description: dict[str, object], what: str) -> str:
    """What a benchmark prints first: the machine, `what` it does there and, on a CPU, by which instructions."""
    load = f"load {description['load_average']}"
    line = f"{description['device']}, {description['threads']} threads, {load}, torch {description['torch']}; {what}"
    if description["device_type"] != "cpu":
        return line
    # ATen tells what its own kernels run; what the library behind torch.mm chooses, it does not.
    return f"{line}\ninstruction sets: {instruction_sets(description)} (its matrix product chooses for itself)"


def slug(description: dict[str, object]) -> str:
    """A file name for this machine: the GPU's name, or the CPU's with its number of cores."""
    name = str(description["device"])
    if description["device_type"] == "cpu":
        name += f" {description['usable_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
