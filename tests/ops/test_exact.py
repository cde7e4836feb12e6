"""The sampler's law: exact transition matrices on tiny spaces, stationarity, and the power of these tests."""

import pytest
import torch
from helpers import chi_square
from oracle import unit

import emc2_kernels as emc2

BACKENDS = ("reference", "cpu")
CHAINS = 65_536


def tiny_space(num_keys=5, temperature=0.4, seed=0):
    """One query, its keys, and the exact target in float64."""
    query, keys = unit(1, 6, seed=seed), unit(num_keys, 6, seed=seed + 1)
    scores = (keys.double() @ query.double()[0]) / temperature
    return query, keys, scores, torch.softmax(scores, 0)


def exact_kernel(scores, proposal=None):
    """Metropolis-Hastings transition matrix (from, to) for independent proposals of law g; uniform by default."""
    m = len(scores)
    g = torch.full((m,), 1 / m, dtype=torch.float64) if proposal is None else proposal
    value = scores - g.log()
    kernel = g * (value - value[:, None]).exp().clamp_max(1)
    kernel.fill_diagonal_(0)
    return kernel + torch.diag(1 - kernel.sum(1))


def walk(backend, query, keys, start, num_proposals, temperature=0.4, seed=1, **options):
    """``len(start)`` independent chains of one query, each from its own start; every state is kept."""
    n = len(start)
    scores = (keys @ query[0]) / temperature
    state_scores = scores[start] if "log_proposal" not in options else (scores - options["log_proposal"])[start]
    if "proposal" not in options:
        options |= {"proposal": "uniform", "num_proposals": num_proposals}
    result = emc2.mh_step(
        query.expand(n, -1),
        keys,
        emc2.MHState(start, state_scores),
        temperature=temperature,
        seed=seed,
        step=0,
        num_samples=num_proposals,
        backend=backend,
        **options,
    )
    return torch.where(result.samples >= 0, result.samples.long(), start[:, None])


def assert_within_standard_errors(counts, probabilities, limit=6.0):
    total = counts.sum()
    standard_error = (probabilities * (1 - probabilities) / total).sqrt().clamp_min(1e-12)
    z = (counts / total - probabilities).abs() / standard_error
    assert z.max() < limit, f"off by {float(z.max()):.1f} standard errors"


def test_the_exact_kernel_has_detailed_balance():
    _, _, scores, target = tiny_space()
    for proposal in (None, torch.softmax(torch.randn(5, dtype=torch.float64), 0)):
        flow = target[:, None] * exact_kernel(scores, proposal)
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_has_the_exact_transition_probabilities(backend):
    query, keys, scores, _ = tiny_space()
    kernel = exact_kernel(scores)
    for start in range(5):
        states = walk(backend, query, keys, torch.full((CHAINS,), start), 1, seed=start)
        assert_within_standard_errors(states[:, 0].bincount(minlength=5).double(), kernel[start])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_state_of_a_walk_follows_the_matrix_power(backend):
    query, keys, scores, target = tiny_space(6, seed=3)
    kernel, law = exact_kernel(scores), torch.eye(6, dtype=torch.float64)[0]
    states = walk(backend, query, keys, torch.zeros(CHAINS, dtype=torch.int64), 12)
    distances = []
    for p in range(12):
        law = law @ kernel
        assert_within_standard_errors(states[:, p].bincount(minlength=6).double(), law)
        distances.append(float((law - target).abs().sum()) / 2)
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposals_from_another_law_enter_by_their_log(backend):
    """Positions drawn from g with log_proposal = log g + constant: the same target."""
    query, keys, scores, _ = tiny_space(seed=5)
    g = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    kernel = exact_kernel(scores, g)
    positions = torch.multinomial(g.expand(CHAINS, 5), 3, replacement=True, generator=torch.Generator().manual_seed(0))
    start = torch.full((CHAINS,), 2)
    states = walk(backend, query, keys, start, 3, proposal=positions, log_proposal=g.log().float() + 3.0)
    for p in range(3):
        assert_within_standard_errors(
            states[:, p].bincount(minlength=5).double(), torch.linalg.matrix_power(kernel, p + 1)[2]
        )


def stationary_counts(backend, chains, temperature, num_keys=40, num_proposals=400):
    """Final states only, one to a chain."""
    query, keys = unit(1, 8, seed=7), unit(num_keys, 8, seed=8)
    result = emc2.mh_step(
        query.expand(chains, -1),
        keys,
        emc2.init_state(chains),
        temperature=temperature,
        seed=11,
        step=5,
        proposal="uniform",
        num_proposals=num_proposals,
        backend=backend,
    )
    target = torch.softmax((keys.double() @ query.double()[0]) / 0.5, 0)
    return result.samples[:, 0].long().bincount(minlength=num_keys).double(), target


def test_final_states_follow_the_softmax():
    counts, target = stationary_counts("cpu", 100_000, temperature=0.5)
    assert chi_square(counts, target) > 1e-4


def test_a_wrong_sampler_is_rejected():
    """The same test must see target^0.9, which is the softmax at temperature 0.5 / 0.9."""
    counts, target = stationary_counts("cpu", 100_000, temperature=0.5 / 0.9)
    assert chi_square(counts, target) < 1e-10


def sweep_states(visits, batch, temperature, num_items=200):
    """Final states of chains that sweep a fresh uniform batch at each visit; one row to a draw of keys."""
    generator = torch.Generator().manual_seed(17)
    query = unit(1, 8, seed=9)
    keys = unit(num_items, 8, seed=10)
    state, finals = emc2.init_state(1), []
    for step in range(visits):
        items = torch.randperm(num_items, generator=generator)[:batch]
        state = emc2.mh_step(
            query, keys[items], state, temperature=temperature, seed=0, step=step, key_labels=items
        ).state
        finals.append(int(state.key))
    target = torch.softmax((keys.double() @ query.double()[0]) / 0.7, 0)
    return torch.tensor(finals), target


def binned(finals, target, bins=12):
    """Counts and probabilities of items grouped by rank, so that every bin is well filled."""
    order = target.argsort()
    bin_of = torch.empty(len(target), dtype=torch.int64)
    bin_of[order] = (target[order].cumsum(0) * bins).long().clamp_max(bins - 1)
    probabilities = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, target)
    return bin_of[finals].bincount(minlength=bins).double(), probabilities


def test_a_chain_swept_over_fresh_batches_follows_the_softmax_of_the_data_set():
    """Every fourth state of a long chain: after 200 proposals among 200 items it has forgotten."""
    finals, target = sweep_states(20_000, 50, temperature=0.7)
    assert chi_square(*binned(finals[20::4], target)) > 1e-4
    wrong, _ = sweep_states(20_000, 50, temperature=1.0)  # the target to the power of 0.7
    assert chi_square(*binned(wrong[20::4], target)) < 1e-6


@pytest.mark.slow
def test_a_long_sweep_follows_the_softmax_of_the_data_set():
    finals, target = sweep_states(400_000, 50, temperature=0.7)
    assert chi_square(*binned(finals[20::4], target, bins=40)) > 1e-4
