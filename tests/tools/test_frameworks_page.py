"""The code of docs/guide/frameworks.md runs, section by section, each after what all share, and does what it says."""

import functools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_identical

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "frameworks.md"
SHARED = "What the examples share"
ITEMS, BATCH = 256, 32
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def sections():
    """By heading, its code, on the lines that it has in the page."""
    text = PAGE.read_text()
    found = {}
    for heading in re.finditer(r"^## (.*?)$(.*?)(?=^## |\Z)", text, re.M | re.S):
        for block in BLOCK.finditer(text, heading.start(), heading.end()):
            line = text.count("\n", 0, block.start(1))
            code = found.get(heading[1], "")
            found[heading[1]] = code + "\n" * (line - code.count("\n")) + block[1]
    return found


SECTIONS = sections()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(heading): the names that its code has made, in an empty folder, as the only process of a group."""
    monkeypatch.chdir(tmp_path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Other backends have tests of their own, and take longer than all of this.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)

    def run(heading):
        for package in ("accelerate", "lightning", "transformers"):
            if re.search(rf"^(import|from) {package}\b", SECTIONS[heading], re.M):
                pytest.importorskip(package)
        names = {"__name__": "page"}
        with monkeypatch.context() as context:
            if "init_process_group" in SECTIONS[heading]:
                for name, value in place.items():
                    context.setenv(name, value)
            for code in (SECTIONS[SHARED], SECTIONS[heading]):
                exec(compile(code, PAGE, "exec"), names)
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


def test_the_page_has_sections_for_all_frameworks():
    named = ("compile", "GradScaler", "checkpointing", "Parallel", "FSDP2", "distributed.checkpoint", "Lightning")
    assert all(any(word in heading for heading in SECTIONS) for word in (*named, "accelerate", "transformers"))


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
    assert [batch.tolist() for batch in names["rest"]] == epoch[5:]
    model, optimizer = names["model"], names["optimizer"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in names["shuffled"]:
        model(**batch).backward()
        optimizer.step()
    assert steps(optimizer) == {5 + ITEMS // BATCH}
    names["load"]("step-5")
    assert steps(optimizer) == {5} and model.loss_fn.step == 5
    assert_identical(model.state_dict(), before)
    assert (before["loss_fn.bank.written_at"] >= 0).sum() == 2 * 5 * BATCH


def test_lightning_goes_on_from_its_checkpoint(run):
    names = run("Lightning")
    module, resumed = names["module"], names["resumed"]
    for each, epochs in ((module, 2), (resumed, 3)):
        assert steps(each.optimizers()) == {epochs * ITEMS // BATCH}
        assert each.sampler.epoch == epochs and each.sampler.facts is not None


def test_accelerate_goes_on_from_its_checkpoint(run):
    names = run("accelerate")
    sampler, loader = names["sampler"], names["chosen"]
    assert steps(names["optimizer"]) == {2 * ITEMS // BATCH}
    twin = names["GlobalContrastiveBatchSampler"](ITEMS, BATCH, rank="all", drop_last=True)
    twin.set_epoch(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [batch["index"].tolist() for batch in loader] == list(twin)
    assert sampler.epoch == 3


def test_the_trainer_has_chosen_batches(run):
    names = run("The Trainer of transformers")
    trainer = names["trainer"]
    assert steps(trainer.optimizer) == {trainer.state.global_step} == {2 * ITEMS // BATCH}
    assert trainer.sampler.epoch == 2 and trainer.sampler.facts is not None
