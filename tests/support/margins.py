"""A pytest plugin: writes down how close each comparison of a test came to failing, and moves the seeds.

    PYTHONPATH=tests pytest -p margins -o enable_assertion_pass_hook=true --margins=FILE [--move-seeds=K]

FILE gets a line of JSON for each test: its outcome, and of each `assert a < b` (of a chain, the last), each
pytest.approx and each assert_close with a tolerance the sides that came closest, as [where, [smaller, larger]]. With K,
the seeds that a test hands to torch, numpy, Python's random and the library are others (not those of processes that it
starts), so that what depends on luck shows its spread; tests marked one_seed are left out.
tests/support/instruction_sets.py runs the suite with it and says what came out.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", metavar="FILE", help="append outcomes and margins to this file")
    parser.addoption("--move-seeds", metavar="K", type=int, default=0, help="add K to every seed")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("margins"):
        config.pluginmanager.register(Recorder(Path(config.getoption("margins")), hasattr(config, "workerinput")))
        helpers = {file.stem for file in Path(__file__).parent.glob("*.py")}
        pytest.register_assert_rewrite(*helpers - set(sys.modules))  # or what they assert would not be seen
    if config.getoption("move_seeds"):
        move_seeds(config.getoption("move_seeds"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("move_seeds"):
        items[:] = [item for item in items if item.get_closest_marker("one_seed") is None]


_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip


def number(node: ast.expr) -> float:
    """What an expression of numbers stands for.

    Raises:
        ValueError: it has something else in it.
    """
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id="inf" | "nan" as name):
            return float(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](number(left), number(right))
        case ast.Call(args=[value]):  # tensor(0.5, dtype=...), np.float64(0.5)
            return number(value)
    raise ValueError(f"not a number: {ast.unparse(node)}")


def comparisons(explanation: str) -> list[tuple[float, float]]:
    """(smaller, larger) of each comparison of numbers that must hold, by pytest's explanation of an assertion that did.

    An explanation is the assertion with values for names; what they came from follows in lines that begin with "+".
    """
    expression = re.split(r"\n +\+", explanation)[0]
    expression = re.sub(r"([^\s(]+) == (\S+) ± ([^\s,)]+)", r"abs_difference(\1 - \2) <= \3", expression)
    try:
        whole = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        return []
    found, open_nodes = [], [whole]
    while open_nodes:
        match open_nodes.pop(0):
            case ast.BoolOp(op=ast.And(), values=values):  # of "or" and "not" one does not have to hold
                open_nodes += values
                continue
            case ast.Compare(left=left, ops=[ast.Lt() | ast.LtE()], comparators=[right]):
                small, large = left, right
            case ast.Compare(left=left, ops=[ast.Gt() | ast.GtE()], comparators=[right]):
                small, large = right, left
            case _:
                continue
        try:
            sides = number(small), number(large)
        except (ValueError, ArithmeticError):
            continue
        approximate = isinstance(left, ast.Call) and getattr(left.func, "id", "") == "abs_difference"
        found.append((abs(sides[0]), sides[1]) if approximate else sides)
    return found


def closeness(actual: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> float | None:
    """Of an assert_close with a tolerance: the largest error as a share of what is allowed; None for other values."""
    if isinstance(actual, dict):
        actual, expected = [*actual.values()], [expected[name] for name in actual]
    if isinstance(actual, (list, tuple)):
        shares = [closeness(a, e, rtol, atol) for a, e in zip(actual, expected, strict=True)]
        return max((share for share in shares if share is not None), default=None)
    if not all(isinstance(side, (float, torch.Tensor)) for side in (actual, expected)):
        return None
    actual, expected = (torch.as_tensor(side).detach().cpu() for side in (actual, expected))
    if not (actual.is_floating_point() and expected.is_floating_point()):
        return None
    if rtol is None or atol is None:
        rtol, atol = torch.testing._comparison.default_tolerances(actual, expected)
    actual, expected = actual.double(), expected.double().expand(actual.shape)
    allowed = atol + rtol * expected.abs()
    share = ((actual - expected).abs() / allowed)[actual.isfinite() & expected.isfinite() & (allowed > 0)]
    return float(share.max()) if share.numel() else None


def slack(small: float, large: float) -> float:
    """How far a comparison is from failing."""
    return large - small


def relative_slack(small: float, large: float) -> float:
    """The same for errors, probabilities and what else is thought of in powers of ten; NaN where a side is not."""
    return math.log(large / small) if small > 0 and large > 0 else math.nan


class Recorder:
    """The outcomes of tests and their closest comparisons, appended to a file.

    Where xdist runs tests in workers these send what they have seen with their reports, and the first process writes,
    which also hears of workers that have died.
    """

    def __init__(self, path: Path, in_worker: bool) -> None:
        self.path = path
        self.in_worker = in_worker
        self.closest: dict[str, tuple[float, float]] = {}
        self.sources = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("*.py"))
        self.assert_close = torch.testing.assert_close
        torch.testing.assert_close = self.measured_assert_close

    def note(self, where: str, small: float, large: float) -> None:
        known = self.closest.get(where)
        if known is None or slack(small, large) < slack(*known):
            self.closest[where] = small, large

    def measured_assert_close(self, actual: Any, expected: Any, *rest: Any, **options: Any) -> None:
        self.assert_close(actual, expected, *rest, **options)
        share = closeness(actual, expected, options.get("rtol"), options.get("atol"))
        if share:  # 0: the same bits
            self.note("assert_close: share of the tolerance", share, 1.0)

    def pytest_assertion_pass(self, item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
        # Those of plugins come here, too; and some hold whatever chance brings: `assert ...  # exact`.
        if "# exact" in orig or not (orig in self.sources or orig in item.path.read_text()):
            return
        for place, sides in enumerate(comparisons(expl)):
            self.note(f"{lineno}.{place} {orig}", *sides)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.closest.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[pytest.TestReport]:
        report = yield
        report.closest = list(self.closest.items())
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.in_worker and (report.when == "call" or not report.passed):
            line = {"test": report.nodeid, "outcome": report.outcome, "closest": getattr(report, "closest", [])}
            line["why"] = str(report.longrepr)[-2000:] if report.failed else ""
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def move_seeds(by: int) -> None:
    """For the rest of the process."""

    def moved(function: Callable, place: int) -> Callable:
        """The function with ``by`` added to the argument in that place, where it is an integer."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            values = list(arguments)
            if len(values) > place and isinstance(values[place], int):
                values[place] += by
            return function(*values, **options)

        return call

    class Generator(torch.Generator):
        manual_seed = moved(torch.Generator.manual_seed, 1)

    class Random(random.Random):
        seed = moved(random.Random.seed, 1)  # which the constructor calls

    torch.Generator, random.Random = Generator, Random
    torch.manual_seed, random.seed = moved(torch.manual_seed, 0), moved(random.seed, 0)
    numpy.random.default_rng, numpy.random.seed = moved(numpy.random.default_rng, 0), moved(numpy.random.seed, 0)

    _move_library_seeds(by)


