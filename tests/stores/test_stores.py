"""ChainStore and EmbeddingBank: what is written is what is read, rescored, saved, copied and cast."""

import copy
import io
import itertools
import random

import pytest
import torch
from helpers import assert_identical, assert_unchanged, normal, snapshot
from torch import nn

from emc2_kernels import ChainStore, EmbeddingBank, MHState

ITEMS, VIEWS, DIM = 7, 2, 5
FAR_KEY = 2_000_003  # float16 and bfloat16 cannot hold it, float32 can
FINE_SCORE = 1.2345678  # changes when rounded to half precision

CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "type": lambda module: module.type(torch.float16),
}


def filled_chains(seed=0):
    """All but the last item's chains started, at keys below ITEMS * VIEWS."""
    store = ChainStore(ITEMS, views=VIEWS)
    index = torch.arange(ITEMS - 1)
    for view in range(VIEWS):
        keys = torch.arange(ITEMS - 1).mul(5).add(3 + view) % (ITEMS * VIEWS)
        store.write(index, view, MHState(keys, normal(seed + view, ITEMS - 1)))
    return store


def filled_bank(dtype=torch.float32):
    """Items 0 .. 4 written, in both views; items 5 and 6 never."""
    bank = EmbeddingBank(ITEMS, DIM, views=VIEWS, dtype=dtype)
    for step, view in ((3, 0), (8, 1)):
        bank.update(torch.arange(5), view, normal(20 + view, 5, DIM), step)
    return bank


def saved_and_loaded(module, fresh):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file), strict=True)
    return fresh


@pytest.mark.parametrize(
    ("module", "fresh"),
    [
        (filled_chains(), ChainStore(ITEMS, views=VIEWS)),
        (filled_bank(), EmbeddingBank(ITEMS, DIM, views=VIEWS, dtype=torch.float32)),
        (filled_bank(torch.bfloat16), EmbeddingBank(ITEMS, DIM, views=VIEWS)),
    ],
    ids=["chains", "bank", "bfloat16 bank"],
)
def test_state_dict_has_all_that_a_store_keeps(module, fresh):
    old, new = module.state_dict(), fresh.state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    kept = {name for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    assert kept | {name for name, _ in module.named_buffers()} == set(old)
    assert not list(module.parameters())
    before = snapshot(module)
    assert_unchanged(saved_and_loaded(module, fresh), before)


def test_a_loaded_bank_has_the_ages_of_the_saved_one():
    bank = filled_bank()
    loaded = saved_and_loaded(bank, EmbeddingBank(ITEMS, DIM, dtype=torch.float32))
    labels = torch.arange(-1, ITEMS * VIEWS)
    assert_identical(loaded.age(labels), bank.age(labels))
    assert_identical(loaded.lookup(labels), bank.lookup(labels))


def test_a_state_dict_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        ChainStore(ITEMS + 1).load_state_dict(filled_chains().state_dict())


def test_new_chains_have_not_started():
    state = ChainStore(3).read(torch.tensor([2, 0]), 1)
    assert_identical(state, MHState(torch.tensor([-1, -1]), torch.tensor([-torch.inf, -torch.inf])))


def test_each_item_and_view_has_its_own_chain():
    store = ChainStore(4, views=3)
    for view in range(3):
        store.write(torch.arange(4), view, MHState(torch.arange(4) * 10 + view, torch.full((4,), float(view))))
    state = store.read(torch.tensor([3, 0, 3]), torch.tensor([2, 1, 0]))
    assert_identical(state, MHState(torch.tensor([32, 1, 30]), torch.tensor([2.0, 1.0, 0.0])))
    assert_identical(store.key, torch.tensor([[10 * item + view for view in range(3)] for item in range(4)]).flatten())


def test_what_is_read_does_not_follow_later_writes_nor_the_other_way_round():
    store = filled_chains()
    before = snapshot(store)
    state = store.read(torch.arange(3), 0)
    state.key.fill_(0)
    state.score.fill_(0)
    assert_unchanged(store, before)
    kept = store.read(torch.arange(3), 0)
    store.write(torch.arange(3), 0, state)
    assert_identical(kept.key, before["key"][[0, 2, 4]])


def test_a_write_keeps_no_graph():
    store, bank = ChainStore(2), EmbeddingBank(2, DIM)
    weight = torch.ones((), requires_grad=True)
    store.write(torch.tensor([0]), 0, MHState(torch.tensor([1]), weight * torch.ones(1)))
    bank.update(torch.tensor([0]), 0, weight * torch.ones(1, DIM), 0)
    assert not any(
        buffer.requires_grad for module in (store, bank) for buffer in module.state_dict(keep_vars=True).values()
    )


def rescored_by_hand(state, queries, bank, temperature):
    """One chain at a time, in float64."""
    scores = []
    for row, (key, score) in enumerate(zip(state.key.tolist(), state.score.tolist(), strict=True)):
        if key >= 0 and bank.written_at[key] >= 0:
            tau = temperature[row].item() if isinstance(temperature, torch.Tensor) else temperature
            score = (queries[row].double() @ bank.embeddings[key].double()).item() / tau
        scores.append(score)
    return torch.tensor(scores)


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, normal(9, ITEMS).abs() + 0.1], ids=["number", "one per row"])
def test_rescoring_takes_the_banks_entry_of_the_chains_key(bank_dtype, dtype, temperature):
    store, bank, queries = filled_chains(), filled_bank(bank_dtype), normal(1, ITEMS, DIM, dtype=dtype)
    before = snapshot(store)
    for view in range(VIEWS):
        kept = store.read(torch.arange(ITEMS), view)
        state = store.read(torch.arange(ITEMS), view, queries, bank, temperature)
        expected = rescored_by_hand(kept, queries, bank, temperature)
        assert state.score.dtype == torch.float32
        assert (expected != kept.score).sum() >= 3  # the case has chains to rescore
        torch.testing.assert_close(state.score, expected, rtol=2e-6, atol=2e-6)
        assert_identical(state.key, kept.key)
    assert_unchanged(store, before)  # the store keeps its own scores until they are written


