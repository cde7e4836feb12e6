"""What one rank does or meets is an error on all ranks, of which each says what it was; see rank_agreement.py.

With two processes: who differs is told to however many there are (test_distributed_misuse.py has up to four).
"""

import re

import pytest
import rank_agreement
import torch

from emc2_kernels.losses import TABLE


def told(found, begins):
    """Rank 1 has met an error that begins so, and rank 0 was told what it is."""
    (first, message), (kind, own) = found
    assert re.match(begins, own), own
    assert (first, message) == ("RuntimeError", f"rank 1 failed: {kind}: {own}")


@pytest.mark.parametrize("case", rank_agreement.OPTIONS)
def test_ranks_whose_losses_have_unlike_options_are_told_which(over_ranks, case):
    """Each option that a loss has, one at a time; what ranks keep is unchanged."""
    found = over_ranks(2, f"unlike {case}")
    option = case.split(": ")[1]
    name = {"encode": "encode is None", "learn_temperature": "temperature"}.get(option, option)
    kind, message = found[0]
    assert kind == "ValueError" and found[1] == found[0]
    assert re.match(rf"{name} must be the same on all ranks, got .+ on rank 0 and .+ on rank 1$", message)
    if option == "burn_in":
        assert message.endswith("got 0.5 on rank 0 and 0.25 on rank 1")


@pytest.mark.parametrize("pair", rank_agreement.PAIRS, ids=" ".join)
def test_ranks_with_other_losses_are_told_so(over_ranks, pair):
    one, other = (TABLE[name].loss.__name__ for name in pair)
    message = f"the call must be the same on all ranks, got {one} on rank 0 and {other} on rank 1"
    assert over_ranks(2, f"other loss: {' '.join(pair)}") == [["ValueError", message]] * 2


@pytest.mark.parametrize("case", rank_agreement.GATHERING)
@pytest.mark.parametrize(
    ("what", "begins"),
    [
        ("NaN", "z0 must be finite, got"),
        ("shape", "z0 must have shape"),
        ("list", "z0 must be a tensor, got"),
        ("meta", "z0 must have values, got"),
        ("index", "index must hold values in"),
        ("return_stats", "return_stats must be True or False, got 1"),
    ],
)
def test_a_bad_argument_on_one_rank_is_an_error_on_all(over_ranks, case, what, begins):
    errors, ready = zip(*over_ranks(2, f"bad {what}: {case}"), strict=True)
    told(errors, begins)
    assert all(ready)


@pytest.mark.parametrize("case", rank_agreement.WATCHING)
def test_a_warning_that_is_an_error_on_one_rank_ends_the_others(over_ranks, case):
    errors, ready = zip(*over_ranks(2, f"warned: {case}"), strict=True)
    told(errors, "index seems to name classes")
    assert all(ready)


def test_a_learnt_temperature_that_is_no_number_is_named_on_all_ranks(over_ranks):
    told(over_ranks(2, "bad log_scale"), "temperature must be .+, got values from nan to nan")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", rank_agreement.OVERFLOWING)
def test_similarities_that_overflow_on_one_rank_are_an_error_on_all(over_ranks, case, training):
    errors, ready = zip(*over_ranks(2, f"overflow {training}: {case}"), strict=True)
    told(errors, "the similarities of z0 and z1 must be finite, got")
    assert all(ready)


@pytest.mark.parametrize(("case", "training"), rank_agreement.ENCODES)
def test_an_encoder_that_fails_on_one_rank_is_an_error_on_all(over_ranks, case, training):
    errors, ready = zip(*over_ranks(2, f"encode {training}: {case}"), strict=True)
    told(errors, "no such image")
    assert all(ready)


@pytest.mark.parametrize("what", rank_agreement.STORE_ERRORS)
def test_an_error_of_a_sharded_store_on_one_rank_is_one_on_all(over_ranks, what):
    told(over_ranks(2, f"store {what}"), rank_agreement.STORE_ERRORS[what][1])


def test_ranks_with_unlike_sharded_stores_are_told_what_differs(over_ranks):
    items, dim = rank_agreement.ITEMS, rank_agreement.DIM
    found = over_ranks(2, "unlike stores")
    assert found[0] == found[1]
    assert [kind for kind, _ in found[0]] == ["ValueError"] * 5
    write, read = "ChainStore's write of key, score", "ChainStore's read of key, score"
    rescored = "EmbeddingBank's read of embeddings, written_at"
    differ = [
        ("num_items", items, items + 1),
        ("views", 2, 3),
        ("a row of embeddings", (torch.bfloat16, (dim,)), (torch.bfloat16, (dim + 1,))),
        ("the call", write, read),
        ("the call", write, rescored),
    ]
    for (_, message), (name, first, other) in zip(found[0], differ, strict=True):
        assert message == f"{name} must be the same on all ranks, got {first} on rank 0 and {other} on rank 1"


def test_a_rank_that_waits_for_others_in_vain_says_what_they_may_have_done(over_ranks):
    nothing, (note,) = over_ranks(2, "alone")
    assert nothing == []
    assert note.startswith("Here EMC2Loss waits for the other ranks") and 'gather="none"' in note
