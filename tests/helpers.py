"""What several test files share: seeded inputs, and module states compared bit by bit."""

import torch

from emc2_kernels import backends

RUNNABLE = [name for name, status in backends().items() if status == "available"]


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def snapshot(module):
    """A copy of all that a module keeps."""
    return {name: buffer.clone() for name, buffer in module.state_dict().items()}


def assert_identical(actual, expected):
    """Equal structure, dtypes and bits; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_unchanged(module, before):
    assert_identical(snapshot(module), before)


def relative_rms(actual, expected):
    """Root mean square of the error over that of the expected values, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
