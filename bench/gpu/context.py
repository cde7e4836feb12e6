"""Where a row of the GPU benchmark runs, how its calls are timed, and what it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch

from bench.gpu.limits import Limits, binding
from bench.harness import memory
from bench.harness.timing import Call, Interleaved, Plan, Timer, cpu_timer, cuda_timer, figures, interleave, summarize

DEAD_CONTEXT = 70  # exit status of a process that has lost the GPU
REHEARSAL_ROUNDS, QUICK_ROUNDS, HEADLINE_ROUNDS, ROUNDS = 3, 7, 9, 15


def context_is_alive(device: torch.device) -> bool:
    """False after a kernel has failed in a way that ends the process's use of the GPU."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Context:
    """Where a row runs, and how thoroughly.

    A rehearsal runs every line of it on a CPU at toy sizes; its figures mean nothing. `headline`: without the peers
    that are slow. `warm`: every call once, which compiles and loads what it needs; its figures mean nothing either.
    """

    device: torch.device
    backends: Sequence[str]
    quick: bool = False
    rehearsal: bool = False
    headline: bool = False
    warm: bool = False

    @cached_property
    def limits(self) -> Limits:
        """Of the machine, each measured when a row first asks for it."""
        return Limits(self)

    def size(self, real: int, toy: int, warm: int | None = None) -> int:
        """`warm`: enough to compile the same binaries, where many processes share the GPU's memory."""
        return toy if self.rehearsal else warm if self.warm and warm is not None else real

    def measure(self, calls: Mapping[str, Call], timer: Timer = cuda_timer) -> Interleaved:
        """Interleaved rounds; at most about half a second for each call."""
        timer = cpu_timer if self.rehearsal else timer
        if self.warm:
            return Interleaved(
                {name: [timer(call, 1)] for name, call in calls.items()}, dict.fromkeys(calls, Plan(1, 1))
            )
        pace = {"min_seconds": 2e-4, "budget_seconds": 0.05} if self.rehearsal else {"min_seconds": 0.004}
        pace = {"budget_seconds": 0.25 if self.quick else 0.6} | pace
        rounds = HEADLINE_ROUNDS if self.headline else ROUNDS
        rounds = REHEARSAL_ROUNDS if self.rehearsal else QUICK_ROUNDS if self.quick else rounds
        return interleave(calls, rounds, timer=timer, **pace)

    def peak_megabytes(self, call: Call) -> float:
        """Peak extra memory of a call that has been made before; results count."""
        return 0.0 if self.rehearsal else memory.peak_growth(call, self.device) / 1e6


@dataclass
class Row:
    """What one row measured.

    `readings` are times beside the limits that the machine sets them in the same run; `goals` are figures, held to a
    bound or not.
    """

    sizes: dict[str, object]
    times_ms: dict[str, dict] = field(default_factory=dict)
    readings: list[dict] = field(default_factory=list)
    goals: list[dict] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)

    def add_times(self, measured: Interleaved, suffix: str = "") -> None:
        for name, seconds in measured.seconds.items():
            self.times_ms[name + suffix] = asdict(summarize([1e3 * figure for figure in figures(seconds)]))

    def add_reading(self, quantity: str, seconds: Sequence[float | None], limits: Mapping[str, float]) -> None:
        """A time over the rounds, in the unit that ends its name: ms or us. `limits`: as Limits.times has them."""
        milliseconds = summarize([1e3 * figure for figure in figures(seconds)])
        scale = {"ms": 1.0, "us": 1e3}[quantity.split(" ")[-1]]
        binds = binding(limits)
        self.readings.append(
            {"quantity": quantity, "measured": scale * milliseconds.median}
            | {"lower_quartile": scale * milliseconds.lower_quartile}
            | {"upper_quartile": scale * milliseconds.upper_quartile}
            | {"limits": dict(limits), "binds": binds}
            | {"time / limit": milliseconds.median / limits[binds] if binds else None}
        )

    def add_goal(
        self, quantity: str, values: float | Sequence[float], sense: str | None = None, bound: float | None = None
    ) -> None:
        """A figure, or its values over the rounds; `sense` "<=" or ">=" `bound`, or no goal."""
        spread = summarize([values] if isinstance(values, (int, float)) else values)
        met = None if bound is None else spread.median <= bound if sense == "<=" else spread.median >= bound
        self.goals.append(
            {"quantity": quantity, "value": spread.median, "lower_quartile": spread.lower_quartile}
            | {"upper_quartile": spread.upper_quartile, "goal": bound and f"{sense} {bound:g}", "met": met}
        )
