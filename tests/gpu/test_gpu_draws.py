"""Which draw has which value: 10^6 counters of each stream, through the public operators, against emc2_kernels.rng."""

import itertools
import math

import pytest
import torch
from gpu_support import BACKENDS, generator, rehearsed, run

import emc2_kernels as emc2
from emc2_kernels import ops, rng

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

COUNTERS = [(0, 0), (2**64 - 1, 2**32 - 1), (0x9E3779B97F4A7C15, 12345)]  # seed, step
FIRST = (0, 1, 2, 3, 2**20 + 5, 2**31 - 1, 2**31 + 2, 2**33 + 7)  # a proposal's number fits 34 bits: a block's, 32


def chains(n, device):
    drawn = torch.randint(0, 2**40, (n,), generator=generator(n))
    edges = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 - 1])[:n]
    drawn[: len(edges)] = edges
    return drawn.to(device)


def allowed_error(e):
    """Of E against float64: lg2.approx's bound, and one rounding."""
    return 2.0**-22 * e.clamp_min(math.log(2)) + 2.0**-24 * e + 1e-12


def assert_draws(actual, e):
    """A threshold over a score of 0 is E itself; rounding must not have put it below the score."""
    assert (actual >= 0).all()
    worst = ((actual.double() - e).abs() / allowed_error(e)).max().item()
    assert worst <= 1, f"E is off by {worst:.3g} times its allowed error"


@pytest.mark.parametrize("first", FIRST)
def test_acceptance_of_one_proposal(device, backend, first):
    """Keys of zeros: every score is 0, so the threshold is E."""
    n = rehearsed(125_000, 2_000)
    ids, zeros = chains(n, device), torch.zeros(n, 8, device=device)
    for seed, step in COUNTERS[1:]:
        counter = {"seed": seed, "step": step}
        options = counter | {"temperature": 1.0, "chain_ids": ids, "first_proposal": first}
        transition = run(emc2.mh_transition, zeros, zeros[:1], backend=backend, **options)
        e = rng.acceptance(ids, range(first, first + 1), dtype=torch.float64, **counter)
        assert_draws(transition.threshold, e)
        assert (transition.score == 0).all() and (transition.position == first).all()


@pytest.mark.parametrize(("seed", "step"), COUNTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_acceptance_along_a_sweep(device, backend, seed, step, dtype):
    """The threshold of a prefix is the largest E so far; the key is the last proposed, for each E exceeds 0."""
    n, m = rehearsed(1001, 101), rehearsed(999, 199)
    ids = chains(n, device)
    queries, keys = torch.zeros(n, 32, dtype=dtype, device=device), torch.zeros(m, 32, dtype=dtype, device=device)
    options = {"temperature": 1.0, "chain_ids": ids, "seed": seed, "step": step, "num_samples": m}
    transition = run(emc2.mh_transition, queries, keys, backend=backend, **options)
    e = rng.acceptance(ids, range(m), seed=seed, step=step, dtype=torch.float64)
    assert_draws(transition.threshold, e.cummax(1).values)
    position = torch.arange(m, device=device).expand(n, m)
    may_be_zero = e < 1e-6  # where the approximation may round E down to 0, the move is not made
    assert ((transition.position == position) | may_be_zero).all()


@pytest.mark.parametrize("num_keys", [1, 7, 1000, 2**20 + 7])
def test_positions(device, backend, num_keys):
    n, count = rehearsed(1024, 64), rehearsed(333, 33)
    ids = chains(n, device)
    zeros = torch.zeros(max(n, num_keys), 8, device=device)
    for (seed, step), first in itertools.product(COUNTERS, (0, 3)):
        counter = {"seed": seed, "step": step}
        options = counter | {"temperature": 1.0, "chain_ids": ids, "first_proposal": first, "num_samples": count}
        options |= {"proposal": "uniform", "num_proposals": count, "burn_in": first}
        transition = run(emc2.mh_transition, zeros[:n], zeros[:num_keys], backend=backend, **options)
        numbers = range(first, first + count)
        expected = rng.proposal_positions(ids, numbers, num_keys, **counter)
        may_be_zero = rng.acceptance(ids, numbers, dtype=torch.float64, **counter) < 1e-6
        assert ((transition.position == expected) | may_be_zero).all()


def test_view_coins(device, backend):
    items = chains(rehearsed(10**6, 10**4), device)
    for seed, step in COUNTERS:
        for tensors in (False, True):
            bits = seed - 2**64 if seed >= 2**63 else seed
            numbers = (
                (torch.tensor(bits, device=device), torch.tensor(step, device=device)) if tensors else (seed, step)
            )
            coins = ops.view_coin(items, *numbers, backend)
            assert torch.equal(coins, rng.view_coin(items, seed=seed, step=step))
