"""What every loss that has a name promises: the same call, comparable statistics, one scale of gradients."""

import inspect
import itertools
import math

import pytest
import torch
from helpers import assert_identical, certain, int64, named_error, normal, snapshot
from torch.nn import functional

from emc2_kernels import losses

ITEMS, DIM, B = 10, 8, 4
Z0, Z1, INDEX = normal(0, B, DIM), normal(1, B, DIM), int64(1, 4, 6, 9)
COMMON_STATS = {"ntxent", "positive_similarity", "negative_similarity", "mean_cosine"}
EVERY = [*losses.TABLE, "emc2 isir"]  # the name of a loss, and of its sampler where it is not the walk
NAMES = pytest.mark.parametrize("name", EVERY)
STATELESS = [name for name, method in losses.TABLE.items() if "num_items" not in method.options()]


def make(name, **options):
    """One of EVERY, with what the loss must know of the data set, where it must know anything."""
    name, *sampler = name.split()
    needed = {"num_items": ITEMS, "dim": DIM, "sampler": sampler[0] if sampler else "mh"}
    takes = losses.TABLE[name].options()
    return losses.get(name, **{option: value for option, value in needed.items() if option in takes}, **options)


def towers(name):
    """Both settings of `bimodal`, where a loss has them."""
    return [{}, {"bimodal": True}] if supports_two_modalities(name) else [{}]


def supports_two_modalities(name):
    if "bimodal" not in losses.TABLE[name.split()[0]].options():
        return False
    try:
        make(name, bimodal=True)
    except ValueError:
        return False
    return True


def value_and_gradients(loss, z0, z1, index, **options):
    z0, z1 = z0.clone().requires_grad_(), z1.clone().requires_grad_()
    out = loss(z0, z1, index, **options)
    value = out[0] if isinstance(out, tuple) else out
    value.backward()
    return value.detach(), z0.grad, z1.grad


def batch(step):
    return normal(10 + step, B, DIM), normal(20 + step, B, DIM), (INDEX + step) % ITEMS


def kept(loss):
    """What a loss keeps of its data set; its parameters are the optimizer's."""
    parameters = dict(loss.named_parameters())
    return {name: value for name, value in snapshot(loss).items() if name not in parameters}


@NAMES
def test_statistics_are_comparable_and_detached(name):
    for options in towers(name):
        loss = make(name, temperature=0.2, **options)
        other = make(name, temperature=0.2, **options)
        for step in range(3):
            value, stats = loss(*batch(step), return_stats=True)
            assert set(stats) >= COMMON_STATS
            for stat, found in stats.items():
                assert found.shape == () and not found.requires_grad, stat
            assert all(found.isfinite() for found in certain(stats).values()), stats
            assert_identical(other(*batch(step)), value)  # asking for them changes nothing
        if not options and name != "clip":
            reference = losses.NTXentLoss(temperature=0.2)
            _, expected = reference(*batch(2), return_stats=True)
            for stat in ("ntxent", "positive_similarity", "mean_cosine"):
                torch.testing.assert_close(stats[stat], expected[stat], msg=stat)


@pytest.mark.parametrize("name", STATELESS)
def test_without_an_index_every_row_is_an_item(name):
    assert_identical(make(name)(Z0, Z1), make(name)(Z0, Z1, torch.arange(B)))


@NAMES
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_finite(name, dtype, autocast):
    others = {
        "emc2": [{"views": "both", "burn_in": 0.0}],
        "emc2 isir": [{"views": "one"}, {"queue": 3}],
    }.get(name, [])
    for options, temperature in itertools.product([*towers(name), *others], (0.2, 0.07, 0.01)):
        loss = make(name, temperature=temperature, **options)
        for step in range(8):
            z0, z1, index = batch(step)
            z0, z1 = (z.to(dtype).requires_grad_() for z in (z0, z1))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value, stats = loss(z0, z1, index, return_stats=True)
            value.backward()
            assert value.dtype == torch.float32 and value.isfinite()
            assert all(stat.isfinite() for stat in certain(stats).values())
            for z in (z0, z1):
                assert z.grad.dtype == dtype and z.grad.isfinite().all() and z.grad.any()


@NAMES
def test_a_batch_whose_rows_are_all_one_item_is_survived(name):
    one = torch.full((B,), 2**40 - 1 if name in STATELESS else 4)
    for options in towers(name):
        loss = make(name, temperature=0.01, **options)
        for index in (one, INDEX, one, one, INDEX):  # before anything is known of the items, and after
            value, *gradients = value_and_gradients(loss, Z0, Z1, index)
            assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
            if name in STATELESS and index is one:
                assert value == 0 and not any(gradient.any() for gradient in gradients)
        for name_of, buffer in kept(loss).items():
            assert not buffer.isnan().any(), name_of


def whole_data_set():
    """As one batch: then there is nothing that a method could estimate."""
    z0 = normal(2, ITEMS, DIM).double()
    return z0, z0 + 0.7 * normal(3, ITEMS, DIM).double(), torch.arange(ITEMS)


