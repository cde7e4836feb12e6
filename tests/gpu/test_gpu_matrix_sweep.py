"""The sweep on Hopper's matrix units against the float64 oracle. On other cards the cuda backend walks these too, by a
warp for each chain."""

import pytest
import torch
from gpu_support import BACKENDS, REHEARSAL, assert_equal_bits, check_walk, moved, problem, run

import emc2_kernels as emc2
from emc2_kernels.backends import gpu

NAMED = BACKENDS if REHEARSAL else ("cuda",)
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", NAMED, indirect=True)]

LARGE = gpu.SMALL_SWEEP + 1  # rows: of fewer, with few keys, each chain has a warp


def step_on(device, values, backend):
    values = moved(values, device)
    operands = [values.pop(name) for name in ("queries", "keys", "state")]
    return run(emc2.mh_step, *operands, backend=backend, **values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [8, 64, 72, 128, 200, 256, 448, 512])
def test_dims(device, backend, d, dtype):
    values = problem(LARGE, 384, d, dtype, seed=20, temperature=0.1, burn_in=11, num_samples=7)
    check_walk(device, backend, values, more=False)


@pytest.mark.parametrize(("n", "m"), [(1, 2048), (127, 1280), (LARGE, 128), (2048, 1024), (3000, 2176), (300, 16_384)])
def test_rows_and_splits(device, backend, n, m):
    values = problem(n, m, 64, torch.bfloat16, seed=21, burn_in=m // 3, num_samples=16)
    values["state"].score[::2], values["state"].key[::2] = 1.0, 12_345
    check_walk(device, backend, values, more=False, min_rows=0.6)  # of many keys, more come near a tie


@pytest.mark.parametrize("layout", ["contiguous", "aligned rows"])
def test_everything_that_it_takes(device, backend, layout):
    n, m = LARGE, 640
    values = problem(n, m, 136, torch.bfloat16, seed=22, burn_in=100, num_samples=200)
    values |= {
        "query_ids": torch.arange(n) % 300,
        "key_ids": torch.arange(m) % 500,
        "chain_ids": torch.arange(n) + 2**39,
    }
    values |= {"temperature": torch.linspace(0.2, 0.4, n), "key_labels": torch.arange(m) * 10**12}
    check_walk(device, backend, values, layout=layout, more=False)


def test_the_same_bits_each_time(device, backend):
    """What a missing barrier would leave to chance comes out differently, some time."""
    n, rounds = (LARGE, 2) if REHEARSAL else (4000, 20)
    values = problem(n, n // 128 * 128, 256, torch.bfloat16, seed=23, num_samples=64)
    first = step_on(device, values, backend)
    for _ in range(rounds):
        assert_equal_bits(step_on(device, values, backend), first)


def test_scores_that_are_not_finite(device, backend):
    values = problem(LARGE, 256, 64, torch.bfloat16, seed=24, num_samples=16)
    values["keys"][7], values["keys"][130], values["keys"][200] = torch.inf, -torch.inf, torch.nan
    result = step_on(device, values, backend)
    assert not torch.isin(result.samples.cpu(), torch.tensor([7, 130, 200], dtype=torch.int32)).any()
    assert result.threshold.isfinite().all() and result.state.score.isfinite().all()
