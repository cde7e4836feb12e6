"""Sweeps against the float64 oracle, on sizes that straddle the edges of tiles."""

import pytest
import torch
from gpu_support import (
    BACKENDS,
    LAYOUTS,
    assert_matches,
    check_walk,
    column_walk,
    dims_and_dtypes,
    problem,
    score_error,
    step_of,
)

import emc2_kernels as emc2

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

SIZES = [
    (1, 1), (1, 1000), (1000, 1), (2, 257), (7, 8), (8, 7), (16, 63), (63, 16), (64, 64), (65, 65), (64, 1000),
    (127, 129), (128, 128), (129, 127), (255, 257), (256, 256), (257, 255), (1000, 1000),
]  # fmt: skip
DIMS = (1, 3, 8, 16, 17, 64, 100, 128, 129, 256, 512, 768, 1024, 2048)


def schedules(m):
    """One sample, some after a burn-in, every state."""
    return [
        {},
        {"burn_in": m // 3, "num_samples": min(16, m - m // 3)},
        {"num_samples": m},
        {"burn_in": m - 1, "num_samples": 1},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sizes_and_schedules(device, backend, n, m, dtype):
    for number, schedule in enumerate(schedules(m)):
        values = problem(n, m, 64, dtype, seed=10, step=number, **schedule)
        values["state"].score[::2] = 1.0  # every other chain comes with a state
        values["state"].key[::2] = 12345
        check_walk(device, backend, values)


@pytest.mark.parametrize(("d", "dtype"), dims_and_dtypes(DIMS), ids=str)
def test_dims(device, backend, d, dtype):
    values = problem(67, 150, d, dtype, seed=20, temperature=0.07, burn_in=11, num_samples=7)
    check_walk(device, backend, values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [24, 128])
def test_rows_any_distance_apart(device, backend, layout, dtype, d):
    """Rows start at 16 bytes, 8 or 2 or 4; what lies between them is NaN."""
    check_walk(device, backend, problem(70, 140, d, dtype, seed=30, num_samples=9), layout=layout)


def test_one_query_for_all_rows(device, backend):
    values = problem(1, 90, 32, seed=40, num_samples=5)
    rows = values | {"queries": values["queries"].expand(70, 32), "state": emc2.init_state(70)}
    one = values["queries"].to(device).expand(70, 32)
    result = emc2.mh_step(
        one,
        values["keys"].to(device),
        emc2.init_state(70, device),
        temperature=0.2,
        seed=7,
        step=3,
        num_samples=5,
        backend=backend,
    )
    expected = column_walk(rows)
    clear = expected[0].closest_tie > score_error(0.2, 32)
    assert torch.equal(result.samples.cpu()[clear].long(), expected[0].samples[clear])


def test_chains_carried_on(device, backend):
    state = emc2.init_state(96)
    for number in range(5):
        values = problem(96, 64, 128, torch.bfloat16, seed=50 + number, step=number, burn_in=32, num_samples=16)
        state = check_walk(device, backend, values | {"state": state}).state
    assert (state.key >= 0).all()


def test_tf32_products_where_they_are_allowed(device, backend):
    """Products rounded to 10 bits of mantissa: at most 2^-9 off for unit vectors, even if truncated."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for d in (64, 100, 512):
        values = problem(130, 100, d, seed=60, temperature=0.5, num_samples=4)
        check_walk(device, backend, values, dots=2.0**-9, min_rows=0.4)


def test_full_precision_after_tf32(device, backend):
    """The setting is read at each call, not kept from the first."""
    values = problem(130, 100, 512, seed=61, temperature=0.02, num_samples=4)
    expected, error = column_walk(values), score_error(0.02, 512)
    for precision in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        result = step_of(values, device, backend)
    assert_matches(result, expected, error)
