"""Embeddings of any length: losses that normalise see directions, as far as numbers go; zeros and what is near."""

import pytest
import torch
from helpers import RUNNABLE, assert_identical, normal, relative_rms, snapshot
from test_finite_state import Opaque
from test_losses_common import DIM, NAMES, B, batch, make

from emc2_kernels.batching import global_train_gap
from emc2_kernels.losses import EMC2Loss, NTXentLoss
from emc2_kernels.losses.anchors import NORM_FLOOR, unit

# 2^64 is where a float32's square overflows. Powers of two, so that everything has the same bits.
LONG = {torch.float32: [2.0**40, 2.0**66, 2.0**100], torch.float64: [2.0**500, 2.0**530, 2.0**1000]}


def visited(loss, step, scales, cls=torch.Tensor, dtype=torch.float32):
    """Value, gradients as of the embeddings before they were scaled, and the state."""
    z0, z1, index = batch(step)
    leaves = [(z.to(dtype) * scales).as_subclass(cls).requires_grad_() for z in (z0, z1)]
    value = loss(*leaves, index)
    value.backward()
    gradients = [leaf.grad.as_subclass(torch.Tensor) * scales for leaf in leaves]
    return value.detach().as_subclass(torch.Tensor), gradients, snapshot(loss)


@pytest.mark.parametrize("cls", [torch.Tensor, Opaque], ids=["seen", "not looked at"])
@pytest.mark.parametrize("dtype", LONG, ids=str)
@NAMES
def test_long_embeddings_are_those_of_their_directions(name, dtype, cls):
    backend = {} if dtype == torch.float32 else {"backend": "reference"}
    for scale in LONG[dtype]:
        some = torch.full((B, 1), scale, dtype=dtype)
        some[::2] = 1
        for scales in (torch.full_like(some, scale), some):
            loss, other = make(name, **backend), make(name, **backend)
            for step in range(2):
                found = visited(loss, step, scales, cls, dtype)
                assert_identical(found, visited(other, step, torch.ones_like(some), dtype=dtype))  # exact


@pytest.mark.skipif("triton" not in RUNNABLE, reason="Triton cannot run here")
@pytest.mark.parametrize("sampler", ["mh", "isir"])
def test_long_embeddings_in_the_fused_kernels(sampler):
    loss, other = (EMC2Loss(10, DIM, sampler=sampler, backend="triton") for _ in range(2))
    scales = torch.tensor([2.0**66, 1.0, 2.0**100, 2.0**55])[:, None]
    assert_identical(visited(loss, 0, scales), visited(other, 0, torch.ones(B, 1)))  # exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e20, 1e30, 1e37])
def test_values_and_gradients_at_decimal_lengths(dtype, scale):
    z = [(normal(seed, 6, DIM) * scale).to(dtype).requires_grad_() for seed in (0, 1)]
    exact = [x.detach().double().requires_grad_() for x in z]
    value, expected = NTXentLoss()(*z), NTXentLoss()(*exact)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    for x, wanted in zip(z, exact, strict=True):
        error = relative_rms(x.grad.double() * scale, wanted.grad * scale)
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dim", [1, 3, 1 << 17])
def test_the_longest_rows_there_are(dim):
    """All elements at the largest number, and around those above which rows are made smaller."""
    for dtype in LONG:
        around = range(50, 66) if dtype == torch.float32 else range(500, 514)
        for edge in (torch.finfo(dtype).max, *(2.0**exponent for exponent in around)):
            found = unit(torch.full((2, dim), -edge, dtype=dtype))
            torch.testing.assert_close(found, torch.full_like(found, -(dim**-0.5)))


def test_the_gap_between_losses_is_of_directions_too():
    x, y = normal(0, 8, DIM), normal(1, 8, DIM)
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert global_train_gap(x * 2.0**70, y, batches, 0.2) == global_train_gap(x, y, batches, 0.2)  # exact


def test_short_rows_are_left_short_and_their_gradient_is_bounded():
    """By 1 / NORM_FLOOR times that of the unit vector: a row of zeros has no direction to turn."""
    z = torch.tensor([[3e-6, 4e-6], [3e-8, 4e-8], [0.0, 0.0]], requires_grad=True)
    found = unit(z)
    torch.testing.assert_close(found.detach(), torch.tensor([[0.6, 0.8], [0.03, 0.04], [0.0, 0.0]]))
    found[:, 0].sum().backward()
    torch.testing.assert_close(z.grad[1:], torch.tensor([[1.0, 0.0]] * 2) / NORM_FLOOR)
    torch.testing.assert_close(z.grad[0], torch.tensor([1 - 0.36, -0.48]) / 5e-6)
