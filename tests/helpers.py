"""What several test files share: seeded inputs, and module states compared bit by bit."""

import pytest
import torch

from emc2_kernels import backends
from emc2_kernels.backends import TABLE


def _takes_cpu_tensors(name):
    backend = TABLE[name]
    return backend.devices is None or "cpu" in (*backend.devices, *backend.also())


# Backends for CPU tensors here: Triton's interpreter among them where there is no GPU. COMPILED: without it, since it
# is slow, and serves one thread only.
RUNNABLE = [name for name, status in backends().items() if status == "available" and _takes_cpu_tensors(name)]
COMPILED = [name for name in RUNNABLE if name != "triton"]


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


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def table(cases):
    """Parametrises (change, exception, regex)."""
    return pytest.mark.parametrize(("change", "exception", "regex"), cases.values(), ids=cases)


def named_error(exception, regex):
    """An error that starts with the argument's name and says what came."""
    return pytest.raises(exception, match=rf"(?s)^(?=.*\bgot\b){regex}")


def with_rows(tensor, row, value):
    changed = tensor.clone()
    changed[row] = value
    return changed
