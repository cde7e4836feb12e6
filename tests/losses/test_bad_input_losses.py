"""Bad and degenerate batches and options of losses: a named error that changes nothing, or a finite result.

Each table has (change to a valid call, expected exception, regex with the argument's name), or changes that stay legal.
"""

from functools import partial

import pytest
import torch
from helpers import assert_unchanged, int64, named_error, normal, snapshot, table, with_rows

from emc2_kernels.losses import EMC2Loss, NTXentLoss

INF, NAN = torch.inf, torch.nan
D = 8
ITEMS, B = 10, 4
Z0, Z1, INDEX = normal(2, B, D), normal(3, B, D), int64(1, 4, 6, 9)

EMBEDDING_ERRORS = {
    "z0 is None": ({"z0": None}, TypeError, "z0"),
    "z0 is a list": ({"z0": Z0.tolist()}, TypeError, "z0"),
    "z0 is one vector": ({"z0": Z0[0]}, ValueError, "z0"),
    "z0 has 3 dimensions": ({"z0": Z0[None]}, ValueError, "z0"),
    "z0 is integers": ({"z0": Z0.long()}, TypeError, "z0"),
    "z0 is complex": ({"z0": Z0.cfloat()}, TypeError, "z0"),
    "z0 is bools": ({"z0": Z0 > 0}, TypeError, "z0"),
    "z0 has no rows": ({"z0": Z0[:0], "z1": Z1[:0], "index": INDEX[:0]}, ValueError, "z0"),
    "z0 has no columns": ({"z0": Z0[:, :0], "z1": Z1[:, :0]}, ValueError, "z0"),
    "z0 has a NaN": ({"z0": with_rows(Z0, (2, 3), NAN)}, ValueError, "z0"),
    "z0 has an infinity": ({"z0": with_rows(Z0, (2, 3), INF)}, ValueError, "z0"),
    "z0 overflowed in float16": ({"z0": (Z0 * 1e6).half(), "z1": Z1.half()}, ValueError, "z0"),
    "z0 is sparse": ({"z0": Z0.to_sparse()}, (TypeError, ValueError), "z0"),
    "z1 is None": ({"z1": None}, TypeError, "z1"),
    "z1 is the index": ({"z1": INDEX}, ValueError, "z1"),
    "z1 has fewer rows": ({"z1": Z1[1:]}, ValueError, "z1"),
    "z1 has fewer columns": ({"z1": Z1[:, 1:]}, ValueError, "z1"),
    "z1 has another dtype": ({"z1": Z1.bfloat16()}, ValueError, "z1"),
    "z1 is elsewhere": ({"z1": Z1.to("meta")}, ValueError, "z1"),
    "z1 has a NaN": ({"z1": with_rows(Z1, (0, 0), NAN)}, ValueError, "z1"),
    "z1 has a -infinity": ({"z1": with_rows(Z1, (0, 0), -INF)}, ValueError, "z1"),
    "z1 is integers": ({"z1": Z1.int()}, TypeError, "z1"),
    "index is a list": ({"index": INDEX.tolist()}, TypeError, "index"),
    "index is an array": ({"index": INDEX.numpy()}, TypeError, "index"),
    "index is a number": ({"index": 3}, TypeError, "index"),
    "index is int32": ({"index": INDEX.int()}, TypeError, "index"),
    "index is floats": ({"index": INDEX.float()}, TypeError, "index"),
    "index is bools": ({"index": INDEX > 4}, TypeError, "index"),
    "index is too short": ({"index": INDEX[1:]}, ValueError, "index"),
    "index is of both views": ({"index": INDEX.repeat(2)}, ValueError, "index"),
    "index is a column": ({"index": INDEX[:, None]}, ValueError, "index"),
    "index is a 0-d tensor": ({"index": INDEX[0]}, ValueError, "index"),
    "index is elsewhere": ({"index": INDEX.to("meta")}, ValueError, "index"),
    "an index is negative": ({"index": int64(0, 1, -1, 2)}, ValueError, "index"),
    "an index has 41 bits": ({"index": int64(0, 1, 2**40, 2)}, ValueError, "index"),
    "return_stats is a word": ({"return_stats": "yes"}, (TypeError, ValueError), "return_stats"),
    "an unknown argument": ({"indices": INDEX}, TypeError, ".*indices"),
}

EMC2_FORWARD_ERRORS = {
    "index is None": ({"index": None}, TypeError, "index"),
    "an index is past the items": ({"index": int64(0, 1, ITEMS, 2)}, ValueError, "index"),
    "z0 and z1 are too narrow": ({"z0": Z0[:, 1:], "z1": Z1[:, 1:]}, ValueError, "z0"),
    "z0 and z1 are too wide": ({"z0": normal(0, B, D + 1), "z1": normal(1, B, D + 1)}, ValueError, "z0"),
}


