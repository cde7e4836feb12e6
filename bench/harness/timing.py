"""Interleaved timing: competitors take turns in one process, so that a slow spell of the machine hits all alike.

Nothing here knows what is being timed. A *call* is a function of no arguments; a *timer* runs a call a number of times
and returns the seconds per call; `interleave` lets the calls take turns and returns one figure per call and round.
Compare two calls by `ratios`, which pairs figures of the same round, and not by dividing two medians: neighbours in
time share the state of the machine.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Timer = Callable[[Call, int], float]

FEWEST_ROUNDS = 3  # below this a median says nothing about spread


@dataclass(frozen=True)
class Plan:
    """How one call is timed: `repeats` calls in a row make one figure, taken in every `stride`-th round."""

    repeats: int
    stride: int


@dataclass(frozen=True)
class Interleaved:
    """What `interleave` measured: seconds per call, one entry per round, None where the call sat the round out."""

    seconds: dict[str, list[float | None]]
    plans: dict[str, Plan]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of `count` figures, in the figures' own unit."""

    median: float
    lower_quartile: float
    upper_quartile: float
    count: int


def cpu_timer(call: Call, repeats: int) -> float:
    """Wall-clock seconds per call, mean of `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_timer(call: Call, repeats: int) -> float:
    """Seconds per call on the current CUDA stream, between two events around `repeats` calls in a row.

    The device is idle at the first event, so a call that cannot be launched as fast as it runs is charged for the gaps.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def wall_timer(call: Call, repeats: int) -> float:
    """Seconds per call until the device is done with all of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def host_timer(call: Call, repeats: int) -> float:
    """Seconds per call that the host is busy for: launches are asynchronous."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return seconds


def choose_timer(device: torch.device) -> Timer:
    """The timer that is right for calls which run on `device`."""
    return cuda_timer if device.type == "cuda" else cpu_timer


def make_plan(seconds_per_call: float, rounds: int, min_seconds: float, budget_seconds: float) -> Plan:
    """Repeat a short call until a figure spans `min_seconds`; let a long one sit rounds out to keep `budget_seconds`.

    Strides are powers of two, so that the rounds of a slower call are a subset of the rounds of a faster one and every
    pair of calls has rounds in common.
    """
    repeats = max(1, round(min_seconds / max(seconds_per_call, 1e-9)))
    turn = (repeats + 1) * seconds_per_call  # a turn begins with one call that is not timed
    stride = 1
    while turn * rounds / stride > budget_seconds and -(-rounds // (2 * stride)) >= FEWEST_ROUNDS:
        stride *= 2
    return Plan(repeats, stride)


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    timer: Timer = cpu_timer,
    warmup: int = 3,
    min_seconds: float = 0.005,
    budget_seconds: float = 10.0,
    seed: int = 0,
) -> Interleaved:
    """Time every call once per round, in an order that is shuffled anew for each round.

    Args:
        calls: name -> call.
        rounds: number of rounds; a call whose turns would pass `budget_seconds` takes part in fewer, evenly spaced, but
            in 3 or more.
        timer: runs a call n times, returns seconds per call.
        warmup: calls made before anything is timed (these compile, allocate and start threads); at least 1.
        min_seconds: span that one figure should cover at least; short calls are repeated within a turn to reach it.
        budget_seconds: time that all turns of one call together may take, roughly.
        seed: of the orders.
    """
    plans = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        # One call may be too short to time: it only sets the number of repeats for the estimate that is used.
        rough = make_plan(timer(call, 1), rounds, min_seconds, budget_seconds)
        plans[name] = make_plan(timer(call, rough.repeats), rounds, min_seconds, budget_seconds)

    seconds: dict[str, list[float | None]] = {name: [None] * rounds for name in calls}
    orders = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            present = [name for name in calls if turn % plans[name].stride == 0]
            orders.shuffle(present)
            for name in present:
                calls[name]()  # refills the caches that the previous competitor emptied
                seconds[name][turn] = timer(calls[name], plans[name].repeats)
    finally:
        if collecting:
            gc.enable()
    return Interleaved(seconds, plans)


def figures(series: Sequence[float | None]) -> list[float]:
    """The figures of the rounds in which a call took part."""
    return [value for value in series if value is not None]


def ratios(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> list[float]:
    """Ratio within each round that both calls took part in."""
    pairs = zip(numerator, denominator, strict=True)
    return [above / below for above, below in pairs if above is not None and below is not None]


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation, end points included)."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, len(values))
