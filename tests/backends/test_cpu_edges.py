"""Where a plausible slip in the CPU core or its Python side would change a result, and random walks rarely come."""

import pytest
import torch
from helpers import COMPILED, assert_identical, int64, normal, with_rows
from oracle import unit

import emc2_kernels as emc2
from emc2_kernels import rng

INF = torch.inf


def transition(backend, queries, keys, **options):
    options = {"temperature": 0.3, "seed": 5, "step": 6, "chain_ids": torch.arange(len(queries)) * 2**35} | options
    return emc2.mh_transition(queries, keys, backend=backend, **options)


def assert_transitions_agree(found, expected):
    assert torch.equal(found.position, expected.position)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.threshold, expected.threshold, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["sweep", "drawn", "given"])
@pytest.mark.parametrize("first", [1, 6, 64, 2**32 + 3])
def test_sample_points_before_in_and_after_a_shard(kind, first):
    """Nothing before the shard's first proposal, the whole shard after its last, whichever way proposals are made."""
    queries, keys = unit(19, 12, seed=1), unit(45, 12, seed=2)
    count = 45 if kind == "sweep" else 70
    options = {"first_proposal": first, "total_proposals": first + count + 20, "burn_in": max(0, first - 9)}
    if kind == "drawn":
        options |= {"proposal": "uniform", "num_proposals": count}
    if kind == "given":
        generator = torch.Generator().manual_seed(0)
        options["proposal"] = torch.randint(0, 45, (19, count), generator=generator)
    kept = options["total_proposals"] - options["burn_in"]
    for samples in (7, kept):
        found, expected = (transition(b, queries, keys, num_samples=samples, **options) for b in ("cpu", "reference"))
        assert_transitions_agree(found, expected)
    points = [options["burn_in"] + -(-(r + 1) * kept // samples) - 1 for r in range(samples)]
    before = torch.tensor(points) < first
    assert before.any() and (found.position[:, before] == -1).all() and (found.threshold[:, before] == -INF).all()
    after = torch.tensor(points) >= first + count - 1
    assert (found.position[:, after] == found.position[:, -1:]).all() and (found.position[:, -1] >= 0).all()


def apart(values):
    """The same values with others between them, in every direction."""
    shape = [2 * size + 1 for size in values.shape]
    wide = torch.full(shape, 77, dtype=values.dtype)
    inside = wide[tuple(slice(1, None, 2) for _ in shape)]
    inside.copy_(values)
    return inside


def test_vectors_and_positions_may_lie_apart():
    n, m = 21, 34
    queries, keys = unit(n, 9, seed=1), unit(m, 9, seed=2)
    generator = torch.Generator().manual_seed(0)
    vectors = {
        "temperature": torch.rand(n, generator=generator) + 0.1,
        "chain_ids": torch.randint(0, 2**40, (n,), generator=generator),
        "query_ids": torch.arange(n) % 7,
        "key_ids": torch.arange(m) % 7,
        "log_proposal": torch.randn(m, generator=generator),
        "key_labels": torch.arange(m) * 10**10,
    }
    state = emc2.MHState(torch.arange(n) + 900, torch.randn(n, generator=generator))
    state.score[::3] = 1e6  # stays
    positions = torch.randint(0, m, (n, 50), generator=generator)
    walks = [{}, {"proposal": "uniform", "num_proposals": 50}, {"proposal": positions}]
    for walk in walks:
        options = {"seed": 3, "step": 4, "num_samples": 5, "return_accepts": True, "backend": "cpu"}
        given = vectors | walk
        expected = emc2.mh_step(queries, keys, state, **given, **options)
        moved = emc2.MHState(*map(apart, state))
        assert_identical(tuple(emc2.mh_step(queries, keys, moved, **given, **options)), tuple(expected))
        for name in (name for name, value in given.items() if isinstance(value, torch.Tensor)):
            changed = given | {name: apart(given[name])}
            assert_identical(tuple(emc2.mh_step(queries, keys, state, **changed, **options)), tuple(expected))
    drawn = {name: vectors[name] for name in ("temperature", "chain_ids", "query_ids", "key_ids")}
    options = {"seed": 3, "step": 4, "num_samples": 5, "backend": "cpu"}
    expected = emc2.gumbel_sample(queries, keys, **drawn, **options)
    for name, value in drawn.items():
        assert_identical(emc2.gumbel_sample(queries, keys, **drawn | {name: apart(value)}, **options), expected)
    transposed = positions.T.contiguous().T
    assert transposed.stride() == (1, n)
    assert_identical(
        tuple(transition("cpu", queries, keys, proposal=transposed)),
        tuple(transition("cpu", queries, keys, proposal=positions)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, INF, -INF])
@pytest.mark.parametrize("dim", [8, 19])
def test_what_is_not_finite_in_half_precision_is_never_moved_to(dtype, value, dim):
    """Widened to a finite number, an infinite element would be the best key of all."""
    queries, keys = normal(1, 9, dim).abs().to(dtype), with_rows(normal(2, 12, dim).to(dtype), [3, 11], value)
    keys[3, : dim // 2] = 0  # not in every element
    ids = {"chain_ids": torch.arange(9), "key_ids": with_rows(torch.zeros(12, dtype=torch.int64), [3, 11], 1)}
    for proposal in ({}, {"proposal": "uniform", "num_proposals": 40}):
        walks = {"temperature": 3.0, "seed": 1, "step": 2, "num_samples": 12, "backend": "cpu"} | proposal
        found = emc2.mh_step(queries, keys, emc2.init_state(9), **ids, **walks)
        clean = keys.clone()
        clean[[3, 11]] = 0
        expected = emc2.mh_step(
            queries, clean, emc2.init_state(9), **ids, query_ids=torch.ones(9, dtype=torch.int64), **walks
        )
        assert_identical(tuple(found), tuple(expected))
        assert (found.samples[:, -1] >= 0).all()
    largest = torch.full((1, dim), torch.finfo(dtype).max, dtype=dtype)
    for proposal in ({}, {"proposal": "uniform", "num_proposals": 1}):
        walk = transition("cpu", with_rows(torch.zeros(1, dim, dtype=dtype), 0, 1e-4), largest, **proposal)
        expected = float(dim * torch.tensor(1e-4, dtype=dtype).double() * largest[0, 0].double() / 0.3)
        torch.testing.assert_close(walk.score.double(), torch.full((1, 1), expected).double(), rtol=1e-5, atol=0)


# The noise of the contract at both ends of a word: chains whose word for one key, at seed 0, step 0, sample 0, is that.
ZERO_WORD, ONES_WORD = (1107449663, 1), (432861728, 2)  # (chain, key)


def draw(backend, scores, chain, **options):
    """A row of given scores."""
    keys = torch.as_tensor(scores, dtype=torch.float32)[:, None]
    call = {"temperature": 1.0, "seed": 0, "step": 0, "chain_ids": int64(chain), "backend": backend} | options
    return emc2.gumbel_sample(torch.ones(1, 1), keys, **call)


def noise(chain, keys):
    return rng.gumbel(int64(chain), range(keys), seed=0, step=0, sample=0, dtype=torch.float64)[0]


@pytest.mark.parametrize("backend", COMPILED)
def test_noise_of_the_smallest_and_the_largest_word(backend):
    """v = (word + 0.5) / 2^32: a word of 0 is noise 22.87, not 22.18 or more than that; one of 2^32 - 1 is -3.13."""
    chain, key = ZERO_WORD
    values = noise(chain, 4)
    assert values[key].item() == pytest.approx(22.8739, abs=1e-4)
    other = (key + 1) % 4
    for margin, winner in ((0.05, key), (-0.05, other)):
        scores = torch.full((4,), -100.0)
        scores[key], scores[other] = 0.0, float(values[key] - values[other]) - margin
        assert draw(backend, scores, chain).item() == winner
    chain, key = ONES_WORD
    values = noise(chain, 4)
    assert values[key].item() == pytest.approx(-3.13, abs=1e-4)
    only = torch.full((4,), torch.nan)
    only[key] = 0.0
    assert draw(backend, only, chain).item() == key
    other = (key + 1) % 4
    for margin, winner in ((0.05, key), (-0.05, other)):
        only[other] = float(values[key] - values[other]) - margin
        assert draw(backend, only, chain).item() == winner


@pytest.mark.parametrize("backend", COMPILED)
def test_equal_sums_of_score_and_noise_go_to_the_lowest_position(backend):
    """Of scores so large that any noise is rounded away."""
    scores = torch.full((50,), 1e30)
    scores[:3] = 1.0
    assert (draw(backend, scores, 9, num_samples=40) == 3).all()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("n", [5, 37])
def test_ids_differ_in_every_bit(backend, n):
    """Two ids that agree in 32 bits, the low or the high ones, are two; so are two chains."""
    bits = [0, 1, 31, 32, 33, 39, 62]
    keys = unit(len(bits), 6, seed=2)
    queries = unit(n, 6, seed=1)
    for base in (0, (1 << 34) + 5, -1):
        ids = {"query_ids": torch.full((n,), base), "key_ids": torch.tensor([base ^ (1 << bit) for bit in bits])}
        common = ids | {"chain_ids": torch.arange(n), "temperature": 1.0, "seed": 1, "step": 2, "backend": backend}
        for key in range(len(bits)):  # alone, it is moved to: no chain has started
            alone = common | {"key_ids": ids["key_ids"][key : key + 1]}
            for proposal in ({}, {"proposal": "uniform", "num_proposals": 1}):
                walk = emc2.mh_step(queries, keys[key : key + 1], emc2.init_state(n), **alone, **proposal)
                assert (walk.samples == 0).all()
        drawn = emc2.gumbel_sample(queries * 0, keys, num_samples=200, **common)
        assert (drawn.flatten().bincount(minlength=len(bits)) > 0).all()
        excluded = common | {"key_ids": torch.full((len(bits),), base)}
        assert (emc2.mh_step(queries, keys, emc2.init_state(n), **excluded).samples == -1).all()
        assert (emc2.gumbel_sample(queries, keys, **excluded) == -1).all()


@pytest.mark.parametrize(("rows", "keys", "samples"), [(150, 33, 40), (40, 33, 600), (3, 2000, 40)])
def test_many_samples_few_rows_many_keys(rows, keys, samples):
    """Races of one block of rows must not be those of the one before, and those of ranges of keys are one."""
    queries, keys = unit(rows, 8, seed=1), unit(keys, 8, seed=2)
    options = {"temperature": 0.3, "seed": 1, "step": 2, "num_samples": samples}
    found, expected = (emc2.gumbel_sample(queries, keys, backend=b, **options) for b in ("cpu", "reference"))
    assert (found != expected).float().mean() < 1e-3  # ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proposal", [{}, {"proposal": "uniform", "num_proposals": 9}], ids=["sweep", "uniform"])
def test_products_of_every_width(dtype, proposal):
    """Components are small integers, so that a score is exact: one that is left out, or read twice, shows."""
    generator = torch.Generator().manual_seed(0)
    for dim in (*range(1, 70), 127, 128, 129):
        queries, keys = (torch.randint(-3, 4, (rows, dim), generator=generator) for rows in (3, 11))
        queries[:, -1], keys[:, -1] = 1, torch.arange(11) - 5
        walk = transition("cpu", queries.to(dtype), keys.to(dtype), temperature=1.0, num_samples=9, **proposal)
        rows = torch.arange(3)[:, None]
        assert torch.equal(walk.score, (queries @ keys.T)[rows, walk.position].float())  # exact


def test_draws_among_large_scores():
    """A float32 of 10^6 has steps of 0.06: what bounds the noise from above must not round below it."""
    chains = torch.arange(20_000) * 2**20
    options = {"temperature": 1.0, "seed": 3, "step": 4, "chain_ids": chains}
    scores = torch.full((30,), 1e6)  # four keys at once are held against the best of those before them
    found = emc2.gumbel_sample(torch.ones(len(chains), 1), scores[:, None], backend="cpu", **options)
    values = rng.gumbel(chains, range(30), seed=3, step=4, sample=0, dtype=torch.float64) + scores.double()
    assert torch.equal(found[:, 0], values.argmax(1))
