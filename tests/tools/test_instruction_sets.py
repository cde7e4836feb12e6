"""The tool that finds tests which hang on the processor or on luck: on planted ones."""

from __future__ import annotations

import math
import platform

import instruction_sets
import margins
import pytest
import torch
from instruction_sets import Done

PLANTED = """
import os
import random
import numpy
import pytest
import torch
import emc2_kernels
import oracle

def test_plain():
    assert 1.0 < 2.0 and abs(-0.5) <= 3 * 0.25
    assert 0.0 <= 0.0  # exact
    torch.testing.assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.25]), rtol=0, atol=0.5)

def test_of_luck():
    for _ in range(3):
        assert torch.randn((), generator=torch.Generator().manual_seed(3)) < 5, "the closest of three"

@pytest.mark.one_seed
def test_a_known_answer():
    assert random.Random(7).randrange(1000) == 331

def test_every_source_of_chance():
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
    drawn = [torch.rand(()), numpy.random.rand(), random.random()]
    drawn += [numpy.random.default_rng(1).random(), random.Random(1).random()]
    for value in drawn:
        assert value >= 0
    assert drawn[0] >= 0
    assert drawn[1] >= 0
    assert drawn[2] >= 0
    assert drawn[3] >= 0
    assert drawn[4] >= 0

def test_the_library_and_its_oracle_move_together():
    queries, keys = torch.eye(5), torch.eye(5)
    walk = queries, keys, emc2_kernels.init_state(5)
    options = {"temperature": 0.5, "seed": 3, "step": 0, "num_samples": 5}
    found = emc2_kernels.mh_step(*walk, **options)
    assert torch.equal(found.samples.long(), oracle.walk(*walk, **options).samples)
    assert found.state.score.sum() < 100
    assert found.threshold.sum() < 100

def test_of_the_threads():
    assert torch.get_num_threads() == 2

def test_that_takes_its_process_along():
    os.kill(os.getpid(), 9)

@pytest.mark.skip
def test_skipped():
    pass
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The planted tests with two threads, and with one and other seeds."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "test_planted.py").write_text(PLANTED)
    found = []
    for threads, move_seeds in (("2", 0), ("1", 50)):
        selection = ["--numprocesses=1", f"--rootdir={folder}", str(folder / "test_planted.py")]
        file = folder / f"{threads} {move_seeds}.jsonl"
        instruction_sets.run_suite({"OMP_NUM_THREADS": threads}, move_seeds, selection, file)
        found.append({test.rpartition("::")[2]: done for test, done in instruction_sets.read(file).items()})
    return found


def test_outcomes_and_the_closest_sides_are_written_down(runs):
    as_written = runs[0]
    passed = {name for name, done in as_written.items() if done.outcome == "passed"}
    assert len(as_written) == 8 and set(as_written) - passed == {"test_skipped", "test_that_takes_its_process_along"}
    assert as_written["test_skipped"].outcome == "skipped" and as_written["test_a_known_answer"].outcome == "passed"
    first, second, close = as_written["test_plain"].closest.values()
    assert (first, second, close) == ((1.0, 2.0), (0.5, 0.75), (0.5, 1.0))
    ((where, (small, large)),) = as_written["test_of_luck"].closest.items()
    assert small == pytest.approx(float(torch.randn((), generator=torch.Generator().manual_seed(3))), abs=1e-3)
    assert large == 5 and where.endswith("torch.randn((), generator=torch.Generator().manual_seed(3)) < 5")


def test_who_fails_is_named_with_the_run(runs):
    two, one = runs
    failures = instruction_sets.failures({"two": two, "one": one})
    assert failures == {"test_of_the_threads": ["one"], "test_that_takes_its_process_along": ["two", "one"]}
    assert "assert 1 == 2" in one["test_of_the_threads"].why


def test_every_seed_is_moved(runs):
    as_written, moved = runs
    assert "test_a_known_answer" not in moved and moved["test_plain"] == as_written["test_plain"]
    before, after = ([*run["test_every_source_of_chance"].closest.values()][1:] for run in runs)
    assert len(before) == 5 and not set(before) & set(after)
    together = "test_the_library_and_its_oracle_move_together"
    assert [run[together].outcome for run in runs] == ["passed", "passed"]
    assert as_written[together].closest != moved[together].closest


@pytest.mark.parametrize(
    ("explanation", "expected"),
    [
        ("0.25 < 0.5\n +  where 0.25 = abs(-0.25)", [(0.25, 0.5)]),
        ("(3 > 2 and 1e-05 >= 4e-07)", [(2, 3), (4e-7, 1e-5)]),
        ("tensor(0.3000, dtype=torch.float64) < ((0.5 * np.float64(2.0)) - -1)", [(0.3, 2)]),
        ("(0.25 == 0.5 ± 0.5 and -inf < 3)", [(0.25, 0.5), (-math.inf, 3)]),
        ("2 == 2", []),
        ("(1 < 2 or 3 < 2)", []),
        ("not (3 < 2)", []),
        ("(3 < 2) == False", []),
        ("tensor([1, 2]) < 3", []),
        ("<Backend cpu> < 3", []),
        ("True <= 3", []),
        ("1 < (2 / 0)", []),
    ],
)
def test_what_an_explanation_compares(explanation, expected):
    assert margins.comparisons(explanation) == expected


def test_closeness_is_the_largest_share_of_the_tolerance():
    actual = {"a": [torch.tensor([1.0, math.inf, 3.0]), 4.0], "b": None, "c": torch.tensor([5])}
    expected = {"a": [torch.tensor([1.5, math.inf, 4.0]), 4.5], "b": None, "c": torch.tensor([5])}
    assert margins.closeness(actual, expected, 0, 2) == 0.5
    assert margins.closeness(actual, expected, 1, 0) == pytest.approx(1 / 3)
    assert margins.closeness(actual, expected, 0, 0) is None
    half = torch.ones(2, dtype=torch.bfloat16)
    assert margins.closeness(half, half + 2**-7) == pytest.approx(2**-7 / (1e-5 + 1.6e-2 * (1 + 2**-7)))


def test_a_margin_is_counted_in_deviations_of_its_spread_over_seeds():
    differences = [(1.0, 1.1), (1.0, 1.2), (1.0, 1.3)]  # 0.1 apart
    assert instruction_sets.deviations([(-1.0, -0.9), (-1.0, -0.85)], differences) == pytest.approx(1)
    assert instruction_sets.deviations([(-1.0, -0.5)], differences) == pytest.approx(2)  # their mean is less
    ratios = [(1.0, math.exp(log)) for log in (5.0, 6.0)]  # as differences 147 and 402: 1.5 deviations
    assert instruction_sets.deviations([(1.0, math.exp(6.0))], ratios) == pytest.approx(5.5 / 0.5**0.5)
    assert instruction_sets.deviations([(1.0, 1.001)], [(1.0, 1.001)] * 3) == math.inf  # nothing hangs on a seed
    assert instruction_sets.deviations([(1.0, math.inf)], [(1.0, math.inf), (1.0, 2.0)]) == math.inf
    assert instruction_sets.deviations([(1.0, 1.001)], [(1.0, 9.0)]) == math.inf  # of one seed there is no spread


def test_the_closest_of_all_settings_counts():
    def run(large):
        return {"test": Done("passed", {"3.0 a < b": (1.0, large)}, "")}

    seeds = {str(large): run(large) for large in (1.5, 1.6, 1.7)}
    (thin,) = instruction_sets.thin_margins({"here": run(1.6), "there": run(1.2)}, seeds)
    assert (thin.test, thin.where, thin.sides) == ("test", "3.0 a < b", (1.0, 1.2))
    assert instruction_sets.thin_margins({"here": run(1.6)}, seeds) == []


def test_the_report_says_what_fails_and_passes_what_does_not(capsys):
    good, bad = Done("passed", {"3.0 a < b": (1.0, 2.0)}, ""), Done("failed", {}, "assert 1 == 2")
    assert instruction_sets.report({"here": {"t": good}}, {"1": {"t": good}, "2": {"t": good}})
    for runs in (({"here": {"t": good}, "there": {"t": bad}}, {}), ({"here": {"t": good}}, {"there": {"t": bad}})):
        assert not instruction_sets.report(*runs)
        assert "FAILED t\n  under there\nassert 1 == 2" in capsys.readouterr().out
    seeds = {str(large): {"t": Done("passed", {"3.0 a < b": (1.0, large)}, "")} for large in (1.5, 9.0)}
    assert not instruction_sets.report({"here": {"t": good}}, seeds)
    assert "1 < 2  t\n         3.0 a < b" in capsys.readouterr().out


@pytest.mark.slow  # builds the core twice; test_cpu_build.py has what a build says of itself
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86's")
@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_the_settings_are_in_force(name):
    if name == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2, or torch was told to use none")
    said, variables = instruction_sets.SETTINGS[f"{name}, 1 thread"]
    assert instruction_sets.in_force(said, variables) == f"ATen {said}, core {said}"
    with pytest.raises(SystemExit, match="expected AVX512, got ATen"):
        instruction_sets.in_force("AVX512", variables)
