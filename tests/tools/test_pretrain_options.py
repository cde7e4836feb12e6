"""Options of the examples: what is refused, and what reaches the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.pretrain import config, data
from examples.pretrain.__main__ import main
from examples.pretrain.run import Run, build_loss
from examples.study import compare_methods

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = config.Config(batch_size=64, epochs=3, dim=16, device="cpu", quiet=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method=moco"], f"--method: expected one of {', '.join(config.METHODS)}, got 'moco'"),
        (["--data=mnist"], "--data: expected one of digits, mnist5k, stl10:PATH, folder:PATH, got 'mnist'"),
        (["--batch-size=1"], "--batch-size: expected an integer of at least 2, got 1"),
        (["--batch-size=1258"], "--batch-size: expected at most 1257 (training images), got 1258"),
        (["--epochs=0"], "--epochs: expected an integer of at least 1, got 0"),
        (["--epochs=many"], "--epochs: expected an integer, got 'many'"),
        (["--lr=nan"], "--lr: expected a number, got 'nan'"),
        (["--lr=.inf"], "--lr: expected a finite number above 0, got inf"),
        (["--lr=0"], "--lr: expected a finite number above 0, got 0.0"),
        (["--weight-decay=-1"], "--weight-decay: expected a finite number of at least 0, got -1.0"),
        (["--temperature=0"], "--temperature: expected a finite number above 0, got 0.0"),
        (["--dim=1"], "--dim: expected an integer of at least 2, got 1"),
        (["--burn-in=1"], "--burn-in: expected a share from 0 to below 1, got 1.0"),
        (["--carry=keep"], "--carry: expected one of auto, cached, corrected, recompute, got 'keep'"),
        (
            ["--carry=corrected"],
            "--carry: expected one of auto, cached, recompute with --proposals batch, got 'corrected'",
        ),
        (
            ["--proposals=bank", "--carry=cached"],
            "--carry: expected one of auto, corrected, recompute with --proposals bank, got 'cached'",
        ),
        (
            ["--method=cached", "--carry=cached"],
            "--carry: expected one of auto, corrected, recompute with --method cached, got 'cached'",
        ),
        (["--views=two"], "--views: expected one of auto, one, both, got 'two'"),
        (["--method=simclr", "--burn-in=0.5"], "--burn-in: expected only with --method emc2, got --method simclr"),
        (["--sampler=gibbs"], "--sampler: expected one of auto, isir, mh, got 'gibbs'"),
        (["--method=simclr", "--sampler=isir"], "--sampler: expected only with --method emc2, got --method simclr"),
        (["--sampler=isir", "--burn-in=0.5"], "--burn-in: expected only with --sampler auto or mh, got --sampler isir"),
        (["--sampler=isir", "--proposals=bank"], "--proposals: expected only with --sampler auto or mh, got --sampler"),
        (
            ["--sampler=isir", "--num-samples=4"],
            "--num-samples: expected none with --sampler isir, which weighs all candidates, got 4",
        ),
        (["--sampler=mh", "--queue=3"], "--queue: expected 0 with --carry recompute and with --sampler mh, which"),
        (["--method=sogclr", "--queue=3"], "--queue: expected only with --method emc2, got --method sogclr"),
        (["--queue=-1"], "--queue: expected an integer of at least 0, got -1"),
        (["--queue=3", "--carry=recompute"], "--queue: expected 0 with --carry recompute and with --sampler mh, which"),
        (["--queue=3", "--burn-in=0"], "--proposals bank, --burn-in and --num-samples mean, got 3"),
        (["--queue=3", "--proposals=bank"], "--proposals bank, --burn-in and --num-samples mean, got 3"),
        (["--queue=3", "--num-samples=2"], "--proposals bank, --burn-in and --num-samples mean, got 3"),
        (["--coupled", "--burn-in=0"], "--coupled: expected only without --sampler mh, which --proposals bank"),
        (["--coupled", "--sampler=mh"], "--coupled: expected only"),
        (["--coupled", "--method=simclr"], "--coupled: expected only with --method emc2, got --method simclr"),
        (["--gamma=0.5"], "--gamma: expected only with --method sogclr or isogclr, got --method emc2"),
        (["--method=sogclr", "--rho=0.5"], "--rho: expected only with --method isogclr, got --method sogclr"),
        (["--method=isogclr", "--carry=cached"], "--carry: expected only with --method emc2 or cached, got"),
        (["--method=simclr", "--refresh=0.1"], "--refresh: expected only with --method cached, got --method simclr"),
        (
            ["--method=simclr", "--num-samples=4"],
            "--num-samples: expected only with --method emc2 or cached, got --method simclr",
        ),
        (["--num-proposals=9"], "--num-proposals: expected only with --proposals bank, got --proposals batch"),
        (["--proposals=bank", "--num-proposals=0"], "--num-proposals: expected an integer of at least 1, got 0"),
        (["--num-samples=17", "--batch-size=32"], "--num-samples: expected at most 16, the 32 proposals after burn-in"),
        (["--num-samples=9", "--batch-size=8", "--views=both"], "expected at most 8, the 16 proposals after burn-in"),
        (
            ["--proposals=bank", "--num-proposals=8", "--num-samples=5"],
            "--num-samples: expected at most 4, the 8 proposals after burn-in",
        ),
        (
            ["--proposals=bank", "--num-samples=33"],
            "--num-samples: expected at most 32, the 64 proposals after burn-in",
        ),
        (["--gamma=0"], "--gamma: expected a share above 0, up to 1, got 0.0"),
        (["--rho=-1"], "--rho: expected a finite number of at least 0, got -1.0"),
        (["--refresh=2"], "--refresh: expected a share from 0 to 1, got 2.0"),
        (["--num-samples=0"], "--num-samples: expected an integer of at least 1, got 0"),
        (
            ["--method=simclr", "--quantile=0.9"],
            "--quantile: expected only with --batching gcbs, got --batching shuffle",
        ),
        (["--batching=gcbs"], "--batching: expected shuffle, as chains take the batch for uniform draws"),
        (["--batching=gcbs"], "got gcbs: add --proposals bank"),
        (["--batching=sorted"], "--batching: expected one of shuffle, gcbs, got 'sorted'"),
        (
            ["--method=simclr", "--batching=gcbs", "--quantile=1"],
            "--quantile: expected a share from 0 to below 1, got 1.0",
        ),
        (["--seed=-1"], "--seed: expected an integer from 0 to below 2**63, got -1"),
        (["--threads=0"], "--threads: expected an integer of at least 1, got 0"),
        (["--gather=some"], "--gather: expected one of auto, none, all, ring, got 'some'"),
        (["--gather=all"], "--gather: expected auto or none with one process; torchrun starts several, got 'all'"),
        (["--device=tpu"], "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        ([f"--out={__file__}"], "--out: expected a directory"),
        (["--batchsize=3"], "--batchsize=3"),
        (["--subset=some"], "--subset: expected an integer, got 'some'"),
        (["--subset=1258"], "--subset: expected 2 to 1257 (training images), got 1258"),
        (["--augmentations=1"], "--augmentations: expected 0 (fresh ones at each visit) or at least 2, got 1"),
        (["--image-size=32"], "--image-size: expected only with --data stl10 or folder, got --data digits"),
        (["--data=stl10:"], "--data: expected one of digits, mnist5k, stl10:PATH, folder:PATH, got 'stl10:'"),
        (["--data=stl10:nowhere"], "--data stl10: expected a directory with train_X.bin"),
        (["--stem=cifar"], "--stem: expected only with --encoder resnet18 or resnet50, got --encoder small"),
        (["--norm=layer"], "--norm: expected one of group, batch, none, got 'layer'"),
        (["--momentum=0.5"], "--momentum: expected only with --optimizer sgd or lars, got --optimizer adamw"),
        (["--warmup-epochs=31"], "--warmup-epochs: expected from 0 to the 30 epochs, got 31.0"),
        (["--clip-grad=0"], "--clip-grad: expected a finite norm above 0, got 0.0"),
        (["--amp=half"], "--amp: expected one of none, bfloat16, float16, got 'half'"),
        (["--profile=-1"], "--profile: expected an integer of at least 0, got -1"),
        (["--config=nowhere.yaml"], "--config: File does not exist"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main([*arguments, "--quiet"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_option_of_an_option_that_means_nothing_means_nothing() -> None:
    """A file may hold proposals: bank for EMC2's sake; with another method its number of proposals is no one's. And
    coupled, which the other's loss has no word for."""
    run = config.Config(method="simclr", proposals="bank", num_proposals=9)
    assert "num_proposals" not in run.own_options() and "num_proposals" not in run.settings()
    build_loss(run, 100, lambda items, views: items)
    assert run.unmet("num_proposals") == ("method", ("emc2",))
    build_loss(config.Config(method="simclr", coupled=True), 100, lambda items, views: items)
    chosen = build_loss(replace(run, method="emc2", num_samples=3), 100, lambda items, views: items)
    assert (chosen.num_proposals, chosen.num_samples) == (9, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 3}, "--batch-size: expected at least 2 images for each of the 2 processes, got 3"),
        (
            {"num_samples": 9, "batch_size": 32, "gather": "none"},
            "--num-samples: expected at most 8, the 16 proposals after burn-in, got 9",
        ),
        (
            {"method": "simclr", "batching": "gcbs", "batch_size": 33},
            "--batch-size: expected a multiple of the 2 processes with --batching gcbs, got 33",
        ),
        ({"norm": "batch"}, "--norm: expected group or none with 2 processes, got batch"),
        ({"method": "sogclr", "gather": "ring"}, "gather must be one of"),
        ({"proposals": "bank", "gather": "ring"}, 'gather="ring" needs proposals="batch"'),
    ],
)
def test_what_several_processes_cannot_do_is_named(
    options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        build_loss(replace(TINY, **options), 100, lambda items, views: items)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("options", "sampler", "queue"),
    [
        ({}, "isir", 16),
        ({"sampler": "isir"}, "isir", 16),
        ({"queue": 0}, "isir", 0),
        ({"sampler": "isir", "queue": 7}, "isir", 7),
        ({"carry": "recompute"}, "isir", 0),
        ({"sampler": "mh"}, "mh", 0),
        ({"burn_in": 0.25}, "mh", 0),
        ({"num_samples": 4}, "mh", 0),
        ({"proposals": "bank"}, "mh", 0),
        ({"proposals": "bank", "queue": 0}, "mh", 0),
    ],
    ids=str,
)
def test_the_sampler_is_the_one_that_the_options_ask_for(options: dict[str, Any], sampler: str, queue: int) -> None:
    run = replace(TINY, **options)
    loss = build_loss(run, 100, lambda items, views: items)
    assert (loss.sampler, loss.queue, loss.decoupled) == (sampler, queue, True) and run.walks == (sampler == "mh")
    assert loss.burn_in == options.get("burn_in", 0.5)
    if sampler == "isir":
        assert not build_loss(replace(run, coupled=True), 100, torch.stack).decoupled


@pytest.mark.parametrize("name", ["isogclr", "sogclr"])
def test_options_reach_the_loss(name: str) -> None:
    run = Run(replace(TINY, method=name, gamma=0.3, rho=2.0, temperature=0.4), data.digits())
    assert (run.loss.gamma, run.loss.temperature, run.loss.num_items) == (0.3, 0.4, 1257)
    assert run.loss.individual_temperature == (name == "isogclr")
    assert name == "sogclr" or run.loss.rho == 2.0


@pytest.mark.parametrize("options", compare_methods.VARIANTS.values(), ids=compare_methods.VARIANTS)
def test_options_of_a_variant_that_is_compared_reach_the_loss(options: dict[str, Any]) -> None:
    loss = build_loss(replace(TINY, **options), 100, lambda items, views: items)
    for name in options.keys() - {"method", "batching", "coupled"}:
        assert getattr(loss, name) == options[name], name
    assert getattr(loss, "decoupled", True) == (not options.get("coupled"))


def test_every_variant_that_is_compared_is_a_legal_run():
    assert {config.Config(**options).method for options in compare_methods.VARIANTS.values()} == set(config.METHODS)