def forward(loss, change):
    """The loss's value and the gradients of z0 and z1."""
    call = {"z0": Z0, "z1": Z1, "index": INDEX} | change
    for name in ("z0", "z1"):
        if isinstance(call[name], torch.Tensor) and call[name].is_floating_point():
            call[name] = call[name].clone().requires_grad_()
    out = loss(**call)
    value = out[0] if isinstance(out, tuple) else out
    value.backward()
    return value.detach(), call["z0"].grad, call["z1"].grad


def warm_emc2(**options):
    """A loss whose chains, bank and step have moved on."""
    loss = EMC2Loss(ITEMS, D, **options)
    for seed in range(3):
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(seed))[:B]
        loss(normal(10 + seed, B, D), normal(20 + seed, B, D), index)
    return loss


@table(EMBEDDING_ERRORS | EMC2_FORWARD_ERRORS)
def test_emc2_names_what_is_wrong_and_leaves_its_state_alone(change, exception, regex):
    loss = warm_emc2()
    before = snapshot(loss)
    with named_error(exception, regex):
        forward(loss, change)
    assert_unchanged(loss, before)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"num_samples": 3}, {}),  # 4 keys, burn-in 2
        ({"burn_in": 0.0, "num_samples": 5}, {}),
        ({"views": "both", "num_samples": 5}, {}),  # 8 keys, burn-in 4
        ({"num_samples": 2}, {"z0": Z0[:1], "z1": Z1[:1], "index": INDEX[:1]}),
    ],
)
def test_emc2_names_num_samples_that_a_batch_is_too_small_for(options, change):
    loss = EMC2Loss(ITEMS, D, **options)
    before = snapshot(loss)
    with named_error(ValueError, "num_samples"):
        forward(loss, change)
    assert_unchanged(loss, before)


def test_emc2_names_a_backend_that_does_not_take_the_dtype():
    loss = EMC2Loss(ITEMS, D, backend="cpu")
    before = snapshot(loss)
    with named_error(ValueError, "backend"):
        forward(loss, {"z0": Z0.double(), "z1": Z1.double()})
    assert_unchanged(loss, before)


def raises(items, views):
    raise OSError("the disk is gone")


def filled(value, dtype=torch.float32, rows=0, columns=0, device="cpu"):
    return lambda items, views: torch.full((len(items) + rows, D + columns), value, dtype=dtype, device=device)


ENCODE_ERRORS = {
    "raises": (raises, OSError, "the disk is gone"),
    "returns None": (lambda items, views: None, TypeError, "encode.*got"),
    "returns a list": (lambda items, views: [[0.0] * D] * len(items), TypeError, "encode.*got"),
    "returns a row too many": (filled(1.0, rows=1), ValueError, "encode.*got"),
    "returns a row too few": (filled(1.0, rows=-1), ValueError, "encode.*got"),
    "returns a column too many": (filled(1.0, columns=1), ValueError, "encode.*got"),
    "returns one vector": (lambda items, views: torch.ones(D), ValueError, "encode.*got"),
    "returns something elsewhere": (filled(1.0, device="meta"), ValueError, "encode.*got"),
    "returns integers": (filled(1, dtype=torch.int64), (TypeError, ValueError), "encode.*got"),
    "returns complex numbers": (filled(1.0, dtype=torch.complex64), (TypeError, ValueError), "encode.*got"),
    "returns NaN": (filled(NAN), ValueError, "encode.*got"),
    "returns infinities": (filled(INF), ValueError, "encode.*got"),
    "takes one argument": (lambda items: torch.ones(len(items), D), TypeError, "positional"),
}


@pytest.mark.parametrize(("encode", "exception", "regex"), ENCODE_ERRORS.values(), ids=ENCODE_ERRORS)
def test_emc2_state_survives_an_encode_that(encode, exception, regex):
    options = {"carry": "recompute", "burn_in": 0.0, "num_samples": B}
    loss = warm_emc2(encode=filled(1.0), **options)
    loss.encode = encode
    before = snapshot(loss)
    with pytest.raises(exception, match=regex):
        forward(loss, {})
    assert_unchanged(loss, before)


