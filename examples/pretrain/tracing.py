"""A trace of a few training steps, and what share of them each part takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

SKIPPED = 2  # steps, which build kernels and start threads
PARTS = ("views", "encoder", "loss", "optimizer", "backward")
# The library's operators that draw negatives; they run within "loss".
SAMPLERS = (
    "emc2_kernels::mh_step",
    "emc2_kernels::mh_transition",
    "emc2_kernels::view_coin",
    "emc2_kernels::gumbel_sample",
)


class Tracer:
    """Traces `steps` steps, from the third on; 0: none.

    Attributes, once that is done:
        step_ms: mean of a step, which is slower for being traced.
        shares: of the step, by part, and "drawing": that of drawing negatives, within "loss".
    """

    def __init__(self, steps: int, path: Path, device: torch.device) -> None:
        """path: of the trace, for chrome://tracing or ui.perfetto.dev."""
        self.left = SKIPPED + steps if steps else 0
        self.steps = steps
        self.path = path
        self.device = device
        self.profiler: profile | None = None
        self.step_ms: float | None = None
        self.shares: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.profiler is None:
            yield
            return
        with record_function(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a part ends when its kernels have, not when they are launched

    @contextmanager
    def step(self) -> Iterator[None]:
        if self.left == self.steps and self.left > 0:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
        with self.part("step"):
            yield
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self._finish()

    def close(self) -> None:
        """Ends a trace that a run breaks off: a profiler that is still at work would crash the interpreter's exit."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _finish(self) -> None:
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.path))
        totals = {event.key: event for event in profiler.key_averages()}
        whole = totals["step"].cpu_time_total
        self.step_ms = whole / self.steps / 1000
        self.shares = {name: totals[name].cpu_time_total / whole for name in PARTS}
        drawing = [totals[name] for name in SAMPLERS if name in totals]
        on_gpu = self.device.type == "cuda"
        self.shares["drawing"] = (
            sum(each.device_time_total if on_gpu else each.cpu_time_total for each in drawing) / whole
        )

    @property
    def summary(self) -> str | None:
        if self.step_ms is None:
            return None
        parts = ", ".join(f"{name} {self.shares[name]:.1%}" for name in PARTS)
        drawing = f"drawing negatives, within the loss, {self.shares['drawing']:.1%}"
        return f"{self.steps} steps of {self.step_ms:.1f} ms, traced: {parts} (of encoder and loss); {drawing}"