def _move_library_seeds(by: int) -> None:
    """Moves a seed where a test hands it to the library, which may pass it on, and in a test's own draws from rng."""
    from emc2_kernels import checks, rng

    def in_library(frame: FrameType) -> bool:
        return frame.f_globals["__name__"].startswith("emc2_kernels")

    def move(seed: int | torch.Tensor) -> int | torch.Tensor:
        return (seed + by) % 2**64 if isinstance(seed, int) else seed + by

    counter = checks.counter

    def moved_counter(name: str, value: Any, *rest: Any) -> int | torch.Tensor:
        found, entry = counter(name, value, *rest), sys._getframe(1)
        while entry.f_back is not None and in_library(entry.f_back):
            entry = entry.f_back
        arguments = entry.f_code.co_varnames[: entry.f_code.co_argcount + entry.f_code.co_kwonlyargcount]
        return move(found) if name == "seed" and "seed" in arguments else found

    def moved_draws(function: Callable) -> Callable:
        @wraps(function)
        def call(*arguments: Any, seed: int | torch.Tensor, **options: Any) -> Any:
            return function(*arguments, seed=seed if in_library(sys._getframe(1)) else move(seed), **options)

        return call

    checks.counter = moved_counter
    for name in ("acceptance", "proposal_positions", "gumbel", "view_coin", "words"):
        setattr(rng, name, moved_draws(getattr(rng, name)))
