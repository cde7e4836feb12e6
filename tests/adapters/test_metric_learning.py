"""pytorch-metric-learning's self-supervised call, beside its own."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_identical, named_error, normal, relative_rms

from emc2_kernels.adapters.metric_learning import SelfSupervisedLoss
from emc2_kernels.losses import EMC2Loss, NTXentLoss, SogCLRLoss

B, D, ITEMS = 12, 8, 30
INDEX = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(2))[:B]


def gradients(loss_fn, *more):
    z = [normal(seed, B, D).requires_grad_() for seed in (0, 1)]
    value = loss_fn(*z, *more)
    value.backward()
    return value.detach(), torch.cat([part.grad for part in z])


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_and_gradient_are_theirs(temperature):
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    value, gradient = gradients(SelfSupervisedLoss(NTXentLoss(temperature=temperature)))
    expected = gradients(theirs.SelfSupervisedLoss(theirs.NTXentLoss(temperature=temperature)))
    torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-6)
    assert relative_rms(gradient, expected[1]) <= 1e-5


@pytest.mark.parametrize("make", [lambda: EMC2Loss(ITEMS, D, temperature=0.2), lambda: SogCLRLoss(ITEMS)])
def test_a_loss_that_keeps_items_gets_their_numbers(make):
    adapter, loss = SelfSupervisedLoss(make(), report=True), make()
    for _ in range(3):  # chains and denominators move alike
        value, gradient = gradients(adapter, INDEX)
        expected, expected_gradient = gradients(loss, INDEX)
        assert_identical((value, gradient), (expected, expected_gradient))
    in_batch = NTXentLoss(temperature=loss.temperature)
    torch.testing.assert_close(adapter.stats["ntxent"], gradients(in_batch)[0])
    assert_identical(adapter.loss.state_dict(), loss.state_dict())
    with named_error(TypeError, "index must be .* got None"):
        gradients(adapter)


def test_bad_input():
    with named_error(TypeError, "loss must be a loss of"):
        SelfSupervisedLoss(None)
    with named_error(TypeError, "report must be"):
        SelfSupervisedLoss(NTXentLoss(), report="yes")
    with named_error(ValueError, "z1 must have the shape"):
        SelfSupervisedLoss(NTXentLoss())(normal(0, 4, D), normal(1, 3, D))
