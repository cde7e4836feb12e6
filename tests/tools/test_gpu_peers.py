"""bench/gpu_peers.py without a GPU: what is compared, what a peer that fails costs, how goals are answered."""

import json
import sys
from types import ModuleType

import pytest
import torch

from bench import gpu_peers
from bench.gpu import contestants, peaks
from bench.gpu import context as gpu_context
from bench.harness import report
from bench.peers import LossStep, make_operands
from emc2_kernels.losses import ClipLoss, NTXentLoss

CPU = torch.device("cpu")
CLIP, NTXENT = gpu_peers.Case("CLIP", 64, 16), gpu_peers.Case("NT-Xent", 64, 16)
PEAK = peaks.Peak(1e15, "a sheet")


def context(**options):
    return gpu_context.Context(CPU, ["reference"], rehearsal=True, headline=True, **options)


def fake_memeff(monkeypatch, loss=contestants.PlainClip, told=None):
    """A module of that name, whose loss is this one."""

    class MemoryEfficientCLIPLoss(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            if told is not None:
                told.append(options)
            self.loss = loss()

        def forward(self, images, texts, tau_plus=None):
            assert tau_plus is None
            return self.loss(images, texts)

    package = ModuleType("memeff")
    package.MemoryEfficientCLIPLoss = MemoryEfficientCLIPLoss
    monkeypatch.setitem(sys.modules, "memeff", package)


def without_compilation(monkeypatch):
    """Inductor takes seconds, of which one test has enough."""
    for of_loss in contestants.CONTESTANTS.values():
        monkeypatch.delitem(of_loss, "torch.compile")


def without_memeff(monkeypatch):
    monkeypatch.setitem(sys.modules, "memeff", None)


def test_a_rehearsal_measures_every_contestant_and_answers_nothing(tmp_path, monkeypatch, capsys):
    told, target = [], tmp_path / "sub" / "peers.json"
    fake_memeff(monkeypatch, told=told)
    assert gpu_peers.main(["--rehearse", "--json", str(target)]) == 0
    results = json.loads(target.read_text())
    assert [case["name"] for case in results["cases"]] == [case.name for case in gpu_peers.TOY_CASES]
    for case in results["cases"]:
        assert case["contestants"].keys() == contestants.CONTESTANTS[case["loss"]].keys()
        for name, record in case["contestants"].items():
            assert "why" not in record and record.get("differs") is None, (case["name"], name, record)
            time_ms, share = record["time_ms"], record["share_of_peak"]
            assert 0 < time_ms["lower_quartile"] <= time_ms["median"] <= time_ms["upper_quartile"]  # exact
            assert share["median"] == pytest.approx(1e3 * case["flops"] / time_ms["median"] / results["peak"]["flops"])
    assert {goal["answer"] for goal in results["goals"]} == {"a rehearsal answers nothing"}
    assert [goal["bound"] for goal in results["goals"]] == [1.2, 1.0, 0.5]
    assert all(options == {"temperature": contestants.TEMPERATURE, "stable": False} for options in told) and told
    printed = capsys.readouterr().out
    assert "missed" not in printed and "DIFFERS" not in printed and "6 n m d" in printed
    assert str(tmp_path) not in target.read_text() and "the fastest torch.mm here" in printed


def test_all_contestants_compute_one_function(monkeypatch):
    """Values and gradients, in float32, of embeddings of any length."""
    fake_memeff(monkeypatch)
    draw = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(24, 8, generator=draw) * scale for scale in (3, 0.5))
    for loss, ours in (("CLIP", ClipLoss), ("NT-Xent", NTXentLoss)):
        expected = LossStep(ours(temperature=contestants.TEMPERATURE, backend="reference"), z0, z1, None)
        for name, make in contestants.CONTESTANTS[loss].items():
            call = make(z0, z1, True)
            if not isinstance(call, LossStep):
                assert name == "cuBLAS alone"
                continue
            assert gpu_peers.differs(gpu_peers.first_call(call), gpu_peers.first_call(expected)) is None
            for own, other in zip(call(), expected(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [contestants.clip_products, contestants.ntxent_products])
def test_products_alone_are_those_of_forward_and_backward(make):
    """Of the sum of squares of all scores, whose derivative by them is twice the scores."""
    z0, z1 = make_operands(6, 6, 4, torch.float32, CPU)
    products = make(z0, z1)
    queries, keys = (each.clone().requires_grad_() for each in (products.queries, products.keys))
    ((queries @ keys.T).square().sum() / 2).backward()
    rows, columns = products()
    torch.testing.assert_close(rows, queries.grad)
    torch.testing.assert_close(columns, keys.grad)
    loss = "CLIP" if make is contestants.clip_products else "NT-Xent"
    assert contestants.rows_and_keys(loss, 6) == (len(queries), len(keys))
    assert contestants.useful_flops(loss, 6, 4) == 3 * 2 * len(queries) * len(keys) * 4


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")


class Wrong(torch.nn.Module):
    def forward(self, z0, z1):
        return 1.5 * contestants.PlainClip()(z0, z1)


def test_a_peer_that_fails_is_a_result(monkeypatch):
    without_memeff(monkeypatch)
    monkeypatch.setitem(contestants.CONTESTANTS["CLIP"], "plain torch", out_of_memory)
    found = gpu_peers.run_case(CLIP, context(), PEAK)["contestants"]
    assert found["memeff"] == {"why": "not installed: pip install memeff==0.3.1"}
    assert found["plain torch"] == {"why": "out of memory"}
    assert all("time_ms" in found[name] for name in ("ClipLoss", "torch.compile", "cuBLAS alone"))
    shown = gpu_peers.table({"peak": None, "goals": [], "cases": [{"name": "CLIP-64-16", "contestants": found}]})
    assert "out of memory" in shown and "not installed" in shown
    fake_memeff(monkeypatch, Wrong)
    found = gpu_peers.run_case(CLIP, context(), PEAK)["contestants"]
    assert found["memeff"]["differs"].startswith(("value", "gradient")) and found["torch.compile"]["differs"] is None
    assert "DIFFERS" in gpu_peers.line("memeff", found["memeff"])


def test_ours_may_fail_too(monkeypatch):
    monkeypatch.setitem(contestants.CONTESTANTS["NT-Xent"], "NTXentLoss", out_of_memory)
    found = gpu_peers.run_case(NTXENT, context(), None)["contestants"]
    assert found["NTXentLoss"] == {"why": "out of memory"}
    assert "time_ms" in found["plain torch"] and "time / ours" not in found["plain torch"]
    assert "share_of_peak" not in found["plain torch"]  # of a peak that is not known
    goal = gpu_peers.share_goal([{"loss": "NT-Xent", "d": 512, "b": 64, "contestants": found}], PEAK, False)
    assert goal["answer"] == "not known: no share was measured"


def test_where_all_do_not_fit_those_that_need_most_sit_out(monkeypatch):
    tried, measure = [], gpu_context.Context.measure

    def measure_few(self, calls, *more):
        tried.append(set(calls))
        if len(calls) > 2:
            out_of_memory()
        return measure(self, calls, *more)

    sizes = iter([1.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr(gpu_context.Context, "peak_megabytes", lambda self, call: next(sizes))
    monkeypatch.setattr(gpu_context.Context, "measure", measure_few)
    found = gpu_peers.run_case(NTXENT, context(), PEAK)["contestants"]
    assert [len(each) for each in tried] == [4, 3, 2]
    assert {name for name, record in found.items() if "time_ms" in record} == {"NTXentLoss", "cuBLAS alone"}
    assert found["torch.compile"]["why"] == found["plain torch"]["why"] == "out of memory beside the others"


def record(share, b=16_384, d=512, loss="NT-Xent"):
    shares = {"median": share, "lower_quartile": share, "upper_quartile": share}
    return {"loss": loss, "b": b, "d": d, "contestants": {"NTXentLoss": {"share_of_peak": shares}}}


@pytest.mark.parametrize(
    ("records", "answer"),
    [
        ([record(0.52)], "met"),
        ([record(0.3), record(0.5, b=65_536)], "met"),
        ([record(0.4)], "missed by 20%"),
        ([record(0.4), record(0.9, d=128)], "missed by 20%"),
        ([record(0.9, loss="CLIP")], "not known: no share was measured"),
        ([], "not known: no share was measured"),
    ],
)
def test_the_share_of_the_peak_is_answered(records, answer):
    assert gpu_peers.share_goal(records, PEAK, False)["answer"] == answer


@pytest.mark.parametrize(
    ("hopper", "nvcc", "expected"),
    [(True, True, ["triton", "cuda"]), (True, False, ["triton"]), (False, True, ["triton"])],
)
def test_a_sweep_is_asked_of_each_backend_with_matrix_units(hopper, nvcc, expected, monkeypatch):
    monkeypatch.setattr(gpu_peers.benchmark, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(gpu_peers.emc2, "backends", lambda: {"cuda": "available" if nvcc else "no nvcc"})
    assert gpu_peers.sweep_backends(gpu_context.Context(CPU, [])) == expected
    assert gpu_peers.sweep_backends(context()) == ["reference"]


def test_the_sweeps_are_answered(monkeypatch):
    assert gpu_peers.run_sweep(512, context(), "reference")["answer"] == "a rehearsal answers nothing"
    for ratio, answers in ((0.99, ["met", "met"]), (1.1, ["met", "missed by 10%"]), (1.5, ["missed by 25%"] * 1)):

        def sweep(context, backend, d, bound, ratio=ratio):
            row = gpu_context.Row({})
            row.add_goal("time / torch.mm", ratio, "<=", bound)
            return row

        monkeypatch.setattr(gpu_peers.rows, "sweep", sweep)
        found = [gpu_peers.run_sweep(d, gpu_context.Context(CPU, []), "triton")["answer"] for d in (512, 128)]
        assert found[: len(answers)] == answers
    monkeypatch.setattr(gpu_peers.rows, "sweep", out_of_memory)
    assert gpu_peers.run_sweep(128, context(), "triton")["answer"] == "not known: out of memory"


def test_the_peak_is_that_of_the_card(monkeypatch):
    def never():
        raise AssertionError

    cards = {
        "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
    }  # fmt: skip
    assert {card: peaks.find_peak(card, never).flops for card in cards} == cards
    for card in ("NVIDIA T4", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB"):
        assert peaks.find_peak(card, lambda: 5e13) == (5e13, "no data sheet is known: the fastest torch.mm here"), card
    assert peaks.find_peak("NVIDIA T4", lambda: None) is None


def test_cases_and_options(tmp_path, monkeypatch, capsys):
    sizes = {(case.loss, case.b, case.d) for case in gpu_peers.CASES}
    batches = (4096, 8192, 16_384, 32_768, 65_536)
    assert sizes == {(loss, b, d) for loss in ("CLIP", "NT-Xent") for b in batches for d in (128, 512)}
    assert len(gpu_peers.CASES) == len(sizes) and gpu_peers.CASES[0].name == "NT-Xent-16384-512"
    assert gpu_peers.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [case.name for case in gpu_peers.CASES]
    with pytest.raises(SystemExit):
        gpu_peers.parse_arguments(["--only", "CLIP-5"])
    assert "the cases are" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_peers.main([]) == 1 and "needs a CUDA GPU" in capsys.readouterr().out
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    without_memeff(monkeypatch)
    words = ["--rehearse", "--budget", "0", "--json", str(tmp_path / "x.json")]
    assert gpu_peers.main(words) == 0
    assert {case["why"] for case in json.loads((tmp_path / "x.json").read_text())["cases"]} == {"not begun within 0 s"}
    assert gpu_peers.main(["--rehearse", "--only", "CLIP-64-32", "--json", str(tmp_path / "x.json")]) == 0
    results = json.loads((tmp_path / "x.json").read_text())
    assert [case["name"] for case in results["cases"]] == ["CLIP-64-32"] and len(results["goals"]) == 1


def test_a_later_run_goes_on_with_the_cases_that_the_file_lacks(tmp_path, monkeypatch):
    without_memeff(monkeypatch)
    without_compilation(monkeypatch)
    target, run, begun = tmp_path / "x.json", gpu_peers.run_case, []

    def run_and_note(case, *more):
        begun.append(case.name)
        return run(case, *more)

    monkeypatch.setattr(gpu_peers, "run_case", run_and_note)
    words = ["--rehearse", "--resume", "--json", str(target)]
    assert gpu_peers.main([*words, "--budget", "0"]) == 0 and begun == []
    first = gpu_peers.TOY_CASES[0].name
    assert gpu_peers.main([*words, "--only", first]) == 0 and begun == [first]
    assert [case["name"] for case in json.loads(target.read_text())["cases"]] == begun
    assert gpu_peers.main(words) == 0
    assert begun == [case.name for case in gpu_peers.TOY_CASES]
    results = json.loads(target.read_text())
    assert [case["name"] for case in results["cases"]] == begun
    assert [goal["bound"] for goal in results["goals"]] == [1.2, 1.0, 0.5]


def test_a_run_that_is_killed_has_answered_what_it_could(tmp_path, monkeypatch):
    without_memeff(monkeypatch)
    without_compilation(monkeypatch)
    target, run = tmp_path / "x.json", gpu_peers.run_case

    def run_first(case, *more):
        if case != gpu_peers.TOY_CASES[0]:
            raise KeyboardInterrupt
        return run(case, *more)

    monkeypatch.setattr(gpu_peers, "run_case", run_first)
    with pytest.raises(KeyboardInterrupt):
        gpu_peers.main(["--rehearse", "--json", str(target)])
    goals = json.loads(target.read_text())["goals"]
    assert [goal["bound"] for goal in goals] == [1.2, 1.0, 0.5] and "value" in goals[-1]


def test_one_goal_has_one_bound():
    """The benchmark's table, and the lines that answer the goals, are of one report."""
    for d, bound in gpu_peers.rows.SWEEP_GOALS.items():
        assert gpu_peers.rows.ROWS[f"sweep-{d}"].keywords["bound"] == bound
