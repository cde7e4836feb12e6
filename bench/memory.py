"""Peak extra memory of one call of a peer, measured in a process of its own.

`python bench/memory.py --size 16384x16384x128` measures in the process that it starts and prints one line of JSON;
`measure` starts that process. A fresh process matters on the CPU, where only the *peak* of the resident set is
recorded: a caller that has used more memory before would hide the growth.
"""

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peers import make_operands, sweep_peers

import emc2_kernels

BLOCK = 1 << 20  # bytes by which `fill_to_peak` goes forward, hence the resolution of a measurement on the CPU
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


def fill_to_peak() -> list[mmap.mmap]:
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
    ballast = fill_to_peak()
    before = peak_resident()
    call()
    after = peak_resident()
    for block in ballast:
        block.close()
    return after - before


def call_growth(peer: str, n: int, m: int, d: int, dtype: torch.dtype, device: torch.device, backend: str) -> int:
    """Peak extra bytes of one call with one sample per row, the library loaded and the operands in place. The buffers
    that a peer makes for itself count."""
    settings = {"temperature": 0.07, "num_samples": 1, "backend": backend}
    small = sweep_peers(*make_operands(256, 256, d, dtype, device), **settings)[peer]
    for _ in range(2):  # builds and loads the native library, starts its threads
        small()()
    square = torch.ones(1024, 1024, dtype=dtype, device=device)
    (square @ square).exp_().sum()  # starts the threads of torch and of its matrix library, with their buffers
    build = sweep_peers(*make_operands(n, m, d, dtype, device), **settings)[peer]
    return peak_growth(lambda: build()(), device)


def measure(
    size: tuple[int, int, int], *, dtype: str, device: str, backend: str, threads: int, peer: str = "mh_step"
) -> dict[str, object]:
    """Run `call_growth` in a fresh process; `size` is (n, m, d). Returns the record that goes into the results."""
    n, m, d = size
    options = {
        "peer": peer,
        "size": f"{n}x{m}x{d}",
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "threads": str(threads),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    # Blocks from 64 KiB up then go back to the system when freed; else what the warm-up freed would serve the sweep
    # uncounted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    # And it must measure the copy of the library that this process has imported, however that was found.
    library = str(Path(emc2_kernels.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed with exit status {done.returncode}")
    growth = json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"]  # a build may have printed lines before
    return {
        "peer": peer,
        "n": n,
        "m": m,
        "d": d,
        "num_samples": 1,
        "dtype": dtype,
        "peak_extra_mb": growth / 1e6,
        "score_matrix_mb": n * m * 4 / 1e6,
        "how": HOW[torch.device(device).type],
    }


def main() -> None:
    """Measure in this process and print one line of JSON."""
    parser = argparse.ArgumentParser(description="Peak extra memory of one call, measured in this process.")
    parser.add_argument("--peer", default="mh_step", help="as bench/peers.py calls it (default: %(default)s)")
    parser.add_argument("--size", default="16384x16384x128", help="n x m x d (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, m, d = map(int, options.size.split("x"))
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    growth = call_growth(options.peer, n, m, d, dtype, device, options.backend)
    print(json.dumps({"peak_extra_bytes": growth}))


if __name__ == "__main__":
    main()
