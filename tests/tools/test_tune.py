"""bench/gpu/tune.py: candidates, who compiles which, and toy shapes in Triton's interpreter within a budget."""

import json
import time

import pytest
import torch

from emc2_kernels.backends import gpu

pytest.importorskip("triton")

from bench.gpu import candidates, tune
from emc2_kernels.backends.triton import tuning

interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="the real thing runs on a GPU")
CPU = torch.device("cpu")
TOYS = {shape.kind: shape for shape in candidates.TOYS}


def toys(kind):
    return candidates.candidates(tuning, TOYS[kind], 8, rehearsal=True)


@interpreted
@pytest.mark.parametrize("kind", TOYS)
def test_the_shipped_row_and_the_fastest_are_measured(kind, monkeypatch, capsys):
    monkeypatch.setattr(tune, "ROUNDS", 3)
    monkeypatch.setattr(tune, "FINALISTS", 1)
    shipped, fits, broken = toys(kind)
    tried = [shipped._replace(num_warps=1), broken, fits]  # a row that does not win is in the final, too
    before = getattr(tuning, kind)
    tuner = tune.Tuner(TOYS[kind], CPU, tuning)
    walk, used = tuner.call, []

    def call():
        used.append(getattr(tuning, kind)())
        return walk()

    def timer(call, repeats):
        call()
        return 0.1 if used[-1] == fits else 0.2

    tuner.call = call
    rows = tuner.measure(tried, time.monotonic() + 60, timer)
    assert getattr(tuning, kind) is before
    assert [(tuple(row["settings"]), row["shipped"], row["median"], row["count"]) for row in rows] == [
        (tuple(fits[:-1]), False, 0.1, 3), (tuple(tried[0][:-1]), True, 0.2, 3),
    ]  # fmt: skip
    assert str(tuple(broken[:-1])) in capsys.readouterr().out  # does not compile, and is said to


class Clock:
    """Moves on by ten seconds for each call that is timed."""

    def __init__(self):
        self.now, self.timed = 0.0, []

    def timer(self, call, repeats):
        self.now += 10.0 * repeats
        self.timed.append(call())
        return 10.0


def measure_clocked(monkeypatch, budget, count=6):
    monkeypatch.setattr(tune, "make_call", lambda shape, device: lambda: tuning.sweep().block_m)
    tuner, clock = tune.Tuner(TOYS["sweep"], CPU, tuning), Clock()
    tried = [tuning.Sweep(block_m, 64, 4, 2, None, "") for block_m in range(count)]
    return tuner.measure(tried, budget, clock.timer, lambda: clock.now), clock


def test_the_budget_ends_the_measuring_and_what_was_measured_stays(monkeypatch):
    rows, clock = measure_clocked(monkeypatch, 80.0)
    assert clock.timed == [0, 1, 2] and clock.now == 90.0  # the third was begun in time; no final is
    assert [row["settings"][0] for row in rows] == [0, 1, 2] and {row["count"] for row in rows} == {1}
    rows, clock = measure_clocked(monkeypatch, 0.0)
    assert rows == [] and clock.timed == []
    # Two candidates at ten seconds a call: 60 s, then 240 s of final, which is more than 299 s leave.
    assert {row["count"] for row in measure_clocked(monkeypatch, 299.0, 2)[0]} == {1}
    assert {row["count"] for row in measure_clocked(monkeypatch, 300.0, 2)[0]} == {3}
    assert tune.final_seconds(10.0) == 40 + 20 + 60
    assert tune.final_seconds(0.001) == pytest.approx(0.004 + 10 * 0.006)


def test_shares_cover_every_candidate_once():
    everything = tune.jobs(candidates.SHAPES, tuning, rehearsal=False)
    assert [place for place, _ in everything] == sorted(place for place, _ in everything)
    for count in (1, 3, 16):
        shares = [tune.share(everything, f"{i}/{count}") for i in range(count)]
        assert sorted((job for share in shares for job in share), key=everything.index) == everything
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for wrong in ("3/3", "-1/3"):
        with pytest.raises(ValueError, match="i/k"):
            tune.share(everything, wrong)


def staged(shape, one):
    """Bytes of shared memory for tiles of 128 keys in flight, and for queries, which stay where a block is whole."""
    whole = one.block_d >= shape.d
    rows = 128 if whole else 128 + one.block_m
    staying = one.block_m * shape.d if whole else 0
    return shape.dtype.itemsize * (rows * min(one.block_d, shape.d) * one.num_stages + staying)


