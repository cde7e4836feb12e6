"""At fixed parameters the mean EMC2 gradient approaches the exact global one; NT-Xent's does not. Nothing is rescaled.

The setting is that of examples/study/gradient_bias.py: 400 real digits with two fixed views each, batches of 4.
"""

import csv

import pytest

from examples.study import global_loss, gradient_bias

pytestmark = pytest.mark.usefixtures("one_thread")


def errors(method, batches):
    stream = gradient_bias.run(gradient_bias.METHODS[method], 4, batches, seed=2)
    exact = gradient_bias.exact_gradient()
    return [((mean - exact).norm() / exact.norm()).item() for mean in stream.means]


def test_recompute_approaches_the_exact_gradient_and_ntxent_does_not():
    found = errors("EMC², recompute", 4000)
    early = found[-4]  # after 503
    assert found[-1] < 0.6 * early, found
    assert found[-1] < 0.2, found
    assert errors("NT-Xent", 2000)[-1] > 0.4


def test_proposals_from_the_bank_are_less_biased_than_ntxent_and_least_where_they_are_encoded_again():
    again, corrected = (errors(f"EMC² from the bank, {carry}", 1200)[-1] for carry in ("recompute", "corrected"))
    ntxent = errors("NT-Xent", 1200)[-1]
    assert again < 0.7 * corrected and corrected < 0.6 * ntxent, (again, corrected, ntxent)


def test_bias_is_told_apart_from_noise():
    """Streams that differ from the exact gradient by a common error, and each by its own noise."""
    import torch

    exact = gradient_bias.exact_gradient()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(exact.shape, generator=generator, dtype=exact.dtype) for _ in range(2)]
    common = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    common *= 0.3 * exact.norm() / common.norm()
    streams = [gradient_bias.Stream([exact + common + 0.5 * exact.norm() * n / n.norm()], 4.0) for n in noise]
    found = gradient_bias.summary(streams)
    assert found.bias == pytest.approx(0.3, abs=0.05) and found.errors[0] > 0.5
    assert found.deviation == pytest.approx(2 / exact.norm().item())


def test_the_study_prints_plots_and_writes(tmp_path, capsys):
    out = tmp_path / "bias.png"
    arguments = ["--batches", "20", "--batch-sizes", "4", "8", "--jobs", "1", "--out", str(out), "--methods"]
    assert gradient_bias.main([*arguments, "NT-Xent", "EMC², cached"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("NT-Xent") == 2 and "mean pairwise cosine" in printed
    assert out.stat().st_size > 10_000
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["batch_size"] for row in rows} == {"4", "8"} and all(float(row["error"]) > 0 for row in rows)
    with pytest.raises(SystemExit):
        gradient_bias.main([*arguments[:2], "--batch-sizes", "1"])


def test_every_method_of_the_study_trains():
    for method in gradient_bias.METHODS:
        trained = global_loss.train(method, 16, 60, 0.1, seed=0)
        assert 0 < trained.per_step < 8
        assert -1 < trained.mean_cosine < 1  # exact
        assert (trained.encodings > 1) == ("recompute" in method), method


def test_the_global_loss_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(global_loss, "RATES", (0.1, 0.3))
    out = tmp_path / "loss.csv"
    arguments = ["--steps", "5", "--seeds", "2", "--batch-sizes", "4", "--jobs", "1", "--out", str(out)]
    assert global_loss.main([*arguments, "--methods", "NT-Xent", "EMC² from the bank, corrected"]) == 0
    assert "b = 4   EMC² from the bank, corrected" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1 + 2 * 2 * 2


@pytest.mark.slow
def test_bias_in_long_runs(capsys, monkeypatch):
    """With one view per item the error keeps falling; with both it stays."""
    both = {"name": "emc2", "sampler": "mh", "carry": "recompute", "views": "both"}
    monkeypatch.setitem(gradient_bias.METHODS, "EMC², both views", both)
    names = ("EMC², recompute", "EMC², both views", "EMC², cached", "NT-Xent")
    found = {name: errors(name, 60_000) for name in (*names, "EMC² from the bank, recompute")}
    with capsys.disabled():
        print(f"\nrelative error of the mean gradient after {gradient_bias.marks(60_000)} batches of 4")
        for name, values in found.items():
            print(f"{name:32}" + "".join(f"{value:8.3f}" for value in values))
    one, both = found["EMC², recompute"][-1], found["EMC², both views"][-1]
    assert one < 0.06 and both > 1.5 * one and found["EMC² from the bank, recompute"][-1] < 0.06
    assert found["NT-Xent"][-1] > 0.5
