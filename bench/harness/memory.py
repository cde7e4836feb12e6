"""Peak extra memory of one call.

On the CPU only the *peak* of the resident set is recorded, so a process that has used more memory before would hide the
growth: `call_isolated` starts one that has not.
"""

import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 1 << 20  # bytes by which `add_ballast` goes forward, hence the resolution of a measurement on the CPU
HOW = {
    "cpu": "growth of the peak resident set (getrusage ru_maxrss) over the call, in a fresh process that made a small"
    " call before and had touched the operands",
    "cuda": "torch.cuda.max_memory_allocated during the call minus memory_allocated before it, in a fresh process that"
    " made a small call before",
}


def peak_resident() -> int:
    """Largest resident set that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def add_ballast() -> list[mmap.mmap]:
    """Take memory until the resident set stands at its own peak; hold the result as long as growth is being measured.

    Start-up leaves the peak above the present size, and Linux even lets a process inherit the peak of the one that
    started it. Growth below that mark would be invisible.
    """
    mark = peak_resident()
    ballast = []
    while peak_resident() == mark:
        block = mmap.mmap(-1, BLOCK)
        block.write(bytes(BLOCK))
        ballast.append(block)
    return ballast


def peak_growth(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory peaks, during one call, above what was in use before it. The call's result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ballast = add_ballast()
    before = peak_resident()
    call()
    after = peak_resident()
    for block in ballast:
        block.close()
    return after - before


def warm_growth(
    small: Callable[[], object], call: Callable[[], object], device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    """`peak_growth` of a call after a small one of its kind, which builds and loads libraries and starts threads."""
    for _ in range(2):
        small()
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    (square @ square).exp_().sum()  # starts the threads of torch and of its matrix library, with their buffers
    return peak_growth(call, device)


def call_isolated(module: str, function: str, *arguments: object) -> Any:
    """What a module's function makes of numbers and words in a new process with as many threads as this one.

    Blocks from 64 KiB up go back to the system there when freed; else what warming up freed would serve the call
    uncounted. And it measures the copy of the library that this process has imported, however that was found.
    """
    lines = (
        "import json, torch",
        f"from {module} import {function}",
        f"torch.set_num_threads({torch.get_num_threads()})",
        f"print(json.dumps({function}(*{arguments!r})))",
    )
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # a build may have printed lines before
