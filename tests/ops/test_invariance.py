"""What must not change a chain: row order, neighbours, splitting the walk, carrying the state through a file."""

import itertools

import pytest
import torch
from oracle import unit

import emc2_kernels as emc2

BACKENDS = ("reference", "cpu")
OPTIONS = {"temperature": 0.15, "seed": 5, "step": 2}


def problem(n=41, m=53, d=9):
    generator = torch.Generator().manual_seed(1)
    ids = {
        "query_ids": torch.randperm(n, generator=generator),
        "key_ids": torch.randint(0, n, (m,), generator=generator),
        "chain_ids": torch.randperm(10 * n, generator=generator)[:n],
    }
    return unit(n, d, seed=1), unit(m, d, seed=2), ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proposal", [{}, {"proposal": "uniform", "num_proposals": 60}], ids=["sweep", "uniform"])
def test_row_order_and_neighbours(backend, proposal):
    queries, keys, ids = problem()
    state = emc2.init_state(41)
    options = OPTIONS | proposal | {"burn_in": 10, "num_samples": 8, "backend": backend, "return_accepts": True}
    options |= {"return_lse": not proposal}
    whole = emc2.mh_step(queries, keys, state, **ids, **options)
    generator = torch.Generator().manual_seed(3)
    for size in (41, 20, 3, 1):
        rows = torch.randperm(41, generator=generator)[:size]
        row_ids = ids | {name: ids[name][rows] for name in ("query_ids", "chain_ids")}
        part = emc2.mh_step(queries[rows], keys, emc2.init_state(size), **row_ids, **options)
        for name in ("samples", "num_accepted"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert torch.equal(part.state.key, whole.state.key[rows])
        torch.testing.assert_close(part.state.score, whole.state.score[rows])
        if not proposal:
            torch.testing.assert_close(part.lse, whole.lse[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_chains_differ_between_ids_seeds_and_steps(backend):
    query, keys = unit(1, 9, seed=3), unit(64, 9, seed=4)
    walks = []
    for chain, seed, step in itertools.product((0, 1, 2**32), (0, 1, 2**32, 2**63), (0, 1)):
        options = {"chain_ids": torch.tensor([chain]), "seed": seed, "step": step, "num_samples": 64}
        result = emc2.mh_step(query, keys, emc2.init_state(1), temperature=1.0, backend=backend, **options)
        walks.append(tuple(result.samples[0].tolist()))
    assert len(set(walks)) == len(walks)


def split_walk(cuts, total, shard):
    """The shards between ``cuts``, and what they compose to; ``shard(begin, end)`` is a Transition."""
    parts = [shard(begin, end) for begin, end in itertools.pairwise([0, *cuts, total])]
    composed = parts[0]
    for part in parts[1:]:
        composed = emc2.compose(emc2.Transition(*(field[:, -1:] for field in composed)), part)
    return parts, composed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(1,), (8, 9), (3, 17, 18, 40), (0, 53)])
def test_a_split_sweep_is_the_whole_sweep(backend, cuts):
    queries, keys, ids = problem()
    row_ids = {name: ids[name] for name in ("query_ids", "chain_ids")}
    options = OPTIONS | {"burn_in": 11, "num_samples": 5, "backend": backend}
    log_proposal = torch.linspace(-1, 1, 53)
    state = emc2.MHState(torch.arange(41) + 100, torch.linspace(-6, 6, 41))
    whole = emc2.mh_step(queries, keys, state, **ids, log_proposal=log_proposal, **options)

    def shard(begin, end):
        local = {"key_ids": ids["key_ids"][begin:end], "log_proposal": log_proposal[begin:end]}
        numbers = {"first_proposal": begin, "total_proposals": 53}
        return emc2.mh_transition(queries, keys[begin:end], **row_ids, **local, **numbers, **options)

    parts, composed = split_walk(cuts, 53, shard)
    result = emc2.apply(composed, state, ids["key_ids"])
    assert torch.equal(result.samples[:, -1], whole.samples[:, -1])
    assert torch.equal(result.state.key, whole.state.key)
    torch.testing.assert_close(result.state.score, whole.state.score)
    torch.testing.assert_close(result.threshold, whole.threshold)
    marks = [11 + -(-(r + 1) * 42 // 5) - 1 for r in range(5)]
    for part, (begin, end) in zip(parts, itertools.pairwise([0, *cuts, 53]), strict=True):
        for r, mark in enumerate(marks):
            if mark < begin:  # before the shard: identity
                assert (part.threshold[:, r] == -torch.inf).all() and (part.position[:, r] == -1).all()
            if mark >= end:  # after it: the whole shard
                assert torch.equal(part.position[:, r], part.position[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 6, 64, 65, 99])
def test_split_uniform_and_given_proposals(backend, cut):
    queries, keys, ids = problem()
    options = OPTIONS | {"num_samples": 3, "backend": backend}
    state = emc2.init_state(41)
    positions = torch.randint(0, 53, (41, 100), generator=torch.Generator().manual_seed(4))
    for given in (False, True):
        proposal = {"proposal": positions} if given else {"proposal": "uniform", "num_proposals": 100}
        whole = emc2.mh_step(queries, keys, state, **ids, **proposal, **options)

        def shard(begin, end, given=given):
            count = (
                {"proposal": positions[:, begin:end]}
                if given
                else {"proposal": "uniform", "num_proposals": end - begin}
            )
            numbers = {"first_proposal": begin, "total_proposals": 100}
            return emc2.mh_transition(queries, keys, **ids, **count, **numbers, **options)

        _, composed = split_walk((cut,), 100, shard)
        result = emc2.apply(composed, state, ids["key_ids"])
        assert torch.equal(result.state.key, whole.state.key)
        assert torch.equal(result.samples[:, -1], whole.samples[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proposal", [{}, {"proposal": "uniform", "num_proposals": 60}], ids=["sweep", "uniform"])
def test_a_step_is_the_transition_applied(backend, proposal):
    queries, keys, ids = problem()
    options = OPTIONS | proposal | {"burn_in": 7, "num_samples": 6, "backend": backend} | ids
    state = emc2.MHState(torch.arange(41), torch.linspace(-8, 8, 41))
    state.score[5] = float("nan")
    step = emc2.mh_step(queries, keys, state, **options)
    applied = emc2.apply(emc2.mh_transition(queries, keys, **options), state, ids["key_ids"])
    assert torch.equal(step.samples, applied.samples)
    for mine, theirs in zip((*step.state, step.threshold), (*applied.state, applied.threshold), strict=True):
        assert torch.equal(mine, theirs)


def test_compose_is_associative_with_an_identity():
    generator = torch.Generator().manual_seed(6)
    values = torch.randint(-3, 4, (3, 2, 5000, 1), generator=generator).float()  # few values: many ties
    triples = []
    for k in range(3):
        score, threshold = values[k].amin(0), values[k].amax(0)
        identity = threshold == 3
        fields = (threshold.masked_fill(identity, -torch.inf), score.masked_fill(identity, -torch.inf))
        triples.append(emc2.Transition(*fields, torch.where(identity, -1, k)))
    a, b, c = triples
    left, right = emc2.compose(emc2.compose(a, b), c), emc2.compose(a, emc2.compose(b, c))
    state = emc2.MHState(torch.full((5000,), -9), torch.randint(-4, 4, (5000,), generator=generator).float())
    in_turn = state
    for part in triples:
        in_turn = emc2.apply(part, in_turn).state
    for composed in (left, right):
        for mine, theirs in zip(emc2.apply(composed, state).state, in_turn, strict=True):
            assert torch.equal(mine, theirs)
    nothing = torch.full((5000, 1), -torch.inf)
    identity = emc2.Transition(nothing, nothing, torch.full((5000, 1), -1))
    unchanged = emc2.compose(emc2.compose(identity, a), identity)
    assert torch.equal(unchanged.threshold, a.threshold)
    for mine, theirs in zip(emc2.apply(unchanged, state).state, emc2.apply(a, state).state, strict=True):
        assert torch.equal(mine, theirs)


def test_compose_broadcasts_a_whole_block_against_prefixes():
    queries, keys, ids = problem()
    first = emc2.mh_transition(queries, keys, **OPTIONS, **ids)
    later = emc2.mh_transition(queries, keys, **(OPTIONS | {"step": 3}), num_samples=7, **ids)
    both = emc2.compose(first, later)
    for r in range(7):
        one = emc2.compose(first, emc2.Transition(*(field[:, r : r + 1] for field in later)))
        assert all(torch.equal(x[:, r : r + 1], y) for x, y in zip(both, one, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_saved_and_resumed_at_every_step(backend, tmp_path):
    queries, keys, ids = problem()

    def run(state, steps):
        for step in steps:
            options = OPTIONS | {"step": step}
            state = emc2.mh_step(queries, keys, state, backend=backend, **ids, **options).state
        return state

    straight = run(emc2.init_state(41), range(8))
    for k in range(8):
        torch.save(run(emc2.init_state(41), range(k))._asdict(), tmp_path / "state.pt")
        resumed = run(emc2.MHState(**torch.load(tmp_path / "state.pt", weights_only=True)), range(k, 8))
        assert all(torch.equal(x, y) for x, y in zip(resumed, straight, strict=True))


def test_without_keys_the_state_stays():
    queries = unit(4, 5)
    state = emc2.MHState(torch.tensor([3, -1, 7, 8]), torch.tensor([0.5, -torch.inf, -2.0, float("nan")]))
    for backend in BACKENDS:
        result = emc2.mh_step(queries, queries[:0], state, num_samples=3, return_lse=True, backend=backend, **OPTIONS)
        assert (result.samples == -1).all() and result.samples.shape == (4, 3)
        assert result.state.key.tolist() == [3, -1, 7, -1]  # a score that is not a number: not started
        assert result.state.score.tolist() == [0.5, -torch.inf, -2.0, -torch.inf]
        assert (result.lse == -torch.inf).all() and (result.threshold == -torch.inf).all()
        empty = emc2.mh_step(queries[:0], queries, emc2.init_state(0), num_samples=3, backend=backend, **OPTIONS)
        assert empty.samples.shape == (0, 3) and empty.state.key.shape == (0,)
