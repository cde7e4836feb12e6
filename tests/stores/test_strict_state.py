"""States of losses and stores are loaded whole or not at all, and a loss that was made on the meta device begins as any
other does."""

import copy
import io
import re

import pytest
import torch
from helpers import assert_identical, assert_unchanged, normal, snapshot
from torch import nn

from emc2_kernels import ChainStore, EmbeddingBank, losses

ITEMS, DIM, B = 10, 8, 4
LOSSES = {
    "emc2": ("emc2", {"sampler": "mh"}),
    "emc2 bimodal": ("emc2", {"sampler": "mh", "bimodal": True}),
    "emc2 isir": ("emc2", {"sampler": "isir", "queue": 6}),
    "emc2 corrected": ("emc2", {"proposals": "bank"}),
    "emc2 bank bimodal": ("emc2", {"proposals": "bank", "bimodal": True}),
    "cached": ("cached", {}),
    "sogclr": ("sogclr", {}),
    "isogclr bimodal": ("isogclr", {"bimodal": True}),
}
EVERY = pytest.mark.parametrize("case", LOSSES)


def make(case, **change):
    name, options = LOSSES[case]
    takes = losses.TABLE[name].options()
    sizes = {size: value for size, value in {"num_items": ITEMS, "dim": DIM}.items() if size in takes}
    return losses.get(name, **sizes | options | change)


def step(loss, seed=0):
    draw = torch.Generator().manual_seed(seed)
    index = torch.randperm(ITEMS, generator=draw)[:B]
    return loss(normal(seed, B, DIM), normal(seed + 100, B, DIM), index)


def trained(case, steps=4, **change):
    loss = make(case, **change)
    for seed in range(steps):
        step(loss, seed)
    return loss


def with_value(value, place=0):
    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[place] = value
        return changed

    return change


def nothing(_):
    return "nothing"


# By the last part of a name: what makes a state wrong, and how the error goes on after the name.
WRONG = {
    "step": [
        (with_value(-3), "must hold values in [0, 4294967295], got values from -3 to -3"),
        (with_value(2**32), "must hold values in [0, 4294967295], got"),
        (lambda t: t.float(), "must hold integers, got float32"),
        (lambda t: t.repeat(2), "must be a tensor with one number, got"),
        (nothing, "must be a tensor with one number, got 'nothing'"),
    ],
    "last_step": [(with_value(-1), "must hold values in [0, 4294967295], got")],
    "key": [
        (with_value(-2), "must hold values in [-1, "),
        (lambda t: t.double(), "must hold integers, got float64"),
        (lambda t: t > 0, "must hold integers, got bool"),
        (nothing, "must be a tensor, got 'nothing'"),
    ],
    "items": [
        (with_value(-2), "must hold values in [-1, 9], got values from -2 to"),
        (with_value(ITEMS), "must hold values in [-1, 9], got values from"),
        (lambda t: t.double(), "must hold integers, got float64"),
        (nothing, "must be a tensor, got 'nothing'"),
    ],
    "score": [
        (with_value(torch.nan), "must hold values in [-inf, "),
        (with_value(torch.inf), "must hold values in [-inf, "),
        (lambda t: t.nan_to_num(0, 0, 0).long(), "must hold floating-point numbers, got int64"),
    ],
    "embeddings": [
        (lambda t: torch.full_like(t, torch.inf), "must be finite where written_at is not -1, got"),
        (lambda t: torch.full_like(t, torch.nan), "must be finite where written_at is not -1, got"),
        (torch.zeros_like, "must be infinite where written_at is -1, got"),
    ],
    "written_at": [
        (with_value(-2), "must hold values in [-1, 4294967295], got"),
        (lambda t: t.float(), "must hold integers, got float32"),
    ],
    "means": [(with_value(torch.nan), "must hold values in [-1.7")],
    "sums": [
        (with_value(-torch.inf, -1), "must hold values in [-1.7"),
        (with_value(torch.inf), "must hold values in [-1.7"),
        (with_value(torch.nan), "must hold values in [-1.7"),
        (lambda t: t.long(), "must hold floating-point numbers, got int64"),
        (nothing, "must be a tensor, got 'nothing'"),
    ],
    "log_u": [
        (with_value(torch.nan), "must hold values in [-inf, "),
        (with_value(torch.inf), "must hold values in [-inf, "),
    ],
    "item_temperature": [
        (with_value(0.0), "must hold values in [7.52316384526264e-37, "),
        (with_value(-0.1), "must hold values in [7.52316384526264e-37, "),
        (with_value(torch.inf), "must hold values in [7.52316384526264e-37, "),
    ],
    "item_velocity": [(with_value(torch.nan), "must hold values in [-1.7")],
}


