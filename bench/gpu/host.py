"""What small batches cost the host, without a GPU: the same calls as on one, but for what only a driver does.

    python -m bench.gpu.host                     microseconds a call, and where they go; writes nothing
    python -m bench.gpu.host --profile mh_step   by function

How a process passes for one with a GPU is in no_cuda.py. Left out, and to be added on a GPU: the driver's part of each
launch, torch's caching allocator in the place of malloc, and the thread in which autograd goes backward. What torch
computes around the kernels runs on the CPU here, in the place of being launched: little, where a loss is fused.

Times are the process's, not the clock's, and the least of 30 batches of 20 calls beside their median: other processes
disturb them little. Stages are shares of the time under Python's profiler, which makes functions dearer than they are.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
from torch import Tensor

import emc2_kernels as emc2
from bench.gpu.no_cuda import NoCuda, pass_for_a_gpu
from bench.harness import machine
from bench.peers import LossStep, MHStep, make_operands
from emc2_kernels.losses import EMC2Loss

BATCH, DIM = 32, 128
CALLS, BATCHES = 20, 30  # calls that are timed together, and how often
PROFILED = 500

Call = Callable[[], object]


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """2b rows, b keys."""
    return make_operands(2 * BATCH, BATCH, DIM, dtype, torch.device("cpu"))


def mh_step(backend: str) -> Call:
    """As bench/gpu/rows.py has it."""
    return MHStep(*operands(torch.bfloat16), 0.07, BATCH // 2, 16, backend)


def mh_step_with_ids(backend: str) -> Call:
    """With the step on the device and ids of chains, rows and keys, as a captured training step calls it."""
    (queries, keys), state = operands(torch.bfloat16), emc2.init_state(2 * BATCH)
    ids, step = torch.arange(2 * BATCH) % BATCH, torch.zeros((), dtype=torch.int64)
    options = {"temperature": 0.07, "seed": 0, "step": step, "query_ids": ids, "key_ids": ids[:BATCH]}
    options |= {"chain_ids": ids + BATCH, "burn_in": BATCH // 2, "num_samples": 16, "backend": backend}
    return lambda: emc2.mh_step(queries, keys, state, **options)


class Loss:
    """EMC2Loss, forward and backward."""

    def __init__(self, backend: str, **options: object) -> None:
        z0, z1 = make_operands(BATCH, BATCH, DIM, torch.float32, torch.device("cpu"))
        self.loss = EMC2Loss(50_000, DIM, backend=backend, **options)
        self.loss._watch.done = True  # which sees nothing on a GPU
        self.step = LossStep(self.loss, z0, z1, torch.arange(BATCH))

    def __call__(self) -> None:
        self.step()
        self.loss.chains.key.fill_(-1)  # no kernel has run, so rubbish was kept


CASES: dict[str, Callable[[], Call]] = {
    "mh_step": lambda: mh_step("triton"),
    "mh_step, with ids": lambda: mh_step_with_ids("triton"),
    "mh_step, cuda": lambda: mh_step("cuda"),
    "EMC2Loss(sampler='mh')": lambda: Loss("triton", sampler="mh"),
    "EMC2Loss": lambda: Loss("triton"),
}

# What a function is part of: the first whose words are in its file's name, a colon and its own name.
STAGES: dict[str, tuple[str, ...]] = {
    "checks": ("/checks.py", "/params.py", "/mh.py:_checked", "/mh.py:_proposals", "/mh.py:_schedule", "check_"),
    "dispatch": ("/dispatch.py", "/backends/__init__.py"),
    "allocation": ("new_empty", "torch.empty", "empty_like", "new_zeros"),
    "key": ("launch.py:bind", "data_ptr"),
    "launch": ("/site-packages/triton/", "launch.py:__call__", "cuda_utils.launch", "launch"),
    "arguments": ("/backends/", "dict"),
    "autograd": ("/torch/autograd/", "_EngineBase", "built-in method apply"),
    "torch": ("torch.", "TensorBase", "/torch/"),
}


def stage_of(file: str, function: str) -> str:
    """The stage, or "other"."""
    name = f"{file}:{function}"
    return next((stage for stage, words in STAGES.items() if any(word in name for word in words)), "other")


def profile(call: Call) -> pstats.Stats:
    """Of many calls."""
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(PROFILED):
            call()
    return pstats.Stats(profiler)


def stage_shares(stats: pstats.Stats) -> dict[str, float]:
    """Each stage's share of the time in functions."""
    seconds = dict.fromkeys([*STAGES, "other"], 0.0)
    for (file, _, function), (_, _, own, _, _) in stats.stats.items():
        seconds[stage_of(file, function)] += own
    return {stage: own / sum(seconds.values()) for stage, own in seconds.items()}


def count_calls(call: Call) -> dict[str, int]:
    """Python's functions and C's that one call of this calls; the same each time."""
    counts = {"call": 0, "c_call": 0}

    def see(frame: object, event: str, argument: object) -> None:
        if event in counts:
            counts[event] += 1

    call()
    collecting = gc.isenabled()
    gc.disable()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()
    return {"python": counts["call"], "c": counts["c_call"]}


def count_launches(call: Call, library: NoCuda) -> dict[str, int]:
    """Launches, and pointers that the driver was asked about, of one call."""
    before = library.launches, library.pointer_queries
    call()
    return {"launches": library.launches - before[0], "pointer queries": library.pointer_queries - before[1]}


def microseconds(call: Call) -> float:
    """Of the process, a call."""
    started = time.process_time_ns()
    for _ in range(CALLS):
        call()
    return (time.process_time_ns() - started) / CALLS / 1e3


def measure(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Microseconds a call, of batches in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for _ in range(BATCHES):
        for name, call in calls.items():
            times[name].append(microseconds(call))
    gc.enable()
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="NAME", choices=CASES, help="functions, by the time that they take")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    library = pass_for_a_gpu()
    calls = {name: make() for name, make in CASES.items() if options.profile in (None, name)}
    for call in calls.values():
        for _ in range(50):
            call()
    if options.profile:
        profile(calls[options.profile]).sort_stats("tottime").print_stats(45)
        return 0
    times = measure(calls)
    print(machine.heading(machine.describe(torch.device("cpu")), f"triton {triton.__version__}"))
    print(f"{'case':<24}{'least us':>9}{'median':>8}{'launches':>9}{'pointers asked':>15}{'calls':>6}{'of C':>6}")
    for name, call in calls.items():
        launched, counts = count_launches(call, library), count_calls(call)
        figures = f"{min(times[name]):>9.1f}{statistics.median(times[name]):>8.1f}{launched['launches']:>9}"
        print(f"{name:<24}{figures}{launched['pointer queries']:>15}{counts['python']:>6}{counts['c']:>6}")
    print(f"{'share of the time':<24}" + "".join(f"{stage:>11}" for stage in [*STAGES, "other"]))
    for name, call in calls.items():
        print(f"{name:<24}" + "".join(f"{share:>11.0%}" for share in stage_shares(profile(call)).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
