"""Bad and degenerate batches and options of losses: a named error that changes nothing, or a finite result.

Each table has (change to a valid call, expected exception, regex with the argument's name), or changes that stay legal.
"""

from functools import partial
from itertools import product

import pytest
import torch
from helpers import assert_unchanged, certain, int64, named_error, normal, snapshot, with_rows

from emc2_kernels.losses import TABLE, CachedSoftmaxLoss, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss

INF, NAN = torch.inf, torch.nan
D = 8
ITEMS, B = 10, 4
Z0, Z1, INDEX = normal(2, B, D), normal(3, B, D), int64(1, 4, 6, 9)
LOSSES = {
    "NT-Xent": NTXentLoss,
    "CLIP": ClipLoss,
    "EMC2": partial(EMC2Loss, num_items=ITEMS, dim=D, sampler="mh"),
    "i-SIR": partial(EMC2Loss, num_items=ITEMS, dim=D, sampler="isir"),
    "SogCLR": partial(SogCLRLoss, num_items=ITEMS),
    "iSogCLR": partial(SogCLRLoss, num_items=ITEMS, individual_temperature=True, bimodal=True),
    "cached": partial(CachedSoftmaxLoss, num_items=ITEMS, dim=D),
}


def every(tables):
    """Parametrises (name of a loss, change, exception, regex)."""
    cases = {f"{name}: {case}": (name, *asked) for name, table in tables.items() for case, asked in table.items()}
    return pytest.mark.parametrize(("name", "change", "exception", "regex"), cases.values(), ids=cases)


def forward(loss, change):
    """The loss's value and the gradients of z0 and z1, all of them finite, as the statistics are."""
    call = {"z0": Z0, "z1": Z1, "index": INDEX} | change
    for name in ("z0", "z1"):
        if isinstance(call[name], torch.Tensor) and call[name].is_floating_point():
            call[name] = call[name].clone().requires_grad_()
    out = loss(**call)
    value, stats = out if isinstance(out, tuple) else (out, {})
    value.backward()
    gradients = call["z0"].grad, call["z1"].grad
    assert all(number.isfinite().all() for number in (value, *gradients, *certain(stats).values())), stats
    return value.detach(), *gradients


def warm(name, **options):
    """A loss whose state has moved on."""
    loss = LOSSES[name](**options)
    for seed in range(3):
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(seed))[:B]
        loss(normal(10 + seed, B, D), normal(20 + seed, B, D), index)
    return loss


def assert_refused(loss, exception, regex, change, error=named_error):
    before = snapshot(loss)
    with error(exception, regex):
        forward(loss, change)
    assert_unchanged(loss, before)


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
    "return_stats is a number": ({"return_stats": 1}, TypeError, "return_stats"),
    "return_stats is None": ({"return_stats": None}, TypeError, "return_stats"),
    "an unknown argument": ({"indices": INDEX}, TypeError, ".*indices"),
}
ITEM_ERRORS = {
    "index is None": ({"index": None}, TypeError, "index"),
    "an index is past the items": ({"index": int64(0, 1, ITEMS, 2)}, ValueError, "index"),
    "all is elsewhere": ({"z0": Z0.to("meta"), "z1": Z1.to("meta")}, ValueError, "z0"),
}
WIDTH_ERRORS = {
    "z0 and z1 are too narrow": ({"z0": Z0[:, 1:], "z1": Z1[:, 1:]}, ValueError, "z0"),
    "z0 and z1 are too wide": ({"z0": normal(0, B, D + 1), "z1": normal(1, B, D + 1)}, ValueError, "z0"),
}
FORWARD_ERRORS = {
    **dict.fromkeys(("NT-Xent", "CLIP"), EMBEDDING_ERRORS),
    **dict.fromkeys(("SogCLR", "iSogCLR"), EMBEDDING_ERRORS | ITEM_ERRORS),
    **dict.fromkeys(("EMC2", "i-SIR", "cached"), EMBEDDING_ERRORS | ITEM_ERRORS | WIDTH_ERRORS),
}


@every(FORWARD_ERRORS)
def test_a_call_names_what_is_wrong_and_leaves_the_state_alone(name, change, exception, regex):
    assert_refused(warm(name), exception, regex, change)


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
    assert_refused(LOSSES["EMC2"](**options), ValueError, "num_samples", change)