def test_candidates_are_few_and_distinct():
    counts = []
    for shape in candidates.SHAPES:
        for generation in (8, 9, 10):
            found = candidates.candidates(tuning, shape, generation)
            assert found[0][:-1] == candidates.shipped(tuning, shape, generation)[:-1]
            assert 4 < len(found) == len(set(found)) <= 13
            if shape.kind in ("sweep", "lse"):
                assert all(staged(shape, one) <= 227 << 10 for one in found[1:])
        counts.append(len(found))
    assert sum(counts) <= 90  # at ten seconds each on sixteen cores: a minute
    whole = candidates.candidates(tuning, candidates.SHAPES[2], 9)
    assert any(one.block_m == 128 and one.block_d == 128 for one in whole)  # of the gradient: owners stay


def test_a_candidate_that_fails_is_said_to_and_the_next_is_tried(monkeypatch, capsys):
    def call():
        if tuning.sweep().block_m == 1:
            raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(tune, "make_call", lambda shape, device: call)
    mine = [(0, tuning.Sweep(block_m, 64, 4, 2, None, "")) for block_m in (1, 2)]
    assert tune.compile_share(mine, [TOYS["sweep"]], CPU, tuning) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"shape": 0, "settings": [1, 64, 4, 2, None], "error": "RuntimeError: out of resource: shared memory"},
        {"shape": 0, "settings": [2, 64, 4, 2, None], "error": None},
    ]
    monkeypatch.setattr(tune, "context_is_alive", lambda device: False)
    assert tune.compile_share(mine, [TOYS["sweep"]], CPU, tuning) == tune.DEAD_CONTEXT
    assert len(capsys.readouterr().out.splitlines()) == 1


@interpreted
def test_a_rehearsal_compiles_in_processes_and_measures_what_compiled(tmp_path, capsys, monkeypatch):
    target = tmp_path / "tune.json"
    monkeypatch.setattr(tune, "ROUNDS", 3)
    assert tune.main(["--rehearse", "--quick", "--budget", "240", "--json", str(target)]) == 0
    results, printed = json.loads(target.read_text()), capsys.readouterr().out
    assert [shape["shape"][0] for shape in results["shapes"]] == ["lse", "lse_gradient"]
    assert results["candidates"]["all"] == 6 and results["candidates"]["compiled"] == 4
    assert [(line["shape"], line["settings"][0]) for line in results["candidates"]["failed"]] == [(0, 24), (1, 24)]
    for shape in results["shapes"]:
        assert [row["shipped"] for row in shape["rows"]].count(True) == 1 and len(shape["rows"]) == 2
        assert [row["median"] for row in shape["rows"]] == sorted(row["median"] for row in shape["rows"])
    assert "4 of 6 candidates compiled" in printed and "(shipped)" in printed


def test_without_a_budget_nothing_is_measured_and_that_is_written(tmp_path, monkeypatch):
    compiled = [
        {"shape": place, "settings": list(toys(shape.kind)[1][:-1]), "error": None}
        for place, shape in enumerate(candidates.TOYS)
    ]
    monkeypatch.setattr(tune, "compile_all", lambda *arguments: iter(compiled))
    monkeypatch.setattr(tune, "make_call", None)  # nor are operands made
    options = tune.parse_arguments(["--rehearse", "--budget", "0", "--json", str(tmp_path / "x.json")])
    tune.tune(options, CPU, {"shapes": []})
    results = json.loads((tmp_path / "x.json").read_text())
    assert [(shape["ready"], shape["rows"]) for shape in results["shapes"]] == [(1, [])] * 4


def test_a_late_process_leaves_what_it_had(tmp_path, monkeypatch, capsys):
    def run_logged(command, log, limit, own_group):
        assert not own_group  # who stops the tuner stops its processes
        part = command[command.index("--warm") + 1]
        log.write_text('warning\n{"shape": 0, "settings": [1], "error": null}\n{"shape": 0, "sett')
        assert command[3:] == ["--warm", part, "--quick"] and limit == 7
        return None if part == "0/2" else 70

    monkeypatch.setattr(tune, "run_logged", run_logged)
    lines = list(tune.compile_all(2, ["--quick"], 7))
    assert lines == [{"shape": 0, "settings": [1], "error": None}] * 2
    assert "ended with 70" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "CUDA GPU" in capsys.readouterr().err


def test_calls_are_what_the_tables_are_for():
    """A walk with a loss's ids, as the benchmark's; a sum; both its gradients."""
    if not gpu.interpreting():
        pytest.skip("runs on a CPU")
    gradients = tune.make_call(TOYS["lse_gradient"], CPU)()
    assert [tuple(one.shape) for one in gradients] == [(2, 4), (12, 4)]
    assert tune.make_call(TOYS["lse"], CPU)().shape == (2,)
    walk = tune.make_call(TOYS["gathered"], CPU)
    assert walk.options["num_proposals"] == 6 and {"query_ids", "key_ids", "chain_ids"} <= walk.options.keys()
