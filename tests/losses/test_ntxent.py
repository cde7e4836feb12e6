"""NTXentLoss against slow formulas, public ones in plain torch, and pytorch-metric-learning where it is installed."""

import math

import pytest
import torch
from helpers import assert_identical, normal, relative_rms
from slow_losses import (
    DIM,
    DTYPES,
    INDICES,
    B,
    assert_statistics,
    slow_ntxent,
    slow_ntxent_negative_similarity,
    slow_pair_statistics,
    value_and_gradients,
)

from emc2_kernels.losses import NTXentLoss


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_ntxent_equals_its_formula(index, dtype, normalize, temperature):
    z0, z1 = normal(0, B, DIM, dtype=dtype), normal(1, B, DIM, dtype=dtype)
    loss = NTXentLoss(temperature=temperature, normalize=normalize)
    value, gradient = value_and_gradients(loss, z0, z1, index)
    exact, exact_gradient = value_and_gradients(
        lambda a, b: slow_ntxent(a, b, index, temperature, normalize), z0.double(), z1.double()
    )
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert relative_rms(gradient, exact_gradient) <= DTYPES[dtype]


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_ntxent_passes_gradcheck(index):
    z = [normal(seed, B, 3, dtype=torch.float64).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(lambda a, b: NTXentLoss(temperature=0.3)(a, b, index), z)


def test_ntxent_does_not_depend_on_the_rows_order():
    z0, z1, index = normal(0, B, DIM), normal(1, B, DIM), INDICES["duplicates"]
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    value, gradient = value_and_gradients(NTXentLoss(), z0, z1, index)
    permuted, permuted_gradient = value_and_gradients(NTXentLoss(), z0[order], z1[order], index[order])
    torch.testing.assert_close(permuted, value)
    assert relative_rms(permuted_gradient, gradient[torch.cat((order, order + B))]) <= 1e-5


def test_ntxent_reports_the_statistics_of_its_batch():
    z0, z1, temperature = normal(0, B, DIM), normal(1, B, DIM), 0.2
    for index in INDICES.values():
        value, stats = NTXentLoss(temperature=temperature)(z0, z1, index, return_stats=True)
        expected = slow_pair_statistics(z0.double(), z1.double(), index, temperature)
        expected["negative_similarity"] = slow_ntxent_negative_similarity(z0.double(), z1.double(), index, temperature)
        assert_identical(stats["ntxent"], value)
        assert_statistics(stats, expected)


def lightly_formula(z0, z1, temperature):
    """lightly's NTXentLoss in one process: the diagonal is taken out, and cross entropy to the other view's column."""
    z = torch.nn.functional.normalize(torch.cat((z0, z1)), dim=1)
    b, n = len(z0), 2 * len(z0)
    logits = (z @ z.T / temperature)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    labels = torch.cat((torch.arange(b) + b - 1, torch.arange(b)))
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [2, 50, 300])
def test_ntxent_equals_lightlys(b, dtype):
    """From a few calls to several tiles; in float64 from the same rounded inputs."""
    z0, z1 = normal(0, b, DIM, dtype=dtype), normal(1, b, DIM, dtype=dtype)
    value, gradient = value_and_gradients(NTXentLoss(temperature=0.1), z0, z1)
    exact, exact_gradient = value_and_gradients(lambda *z: lightly_formula(*z, 0.1), z0.double(), z1.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    assert relative_rms(gradient, exact_gradient) <= DTYPES[dtype]


def test_ntxent_equals_pytorch_metric_learnings():
    public = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=0.1)
    z0, z1, labels = normal(0, 40, DIM), normal(1, 40, DIM), torch.arange(40).repeat(2)
    value, gradient = value_and_gradients(NTXentLoss(temperature=0.1), z0, z1)
    expected, expected_gradient = value_and_gradients(lambda *z: public(torch.cat(z), labels), z0, z1)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert relative_rms(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_a_learnt_temperature_has_the_formulas_gradient(index):
    z0, z1 = normal(0, B, DIM), normal(1, B, DIM)
    loss = NTXentLoss(temperature=0.2, learn_temperature=True)
    value, stats = loss(z0, z1, index, return_stats=True)
    value.backward()
    log_scale = torch.tensor(-math.log(0.2), dtype=torch.float64, requires_grad=True)
    slow_ntxent(z0.double(), z1.double(), index, (-log_scale).exp()).backward()
    torch.testing.assert_close(loss.log_scale.grad[0].double(), log_scale.grad, rtol=1e-5, atol=1e-6)
    assert stats["temperature"].item() == pytest.approx(0.2) and not stats["temperature"].requires_grad
    assert dict(loss.named_parameters()).keys() == {"log_scale"}
    assert not list(NTXentLoss().parameters()) and not NTXentLoss().state_dict()