@pytest.mark.parametrize("name", ["EMC2", "i-SIR"])
def test_emc2_names_a_backend_that_does_not_take_the_dtype(name):
    assert_refused(LOSSES[name](backend="cpu"), ValueError, "backend", {"z0": Z0.double(), "z1": Z1.double()})


@pytest.mark.parametrize("scale", [1e19, 3e38])
@pytest.mark.parametrize("name", LOSSES)
def test_products_that_overflow_without_normalisation_are_named_and_change_nothing(name, scale):
    big = torch.full_like(Z0, scale)
    for loss in (LOSSES[name](normalize=False), warm(name, normalize=False)):
        assert_refused(loss, ValueError, "the similarities", {"z0": big, "z1": big})


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
ENCODING = {
    "EMC2": ("EMC2", {"carry": "recompute", "burn_in": 0.0, "num_samples": B}),
    "i-SIR": ("i-SIR", {"carry": "recompute"}),
    "i-SIR, both views": ("i-SIR", {"carry": "recompute", "views": "both"}),
    "cached, refresh": ("cached", {"refresh": 0.2}),
    "cached, recompute": ("cached", {"refresh": 0, "carry": "recompute"}),
}


@pytest.mark.parametrize(("name", "options"), ENCODING.values(), ids=ENCODING)
@pytest.mark.parametrize(("encode", "exception", "regex"), ENCODE_ERRORS.values(), ids=ENCODE_ERRORS)
def test_the_state_survives_an_encode_that(encode, exception, regex, name, options):
    loss = warm(name, encode=filled(1.0), **options)
    loss.encode = encode
    assert_refused(loss, exception, regex, {}, error=lambda exception, regex: pytest.raises(exception, match=regex))


