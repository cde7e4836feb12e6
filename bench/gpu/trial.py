"""What the smoke stage is made of: a trial calls kernels and is judged, and a case is what one comparison found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.peers import Replay

ENOUGH = 0.9  # share of a case's rows that must be clear of ties, or it says too little


@dataclass
class Case:
    """One comparison. A row that came too near a tie is not compared: there rounding may decide either way."""

    case: str
    rows: int
    compared: int
    mismatches: int  # of the compared rows
    largest_error: float  # the one that came nearest to its bound, and that bound
    bound: float
    notes: dict[str, float] = field(default_factory=dict)  # figures that are no part of the verdict

    @property
    def nearness(self) -> float:
        """Largest error as a share of its bound; exact comparisons have bound 0."""
        return self.largest_error / self.bound if self.bound else (math.inf if self.largest_error else 0.0)

    def failure(self) -> str | None:
        """What is wrong, in words; None where nothing is."""
        if self.mismatches:
            error = f"error {self.largest_error:.3g}, bound {self.bound:.3g}"
            return f"{self.case}: {self.mismatches} of {self.compared} compared rows differ ({error})"
        if self.compared < ENOUGH * self.rows:
            return f"{self.case}: only {self.compared} of {self.rows} rows are clear of ties"
        return None

    def record(self) -> dict[str, object]:
        """For the results: JSON knows no infinity."""
        kept = asdict(self)
        kept["largest_error"] = self.largest_error if math.isfinite(self.largest_error) else None
        return kept | kept.pop("notes")


class Trial(NamedTuple):
    """``call`` launches kernels and returns what ``judge`` compares with float64; warming up only calls."""

    name: str
    call: Callable[[], object]
    judge: Callable[[object], list[Case]]


@dataclass(frozen=True)
class Context:
    """Where trials run, and which backends stand behind the names "triton" and "cuda"."""

    device: torch.device
    triton: str = "triton"
    cuda: str = "cuda"

    @property
    def rehearsal(self) -> bool:
        """On a CPU, at toy sizes."""
        return self.device.type == "cpu"

    def backend(self, kind: str) -> str:
        """The backend that runs the families of a kind."""
        return {"triton": self.triton, "cuda": self.cuda, "hopper": self.cuda}[kind]

    def choose(self, real: tuple, toy: tuple) -> tuple:
        """A shape: the real one, or the toy in a rehearsal."""
        return toy if self.rehearsal else real

    def synchronize(self) -> None:
        """Waits for the device, so that what a kernel did wrong is raised here and the clock sees all of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(name: str, actual: Tensor, expected: Tensor, bound: float | Tensor, notes: dict | None = None) -> Case:
    """actual (n, ...) within ``bound``, (), (n,) or of its shape, of expected float64; equal infinities are equal."""
    if actual.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    actual = actual.detach().double()
    error = torch.where(actual == expected, 0.0, (actual - expected).abs())
    error = torch.where(error.isnan(), torch.inf, error)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=error.device)
    if bound.dim() == 1:
        bound = bound.reshape(-1, *[1] * (error.dim() - 1))
    bound = bound.expand_as(error)
    rows = error.shape[0]
    if error.numel() == 0:
        return Case(name, rows, rows, 0, 0.0, 0.0, notes or {})
    ratio = torch.where(error == 0, 0.0, error / bound)  # a bound of 0 is met by an error of 0
    ratio = ratio.flatten(1) if ratio.dim() > 1 else ratio[:, None]
    worst = int(ratio.argmax())
    wrong = int((ratio > 1).any(1).sum())
    return Case(name, rows, rows, wrong, float(error.flatten()[worst]), float(bound.flatten()[worst]), notes or {})


def compare_rows(name: str, actual: Tensor, expected: Tensor, bound: float) -> Case:
    """Rows (n, d) of a gradient: length of the error over the row's own, or over a tenth of the rows' mean length."""
    if actual.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    lengths = expected.norm(dim=1)
    relative = (actual.detach().double() - expected).norm(dim=1) / lengths.clamp_min(0.1 * float(lengths.mean()))
    return compare(name, relative, torch.zeros_like(relative), bound)


def compare_exactly(name: str, actual: Tensor, expected: Tensor) -> Case:
    """Equal values, row by row; a number counts as one row."""
    actual, expected = torch.atleast_1d(actual.detach()), torch.atleast_1d(expected.detach())
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        what = [(tuple(tensor.shape), tensor.dtype) for tensor in (actual, expected)]
        raise ValueError(f"{name}: {what[0]} instead of {what[1]}")
    differs = (actual != expected).flatten(1).any(1) if actual.dim() > 1 else actual != expected
    apart = (actual.double() - expected.double()).abs()
    largest = (
        float(apart[actual != expected].nan_to_num(nan=math.inf, posinf=math.inf).max()) if bool(differs.any()) else 0.0
    )
    return Case(name, len(actual), len(actual), int(differs.sum()), largest, 0.0)


def merge_cases(cases: Sequence[Case]) -> list[Case]:
    """Cases of one name as one: counts added, the error that came nearest to its bound kept."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.case, []).append(case)
    out = []
    for name, group in groups.items():
        worst = max(group, key=lambda case: case.nearness)
        counts = [sum(getattr(case, count) for case in group) for count in ("rows", "compared", "mismatches")]
        out.append(Case(name, *counts, worst.largest_error, worst.bound, worst.notes))
    return out


def capture(function: Callable[[], tuple[Tensor, ...]], context: Context) -> Callable[[], tuple[Tensor, ...]]:
    """A replay of the function's CUDA graph, which returns copies of its outputs; in a rehearsal the function."""
    if context.rehearsal:
        return function
    graph = Replay(function, context.device)

    def replay() -> tuple[Tensor, ...]:
        graph()
        return tuple(output.detach().clone() for output in graph.results)

    return replay