def test_chains_without_a_banked_key_keep_their_scores():
    store, bank = ChainStore(4), EmbeddingBank(4, DIM)
    bank.update(torch.tensor([1]), 0, torch.ones(1, DIM), 0)
    keys = torch.tensor([2, 2 * 3 + 1, -1, 2])  # written, never written, not started, written
    store.write(torch.arange(4), 0, MHState(keys, torch.tensor([0.5, 1.5, -torch.inf, 2.5])))
    state = store.read(torch.arange(4), 0, torch.ones(4, DIM), bank, 0.5)
    assert_identical(state, MHState(keys, torch.tensor([2.0 * DIM, 1.5, -torch.inf, 2.0 * DIM])))


def test_rescoring_is_float32_under_autocast_and_has_no_gradient():
    store, bank = filled_chains(), filled_bank()
    queries = normal(1, ITEMS, DIM).requires_grad_()
    expected = store.read(torch.arange(ITEMS), 0, queries, bank, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        state = store.read(torch.arange(ITEMS), 0, queries, bank, 0.1)
    assert_identical(state, expected)
    assert not state.score.requires_grad


RESCORING = {"queries": normal(1, 3, DIM), "bank": filled_bank(), "temperature": 0.1}


@pytest.mark.parametrize(
    "given", [names for size in (1, 2) for names in itertools.combinations(RESCORING, size)], ids="+".join
)
def test_some_but_not_all_rescoring_arguments_raise(given):
    with pytest.raises(ValueError, match="queries, bank and temperature"):
        filled_chains().read(torch.arange(3), 0, **{name: RESCORING[name] for name in given})


def random_writes(rng, count, max_batch=9):
    """(index, views) of batches with many duplicates."""
    for _ in range(count):
        size = rng.randint(0, max_batch)
        yield [rng.randrange(3) for _ in range(size)], [rng.randrange(VIEWS) for _ in range(size)]


def test_the_last_of_several_chains_with_one_slot_is_kept():
    store, expected = ChainStore(3, views=VIEWS), {}
    for number, (index, views) in enumerate(random_writes(random.Random(0), 200)):
        keys = torch.arange(len(index)) + 100 * number
        scores = normal(number, len(index))
        store.write(
            torch.tensor(index, dtype=torch.int64), torch.tensor(views, dtype=torch.int64), MHState(keys, scores)
        )
        for row, slot in enumerate(zip(index, views, strict=True)):
            expected[slot] = keys[row].item(), scores[row].item()
        for (item, view), (key, score) in expected.items():
            slot = item * VIEWS + view
            assert (store.key[slot].item(), store.score[slot].item()) == (key, score), f"write {number}"


def test_the_last_of_several_embeddings_with_one_slot_is_kept():
    bank, expected = EmbeddingBank(3, DIM, views=VIEWS, dtype=torch.float32), {}
    for step, (index, views) in enumerate(random_writes(random.Random(1), 200)):
        embeddings = normal(step, len(index), DIM)
        bank.update(
            torch.tensor(index, dtype=torch.int64),
            torch.tensor(views, dtype=torch.int64),
            embeddings,
            torch.tensor(step),
        )
        for row, slot in enumerate(zip(index, views, strict=True)):
            expected[slot] = embeddings[row], step
        for (item, view), (embedding, written_at) in expected.items():
            label = torch.tensor([item * VIEWS + view])
            assert torch.equal(bank.lookup(label)[0], embedding), f"update {step}"
            assert bank.age(label).item() == step - written_at, f"update {step}"


def test_age_counts_steps_since_the_latest_update():
    bank = EmbeddingBank(3, DIM)
    labels = torch.tensor([-1, 0, 1, 2, 5])
    assert bank.age(labels).tolist() == [-1] * 5
    bank.update(torch.tensor([0, 1]), 0, torch.ones(2, DIM), 4)
    bank.update(torch.tensor([0]), 1, torch.ones(1, DIM), torch.tensor(9))
    assert bank.age(labels).tolist() == [-1, 5, 0, 5, -1]
    bank.update(torch.tensor([1]), 0, torch.ones(1, DIM), 2**32 - 1)
    assert bank.age(labels).tolist() == [-1, 2**32 - 5, 2**32 - 10, 0, -1]


def test_lookup_gives_zeros_for_what_was_never_written():
    bank = filled_bank(torch.bfloat16)
    found = bank.lookup(torch.tensor([-1, 13, 4]))
    assert found.dtype == torch.bfloat16
    assert_identical(found, torch.stack((torch.zeros(DIM), torch.zeros(DIM), normal(20, 5, DIM)[2])).bfloat16())


def test_default_bank_is_bfloat16_and_rounds_what_it_is_given():
    bank = EmbeddingBank(2, DIM)
    embeddings = normal(0, 1, DIM)
    bank.update(torch.tensor([1]), 1, embeddings, 0)
    assert_identical(bank.embeddings[3:], embeddings.bfloat16())
    bank.update(torch.tensor([1]), 1, embeddings.half(), 0)
    assert_identical(bank.embeddings[3:], embeddings.half().bfloat16())


def stores_that_casting_would_damage():
    store = ChainStore(2)
    store.write(torch.tensor([0]), 0, MHState(torch.tensor([FAR_KEY]), torch.tensor([FINE_SCORE])))
    bank = EmbeddingBank(2, DIM, dtype=torch.float32)
    bank.update(torch.tensor([0]), 0, torch.full((1, DIM), FINE_SCORE), FAR_KEY)
    return store, bank


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_leaves_ids_scores_and_the_banks_dtype_alone(cast):
    for module in (*stores_that_casting_would_damage(), EmbeddingBank(2, DIM)):
        before = snapshot(module)
        assert_unchanged(cast(module), before)


def test_casting_and_moving_at_once_moves():
    store, bank = stores_that_casting_would_damage()
    nn.ModuleList((store, bank)).to("meta", torch.float16)
    assert {buffer.device.type for module in (store, bank) for buffer in module.state_dict().values()} == {"meta"}
    dtypes = [buffer.dtype for buffer in (store.key, store.score, bank.embeddings, bank.written_at, bank.last_step)]
    assert dtypes == [torch.int64, torch.float32, torch.float32, torch.int64, torch.int64]


def test_a_deep_copy_shares_nothing():
    for module in (filled_chains(), filled_bank()):
        copied, before = copy.deepcopy(module), snapshot(module)
        assert_unchanged(copied, before)
        for buffer in copied.state_dict().values():
            buffer.zero_()
        assert_unchanged(module, before)


STORE_ERRORS = {
    "index is a list": ({"index": [0, 1, 2]}, TypeError, "index"),
    "index is int32": ({"index": torch.arange(3, dtype=torch.int32)}, TypeError, "index"),
    "index is 2-d": ({"index": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "index"),
    "index is negative": ({"index": torch.tensor([0, -1, 2])}, ValueError, "index"),
    "index is past the items": ({"index": torch.tensor([0, ITEMS, 2])}, ValueError, "index"),
    "view is past the views": ({"view": VIEWS}, ValueError, "view"),
    "view is negative": ({"view": -1}, ValueError, "view"),
    "view is a float": ({"view": 0.0}, TypeError, "view"),
    "views are too few": ({"view": torch.tensor([0, 1])}, ValueError, "view"),
    "views are past the views": ({"view": torch.tensor([0, 1, 2])}, ValueError, "view"),
    "views are int32": ({"view": torch.zeros(3, dtype=torch.int32)}, TypeError, "view"),
}


def named_error(exception, regex):
    return pytest.raises(exception, match=regex + r".* got ")


@pytest.mark.parametrize(("change", "exception", "regex"), STORE_ERRORS.values(), ids=STORE_ERRORS)
def test_a_wrong_slot_raises_and_changes_nothing(change, exception, regex):
    slot = {"index": torch.arange(3), "view": 0} | change
    store, bank = filled_chains(), filled_bank()
    before = snapshot(store), snapshot(bank)
    for call in (
        lambda: store.read(**slot),
        lambda: store.write(**slot, state=MHState(torch.zeros(3, dtype=torch.int64), torch.zeros(3))),
        lambda: bank.update(**slot, embeddings=torch.zeros(3, DIM), step=0),
    ):
        with named_error(exception, regex):
            call()
    assert_unchanged(store, before[0])
    assert_unchanged(bank, before[1])


WRITE_ERRORS = {
    "state is None": (None, TypeError, "state"),
    "keys are too few": (MHState(torch.zeros(2, dtype=torch.int64), torch.zeros(3)), ValueError, r"state\.key"),
    "keys are int32": (MHState(torch.zeros(3, dtype=torch.int32), torch.zeros(3)), TypeError, r"state\.key"),
    "scores are half": (MHState(torch.zeros(3, dtype=torch.int64), torch.zeros(3).half()), TypeError, r"state\.score"),
    "scores are too many": (MHState(torch.zeros(3, dtype=torch.int64), torch.zeros(4)), ValueError, r"state\.score"),
}


@pytest.mark.parametrize(("state", "exception", "regex"), WRITE_ERRORS.values(), ids=WRITE_ERRORS)
def test_a_wrong_state_is_not_written(state, exception, regex):
    store = filled_chains()
    before = snapshot(store)
    with named_error(exception, regex):
        store.write(torch.arange(3), 0, state)
    assert_unchanged(store, before)


UPDATE_ERRORS = {
    "embeddings are a list": ({"embeddings": [[0.0] * DIM] * 3}, TypeError, "embeddings"),
    "embeddings are too narrow": ({"embeddings": torch.zeros(3, DIM - 1)}, ValueError, "embeddings"),
    "embeddings are too few": ({"embeddings": torch.zeros(2, DIM)}, ValueError, "embeddings"),
    "embeddings are elsewhere": ({"embeddings": torch.zeros(3, DIM, device="meta")}, ValueError, "embeddings"),
    "step is negative": ({"step": -1}, ValueError, "step"),
    "step has 33 bits": ({"step": torch.tensor(2**32)}, ValueError, "step"),
    "step is a float": ({"step": 1.0}, TypeError, "step"),
}


@pytest.mark.parametrize(("change", "exception", "regex"), UPDATE_ERRORS.values(), ids=UPDATE_ERRORS)
def test_a_wrong_update_is_not_kept(change, exception, regex):
    bank = filled_bank()
    before = snapshot(bank)
    with named_error(exception, regex):
        bank.update(torch.arange(3), 0, **({"embeddings": torch.zeros(3, DIM), "step": 0} | change))
    assert_unchanged(bank, before)


RESCORING_ERRORS = {
    "queries are too few": ({"queries": normal(1, 2, DIM)}, ValueError, "queries"),
    "queries are too narrow": ({"queries": normal(1, 3, DIM - 1)}, ValueError, "queries"),
    "queries are integers": ({"queries": torch.zeros(3, DIM, dtype=torch.int64)}, TypeError, "queries"),
    "bank is no bank": ({"bank": "bank"}, TypeError, "bank"),
    "temperature is 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperatures are too few": ({"temperature": torch.ones(2)}, ValueError, "temperature"),
    "a temperature is negative": ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "temperature"),
}


@pytest.mark.parametrize(("change", "exception", "regex"), RESCORING_ERRORS.values(), ids=RESCORING_ERRORS)
def test_wrong_rescoring_arguments_raise(change, exception, regex):
    with named_error(exception, regex):
        filled_chains().read(torch.arange(3), 0, **(RESCORING | change))


@pytest.mark.parametrize("method", ["find", "lookup", "age"])
@pytest.mark.parametrize(
    ("labels", "exception"),
    [
        (torch.tensor([-2]), ValueError),
        (torch.tensor([ITEMS * VIEWS]), ValueError),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError),
        (torch.zeros(1), TypeError),
        (0, TypeError),
    ],
    ids=["below -1", "past the end", "2-d", "float", "number"],
)
def test_wrong_labels_raise(method, labels, exception):
    with named_error(exception, "labels"):
        getattr(filled_bank(), method)(labels)


@pytest.mark.parametrize(
    ("build", "exception", "regex"),
    [
        (lambda: ChainStore(0), ValueError, "num_items"),
        (lambda: ChainStore(2.5), TypeError, "num_items"),
        (lambda: ChainStore(3, views=0), ValueError, "views"),
        (lambda: ChainStore(2**40), ValueError, "num_items"),
        (lambda: EmbeddingBank(3, 0), ValueError, "dim"),
        (lambda: EmbeddingBank(3, True), TypeError, "dim"),
        (lambda: EmbeddingBank(3, DIM, dtype=torch.int32), TypeError, "dtype"),
    ],
)
def test_wrong_sizes_raise(build, exception, regex):
    with named_error(exception, regex):
        build()
