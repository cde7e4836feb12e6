"""The study: exact loss and gradient in tiles, laws beside the transition matrix, cells that are measured once."""

import csv
import math
import re
from itertools import islice

import pytest
import torch

from examples.pretrain import data, encoders, evaluate, training
from examples.pretrain.config import Config
from examples.study import (
    __main__ as study,
)
from examples.study import (
    accuracy,
    cells,
    finite,
    gradient_bias,
    lag,
    options,
    sampler,
    speed,
    subset,
    tables,
)

TEMPERATURE = 0.2


def test_exact_loss_and_gradient_in_tiles_are_those_of_the_plain_formula():
    encoder = encoders.build_encoder(8, seed=0).double()
    views = finite.fixed_views("digits", 30).double()
    found = finite.exact(encoder, views, TEMPERATURE, tile=7)
    z = torch.nn.functional.normalize(encoder(views.transpose(0, 1).flatten(0, 1)), dim=1)
    scores, loss = z @ z.T / TEMPERATURE, 0.0
    for row in range(60):
        others = [column for column in range(60) if column % 30 != row % 30]
        loss = loss + scores[row, others].exp().sum().log() - scores[row, (row + 30) % 60]
    loss = loss / 60
    torch.testing.assert_close(gradient_bias.global_loss(z), loss, rtol=1e-12, atol=0)
    expected = finite.flat(torch.autograd.grad(loss, list(encoder.parameters())))
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(found.gradient, expected, rtol=0, atol=1e-10 * expected.norm().item())
    off_diagonal = (z @ z.T)[~torch.eye(60, dtype=torch.bool)]
    assert found.mean_cosine == pytest.approx(off_diagonal.mean().item(), rel=1e-9)


def test_views_are_fixed_and_differ():
    first = finite.fixed_views("digits", 20).clone()
    finite.fixed_views.cache_clear()
    assert torch.equal(finite.fixed_views("digits", 20), first)
    assert first.shape == (20, 2, 1, 8, 8) and (first[:, 0] != first[:, 1]).flatten(1).any(1).all()
    with pytest.raises(ValueError, match="num_items must be at most 1257, .* got 2000"):
        finite.fixed_views("digits", 2000)


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "ntxent", "emc2", "emc2 isir"])
def test_gradients_of_all_methods_have_the_scale_of_the_exact_one(name):
    """With the whole data set in one batch: SogCLR's is the exact gradient, NT-Xent's differs by the positive in its
    sum, EMC2's by its samples."""
    name, *sampler = name.split()
    options = {"sampler": sampler[0] if sampler else "mh"} if name == "emc2" else {}
    run = finite.Finite({"name": name} | options, "digits", 60, 60, seed=0)
    target = run.exact().gradient
    state = {key: value.clone() for key, value in run.loss.state_dict().items()}
    error = run.error(target)
    assert all(torch.equal(value, run.loss.state_dict()[key]) for key, value in state.items())
    if name.endswith("sogclr"):
        assert error.batch < 1e-4 and error.scale == pytest.approx(1, abs=1e-4)
    assert error.scale == pytest.approx(1, abs=0.25)


def test_an_update_is_a_step_of_gradient_descent():
    run = finite.Finite({"name": "ntxent"}, "digits", 20, 4, seed=0)
    before = finite.flat([parameter.detach().clone() for parameter in run.parameters])
    gradient = run.gradient(run.loss, next(run.batches()))
    run.update(gradient, 0.5)
    torch.testing.assert_close(finite.flat(run.parameters).detach(), before - 0.5 * gradient)


def test_laws_are_the_matrix_power_and_lie_below_the_bound():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)).double() * 2
    target, kernel = scores.softmax(0), sampler.transition_matrix(scores)
    torch.testing.assert_close(kernel.sum(1), torch.ones(12, dtype=torch.float64))
    flow = target[:, None] * kernel
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)
    marks = [1, 2, 5, 40]
    for mark, law in zip(marks, sampler.laws(scores, marks), strict=True):
        start = torch.full((12,), 1 / 12, dtype=torch.float64)
        torch.testing.assert_close(law, start @ torch.linalg.matrix_power(kernel, mark - 1))
        assert sampler.distance(law, target) <= sampler.bound(target, mark)  # exact
    assert sampler.bound(target, 40) < 0.2
    # Scores between -1 / temperature and 1 / temperature: m max pi is below exp(2 / temperature).
    close = (scores / scores.abs().max()).softmax(0)
    assert sampler.bound(close, 5) <= sampler.worst_bound(1.0, 5)