def refused(module, state, *says, **options):
    """And nothing of the module has changed."""
    before = snapshot(module)
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state, **options)
    for line in says:
        assert line in str(error.value)
    assert_unchanged(module, before)


@EVERY
@pytest.mark.parametrize("strict", [True, False])
def test_each_wrong_table_is_named_and_nothing_is_loaded(case, strict):
    """Of the loss by itself, and of one in a bigger model."""
    state, loss = trained(case, 2).state_dict(), trained(case, 1)
    model = nn.ModuleDict({"loss": loss})
    tried = 0
    for name, tensor in state.items():
        for change, says in WRONG[name.split(".")[-1]]:
            wrong = state | {name: change(tensor)}
            refused(loss, wrong, f"{name} {says}", strict=strict)
            refused(model, {f"loss.{key}": value for key, value in wrong.items()}, f"loss.{name} {says}", strict=strict)
            tried += 1
    assert tried >= len(state)
    after = copy.deepcopy(loss)
    assert_identical(step(loss, 7), step(after, 7))
    loss.load_state_dict(state, strict=strict)
    assert_unchanged(loss, state)


@EVERY
@pytest.mark.parametrize("change", [{"num_items": ITEMS + 1}, {"dim": DIM + 1}, {"num_items": ITEMS // 2}], ids=str)
def test_a_state_of_another_size_leaves_the_loss_as_it_was(case, change):
    if not set(change) <= set(losses.TABLE[LOSSES[case][0]].options()):
        change = {"num_items": ITEMS + 2}
    loss = trained(case)
    refused(loss, trained(case, 0, **change).state_dict(), "size mismatch for ")
    assert step(loss, 8).isfinite()


@pytest.mark.parametrize("name", ["emc2", "cached", "sogclr", "isogclr"])
@pytest.mark.parametrize("bimodal", [True, False])
def test_a_state_of_other_modalities_is_refused(name, bimodal):
    sizes = {"num_items": ITEMS} | ({"dim": DIM} if name in ("emc2", "cached") else {})
    states = {both: losses.get(name, **sizes, bimodal=both) for both in (True, False)}
    loss = states[bimodal]
    says = f"bimodal must be {bimodal}, got a state that was saved with {not bimodal}"
    refused(loss, states[not bimodal].state_dict(), says)
    file = io.BytesIO()
    torch.save(states[not bimodal].state_dict(), file)
    file.seek(0)
    refused(loss, torch.load(file, weights_only=True), says)


def test_running_means_of_twice_the_items_are_no_two_modalities():
    state = losses.SogCLRLoss(2 * ITEMS).state_dict()
    loss = losses.SogCLRLoss(ITEMS, bimodal=True)
    assert state["log_u"].shape == loss.log_u.shape
    refused(loss, state, f"num_items must be {ITEMS}, got a state that was saved with {2 * ITEMS}", "views must be 2")
    refused(ChainStore(ITEMS, views=2), ChainStore(2 * ITEMS, views=1).state_dict(), "views must be 2, got")


def test_chains_of_one_modality_show_in_a_state_that_does_not_say():
    loss, state = trained("emc2 bimodal"), dict(trained("emc2").state_dict())
    refused(loss, state, "chains.key must be of the other modality with bimodal=True, got ")
    assert loss.load_state_dict(dict(trained("emc2 bimodal", 2).state_dict())).missing_keys == []


@pytest.mark.parametrize("case", [case for case in LOSSES if "emc2" in case])
def test_keys_beyond_the_data_set_are_refused(case):
    state = trained(case).state_dict()
    wrong = with_value(2 * ITEMS, state["chains.key"].argmax())(state["chains.key"])
    says = f"chains.key must hold values in [-1, {2 * ITEMS - 1}], got values from"
    refused(trained(case, 1), state | {"chains.key": wrong}, says)


def test_a_store_by_itself_takes_any_label():
    chains = ChainStore(2)
    chains.load_state_dict(chains.state_dict() | {"key": torch.tensor([2**40, -1, 5, 6])})
    assert chains.key.tolist() == [2**40, -1, 5, 6]


@EVERY
def test_older_states_that_say_nothing_of_themselves_are_loaded(case):
    loss, state = make(case), trained(case).state_dict()
    keys = loss.load_state_dict(dict(state), strict=True)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert_unchanged(loss, state)


@EVERY
def test_what_is_missing_or_too_much_is_reported_and_nothing_is_loaded(case):
    loss, state = trained(case, 1), trained(case).state_dict()
    for name in state:
        part = {key: value for key, value in state.items() if key != name}
        refused(loss, part, f"Missing key(s) in state_dict: {name}")
    for stray in ("key", "chains", "embeddings", "bank", "log_u.step", "score"):
        if stray not in state:
            refused(loss, state | {stray: torch.zeros(1)}, f"Unexpected key(s) in state_dict: {stray}")
            assert loss.load_state_dict(state | {stray: torch.zeros(1)}, strict=False).unexpected_keys == [stray]
            model = nn.ModuleDict({"loss": trained(case, 1)})
            named = {f"loss.{key}": value for key, value in state.items()} | {stray: torch.zeros(1)}
            with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{re.escape(stray)}"'):
                model.load_state_dict(named)
            loss = trained(case, 1)


def test_without_strict_a_store_may_be_missing_but_not_a_part_of_it():
    loss, state = trained("emc2", 1), trained("emc2").state_dict()
    whole = {key: value for key, value in state.items() if not key.startswith("bank.")}
    bank = snapshot(loss.bank)
    assert len(loss.load_state_dict(whole, strict=False).missing_keys) == 3
    assert_unchanged(loss.bank, bank)
    assert_unchanged(loss.chains, {name: state[f"chains.{name}"] for name in ("key", "score")})
    part = {key: value for key, value in state.items() if key != "bank.written_at"}
    refused(loss, part, "bank.written_at must be in the state beside the others, got none", strict=False)


def test_a_store_in_a_list_of_stores_reports_a_stray_key_of_its_own_name():
    stores = nn.ModuleList((ChainStore(3), EmbeddingBank(3, DIM)))
    state = stores.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "key", "1.key"'):
        stores.load_state_dict(state | {"key": torch.zeros(1), "1.key": torch.zeros(1)})


def test_an_assigned_table_keeps_its_dtype():
    loss, state = make("emc2"), trained("emc2", bank_dtype=torch.float32).state_dict()
    loss.load_state_dict(state | {"chains.score": state["chains.score"].double()}, assign=True)
    assert loss.bank.embeddings.dtype == torch.bfloat16 and loss.chains.score.dtype == torch.float32
    assert_identical(loss.bank.embeddings, state["bank.embeddings"].bfloat16())
    assert step(loss, 9).isfinite()


@EVERY
def test_a_loss_that_leaves_the_meta_device_is_a_new_one(case):
    with torch.device("meta"):
        loss = make(case)
    new = make(case)
    with pytest.raises(ValueError, match=r"z0 must be on meta, where the loss keeps its .+ got float32 tensor"):
        step(loss)
    loss.to_empty(device="cpu")
    assert_unchanged(loss, snapshot(new))
    for seed in range(4):
        assert_identical(step(loss, seed), step(new, seed))
    assert_unchanged(loss, snapshot(new))


@EVERY
def test_a_state_may_be_assigned_to_a_loss_on_the_meta_device(case):
    with torch.device("meta"):
        loss = make(case)
    saved = trained(case)
    loss.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    for seed in (11, 12):
        assert_identical(step(loss, seed), step(saved, seed))
    assert_unchanged(loss, snapshot(saved))


@pytest.mark.parametrize("case", [*LOSSES, "ntxent", "clip"])
def test_embeddings_without_values_are_refused_by_name(case):
    loss = losses.get(case) if case in ("ntxent", "clip") else make(case)
    z = torch.zeros(B, DIM, device="meta")
    with pytest.raises(ValueError, match=r"z0 must have values, got float32 tensor of shape \(4, 8\) on meta"):
        loss(z, z, torch.arange(B))


def test_a_cast_by_type_leaves_a_losss_step_alone():
    loss = trained("emc2")
    before = snapshot(loss)
    assert_unchanged(loss.type(torch.float16), before)


def test_what_a_user_adds_to_a_loss_is_cast_as_asked():
    loss = make("emc2")
    loss.head = nn.Linear(DIM, DIM)
    loss.half()
    assert loss.head.weight.dtype == torch.float16 and loss.chains.score.dtype == torch.float32
