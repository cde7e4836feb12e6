"""Proposals that are drawn with replacement, or given: against the float64 oracle."""

import pytest
import torch
from gpu_support import BACKENDS, LAYOUTS, check_walk, dims_and_dtypes, generator, problem, step_of

import emc2_kernels as emc2

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

SIZES = [(1, 1, 1), (1, 9, 1000), (7, 8, 16), (33, 1, 31), (64, 65, 127), (129, 1000, 257), (1000, 63, 33)]
DIMS = (1, 3, 8, 17, 64, 100, 128, 129, 256, 768, 1024, 2048)


def with_proposals(values, kind, count):
    n, m = len(values["queries"]), len(values["keys"])
    if kind == "uniform":
        return values | {"proposal": "uniform", "num_proposals": count}
    return values | {"proposal": torch.randint(0, m, (n, count), generator=generator(count))}


KINDS = pytest.mark.parametrize("kind", ["uniform", "positions"])


@KINDS
@pytest.mark.parametrize(("n", "m", "count"), SIZES)
def test_sizes_and_schedules(device, backend, kind, n, m, count):
    schedules = [{}, {"burn_in": count // 2, "num_samples": min(16, count - count // 2)}, {"num_samples": count}]
    for number, schedule in enumerate(schedules):
        values = problem(n, m, 64, (torch.float32, torch.bfloat16)[number % 2], seed=10, step=number, **schedule)
        check_walk(device, backend, with_proposals(values, kind, count))


@pytest.mark.parametrize(("d", "dtype"), dims_and_dtypes(DIMS), ids=str)
def test_dims(device, backend, d, dtype):
    kind = "uniform" if d % 3 else "positions"
    values = problem(35, 80, d, dtype, seed=20, temperature=0.07, burn_in=5, num_samples=6)
    check_walk(device, backend, with_proposals(values, kind, 70))


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_any_distance_apart(device, backend, kind, layout, dtype):
    for d in (24, 128):
        values = problem(40, 70, d, dtype, seed=30, num_samples=9)
        check_walk(device, backend, with_proposals(values, kind, 50), layout=layout)


def test_given_positions_in_a_wider_array(device, backend):
    values = with_proposals(problem(40, 70, 32, seed=40, num_samples=9), "positions", 50)
    expected = step_of(values, device, backend)
    wide = torch.full((40, 63), 1 << 40, device=device)
    wide[:, 5:55] = values["proposal"].to(device)
    actual = step_of(values | {"proposal": wide[:, 5:55]}, device, backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_chains_carried_on(device, backend):
    state = emc2.init_state(96)
    for number in range(4):
        values = problem(96, 300, 128, torch.bfloat16, seed=50, step=number, burn_in=32, num_samples=16)
        state = check_walk(device, backend, with_proposals(values | {"state": state}, "uniform", 128)).state
    assert (state.key >= 0).all()