COMMON_OPTION_ERRORS = {
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
    "gather is a typo": ({"gather": "some"}, ValueError, "gather"),
    "gather is a bool": ({"gather": True}, ValueError, "gather"),
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "an unknown argument": ({"temprature": 0.1}, TypeError, ".*temprature"),
}
LEARN = {"learn_temperature": True}
IN_BATCH_OPTION_ERRORS = {
    "learn_temperature is a number": ({"learn_temperature": 1}, TypeError, "learn_temperature"),
    "max_scale is a word": ({"max_scale": "big"}, TypeError, "max_scale"),
    "max_scale is a bool": ({"max_scale": True}, TypeError, "max_scale"),
    "max_scale is 0": ({"max_scale": 0.0}, ValueError, "max_scale"),
    "max_scale is infinite": ({"max_scale": INF}, ValueError, "max_scale"),
    "temperature is past the scale": (LEARN | {"temperature": 0.001}, ValueError, "temperature"),
}
ITEM_OPTION_ERRORS = {
    "num_items is 0": ({"num_items": 0}, ValueError, "num_items"),
    "num_items is a float": ({"num_items": 10.0}, TypeError, "num_items"),
    "num_items is a bool": ({"num_items": True}, TypeError, "num_items"),
    "bimodal is a word": ({"bimodal": "yes"}, TypeError, "bimodal"),
    "bimodal is a number": ({"bimodal": 1}, TypeError, "bimodal"),
}
SAMPLING_OPTION_ERRORS = {
    "dim is 0": ({"dim": 0}, ValueError, "dim"),
    "dim is a word": ({"dim": "8"}, TypeError, "dim"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
    "carry is a typo": ({"carry": "cache"}, ValueError, "carry"),
    "carry is None": ({"carry": None}, ValueError, "carry"),
    "recompute without encode": ({"carry": "recompute"}, ValueError, "encode"),
    "recompute with an encode that is no function": ({"carry": "recompute", "encode": 3}, TypeError, "encode"),
    "encode is no function": ({"encode": 3}, TypeError, "encode"),
    "encode is a word": ({"encode": "recompute"}, TypeError, "encode"),
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed is a float": ({"seed": 0.5}, TypeError, "seed"),
    "seed is None": ({"seed": None}, TypeError, "seed"),
    "bank_dtype is integer": ({"bank_dtype": torch.int8}, TypeError, "bank_dtype"),
    "bank_dtype is a word": ({"bank_dtype": "bfloat16"}, TypeError, "bank_dtype"),
}
EMC2_OPTION_ERRORS = {
    "num_items exceeds the chain ids": ({"num_items": 2**39 + 1}, ValueError, "num_items"),
    "proposals is a typo": ({"proposals": "batches"}, ValueError, "proposals"),
    "views is a number": ({"views": 1}, ValueError, "views"),
    "views is a typo": ({"views": "two"}, ValueError, "views"),
    "num_proposals beside the batch": ({"num_proposals": 64}, ValueError, "num_proposals"),
    "num_proposals is 0": ({"proposals": "bank", "num_proposals": 0}, ValueError, "num_proposals"),
    "num_proposals is a float": ({"proposals": "bank", "num_proposals": 6.5}, TypeError, "num_proposals"),
    "both views from the bank": ({"proposals": "bank", "views": "both"}, ValueError, "views"),
    "both views of two modalities": ({"bimodal": True, "views": "both"}, ValueError, "views"),
    "carry was deleted": ({"proposals": "bank", "carry": "drop"}, ValueError, "carry"),
    "a queue, which it does not have": ({"queue": 4}, ValueError, "queue.* sampler=.mh"),
    "a denominator, which it does not have": ({"decoupled": False}, ValueError, "decoupled.* sampler=.mh"),
    "decoupled is a number": ({"decoupled": 1}, TypeError, "decoupled"),
    "burn_in is 1": ({"burn_in": 1.0}, ValueError, "burn_in"),
    "burn_in is a count": ({"burn_in": 16}, ValueError, "burn_in"),
    "burn_in is negative": ({"burn_in": -0.1}, ValueError, "burn_in"),
    "burn_in is NaN": ({"burn_in": NAN}, ValueError, "burn_in"),
    "burn_in is a word": ({"burn_in": "half"}, (TypeError, ValueError), "burn_in"),
    "estimator is a typo": ({"estimator": "state"}, ValueError, "estimator"),
}
ISIR_OPTION_ERRORS = {
    "sampler is a typo": ({"sampler": "sir"}, ValueError, "sampler"),
    "sampler is None": ({"sampler": None}, ValueError, "sampler"),
    "sampler is a bool": ({"sampler": True}, ValueError, "sampler"),
    "sampler is a list": ({"sampler": ["isir"]}, ValueError, "sampler"),
    "proposals from the bank": ({"proposals": "bank"}, ValueError, "proposals"),
    "proposals from the bank, recomputed": (
        {"proposals": "bank", "carry": "recompute", "encode": len}, ValueError, "proposals",
    ),
    "num_proposals": ({"num_proposals": 64}, ValueError, "num_proposals"),
    "num_samples": ({"num_samples": 4}, ValueError, "num_samples.* sampler=.isir"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "burn_in": ({"burn_in": 0.25}, ValueError, "burn_in.* sampler=.isir"),
    "no burn_in": ({"burn_in": 0.0}, ValueError, "burn_in.* sampler=.isir"),
    "burn_in is a word": ({"burn_in": "half"}, (TypeError, ValueError), "burn_in"),
    "both views of two modalities": ({"bimodal": True, "views": "both"}, ValueError, "views"),
    "carry is a typo": ({"carry": "correct"}, ValueError, "carry"),
    "carry was deleted": ({"carry": "drop"}, ValueError, "carry"),
    "carry is the bank's": ({"carry": "corrected"}, ValueError, "carry"),
    "queue is negative": ({"queue": -1}, ValueError, "queue"),
    "queue is a share": ({"queue": 0.5}, TypeError, "queue"),
    "queue is a data set": ({"queue": 2**24 + 1}, ValueError, "queue"),
    "queue is a bool": ({"queue": True}, TypeError, "queue"),
    "queue is a name": ({"queue": "auto"}, TypeError, "queue"),
    "queue beside recompute": ({"queue": 4, "carry": "recompute", "encode": len}, ValueError, "queue"),
    "no recent items, beside recompute": ({"queue": 2.0, "carry": "recompute", "encode": len}, TypeError, "queue"),
    "decoupled is a number": ({"decoupled": 0}, TypeError, "decoupled"),
    "decoupled is None": ({"decoupled": None}, TypeError, "decoupled"),
    "sharded by itself": ({"sharded": True}, ValueError, "sharded"),
    "recompute without encode": ({"carry": "recompute"}, ValueError, "encode"),
    "estimator is a typo": ({"estimator": "state"}, ValueError, "estimator"),
}  # fmt: skip
CACHED_OPTION_ERRORS = {
    "num_items exceeds the positions": ({"num_items": 2**30}, ValueError, "num_items"),
    "refresh is a count": ({"refresh": 16, "encode": len}, ValueError, "refresh"),
    "refresh is negative": ({"refresh": -0.1, "encode": len}, ValueError, "refresh"),
    "refresh is NaN": ({"refresh": NAN, "encode": len}, ValueError, "refresh"),
    "refresh is a bool": ({"refresh": True, "encode": len}, TypeError, "refresh"),
    "refresh is None": ({"refresh": None}, TypeError, "refresh"),
    "refresh without encode": ({"refresh": 0.5}, ValueError, "refresh"),
    "num_samples is None": ({"num_samples": None}, TypeError, "num_samples"),
    "num_samples is 2^16": ({"num_samples": 2**16}, ValueError, "num_samples"),
    "carry is another loss's": ({"carry": "drop"}, ValueError, "carry"),
    "carry was deleted": ({"carry": "cached"}, ValueError, "carry"),
}
LEARNED = {"individual_temperature": True}
SOGCLR_OPTION_ERRORS = {
    "num_items exceeds the ids": ({"num_items": 2**40 + 1}, ValueError, "num_items"),
    "gamma is 0": ({"gamma": 0.0}, ValueError, "gamma"),
    "gamma is above 1": ({"gamma": 1.5}, ValueError, "gamma"),
    "gamma is NaN": ({"gamma": NAN}, ValueError, "gamma"),
    "gamma is None": ({"gamma": None}, TypeError, "gamma"),
    "gamma is a bool": ({"gamma": True}, TypeError, "gamma"),
    "gamma is a word": ({"gamma": "0.9"}, TypeError, "gamma"),
    "gamma_schedule is a typo": ({"gamma_schedule": "cos"}, ValueError, "gamma_schedule"),
    "cosine without its length": ({"gamma_schedule": "cosine"}, TypeError, "gamma_steps"),
    "cosine over no steps": ({"gamma_schedule": "cosine", "gamma_steps": 0}, ValueError, "gamma_steps"),
    "cosine over half a step": ({"gamma_schedule": "cosine", "gamma_steps": 0.5}, TypeError, "gamma_steps"),
    "gamma_steps of a constant": ({"gamma_steps": 100}, ValueError, "gamma_steps"),
    "individual_temperature is a number": ({"individual_temperature": 0.1}, TypeError, "individual_temperature"),
    "temperature_lr is negative": (LEARNED | {"temperature_lr": -0.1}, ValueError, "temperature_lr"),
    "temperature_lr is infinite": (LEARNED | {"temperature_lr": INF}, ValueError, "temperature_lr"),
    "temperature_momentum is 1": (LEARNED | {"temperature_momentum": 1.0}, ValueError, "temperature_momentum"),
    "temperature_momentum is a word": (LEARNED | {"temperature_momentum": "0"}, TypeError, "temperature_momentum"),
    "rho is negative": (LEARNED | {"rho": -1}, ValueError, "rho"),
    "rho is NaN": (LEARNED | {"rho": NAN}, ValueError, "rho"),
    "one bound": (LEARNED | {"temperature_bounds": 0.1}, TypeError, "temperature_bounds"),
    "three bounds": (LEARNED | {"temperature_bounds": (0.01, 0.1, 1)}, TypeError, "temperature_bounds"),
    "bounds are words": (LEARNED | {"temperature_bounds": ("0.01", "1")}, TypeError, "temperature_bounds"),
    "lowest is 0": (LEARNED | {"temperature_bounds": (0, 1)}, ValueError, "temperature_bounds"),
    "lowest is above it": (LEARNED | {"temperature_bounds": (0.1, 1)}, ValueError, "temperature_bounds"),
    "highest is below it": (LEARNED | {"temperature_bounds": (0.01, 0.05)}, ValueError, "temperature_bounds"),
    "highest is infinite": (LEARNED | {"temperature_bounds": (0.01, INF)}, ValueError, "temperature_bounds"),
}
OPTION_ERRORS = {
    **dict.fromkeys(("NT-Xent", "CLIP"), COMMON_OPTION_ERRORS | IN_BATCH_OPTION_ERRORS),
    "EMC2": COMMON_OPTION_ERRORS | ITEM_OPTION_ERRORS | SAMPLING_OPTION_ERRORS | EMC2_OPTION_ERRORS,
    "i-SIR": ISIR_OPTION_ERRORS,
    "SogCLR": COMMON_OPTION_ERRORS | ITEM_OPTION_ERRORS | SOGCLR_OPTION_ERRORS,
    "cached": COMMON_OPTION_ERRORS | ITEM_OPTION_ERRORS | SAMPLING_OPTION_ERRORS | CACHED_OPTION_ERRORS,
}


@every(OPTION_ERRORS)
def test_the_constructor_names_what_is_wrong(name, change, exception, regex):
    with named_error(exception, regex):
        LOSSES[name](**change)


def test_each_table_has_at_least_forty_cases():
    for name in ("EMC2", "SogCLR", "cached"):
        assert min(len(FORWARD_ERRORS[name]), len(OPTION_ERRORS[name])) >= 40
    assert all(len(FORWARD_ERRORS[name] | OPTION_ERRORS[name]) >= 40 for name in ("NT-Xent", "CLIP"))


def test_every_loss_is_asked():
    assert {type(make()) for make in LOSSES.values()} == {method.loss for method in TABLE.values()}


def one_row():
    return {"z0": Z0[:1], "z1": Z1[:1], "index": INDEX[:1]}


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
}

DEGENERATE_LOSSES = {
    "NT-Xent": ("NT-Xent", {}),
    "CLIP": ("CLIP", {}),
    "EMC2": ("EMC2", {}),
    "EMC2, both views": ("EMC2", {"views": "both", "burn_in": 0}),
    "EMC2, burn-in": ("EMC2", {"burn_in": 0.9}),
    "EMC2, bimodal": ("EMC2", {"bimodal": True}),
    "EMC2, bank, bimodal": ("EMC2", {"proposals": "bank", "num_proposals": 5, "bimodal": True}),
    "i-SIR": ("i-SIR", {}),
    "i-SIR, one view": ("i-SIR", {"views": "one", "queue": 3}),
    "i-SIR, coupled": ("i-SIR", {"decoupled": False}),
    "i-SIR, bimodal": ("i-SIR", {"bimodal": True, "bank_dtype": torch.float32}),
    "SogCLR": ("SogCLR", {}),
    "iSogCLR, bimodal": ("iSogCLR", {}),
    "cached": ("cached", {}),
    "cached, bimodal": ("cached", {"bimodal": True, "bank_dtype": torch.float32}),
}


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize(("name", "options"), DEGENERATE_LOSSES.values(), ids=DEGENERATE_LOSSES)
@pytest.mark.parametrize("change", DEGENERATE_BATCHES.values(), ids=DEGENERATE_BATCHES)
def test_degenerate_batches_are_finite_and_leave_a_legal_state(change, name, options, temperature):
    width = {"dim": change.get("z0", Z0).shape[1]} if name in ("EMC2", "i-SIR", "cached") else {}
    loss = LOSSES[name](temperature=temperature, **options, **width)
    for return_stats in (False, True, True):  # chains that have not started, and chains that have
        forward(loss, change | {"return_stats": return_stats})
    state = snapshot(loss)
    if "bank.embeddings" in state:
        state["bank.embeddings"] = state["bank.embeddings"][state["bank.written_at"] >= 0]
    assert not state or state["step"] == 3
    assert not any(kept.isnan().any() or (kept == INF).any() for kept in state.values())
    if name in ("EMC2", "i-SIR"):
        assert torch.equal(loss.chains.key == -1, loss.chains.score == -INF)


EXTREMES = [{"seed": 2**64 - 1}, {"temperature": 1}, {"temperature": 1e30}]


@pytest.mark.parametrize(("name", "options"), [("EMC2", {"burn_in": 0}), *product(("EMC2", "i-SIR"), EXTREMES)])
def test_extreme_options_of_emc2_are_legal(name, options):
    loss = LOSSES[name](**options)
    for _ in range(3):
        forward(loss, {})
