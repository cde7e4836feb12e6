"""Training short and long, and retrieval by each loss: the scripts run, go on, and say what they found."""

from __future__ import annotations

from itertools import product

import pytest

from examples.study import accuracy, cells, features, global_loss, gradient_bias, headline, long_training
from examples.two_towers import compare_losses

pytestmark = pytest.mark.usefixtures("one_thread")


def row(method, rate, seed, loss, step=100, size=4, items=400):
    case = {"method": method, "items": items, "batch_size": size, "temperature": 0.2, "steps": 100}
    return case | {"rate": rate, "seed": seed, "step": step, "loss": loss, "mean_cosine": 0.0}


def test_the_table_takes_each_methods_best_rate_at_the_end():
    rows = [row(long_training.FLOOR, 1.0, 0, 2.0, size=400)]
    rows += [row("NT-Xent", rate, seed, 3 + rate + 0.1 * seed) for rate in (0.1, 0.3) for seed in (0, 1)]
    rows += [row("NT-Xent", 0.3, 0, 1.0, step=50)]  # before the end
    rows += [row("NT-Xent", 0.3, 0, 1.5, items=99)]
    printed, other = long_training.table(rows).split("\n\n99 items")
    assert "400 items" in printed and "floor 2.000" in printed and "3.150 ± 0.071 (0.1; 0.00)" in printed
    assert "floor not measured" in other and "1.500 (0.3; 0.00)" in other


@pytest.mark.parametrize("method", ["NT-Xent", "i-SIR", "i-SIR, recompute"])
def test_runs_of_all_methods_are_of_equal_encodings(method, monkeypatch):
    """One that encodes its samples again makes fewer steps."""
    made = []

    class Recorded(global_loss.Encoder):
        def __init__(self, seed):
            super().__init__(seed)
            made.append(self)

    monkeypatch.setattr(long_training, "Encoder", Recorded)
    rows = long_training.train(method, 400, 4, 0.2, 60, 0.1, 0)
    assert [found["step"] for found in rows] == long_training.marks(60)
    assert 480 <= made[0].encoded < 480 + 16  # a step encodes 8, and 8 at most again
    assert rows[-1]["loss"] < rows[0]["loss"] < 6.68  # all embeddings at one point
    assert rows[-1]["loss"] == pytest.approx(global_loss.evaluate(made[0])[0])