def exact(bimodal, with_positive):
    """Gradients of the mean over anchors of -s+ + log sum exp(s), scores divided by 0.5 and nothing else."""

    def loss(z0, z1, index):
        z, view = functional.normalize(torch.cat((z0, z1))), torch.arange(2).repeat_interleave(ITEMS)
        scores = z @ z.T / 0.5
        excluded = torch.eye(2 * ITEMS, dtype=torch.bool)
        positive = excluded.roll(ITEMS, 0)
        if not with_positive:
            excluded = excluded | positive
        if bimodal:
            excluded = excluded | (view[:, None] == view)
        return (scores.masked_fill(excluded, -torch.inf).logsumexp(1) - scores[positive]).mean()

    return value_and_gradients(loss, *whole_data_set())


SAME_SCALE = {
    "sogclr": ({"gamma": 1.0}, False, False),
    "sogclr, two modalities": ({"gamma": 1.0, "bimodal": True}, True, False),
    "isogclr": ({"gamma": 1.0}, False, False),  # at its first step every item still has the temperature of the others
    "emc2 isir": ({"views": "both"}, False, False),
    "emc2 isir, two modalities": ({"bimodal": True}, True, False),
    "ntxent": ({}, False, True),
    "simclr": ({}, False, True),
    "clip": ({}, True, True),
}


@pytest.mark.parametrize("case", SAME_SCALE)
def test_with_the_data_set_as_the_batch_gradients_are_the_exact_ones(case):
    options, bimodal, with_positive = SAME_SCALE[case]
    loss = make(case.split(",")[0], temperature=0.5, **options)
    _, *gradients = value_and_gradients(loss, *whole_data_set())
    _, *expected = exact(bimodal, with_positive)
    for found, formula in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, formula, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["emc2", "emc2 isir", "cached"])
def test_sampled_gradients_are_on_the_same_scale(name):
    """The projection of their mean on the exact gradient: 1, and not 1 / temperature or the number of views."""
    loss, gradients = make(name, temperature=0.5, bank_dtype=torch.float32), []
    for _ in range(400):
        _, *found = value_and_gradients(loss, *(z.float() for z in whole_data_set()[:2]), torch.arange(ITEMS))
        gradients.append(torch.cat(found).double())
    expected = torch.cat(exact(False, False)[1:])
    mean = torch.stack(gradients[20:]).mean(0)
    scale = ((mean * expected).sum() / expected.square().sum()).item()
    assert scale > 0.8 and scale < 1.25


def test_a_name_gives_the_loss_with_its_options():
    assert isinstance(losses.get("emc2", num_items=3, dim=5, burn_in=0.25), losses.EMC2Loss)
    assert losses.get("emc2", num_items=3, dim=5, burn_in=0.25).burn_in == 0.25
    assert not losses.get("sogclr", num_items=3).individual_temperature
    learned = losses.get("isogclr", num_items=3, rho=0.5)
    assert learned.individual_temperature and learned.rho == 0.5
    for name in ("ntxent", "simclr"):
        loss = losses.get(name, temperature=0.5)
        assert isinstance(loss, losses.NTXentLoss) and math.isclose(loss.temperature, 0.5)
    for method in losses.TABLE.values():
        assert issubclass(method.loss, torch.nn.Module) and set(method.fixed) <= set(
            inspect.signature(method.loss).parameters
        )


@pytest.mark.parametrize("name", ["moco", "EMC2", "", None, 3, ["emc2"]])
def test_an_unknown_name_is_answered_with_those_there_are(name):
    with named_error(ValueError, "name must be one of 'emc2', .*'isogclr', .*'simclr'"):
        losses.get(name)


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("emc2", {"num_items": 3, "dim": 5, "gamma": 0.9}, "gamma"),
        ("sogclr", {"num_items": 3, "tau": 0.1}, "tau"),
        ("sogclr", {"num_items": 3, "rho": 0.1}, "rho"),
        ("sogclr", {"num_items": 3, "individual_temperature": True}, "individual_temperature"),
        ("isogclr", {"num_items": 3, "individual_temperature": False}, "individual_temperature"),
        ("ntxent", {"num_items": 3}, "num_items"),
        ("simclr", {"burn_in": 0.5}, "burn_in"),
        ("emc2", {"dim": 3}, "num_items"),
        ("sogclr", {}, "num_items"),
    ],
)
def test_an_option_that_a_loss_does_not_have_or_misses_is_named_with_the_loss(name, options, option):
    with named_error(TypeError, f"{option} .*the loss '{name}'"):
        losses.get(name, **options)


def test_an_options_value_is_checked_by_the_loss():
    with named_error(ValueError, "temperature"):
        losses.get("sogclr", num_items=3, temperature=0)


# The walk's and the cache's surrogates are products and means of torch's own, linear in each embedding.
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("emc2", "cached")])
@pytest.mark.parametrize("again", ["backward", "grad", "of a weight", "hessian"])
def test_a_second_derivative_is_an_error_however_it_is_asked_for(name, again):
    loss, z0 = make(name), Z0.clone().requires_grad_()
    loss(Z0, Z1, INDEX)  # so that something is carried
    weight = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(weight * loss(z0, Z1, INDEX), z0, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        match again:
            case "backward":
                gradient.square().sum().backward()
            case "grad":
                torch.autograd.grad(gradient.square().sum(), z0)
            case "of a weight":
                torch.autograd.grad(gradient.square().sum(), weight)
            case "hessian":
                torch.autograd.functional.hessian(lambda z: loss(z, Z1, INDEX), z0)