EMC2_CONSTRUCTOR_ERRORS = {
    "num_items is 0": ({"num_items": 0}, ValueError, "num_items"),
    "num_items is a float": ({"num_items": 10.0}, TypeError, "num_items"),
    "num_items is a bool": ({"num_items": True}, TypeError, "num_items"),
    "num_items exceeds the chain ids": ({"num_items": 2**39 + 1}, ValueError, "num_items"),
    "dim is 0": ({"dim": 0}, ValueError, "dim"),
    "dim is a word": ({"dim": "8"}, TypeError, "dim"),
    "proposals is a typo": ({"proposals": "batches"}, ValueError, "proposals"),
    "views is a number": ({"views": 1}, ValueError, "views"),
    "views is a typo": ({"views": "two"}, ValueError, "views"),
    "num_proposals beside the batch": ({"num_proposals": 64}, ValueError, "num_proposals"),
    "num_proposals is 0": ({"proposals": "bank", "num_proposals": 0}, ValueError, "num_proposals"),
    "num_proposals is a float": ({"proposals": "bank", "num_proposals": 6.5}, TypeError, "num_proposals"),
    "both views from the bank": ({"proposals": "bank", "views": "both"}, ValueError, "views"),
    "both views of two modalities": ({"bimodal": True, "views": "both"}, ValueError, "views"),
    "bimodal is a number": ({"bimodal": 1}, TypeError, "bimodal"),
    "carry was deleted": ({"proposals": "bank", "carry": "drop"}, ValueError, "carry"),
    "burn_in is 1": ({"burn_in": 1.0}, ValueError, "burn_in"),
    "burn_in is a count": ({"burn_in": 16}, ValueError, "burn_in"),
    "burn_in is negative": ({"burn_in": -0.1}, ValueError, "burn_in"),
    "burn_in is NaN": ({"burn_in": NAN}, ValueError, "burn_in"),
    "burn_in is None": ({"burn_in": None}, (TypeError, ValueError), "burn_in"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
    "carry is a typo": ({"carry": "cache"}, ValueError, "carry"),
    "carry is None": ({"carry": None}, ValueError, "carry"),
    "recompute without encode": ({"carry": "recompute"}, ValueError, "encode"),
    "recompute with an encode that is no function": ({"carry": "recompute", "encode": 3}, TypeError, "encode"),
    "encode is a word": ({"encode": "recompute"}, TypeError, "encode"),
    "estimator is a typo": ({"estimator": "state"}, ValueError, "estimator"),
    "gather is a typo": ({"gather": "some"}, ValueError, "gather"),
    "gather is a bool": ({"gather": True}, ValueError, "gather"),
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed is a float": ({"seed": 0.5}, TypeError, "seed"),
    "seed is None": ({"seed": None}, TypeError, "seed"),
    "bimodal is a word": ({"bimodal": "yes"}, (TypeError, ValueError), "bimodal"),
    "bank_dtype is integer": ({"bank_dtype": torch.int8}, TypeError, "bank_dtype"),
    "bank_dtype is a word": ({"bank_dtype": "bfloat16"}, TypeError, "bank_dtype"),
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "an unknown argument": ({"temprature": 0.1}, TypeError, ".*temprature"),
}

LOSS_CONSTRUCTOR_ERRORS = {
    "temperature is 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperature is negative": ({"temperature": -1}, ValueError, "temperature"),
    "temperature is NaN": ({"temperature": NAN}, ValueError, "temperature"),
    "temperature is infinite": ({"temperature": INF}, ValueError, "temperature"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature"),
    "temperature is a word": ({"temperature": "0.1"}, TypeError, "temperature"),
    "temperature is a bool": ({"temperature": True}, TypeError, "temperature"),
    "temperatures are two": ({"temperature": torch.ones(2)}, ValueError, "temperature"),
    "temperatures are none": ({"temperature": torch.ones(0)}, ValueError, "temperature"),
    "temperature is an integer tensor": ({"temperature": torch.tensor(1)}, TypeError, "temperature"),
    "normalize is a word": ({"normalize": "no"}, (TypeError, ValueError), "normalize"),
}


@table(EMC2_CONSTRUCTOR_ERRORS | LOSS_CONSTRUCTOR_ERRORS)
def test_emc2_constructor_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        EMC2Loss(**({"num_items": ITEMS, "dim": D} | change))


NTXENT_CONSTRUCTOR_ERRORS = {"an unknown argument": ({"tau": 0.1}, TypeError, ".*tau")}


@table(LOSS_CONSTRUCTOR_ERRORS | NTXENT_CONSTRUCTOR_ERRORS)
def test_ntxent_constructor_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        NTXentLoss(**change)


@table(EMBEDDING_ERRORS)
def test_ntxent_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        forward(NTXentLoss(), change)


def one_row(change=None):
    return {"z0": Z0[:1], "z1": Z1[:1], "index": INDEX[:1]} | (change or {})


DEGENERATE_BATCHES = {
    "one pair": one_row(),
    "one column": {"z0": Z0[:, :1], "z1": Z1[:, :1]},
    "all rows one item": {"index": int64(3, 3, 3, 3)},
    "all rows but one one item": {"index": int64(3, 3, 3, 0)},
    "duplicate items": {"index": int64(5, 2, 5, 2)},
    "zero embeddings": {"z0": Z0 * 0, "z1": Z1 * 0},
    "one zero row": {"z0": with_rows(Z0, 1, 0.0)},
    "equal embeddings": {"z0": Z0[:1].repeat(B, 1), "z1": Z0[:1].repeat(B, 1)},
    "opposite views": {"z1": -Z0},
    "subnormal embeddings": {"z0": Z0 * 1e-42, "z1": Z1 * 1e-42},
    "tiny embeddings": {"z0": Z0 * 1e-30, "z1": Z1 * 1e-30},
    "huge embeddings": {"z0": Z0 * 1e30, "z1": Z1 * 1e30},
    "largest float16": {"z0": torch.full((B, D), 65504.0).half(), "z1": Z1.half()},
    "float16": {"z0": Z0.half(), "z1": Z1.half()},
    "bfloat16": {"z0": Z0.bfloat16(), "z1": Z1.bfloat16()},
    "float64": {"z0": Z0.double(), "z1": Z1.double()},
    "transposed": {"z0": normal(2, D, B).T, "z1": normal(3, D, B).T},
    "columns apart": {"z0": normal(2, B, 2 * D)[:, ::2]},
    "one row expanded": {"z0": Z0[:1].expand(B, D)},
    "first and last item": {"index": int64(0, ITEMS - 1, 1, 2)},
    "index apart": {"index": torch.arange(2 * B)[::2]},
    "with statistics": {"return_stats": True},
    "one pair with statistics": one_row({"return_stats": True}),
    "one item with statistics": {"index": int64(3, 3, 3, 3), "return_stats": True},
}


def assert_finite_and_differentiable(loss, change):
    for _ in range(3):  # chains that have not started, and chains that have
        value, *gradients = forward(loss, change)
        assert value.isfinite()
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("change", DEGENERATE_BATCHES.values(), ids=DEGENERATE_BATCHES)
class TestDegenerateBatch:
    def test_ntxent_is_finite(self, change, temperature):
        assert_finite_and_differentiable(NTXentLoss(temperature=temperature), change)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"views": "both", "burn_in": 0},
            {"burn_in": 0.9},
            {"bimodal": True},
            {"proposals": "bank", "num_proposals": 5, "bimodal": True},
        ],
        ids=str,
    )
    def test_emc2_is_finite_and_its_state_legal(self, change, temperature, options):
        dim = change.get("z0", Z0).shape[1]
        loss = EMC2Loss(ITEMS, dim, temperature=temperature, **options)
        assert_finite_and_differentiable(loss, change)
        chains = loss.chains
        assert loss.step == 3
        assert not chains.score.isnan().any()
        assert torch.equal(chains.key == -1, chains.score == -INF)
        assert loss.bank.embeddings[loss.bank.written_at >= 0].isfinite().all()


