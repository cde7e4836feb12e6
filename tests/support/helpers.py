"""What several test files share: seeded inputs, and module states compared bit by bit."""

import pytest
import torch
from scipy.stats import chi2

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
    """A copy of all that a module keeps, as one process would have it: a collective where it lies over ranks."""
    return {name: _whole(table).clone() for name, table in module.state_dict().items()}


def _whole(table):
    """A sharded store's has a dimension of views, a parameter of FSDP2's has one dimension."""
    if not hasattr(table, "full_tensor"):
        return table
    whole = table.full_tensor()
    return whole.flatten(0, 1) if whole.dim() > 1 else whole


def assert_identical(actual, expected):
    """Equal structure, dtypes and bits; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def certain(stats):
    """All but staleness, which is NaN or infinite where there is nothing to go by."""
    return {name: stat for name, stat in stats.items() if name != "staleness"}


def assert_unchanged(module, before):
    assert_identical(snapshot(module), before)


def differences(a, b, path="state"):
    """Where two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return [] if alike and torch.equal(*bits) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [found for name in a for found in differences(a[name], b[name], f"{path}.{name}")]
    if isinstance(a, list):
        if len(a) != len(b):
            return [path]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [path]  # NaN is NaN


def relative_rms(actual, expected):
    """Root mean square of the error over that of the expected values, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def chi_square(counts, probabilities):
    """p-value of the counts under the probabilities."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1))


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


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def eager(call, tensors):
    return call(**tensors)


def compiled(call, tensors):
    return torch.compile(lambda given: call(**given), fullgraph=True, backend="aot_eager")(tensors)


def subclassed(call, tensors):
    return call(**{name: value.as_subclass(Plain) for name, value in tensors.items()})


HOW = [eager, compiled, subclassed]  # with a call's tensors, whose values only the first sees before an operator runs


def poisoned(tensor):
    """What a kernel has to overwrite."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
