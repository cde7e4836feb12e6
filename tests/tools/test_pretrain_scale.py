"""Whole runs at the papers' settings, made small: ResNet-18 on STL-10's files and on folders, from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import differences
from stl10_files import write_stl10, write_tree
from tqdm import tqdm

from examples.pretrain import config, data, report
from examples.pretrain.__main__ import main, parse_arguments
from examples.pretrain.processes import Processes
from examples.pretrain.run import Run, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = sorted((Path(config.__file__).parent / "configs").glob("*.yaml"))
SMALL = "image_size: 16\nepochs: 2\nbatch_size: 8\ndevice: cpu\nquiet: true\ndim: 8\nprobe: sgd\n"


def read_end(path):
    state = load_checkpoint(path, torch.load(path)["settings"])
    del state["seconds"]
    for row in state["history"]:
        del row["images_per_second"]
    return state


def interrupted(monkeypatch, *flags):
    """Runs until the second epoch's second step."""
    step = Run.train_step

    def interrupt(run, index):
        if run.step == run.steps_per_epoch + 1:
            raise KeyboardInterrupt
        return step(run, index)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", interrupt)
        assert main(flags) == 130


def test_resnet18_on_stl10_from_a_file_of_settings_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    write_stl10(tmp_path / "stl10", train=12, test=10, unlabelled=4)
    settings = tmp_path / "small.yaml"
    settings.write_text(
        f"data: stl10:{tmp_path / 'stl10'}\nencoder: resnet18\nprojector_hidden: 32\noptimizer: lars\n"
        f"clip_grad: 1.0\nwarmup_epochs: 1\naugmentations: 4\nblur: 0.5\nburn_in: 0.25\nlr: 1e-1\n{SMALL}"
    )
    flags = [f"--config={settings}", "--profile=2"]
    assert main([*flags, f"--out={tmp_path / 'whole'}"]) == 0
    printed = capsys.readouterr().out
    assert "emc2: 4 steps of 8 images" in printed and "10-NN" in printed
    assert "2 steps of" in printed and "drawing negatives" in printed and "trace.json" in printed
    names = {event.get("name") for event in json.loads((tmp_path / "whole" / "trace.json").read_text())["traceEvents"]}
    assert {"step", "views", "encoder", "loss", "backward", "optimizer", "emc2_kernels::mh_step"} <= names

    interrupted(monkeypatch, *flags, f"--out={tmp_path / 'broken'}")
    assert not torch.autograd.profiler._is_profiler_enabled  # that would crash at exit
    assert main([*flags, f"--out={tmp_path / 'broken'}", "--resume"]) == 0
    assert "no trace: fewer than 4 steps were left" in capsys.readouterr().out
    ends = [read_end(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken")]
    assert differences(*ends) == []
    assert len(ends[0]["history"]) == 2
    assert any("velocity" in state for state in ends[0]["optimizer"]["state"].values())


def test_half_precision_resumes_to_the_same_bits(tmp_path, monkeypatch):
    flags = ["--method=emc2", "--carry=recompute", "--burn-in=0", "--subset=48", "--epochs=2", "--batch-size=16"]
    flags += ["--amp=float16", "--augmentations=3", "--clip-grad=0.5", "--dim=8", "--device=cpu", "--quiet"]
    flags += ["--lr=1e-5"]  # no gradient is beyond the range, and the scaler counts all steps
    assert main([*flags, f"--out={tmp_path / 'whole'}"]) == 0
    interrupted(monkeypatch, *flags, f"--out={tmp_path / 'broken'}")
    assert main([*flags, f"--out={tmp_path / 'broken'}", "--resume"]) == 0
    ends = [read_end(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken")]
    assert differences(*ends) == []
    assert ends[0]["scaler"]["_growth_tracker"] == 6


def test_a_tree_of_folders_is_trained_on_by_every_method(tmp_path, capsys):
    write_tree(tmp_path / "tree", train=8)
    settings = tmp_path / "small.yaml"
    # A file may hold the options of several methods.
    settings.write_text(
        f"data: folder:{tmp_path / 'tree'}\nburn_in: 0.25\ngamma: 0.8\namp: bfloat16\nsubset: 20\n{SMALL}"
    )
    for method in config.METHODS:
        out = tmp_path / method
        flags = [f"--config={settings}", f"--method={method}", "--epochs=1", f"--out={out}", "--evaluate-every=5"]
        assert main(flags) == 0, capsys.readouterr().err
        assert f"{method}: 2 steps of 8 images" in capsys.readouterr().out
        assert len((out / "metrics.csv").read_text().splitlines()) == 2


def test_flags_stand_over_the_file_and_the_file_over_defaults(tmp_path, capsys):
    settings = tmp_path / "some.yaml"
    settings.write_text("lr: 3e-3\nbatch_size: 8\nburn_in: 0.25\ntensorboard: true\n")
    found = parse_arguments([f"--config={settings}", "--batch-size=16"])
    assert found == config.Config(lr=3e-3, batch_size=16, burn_in=0.25, tensorboard=True)
    assert parse_arguments([f"--config={settings}", "--method=simclr"]).method == "simclr"
    for flags, expected in (
        (["--method=simclr", "--burn-in=0.5"], "--burn-in: expected only with --method emc2, got --method simclr"),
        (["--lr=much"], "--lr: expected a number, got 'much'"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([f"--config={settings}", *flags])
        assert expected in capsys.readouterr().err
    for text, expected in (
        ("batch_sise: 8", "--config: expected names of settings, got 'batch_sise'"),
        ("batch_size: many", "--batch-size: expected an integer, got 'many'"),
        ("batch_size: 1", "--batch-size: expected an integer of at least 2, got 1"),
        ("quiet: maybe", "--quiet: expected true or false, got 'maybe'"),
        ("- 3", "--config: "),
        ("a: [", "--config: "),
    ):
        settings.write_text(text)
        with pytest.raises(SystemExit):
            parse_arguments([f"--config={settings}"])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_made_settings_are_legal_and_name_their_source(path):
    assert path.read_text().startswith("#") and "arXiv" in path.read_text()
    found = parse_arguments([f"--config={path}"])
    assert found.data.endswith(":PATH") or found.data.endswith("/PATH")
    for method in config.METHODS:
        assert parse_arguments([f"--config={path}", f"--method={method}"]).method == method


def test_there_are_settings_of_the_papers():
    assert {path.stem for path in CONFIGS} == {"stl10", "imagenet100", "stl10_subset"}


def small_run(tmp_path, **options):
    base = config.Config(method="simclr", batch_size=12, dim=8, device="cpu", quiet=True, out=str(tmp_path / "run"))
    given = replace(base, **options)
    split = data.load(given.data, given.image_size, given.workers, given.subset)
    return Run(given, split)


def test_unlabelled_images_are_trained_on_and_left_out_of_the_probes(tmp_path, monkeypatch):
    write_stl10(tmp_path, train=14, test=10, unlabelled=10)
    run = small_run(tmp_path, data=f"stl10:{tmp_path}", image_size=16)
    seen = torch.cat(list(run.batches()))
    assert len(seen) == 24 == len(seen.unique())
    features = run.features()
    assert features.train.shape == (14, 128) and features.train_labels.tolist() == [i % 10 for i in range(14)]
    monkeypatch.setattr("examples.pretrain.images.CHUNK_NUMBERS", 4 * 3 * 16 * 16)  # four images at a time
    for found, expected in zip(run.features(), features, strict=True):
        torch.testing.assert_close(found, expected)
    monkeypatch.setattr("examples.pretrain.evaluate.LARGE", 100)
    assert run.features().train.dtype == torch.float16


def test_neither_readers_nor_processes_change_what_is_seen(tmp_path):
    write_stl10(tmp_path, train=24, test=10, unlabelled=0)
    options = {"data": f"stl10:{tmp_path}", "image_size": 16, "augmentations": 2}
    views = []
    for workers in (1, 3):
        run = small_run(tmp_path, workers=workers, **options)
        views.append(run.views(torch.arange(12)))
        assert views[-1].shape == (24, 3, 16, 16)
        assert torch.equal(run.views(torch.arange(12)), views[-1])  # the two fixed views
    assert torch.equal(*views)


@pytest.mark.parametrize("count", [0, 2])
def test_processes_see_their_part_of_what_one_would_see(count, tmp_path):
    write_stl10(tmp_path, train=14, test=10, unlabelled=0)
    options = {"data": f"stl10:{tmp_path}", "image_size": 16, "augmentations": count, "batch_size": 7, "blur": 0.5}
    runs = [small_run(tmp_path, **options) for _ in range(3)]
    index = torch.arange(7)
    whole = runs[0].views(index).chunk(2)
    for rank, run in enumerate(runs[1:]):
        run.processes = Processes(rank=rank, count=2)
        part = run.processes.part(index)
        for view, expected in zip(run.views(part).chunk(2), whole, strict=True):
            torch.testing.assert_close(view, expected[part])


def test_fixed_views_are_what_is_encoded_again(tmp_path):
    run = small_run(tmp_path, method="emc2", carry="recompute", augmentations=2)
    index = torch.arange(12)
    z0, z1 = run.encoder(run.views(index)).chunk(2)
    again = run.encode_again(torch.tensor([5, 5, 2]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(again, torch.stack([z0[5], z1[5], z1[2]]))


def test_batches_are_chosen_of_images_on_disk(tmp_path):
    write_stl10(tmp_path, train=24, test=10, unlabelled=0)
    run = small_run(tmp_path, data=f"stl10:{tmp_path}", image_size=16, batching="gcbs", epochs=2)
    found = run.embeddings()[0]
    expected = run.encoder(run.split.train_images[torch.arange(24)])
    torch.testing.assert_close(found, expected)
    with tqdm(disable=True) as progress:
        assert [run.train_epoch(progress)["step"] for _ in range(2)] == [2, 4]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_with_autocast_training_is_close_to_float32(amp, tmp_path):
    runs = [small_run(tmp_path, amp=value, batch_size=32) for value in ("none", amp)]
    losses = [[run.train_step(torch.arange(32))["method_loss"].item() for _ in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
    assert all(parameter.dtype == torch.float32 for parameter in runs[1].encoder.parameters())


def test_gradients_are_clipped_to_the_norm(tmp_path):
    run = small_run(tmp_path, clip_grad=0.01, optimizer="sgd", lr=1.0, weight_decay=0.0, warmup_epochs=0.0)
    before = [parameter.detach().clone() for parameter in run.encoder.parameters()]
    run.train_step(torch.arange(12))
    moved = torch.cat([(a - b).flatten() for a, b in zip(run.encoder.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_batches_are_chosen_with_batchnorm_without_touching_its_statistics(tmp_path):
    run = small_run(tmp_path, norm="batch", batching="gcbs")
    buffers = {name: value.clone() for name, value in run.encoder.named_buffers()}
    run.encoder.train()
    run.embeddings()
    assert run.encoder.training and differences(buffers, dict(run.encoder.named_buffers())) == []


def test_evaluation_every_so_often_and_at_the_end(tmp_path):
    run = small_run(tmp_path, evaluate_every=2, epochs=3, subset=24)
    with tqdm(disable=True) as progress:
        rows = [run.train_epoch(progress) for _ in range(3)]
    assert ["few_nearest_neighbour" in row for row in rows] == [False, True, True]


def test_tensorboard_is_written_or_its_package_named(tmp_path, monkeypatch, capsys):
    flags = ["--method=simclr", "--subset=64", "--epochs=2", "--dim=8", "--device=cpu", "--quiet", "--tensorboard"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)
        patch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        assert main([*flags, f"--out={tmp_path / 'none'}"]) == 2
    message = capsys.readouterr().err
    assert "--tensorboard: expected the package tensorboard: pip install tensorboard" in message
    assert not (tmp_path / "none").exists()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    interrupted(monkeypatch, *flags, f"--out={out}")
    assert main([*flags, f"--out={out}", "--resume"]) == 0
    found = EventAccumulator(str(out)).Reload()
    assert [event.step for event in found.Scalars("ntxent")] == [2, 4]
    assert set(found.Tags()["scalars"]) == set(report.COLUMNS[2:]) - set(report.OWN_STATS)
    shutil.rmtree(out)