@pytest.mark.parametrize("options", [{"burn_in": 0}, {"seed": 2**64 - 1}, {"temperature": 1}, {"temperature": 1e30}])
def test_extreme_options_of_emc2_are_legal(options):
    assert_finite_and_differentiable(EMC2Loss(ITEMS, D, **options), {})


def test_every_statistic_of_a_degenerate_batch_is_finite():
    for loss in (NTXentLoss(), EMC2Loss(ITEMS, D)):
        for change in (one_row(), {"index": int64(3, 3, 3, 3)}, {"z0": Z0 * 0, "z1": Z1 * 0}):
            _, stats = partial(loss, return_stats=True)(**({"z0": Z0, "z1": Z1, "index": INDEX} | change))
            assert all(value.isfinite() for value in stats.values()), stats


@pytest.mark.parametrize("scale", [1e19, 3e38])
def test_products_that_overflow_without_normalisation_are_named_and_change_nothing(scale):
    big = torch.full_like(Z0, scale)
    with named_error(ValueError, "the similarities"):
        NTXentLoss(normalize=False)(big, big)
    loss = warm_emc2(normalize=False)
    before = snapshot(loss)
    with named_error(ValueError, "the similarities"):
        loss(big, big, INDEX)
    assert_unchanged(loss, before)


def test_each_table_has_at_least_forty_cases():
    assert len(EMBEDDING_ERRORS | EMC2_FORWARD_ERRORS) >= 40
    assert len(EMC2_CONSTRUCTOR_ERRORS | LOSS_CONSTRUCTOR_ERRORS) >= 40
    assert len(EMBEDDING_ERRORS | LOSS_CONSTRUCTOR_ERRORS) >= 40
