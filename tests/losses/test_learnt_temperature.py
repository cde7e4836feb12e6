"""The parameter of a learnt temperature: its bound, torch.func, checkpoints."""

import copy
import math

import pytest
import torch
from helpers import assert_identical, assert_unchanged, normal, snapshot
from test_losses_common import EVERY, NAMES, batch, make

from emc2_kernels import contrastive_lse
from emc2_kernels.losses import ClipLoss, NTXentLoss

B, D = 6, 8
LEARN = pytest.mark.parametrize("loss_of", [NTXentLoss, ClipLoss])
STATELESS = ("ntxent", "simclr", "clip")
BOUND = 20.0
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0),
}


def learnt(loss_of=NTXentLoss, scale=10.0, **options):
    return loss_of(temperature=1 / scale, learn_temperature=True, max_scale=BOUND, **options)


def pairs(*seeds):
    return [normal(seed, B, D).requires_grad_() for seed in seeds]


@LEARN
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0], ids=str)
def test_a_forward_pass_does_not_write_to_its_parameter(loss_of, scale):
    loss = learnt(loss_of)
    with torch.no_grad():
        loss.log_scale.fill_(math.log(scale))
    version = loss.log_scale._version
    for _ in range(2):
        loss(*pairs(0, 1))
    assert loss.log_scale._version == version


@LEARN
def test_past_the_bound_the_value_is_the_bounds_and_only_a_gradient_that_leads_back_passes(loss_of):
    loss, z0, apart = learnt(loss_of), pairs(0)[0], normal(5, B, D)
    gradients = []
    for positive in (z0, apart):  # the loss falls with the scale where positives are alike, and rises where not
        for scale in (0.999 * BOUND, 2 * BOUND):
            with torch.no_grad():
                loss.log_scale.fill_(math.log(scale))
            loss.zero_grad()
            value = loss(z0, positive)
            value.backward()
            expected = loss_of(temperature=1 / min(scale, BOUND))(z0, positive)
            torch.testing.assert_close(value.detach(), expected.detach())
            gradients.append(loss.log_scale.grad.item())
    (inside_up, outside_up), (inside_down, outside_down) = gradients[:2], gradients[2:]
    assert inside_up < 0 and outside_up == 0
    assert inside_down > 0 and outside_down == pytest.approx(inside_down, rel=0.01)


@LEARN
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_takes_the_scale_to_its_bound_and_back(loss_of, optimizer):
    """Momentum overshoots by what it holds and no more; AdamW's steps, of 0.05 at most, fall by a tenth each."""
    loss, z0, apart = learnt(loss_of, scale=15.0), normal(0, B, D), normal(5, B, D)
    step = OPTIMIZERS[optimizer](loss.parameters())

    def train(positive, steps):
        for _ in range(steps):
            step.zero_grad()
            loss(z0, positive).backward()
            step.step()
        return loss.log_scale.item() - math.log(BOUND)

    # Views that are alike up to noise: a larger scale is better at every step, at least up to the bound.
    alike = z0 + 0.3 * normal(7, B, D)
    past = max(train(alike, 1) for _ in range(150))
    assert -0.05 < past < 0.6
    rest = train(alike, 40)
    assert rest == pytest.approx(train(alike, 40), abs=1e-3)  # it does not run away
    assert train(apart, 60) < -0.2
    assert loss.temperature.item() > 1.2 / BOUND


@NAMES
def test_torch_func_differentiates_every_loss(name):
    options = {"learn_temperature": True} if name in STATELESS else {}
    loss = make(name, temperature=0.2, **options)
    for step in range(3):
        loss(*batch(step))
    loss.train(name in STATELESS)
    z0, z1, index = batch(3)
    parameters = dict(loss.named_parameters())

    def call(z0, z1, parameters):
        return torch.func.functional_call(loss, parameters, (z0, z1, index))

    before = snapshot(loss)
    found = torch.func.grad(call, argnums=(0, 1, 2))(z0, z1, parameters)
    assert_unchanged(loss, before)
    leaves = [z.clone().requires_grad_() for z in (z0, z1)]
    loss(*leaves, index).backward()
    expected = *(leaf.grad for leaf in leaves), {name: parameter.grad for name, parameter in parameters.items()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in STATELESS])
def test_torch_func_cannot_train_what_keeps_state_and_leaves_it_alone(name):
    """A transform forbids writes to what it has captured."""
    loss, (z0, z1, index) = make(name), batch(0)
    loss(z0, z1, index)
    before = snapshot(loss)
    with pytest.raises(RuntimeError, match="mutate a captured"):
        torch.func.grad(lambda z: loss(z, z1, index))(z0)
    assert_unchanged(loss, before)


def test_torch_func_says_that_there_is_no_second_derivative():
    queries, keys = normal(0, B, D), normal(1, B, D)

    def total(queries):
        return contrastive_lse(queries, keys, temperature=0.5).sum()

    def penalty(queries):
        return torch.func.grad(total)(queries).square().sum()

    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(penalty)(queries)
    with pytest.raises(NotImplementedError, match="second derivative"):  # the outer one is autograd's
        penalty(queries.requires_grad_()).backward()


@LEARN
def test_a_checkpoint_with_a_scalar_parameter_loads(loss_of):
    loss, model = learnt(loss_of), torch.nn.ModuleDict({"loss": learnt(loss_of, scale=4.0)})
    old = {"log_scale": loss.log_scale.detach().clone()[0]}
    for module, state in ((learnt(loss_of, 5.0), old), (model, {"loss.log_scale": old["log_scale"]})):
        module.load_state_dict(state, strict=True)
        (parameter,) = module.parameters()
        assert_identical(parameter.detach(), loss.log_scale.detach())
        assert state[next(iter(state))].shape == ()  # the caller's is as it was
    z0, z1 = pairs(0, 1)
    assert_identical(model["loss"](z0, z1), loss(z0, z1))


def test_copies_learn_by_themselves():
    loss = learnt()
    other = copy.deepcopy(loss)
    other(*pairs(0, 1)).backward()
    assert loss.log_scale.grad is None and other.log_scale.grad.shape == (1,)


@pytest.mark.parametrize("loss_of", [NTXentLoss, ClipLoss])
def test_made_on_the_meta_device_it_begins_where_it_was_told(loss_of):
    with torch.device("meta"):
        loss = loss_of(temperature=0.2, learn_temperature=True)
    new = loss_of(temperature=0.2, learn_temperature=True)
    assert_identical(loss.to_empty(device="cpu").state_dict(), new.state_dict())  # exact
    with torch.no_grad():
        loss.log_scale.fill_(3.0)
    loss.reset_parameters()
    assert_identical(loss.state_dict(), new.state_dict())  # exact
    loss_of().reset_parameters()  # there are none