def test_chains_follow_the_matrix_within_the_noise_and_both_views_do_not():
    settings = ("digits", 40, 5, 4000, TEMPERATURE, 0)
    for kind in ("uniform", "sweep, one view"):
        for row in sampler.measure(*settings, kind, most=64):
            assert abs(row["chains_distance"] - row["expected_distance"]) < 6 * row["deviation"], row
    last = sampler.measure(*settings, "sweep, both views", most=64)[-1]
    assert last["chains_distance"] > last["expected_distance"] + 20 * last["deviation"]


def test_batches_of_a_sweep_are_uniform_draws_without_replacement():
    batches = sampler.Batches(3000, 20, both=False, seed=0)
    visits = torch.cat([batches.visit() for _ in range(2)])
    assert all(len(set(row)) == sampler.BATCH - 1 for row in (visits // 2).tolist())
    counts = visits.flatten().bincount(minlength=40).double()
    expected = counts.sum() / 40
    assert ((counts - expected).abs() / expected.sqrt()).max() < 5
    both = sampler.Batches(2, 20, both=True, seed=0).visit()
    assert torch.equal(both[:, :15] + 1, both[:, 15:]) and (both[:, :15] % 2 == 0).all()


def test_an_interrupted_study_measures_what_is_missing(tmp_path):
    path, calls = tmp_path / "cells.csv", []

    def measure(name, number):
        calls.append((name, number))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"value": number / 3, "note": None}, {"value": 1e-9, "note": "text"}]

    wanted = [("a", 1), ("a", 2), ("b", 1)]
    with pytest.raises(KeyboardInterrupt):
        cells.measure_missing(path, ("name", "number"), wanted, measure)
    assert len(cells.read(path)) == 4
    rows = cells.measure_missing(path, ("name", "number"), wanted, measure)
    assert calls == [*wanted, ("b", 1)] and len(rows) == 6
    assert rows[2]["value"] == pytest.approx(2 / 3, rel=1e-5) and rows[2]["note"] is None and rows[3]["note"] == "text"
    assert len(cells.measure_missing(path, ("name", "number"), wanted[:1], measure)) == 2 and len(calls) == 4
    shown = [("a", 2), ("z", 9)]
    assert len(cells.measure_missing(path, ("name", "number"), wanted[:1], measure, shown)) == 4 and len(calls) == 4
    with pytest.raises(ValueError, match="expected columns that begin with .*'other'"):
        cells.measure_missing(path, ("other",), [(1,)], measure)
    assert [path] == list(tmp_path.iterdir())


def test_the_time_to_an_accuracy():
    curve = [(10, 50.0), (20, 70.0), (30, 60.0)]
    assert speed.reached(curve, 40.0) == 10 and speed.reached(curve, 60.0) == 15
    assert speed.reached(curve, 70.5) is None
    rows = [
        {"data": "d", "batch_size": 8, "round": turn, "method": method, "step_ms": factor * (1 + turn)}
        for turn in range(3)
        for method, factor in (("EMC²", 3.0), ("SimCLR", 2.0))
    ]
    assert speed.ratios(rows) == {("d", 8, "EMC²"): (1.5, 1.5, 1.5), ("d", 8, "SimCLR"): (1.0, 1.0, 1.0)}


def trained_rows(lr, few_nearest, mean_cosine=0.1, seed=0):
    common = {"data": "d", "epochs": 1, "lr": lr, "batch_size": 8, "seed": seed, "method": "SimCLR", "epoch": 1}
    return [
        common | {"step": 9, "mean_cosine": mean_cosine, "few_nearest": few_nearest, "few_probe": 60.0, "probe": 70.0}
    ]


def test_time_to_an_accuracy_is_of_the_rate_at_which_steps_were_timed(tmp_path, monkeypatch):
    rows = trained_rows(accuracy.LR, 50.0) + trained_rows(accuracy.LOWER, 90.0)
    timed = [{"data": "d", "batch_size": 8, "round": 0, "method": "SimCLR", "step_ms": 1.0}]
    monkeypatch.setattr(accuracy, "run", lambda *_: rows)
    monkeypatch.setattr(speed, "run", lambda *_: timed)
    assert "| 50.0 | 1.00 | 1.00 |" in study.part_e(tmp_path, tmp_path, True)


def test_the_accuracy_table_keeps_rates_apart_and_counts_collapsed_runs():
    rows = trained_rows(1e-3, 50.0, mean_cosine=0.98)
    rows += trained_rows(3e-4, 70.0) + trained_rows(3e-4, 80.0, mean_cosine=0.999, seed=1)
    text = tables.accuracy(rows)
    assert "| SimCLR | 50.0 |" in text and "| SimCLR | 75.0 ± 7.1 |" in text
    assert [line for line in text.splitlines() if line.startswith("Runs")] == [
        "Runs whose last epoch has a mean cosine above 0.99: SimCLR, b = 8: 1"
    ]