def test_the_readme_s_figure_has_each_method_s_best_rate(tmp_path):
    steps = headline.STEPS
    rows = [row("i-SIR", 0.1, seed, 3 + seed, step=steps) for seed in (0, 1)]
    rows += [row("i-SIR", 0.1, seed, 5 + seed, step=headline.FIRST) for seed in (0, 1)]
    rows += [row("i-SIR", 0.3, 0, 4, step=steps), row("i-SIR", 0.3, 0, 1, step=headline.FIRST)]
    rows += [row("i-SIR", 0.1, 0, 9, step=headline.FIRST - 1), row("NT-Xent", 0.1, 0, 1, step=steps)]
    assert headline.curve(rows, "i-SIR") == {headline.FIRST: 5.5, steps: 3.5}
    assert headline.main(["--out", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_long_training_runs_and_is_not_measured_again(tmp_path, capsys, monkeypatch):
    arguments = ["--steps", "20", "40", "--batch-sizes", "4", "--seeds", "2", "--rates", "0.1", "--out", str(tmp_path)]
    arguments += ["--methods", "NT-Xent", "i-SIR"]
    assert long_training.main([*arguments, "--jobs", "2"]) == 0
    first = capsys.readouterr().out
    assert "i-SIR" in first and (tmp_path / "long_training.png").stat().st_size > 10_000
    rows = cells.read(tmp_path / "long_training.csv")
    assert {found["steps"] for found in rows if found["method"] != long_training.FLOOR} == {20, 40}
    assert {found["items"] for found in rows} == {400}
    monkeypatch.setattr(long_training, "train", None)  # whoever measures again fails
    assert long_training.main([*arguments, "--jobs", "1"]) == 0
    assert capsys.readouterr().out == first


def test_the_figure_has_what_was_asked_for_and_not_all_that_the_file_has(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(long_training, "learning_curves", lambda rows, *_: drawn.append(rows))
    arguments = ["--steps", "20", "--items", "40", "--seeds", "1", "--rates", "0.1", "--jobs", "1"]
    arguments += ["--out", str(tmp_path), "--methods"]
    for asked_for in (["NT-Xent", "i-SIR", "--batch-sizes", "4", "8"], ["i-SIR", "--batch-sizes", "4"]):
        assert long_training.main([*arguments, *asked_for]) == 0
    every, part = ({(found["method"], found["batch_size"]) for found in rows} for rows in drawn)
    assert every == {(long_training.FLOOR, 40), *product(("NT-Xent", "i-SIR"), (4, 8))}
    assert part == {(long_training.FLOOR, 40), ("i-SIR", 4)}


def test_data_sets_of_other_sizes_are_trained_on(tmp_path, capsys):
    arguments = ["--steps", "40", "--seeds", "1", "--rates", "0.1", "--jobs", "1", "--out", str(tmp_path)]
    arguments += ["--methods", "i-SIR", "--no-floor"]
    for items in ("50", "90"):
        assert long_training.main([*arguments, "--items", items]) == 0
    printed = capsys.readouterr().out
    assert "90 items" in printed and not (tmp_path / "long_training.png").exists()
    ends = {row["items"]: row["loss"] for row in cells.read(tmp_path / "long_training.csv") if row["step"] == 40}
    assert 0 < ends[90] - ends[50] < 1.2  # about the logarithm of 90 / 50
    for items in ("15", "1798"):
        with pytest.raises(SystemExit):
            long_training.main([*arguments, "--items", items])
        assert "--items" in capsys.readouterr().err


def test_features_are_compared_and_not_measured_again(tmp_path, capsys, monkeypatch):
    arguments = ["--epochs", "1", "--batch-sizes", "128", "--methods", "i-SIR", "--rates", "1e-3", "--seeds", "1"]
    arguments += ["--first-seed", "3", "--out", str(tmp_path)]
    assert features.main([*arguments, "--jobs", "1"]) == 0
    first = capsys.readouterr().out
    assert "| EMC² |" in first and f"written: {tmp_path / 'features.csv'}" in first
    rows = cells.read(tmp_path / "features.csv")
    assert {(found["seed"], found["epochs"], found["batch_size"], found["lr"]) for found in rows} == {(3, 1, 128, 1e-3)}
    assert all(10 < found["few_probe"] <= 100 for found in rows)
    monkeypatch.setattr(features, "measure", None)  # whoever measures again fails
    assert features.main([*arguments, "--jobs", "2"]) == 0
    assert capsys.readouterr().out == first


def test_every_method_of_features_is_one_of_accuracy():
    assert set(features.SHOWN) | set(accuracy.SHOWN) <= set(accuracy.METHODS)


def test_retrieval_is_compared(tmp_path, capsys):
    arguments = ["--losses", "CLIP", "i-SIR", "--batch-sizes", "64", "--larger", "128", "--epochs", "3", "--seeds", "2"]
    assert compare_losses.main([*arguments, "--rates", "1e-3", "--jobs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(0.001; ") == 3 and printed.count("b = 128") == 2
    assert printed.count("held-out MRR in %, by learning rate") == 2
    rows = cells.read(tmp_path / "retrieval_digits-held-out.csv")
    assert len(rows) == 6
    # By chance 0.6 and 1.3.
    assert all(found["train_mrr"] > 3 and found["held_out_mrr"] > 5 for found in rows)


def test_retrieval_of_held_out_pairs_is_shown_by_rate():
    case = {"data": "verses", "epochs": 2, "batch_size": 8, "train_mrr": 99.0}
    found = [("CLIP", 1e-3, 40.0), ("CLIP", 1e-3, 42.0), ("CLIP", 5e-4, 41.0), ("i-SIR", 5e-4, 43.0)]
    printed = compare_losses.table_by_rate(
        [case | {"loss": loss, "lr": rate, "held_out_mrr": mrr} for loss, rate, mrr in found]
    )
    assert "|  | 0.0005 | 0.001 |" in printed
    assert "| CLIP | 41.0 | 41.0 ± 1.4 |" in printed and "| i-SIR | 43.0 | - |" in printed


@pytest.mark.parametrize("main", [long_training.main, compare_losses.main, features.main])
def test_a_study_of_no_seeds_is_refused(main, capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err


def test_what_isir_says_of_itself_is_printed_beside_the_exact_loss(capsys):
    assert gradient_bias.main(["--statistics", "--batch-sizes", "64"]) == 0
    exact, estimated = capsys.readouterr().out.splitlines()
    loss, estimate = float(exact.split()[3].rstrip(";")), float(estimated.split()[3].rstrip(","))
    assert loss == pytest.approx(4.61, abs=0.01)
    assert loss < estimate < loss + 0.05  # too large by about half the variance of its inverse


def test_isir_is_less_noisy_than_the_walk_at_fixed_parameters():
    walk, resampled = (
        gradient_bias.run(gradient_bias.METHODS[name], 16, 400, seed=2).variance
        for name in ("EMC², recompute", "i-SIR, recompute")
    )
    assert resampled < 0.9 * walk  # 0.76 over 4,000 batches
