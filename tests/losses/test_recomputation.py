"""Losses inside torch.utils.checkpoint, which makes a forward pass twice."""

import pytest
import torch
from helpers import assert_identical, assert_unchanged, named_error, snapshot
from test_losses_common import DIM, batch, make
from torch.utils.checkpoint import checkpoint

from emc2_kernels import losses

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
STATELESS = ["ntxent", "clip"]
STATEFUL = ["emc2", "emc2 isir", "sogclr", "isogclr", "cached"]


def warm(name, **options):
    loss = make(name, temperature=0.2, **options)
    for step in range(2):
        loss(*batch(step))
    return loss


def encoder():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.Tanh(), torch.nn.Linear(DIM, DIM))


def gradients(model, loss, step, call):
    """Of the encoder and the loss's parameters, and of z0, which is a leaf here so that both kinds have a gradient."""
    z0, z1, index = batch(step)
    leaf = z0.clone().requires_grad_()
    call(leaf, z1, index).backward()
    return [leaf.grad, *(p.grad for p in [*model.parameters(), *loss.parameters()])]


def whole(model, loss):
    return lambda z0, z1, index: loss(model(z0), model(z1), index)


@REENTRANT
@pytest.mark.parametrize("name", STATELESS)
def test_losses_without_state_have_the_same_gradient_inside(name, reentrant):
    found = []
    for inside in (False, True):
        model, loss = encoder(), make(name, temperature=0.2, learn_temperature=True)
        call = whole(model, loss)
        if inside:
            found.append(gradients(model, loss, 0, lambda *z, call=call: checkpoint(call, *z, use_reentrant=reentrant)))
        else:
            found.append(gradients(model, loss, 0, call))
    assert_identical(*found)


@REENTRANT
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("part", ["loss", "encoder and loss"])
def test_losses_with_state_are_refused_inside_before_it_moves(name, part, reentrant):
    loss, model = warm(name), encoder() if part == "encoder and loss" else torch.nn.Identity()
    before = snapshot(loss)
    z0, z1, index = batch(3)
    with named_error(RuntimeError, f"{type(loss).__name__} must be called once.*got a call inside"):
        checkpoint(whole(model, loss), z0.requires_grad_(), z1, index, use_reentrant=reentrant)
    assert_unchanged(loss, before)


class Again(torch.autograd.Function):
    """A checkpoint of somebody else's, which torch's cannot be told from."""

    @staticmethod
    def forward(ctx, call, z0):
        ctx.call = call
        ctx.save_for_backward(z0)
        return call(z0).detach()

    @staticmethod
    def backward(ctx, grad):
        (z0,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = z0.detach().requires_grad_()
            return None, torch.autograd.grad(ctx.call(leaf), leaf, grad)[0]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_second_pass_is_refused_where_the_first_could_not_be_told(name):
    loss = warm(name)
    z0, z1, index = batch(3)
    value = Again.apply(lambda z: loss(z, z1, index), z0.requires_grad_())
    before = snapshot(loss)
    with named_error(RuntimeError, f"{type(loss).__name__} must be called once.*got a call during a backward pass"):
        value.backward()
    assert_unchanged(loss, before)


@REENTRANT
@pytest.mark.parametrize("name", STATEFUL)
def test_evaluation_inside_has_the_same_gradient(name, reentrant):
    found = []
    for inside in (False, True):
        model, loss = encoder(), warm(name).eval()
        call = whole(model, loss)
        run = (lambda *z, call=call: checkpoint(call, *z, use_reentrant=reentrant)) if inside else call
        found.append(gradients(model, loss, 3, run))
    assert_identical(*found)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_makes_no_second_pass_is_legal(name):
    """A checkpointed encoder with the loss outside; saved tensors on the CPU; training mode without gradient."""
    plain, wrapped = warm(name), warm(name)
    z0, z1, index = batch(3)
    model = encoder()

    def outside(z0, z1, index):
        return wrapped(*(checkpoint(model, z, use_reentrant=False) for z in (z0, z1)), index)

    expected = gradients(model, plain, 3, whole(model, plain))
    model.zero_grad()
    assert_identical(gradients(model, wrapped, 3, outside), expected)
    with torch.autograd.graph.save_on_cpu():
        value = wrapped(z0.requires_grad_(), z1, index)
    value.backward()
    with torch.no_grad():
        assert_identical(plain(z0, z1, index), value.detach())
        assert_identical(wrapped(z0, z1, index), plain(z0, z1, index))
    assert wrapped.step == 5


def test_every_loss_is_tried_here():
    tried = {losses.TABLE[name.split()[0]].loss for name in STATELESS + STATEFUL}
    assert tried == {method.loss for method in losses.TABLE.values()}