@pytest.fixture
def small(monkeypatch):
    """Every part with less than --quick has of everything."""
    split = data.digits()
    few = split._replace(train_images=split.train_images[:320], train_labels=split.train_labels[:320])
    monkeypatch.setitem(data.DATASETS, "digits", lambda: few)
    monkeypatch.setattr(evaluate, "FEW_DRAWS", 1)
    monkeypatch.setattr(training, "plot_curves", lambda *_: None)  # of each run, which takes longer than the run
    methods = {name: accuracy.METHODS[name] for name in ("SimCLR", "EMC², both views")}
    for module in (accuracy, speed):
        monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(accuracy, "SHOWN", tuple(methods))
    monkeypatch.setattr(accuracy, "QUICK", (("digits", 1, 1e-3, (160,), 2), ("digits", 1, 3e-4, (160,), 1)))
    monkeypatch.setattr(speed, "QUICK", (("digits", (160,), 1),))
    monkeypatch.setattr(subset, "METHODS", {name: subset.METHODS[name] for name in ("SimCLR", "EMC², re-encoded")})
    monkeypatch.setattr(lag, "METHODS", subset.METHODS)
    monkeypatch.setattr(lag, "QUICK", ("digits", 16, 4, 4, 1e-3, 1))
    monkeypatch.setattr(lag, "EPOCHS", (0, 1))
    monkeypatch.setattr(subset, "QUICK", (("digits", 16, 4, 10, 1, (1e-3,)),))
    chosen = ("batch", "bank, recompute")
    monkeypatch.setattr(options, "OPTIONS", {name: options.OPTIONS[name] for name in chosen})
    monkeypatch.setattr(options, "TRAINED", {name: options.TRAINED[name] for name in ("batch", "cache, refresh 0.05")})
    monkeypatch.setattr(options, "QUICK", ((16, 10), (("digits", 1, 160, 1),)))
    monkeypatch.setattr(sampler, "QUICK", (("digits", 20, 2, 200, (0.2,), 1, 32),))


COLUMNS = {
    "accuracy": {"step", "ntxent", "mean_cosine", "few_nearest", "few_probe"},
    "subset": {"loss", "squared_gradient", "mean_cosine", "common_error", "batch_error", "scale", "encodings"},
    "lag": {"epochs_held", "common_error", "scale"},
    "sampler": {"chains_distance", "exact_distance", "expected_distance", "deviation", "bound"},
    "bias": {"bias", "deviation"},
    "options": {"few_probe", "few_nearest", "acceptance"},
    "speed": {"method", "step_ms"},
}


@pytest.mark.usefixtures("small")
def test_all_parts_run_write_and_are_not_measured_again(tmp_path, capsys, monkeypatch):
    assert study.main(["--quick", "--out", str(tmp_path), "--figures", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out
    titles, *parts = printed.split("\n## ")
    assert titles == "" and [part[0] for part in parts] == list(study.PARTS)
    for part in parts:  # each says above its tables what their columns are
        about, *table = part.split("\n\n|")
        assert about.startswith(f"{part[0]}. {study.ABOUT[part[0]]}")
        columns = {cell.strip() for one in table for cell in one.partition("\n")[0].split("|")[1:]}
        named = {cell.partition(",")[0] for cell in columns if cell and not re.match(r"b = |\d+$", cell)}
        assert [name for name in named if name.lower() not in " ".join(about.lower().split())] == []
    assert {path.stem for path in tmp_path.glob("*.csv")} == COLUMNS.keys()
    for name, columns in COLUMNS.items():
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert columns <= rows[0].keys()
        words = {"data", "method", "options", "proposals"}
        numbers = [value for row in rows for column, value in row.items() if column not in words and value]
        assert len(numbers) > len(rows) and all(math.isfinite(float(value)) for value in numbers)
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "figures").glob("*.png"))
    assert len(list((tmp_path / "figures").glob("study_*.png"))) == len(study.PARTS)
    monkeypatch.setattr(sampler, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert study.main(["--quick", "--out", str(tmp_path), "--parts", "c"]) == 0


def test_the_settings_of_the_full_study_are_legal():
    """Every cell of part d that is trained, and the first batches of part b's methods."""
    for settings in options.TRAINED.values():
        Config(**settings)
    for settings in subset.METHODS.values():
        started = finite.Finite(settings, "digits", 12, 4, seed=0)
        gradients = [started.gradient(started.loss, index) for index in islice(started.batches(), 2)]
        assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in gradients)
