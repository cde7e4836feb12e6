"""Offsets past 2^31 and memory that does not grow with n x m."""

import pytest
import torch
from gpu_support import (
    BACKENDS,
    MANY_SAMPLES,
    MANY_SAMPLES_GB,
    ON_GPU,
    assert_matches,
    column_walk,
    generator,
    needs_memory,
    on_cpu,
    rehearsed,
    run,
    score_error,
)

import emc2_kernels as emc2
from emc2_kernels import rng

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

OPTIONS = {"seed": 3, "step": 4}


def rows_of(result, rows):
    """Some rows of a result, on the CPU."""
    result = on_cpu(result)
    fields = [field if field is None or isinstance(field, emc2.MHState) else field[rows] for field in result]
    fields[1] = emc2.MHState(*(field[rows] for field in result.state))
    return emc2.MHResult(*fields)


def unit_rows(n, d, device, dtype=torch.bfloat16, seed=0):
    draw = torch.Generator(device).manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=draw, device=device), dim=1).to(dtype)


def test_more_pairs_than_32_bits_count(device, backend):
    """50,000 x 50,000 is 2.5e9; some rows of all against the oracle."""
    n = m = rehearsed(50_000, 700)
    queries, keys = unit_rows(n, 16, device), unit_rows(m, 16, device, seed=1)
    rows = torch.tensor([0, 1, 63, 64, n // 2, *range(n * 6 // 7, n * 6 // 7 + 3), n - 2, n - 1])
    options = OPTIONS | {"temperature": 0.2, "burn_in": m // 2, "num_samples": 16}
    asked = {"return_accepts": True, "return_lse": True}
    state = emc2.init_state(n, device)
    result = run(emc2.mh_step, queries, keys, state, backend=backend, **asked, **options)
    values = options | {"queries": queries[rows.to(device)].cpu(), "keys": keys.cpu(), "chain_ids": rows}
    values["state"] = emc2.init_state(len(rows))
    # Over 50,000 proposals every other row comes near a tie somewhere; the others are enough.
    assert_matches(rows_of(result, rows), column_walk(values), score_error(0.2, 16), min_rows=0.2)


def test_more_samples_than_an_int32_of_bytes(device, backend):
    """Every state of a large sweep: (n, R) of 1.1e9 int32 is past 2^31 bytes; the last row and column are written."""
    needs_memory(MANY_SAMPLES_GB)
    n = m = MANY_SAMPLES
    queries = unit_rows(n, 16, device)
    whole = run(
        emc2.mh_step, queries, queries, emc2.init_state(n, device), temperature=0.2, num_samples=m, backend=backend,
        **OPTIONS,
    )  # fmt: skip
    few = run(
        emc2.mh_step, queries, queries, emc2.init_state(n, device), temperature=0.2, num_samples=1, backend=backend,
        **OPTIONS,
    )  # fmt: skip
    assert torch.equal(whole.samples[:, -1], few.samples[:, 0]) and torch.equal(whole.state.key, few.state.key)
    assert whole.samples.min() >= 0 and whole.samples.max() < m


def compact(queries, keys, positions, device):
    """A problem of the proposed keys alone, on the CPU, and the positions that its own positions stand for."""
    proposed, inverse = positions.unique(return_inverse=True)
    values = {"queries": queries.cpu(), "keys": keys[proposed].cpu(), "proposal": inverse.cpu()}
    return values | {"key_labels": proposed.cpu()}, proposed.cpu()


def in_place(expected, proposed):
    walked, lse = expected
    walked.samples = torch.where(walked.samples >= 0, proposed[walked.samples.clamp_min(0)], -1)
    return walked, lse


@pytest.mark.parametrize("given", [False, True], ids=["uniform", "positions"])
def test_keys_of_more_elements_than_32_bits_count(device, backend, given):
    """20,000,000 x 128 keys: 2.56e9 elements."""
    m = rehearsed(20_000_000, 5_000)
    if ON_GPU:
        needs_memory(7)
    keys = torch.randn(m, 128, dtype=torch.bfloat16, device=device)
    n, count = 256, 64
    queries = unit_rows(n, 128, device)
    numbers = torch.arange(n, device=device)
    positions = rng.proposal_positions(numbers, range(count), m, **OPTIONS)
    if given:
        positions = m - 1 - torch.randint(0, m // 20, (n, count), generator=generator(0)).to(device)
    proposal = {"proposal": positions} if given else {"proposal": "uniform", "num_proposals": count}
    options = OPTIONS | {"temperature": 1.0, "num_samples": 8}
    state = emc2.init_state(n, device)
    result = run(emc2.mh_step, queries, keys, state, backend=backend, return_accepts=True, **proposal, **options)
    values, proposed = compact(queries, keys, positions, device)
    expected = in_place(column_walk(options | values | {"state": emc2.init_state(n)}), proposed)
    error = score_error(1.0, 128, dots=20 * 3e-6)  # keys are some 11 long
    assert_matches(on_cpu(result), expected, error)


@pytest.mark.parametrize("which", ["queries", "keys"])
def test_rows_that_far_apart(device, backend, which):
    """A row stride of 2^21: row 1,024 begins at element 2^31."""
    if ON_GPU:
        needs_memory(6)
    rows, stride = 1_100, rehearsed(1 << 21, 1 << 8)
    storage = torch.empty(rows * stride, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((rows, 64), (stride, 1), stride - 64)
    far.copy_(unit_rows(rows, 64, device))
    near = far.contiguous()
    other = unit_rows(90, 64, device, seed=1)
    for proposal in ({}, {"proposal": "uniform", "num_proposals": 200}):
        options = OPTIONS | {"temperature": 0.2, "num_samples": 7, "backend": backend} | proposal
        results = []
        for operand in (far, near):
            queries, keys = (operand, other) if which == "queries" else (other, operand)
            results.append(run(emc2.mh_step, queries, keys, emc2.init_state(len(queries), device), **options))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_memory_of_a_large_sweep(device, backend, dtype):
    """Results and a little: the scores of n = m = 32,768 would be 4.3 GB."""
    needs_memory(2)
    n = m = 32_768
    queries, keys = unit_rows(n, 128, device, dtype), unit_rows(m, 128, device, dtype, seed=1)
    state = emc2.init_state(n, device)
    options = OPTIONS | {"temperature": 0.2, "burn_in": m // 2, "num_samples": 16, "backend": backend}
    run(emc2.mh_step, queries[:64], keys[:64], emc2.init_state(64, device), **(options | {"burn_in": 32}))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(emc2.mh_step, queries, keys, state, **options)
    torch.cuda.synchronize()
    assert result.samples.shape == (n, 16)
    assert torch.cuda.max_memory_allocated() - before < 100e6
