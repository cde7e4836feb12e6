"""Chosen batches in the examples: what they train on, and what the study measures."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from emc2_kernels.batching import GlobalContrastiveBatchSampler
from examples.pretrain import config, data
from examples.pretrain.run import Run
from examples.two_towers import gcbs, halves
from examples.two_towers import pairs as pairings

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 330  # ten batches of 32, and ten images that an epoch leaves out


def make_run(**options):
    split = data.digits()
    split = split._replace(train_images=split.train_images[:IMAGES], train_labels=split.train_labels[:IMAGES])
    return Run(config.Config(dim=16, device="cpu", quiet=True, batching="gcbs", **options), split)


def alikeness(batches, x, y):
    """Mean similarity of the two views of batch-mates."""
    return float(torch.stack([(x[items] @ y[items].T).mean() for items in batches]).mean())


@pytest.mark.parametrize("options", [{"method": "simclr"}, {"method": "emc2", "proposals": "bank"}], ids=str)
def test_batches_are_chosen_from_the_second_epoch_on(options):
    """By the encoder as it is then. How far it has come by then is luck; that batch-mates are alike to it is not."""
    run = make_run(epochs=2, **options)
    for epoch in range(2):
        chosen = list(run.batches())
        run.sampler.set_epoch(run.epoch)  # looking at batches takes them
        assert [len(items) for items in chosen] == [32] * 10 and len(torch.cat(chosen).unique()) == 320
        views = run.embeddings()
        graph = run.config.own_options("batching")
        sampler = GlobalContrastiveBatchSampler(IMAGES, 32, drop_last=True, seed=run.config.seed, **graph)
        sampler.set_epoch(epoch)
        if epoch == 1:
            sampler.update(*views)
            x, y = (torch.nn.functional.normalize(view, dim=1) for view in views)
            generator = torch.Generator().manual_seed(0)
            shuffles = [torch.randperm(IMAGES, generator=generator)[:320].split(32) for _ in range(100)]
            random = torch.tensor([alikeness(batches, x, y) for batches in shuffles])
            assert (alikeness(chosen, x, y) - random.mean()) / random.std() > 4
        assert torch.stack(chosen).tolist() == list(sampler)
        with tqdm(disable=True) as progress:
            row = run.train_epoch(progress)
        assert math.isfinite(row["method_loss"])


def test_the_bank_gives_what_it_has_and_the_encoder_the_rest():
    run = make_run(method="emc2", proposals="bank")
    with tqdm(disable=True) as progress:
        run.train_epoch(progress)
    bank = run.loss.bank
    written = bank.written_at.view(-1, 2) >= 0
    assert int(written.all(1).sum()) == 320 and torch.equal(written[:, 0], written[:, 1])
    views = run.embeddings()
    encoded = run.encoder(run.split.train_images).detach()
    for number, view in enumerate(views):
        kept = bank.lookup(torch.arange(IMAGES) * 2 + number).float()
        assert torch.equal(view[written[:, 0]], kept[written[:, 0]])
        torch.testing.assert_close(view[~written[:, 0]], encoded[~written[:, 0]])
    assert not torch.equal(*views)


def test_sogclr_is_trained_on_them_with_a_warning():
    with pytest.warns(UserWarning, match="SogCLRLoss is biased"):
        make_run(method="sogclr")


def test_purity_counts_pairs_of_batch_mates():
    classes = torch.tensor([0, 0, 1, 1, 1])
    batches = [torch.tensor([0, 1]), torch.tensor([1, 2, 3])]
    assert gcbs.purity(classes, batches) == pytest.approx((1 + 1 / 3) / 2)
    assert math.isnan(gcbs.purity(None, batches))


SHORT = gcbs.Settings(quantiles="0.99", epochs=6, seeds=2, quiet=True)


def test_the_study_prints_a_table_and_writes_its_files(tmp_path, capsys):
    assert gcbs.main(["--quantiles=0.99", "--epochs=6", "--seeds=2", "--quiet", f"--out={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:3]] == ["random", "q = 0.99"]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 7
    found = {
        (row["batching"], row["seed"], row["epoch"]): {k: float(row[k]) for k in gcbs.Epoch._fields[3:]} for row in rows
    }
    for seed in "01":
        plain, chosen = (found[name, seed, "6"] for name in ("random", "q = 0.99"))
        assert chosen["gap"] < plain["gap"] - 0.5
        assert chosen["purity"] > 2 * plain["purity"]
        untrained = [found[name, seed, "0"] for name in ("random", "q = 0.99")]
        assert untrained[0]["global_loss"] == untrained[1]["global_loss"]
        for row in (plain, chosen):
            assert row["gap"] == pytest.approx(row["global_loss"] - row["train_loss"])
            assert row["reciprocal_rank"] > untrained[0]["reciprocal_rank"] + 0.02


def test_a_run_of_the_study_follows_its_seed():
    pairs = pairings.held_out_digits()
    short = replace(SHORT, epochs=1)
    ends = [list(gcbs.train(short, pairs, "q = 0.99", seed))[-1][0] for seed in (0, 0, 1)]
    assert ends[0][:-1] == ends[1][:-1] and ends[0].gap != ends[2].gap


def test_pairs_are_the_halves_of_digits_and_retrieval_is_on_the_held_out():
    pairs = pairings.held_out_digits()
    assert [len(side) for side in (*pairs.train, *pairs.test)] == [1257, 1257, 540, 540]
    everything = pairings.all_digits()
    assert len(everything.train.left) == len(everything.classes) == 1792 and everything.test is everything.train
    towers = pairs.towers(0)
    left, right = (tower(side) for tower, side in zip(towers, pairs.test, strict=True))
    assert pairs.retrieval(towers) == (halves.retrieve(left, right), halves.retrieve(right, left))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data=news"], "--data: expected one of digits, digits-held-out, verses, got 'news'"),
        (["--quantiles=0.9,1"], "--quantiles: expected shares from 0 to below 1, with commas between, got '0.9,1'"),
        (["--quantiles=half"], "--quantiles: expected shares"),
        (["--scope=column"], "--scope: expected one of global, row, got 'column'"),
        (["--seeds=1"], "--seeds: expected an integer of at least 2, got 1"),
        (["--batch-size=2000"], "--batch-size: expected at most 1792 (pairs), got 2000"),
        (["--temperature=0"], "--temperature: expected a finite number above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, expected, capsys):
    try:
        assert gcbs.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert expected in capsys.readouterr().err
