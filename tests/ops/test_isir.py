"""isir_step: every backend against the noise of the contract and a literal argmax, and against itself in pieces."""

import functools
import itertools

import oracle
import pytest
import torch
from helpers import COMPILED, RUNNABLE, assert_identical, named_error, normal
from oracle import unit
from torch import Tensor

import emc2_kernels as emc2
from emc2_kernels import MHState, checks, ops, rng
from emc2_kernels.backends.params import CarriedParams, DrawParams, ScoreParams
from emc2_kernels.backends.reference import lse
from emc2_kernels.isir import Drawn

SIZES = [(1, 1, 1), (1, 5, 3), (7, 4, 16), (8, 3, 17), (16, 63, 64), (17, 64, 33), (33, 65, 100), (65, 130, 8)]
USUAL = {"temperature": 0.2, "seed": 7, "step": 3}
INF, NAN = torch.inf, torch.nan
NOT_STARTED = (NAN, INF, -INF)


def chains_at(n, seed=11):
    """Chains whose scores are those of the best keys, so that some of them stay; some have not started."""
    state = MHState(torch.arange(n) * 10 + 5, normal(seed, n) * 2 + 4)
    for row, score in zip(range(3, n, 7), itertools.cycle(NOT_STARTED)):
        state.score[row] = score
    return state


def resample(backend, queries, keys, state, **options):
    return emc2.isir_step(queries, keys, state, backend=backend, **USUAL | options)


def expected_of(queries, keys, state, **options):
    return oracle.resample(queries, keys, (state.key[:, None], state.score[:, None]), **USUAL | options)


def error_of(options):
    """Of a score and its noise together; it grows as 1 / temperature."""
    return 3e-6 / min(0.2, float(torch.as_tensor((USUAL | options)["temperature"]).min()))


def assert_resampled(result, expected, state, error, min_share=0.9):
    """Index-exact wherever the margin exceeds the error of score and noise."""
    clear = expected.margin > error
    assert clear.double().mean() >= min_share
    assert_identical(result.position[clear], expected.position[clear])
    assert_identical(result.state.key[clear], expected.key[clear])
    torch.testing.assert_close(result.state.score[clear].double(), expected.score[clear], rtol=1e-6, atol=error)
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=1e-6, atol=error)
    share = torch.where(state.score.isfinite(), (state.score.double() - expected.lse).exp(), 0)
    torch.testing.assert_close(result.carried_weight.double(), share, rtol=0, atol=2 * error)


def assert_steps(backend, queries, keys, state, **options):
    result = resample(backend, queries, keys, state, **options)
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    assert result.state.score.dtype == result.lse.dtype == result.carried_weight.dtype == wide
    assert_resampled(result, expected_of(queries, keys, state, **options), state, error_of(options))
    return result


def everything(n=37, m=45):
    """Operands, chains and options with all that a step can have, and keys that are nobody's candidates."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = unit(n, 19, seed=3), unit(m, 19, seed=4)
    keys[[4, 20, m - 1]] = torch.tensor([NAN, INF, -INF])[:, None]
    options = {
        "temperature": torch.rand(n, generator=generator) * 0.5 + 0.1,
        "seed": 2**64 - 3,
        "step": 2**32 - 1,
        "chain_ids": torch.randperm(n, generator=generator) + 2**40 - n,
        "query_ids": torch.randint(0, 6, (n,), generator=generator) + (1 << 33),
        "carried_ids": torch.randint(0, 6, (n,), generator=generator) + (1 << 33),
        "key_ids": torch.randint(0, 8, (m,), generator=generator) + (1 << 33),
        "key_labels": torch.randperm(m, generator=generator) * 10**12 - 9,
        "log_proposal": torch.randn(m, generator=generator),
    }
    options["key_ids"][::9] -= 1 << 32  # low words of excluded ids under other high words
    return queries, keys, chains_at(n), options


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_steps_are_the_oracles(backend, n, m, d):
    queries, keys, state = unit(n, d, seed=1), unit(m, d, seed=2), chains_at(n)
    for step in range(2):  # carried on
        state = assert_steps(backend, queries, keys, state, step=step).state


def test_chains_stay_and_move():
    """Or the comparisons above would compare little."""
    result = resample("reference", unit(65, 8, seed=1), unit(130, 8, seed=2), chains_at(65))
    assert 5 < (result.position == -1).sum() < 60
    assert (result.carried_weight == 0).sum() == len(range(3, 65, 7))


WITHOUT = {
    "everything": (),
    "key ids alone": ("query_ids", "carried_ids", "key_labels"),
    "query ids alone": ("carried_ids", "log_proposal"),
    "carried ids alone": ("query_ids",),
    "no chain ids: the query ids": ("chain_ids",),
    "no chain ids and no query ids: the row numbers": ("chain_ids", "query_ids"),
    "no labels: the key ids": ("key_labels",),
    "neither labels nor ids: the positions": ("key_labels", "key_ids", "query_ids", "carried_ids"),
    "one temperature": ("temperature",),
}


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_everything_at_once(backend, without):
    queries, keys, state, options = everything()
    result = assert_steps(backend, queries, keys, state, **{k: v for k, v in options.items() if k not in without})
    kept = result.position == -1
    started = kept & state.score.isfinite()
    assert_identical(result.state.key[started], state.key[started])
    assert_identical(result.state.score[started], state.score[started])  # exactly what came


def test_what_a_row_excludes_is_no_candidate(backend):
    queries, keys, state, options = everything()
    drawn = torch.stack([resample(backend, queries, keys, state, **options | {"step": s}).position for s in range(60)])
    allowed = (options["query_ids"][:, None] != options["key_ids"]) & (
        options["carried_ids"][:, None] != options["key_ids"]
    )
    rows = torch.arange(len(queries)).expand_as(drawn)
    assert allowed[rows, drawn.clamp_min(0)][drawn >= 0].all()
    assert not set(drawn.flatten().tolist()) & {4, 20, len(keys) - 1}
    low = options["key_ids"] < 1 << 33  # as low words alone they would be excluded somewhere
    assert low[drawn.clamp_min(0)][drawn >= 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_dtypes(backend, dtype):
    queries, keys = unit(40, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    assert_steps(backend, queries, keys, chains_at(40), temperature=0.07, log_proposal=normal(7, 60))


def test_float64_goes_to_the_reference():
    queries, keys = unit(9, 5, seed=5, dtype=torch.float64), unit(11, 5, seed=6, dtype=torch.float64)
    state = chains_at(9)
    assert_steps("auto", queries, keys, state)
    exact = MHState(state.key, state.score.double() + 1e-12)
    result = assert_steps("reference", queries, keys, exact)
    expected = expected_of(queries, keys, exact)
    torch.testing.assert_close(result.lse, expected.lse, rtol=1e-14, atol=0)
    torch.testing.assert_close(result.state.score, expected.score, rtol=1e-14, atol=1e-14)
    with named_error(ValueError, "backend"):
        resample("cpu", queries, keys, state)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_strided_operands(backend):
    """Rows may be any distance apart, vectors too; one query may stand for all rows."""
    wide_queries, wide_keys = unit(80, 3, 24, seed=7), unit(90, 40, seed=8)
    queries, keys = wide_queries[::2, 1, :20], wide_keys[5::2, 10:30]
    options = {
        "query_ids": torch.arange(80)[::2] % 5,
        "carried_ids": torch.arange(120)[::3] % 4 - 1,
        "key_ids": torch.arange(86)[::2] % 7,
        "key_labels": torch.arange(86)[::2] + 2**50,
        "chain_ids": torch.arange(80)[::2],
        "temperature": torch.linspace(0.1, 1, 80)[::2],
        "log_proposal": normal(9, 86)[::2],
    }
    state = MHState(*(field[::2] for field in chains_at(80)))
    assert_steps(backend, queries, keys, state, **options)
    one = MHState(state.key[:1].expand(40), state.score[:1].expand(40))
    temperature = {"temperature": torch.tensor(0.2)}
    assert_steps(backend, queries[:1].expand(40, 20), keys, one, **options | temperature)


def test_scores_far_apart(backend):
    for temperature in (1e-2, 1e-4, 1e-30):
        queries, keys = unit(33, 16, seed=1), unit(70, 16, seed=2)
        state = MHState(torch.arange(33), torch.linspace(-1, 1, 33) / temperature)
        assert_steps(backend, queries, keys, state, temperature=temperature)
    huge = unit(33, 16, seed=1) * 1e19, unit(70, 16, seed=2) * 1e19
    result = resample(backend, *huge, MHState(torch.arange(33), torch.full((33,), 3e38)), temperature=1.0)
    assert (result.position == -1).all() and (result.carried_weight == 1).all()


def test_many_keys_and_chains_on_all_cores(backend):
    """Large enough that threads share the work."""
    for n, m in ((3, 1500), (100, 400)):
        options = {"log_proposal": normal(9, m), "query_ids": torch.arange(n), "key_ids": torch.arange(m) // 3}
        assert_steps(backend, unit(n, 8, seed=1), unit(m, 8, seed=2), chains_at(n), **options)


def test_log_proposal_is_taken_off_before_a_score_is_looked_at(backend):
    """A score that is not finite only then is no candidate, either."""
    queries, keys = torch.full((2, 1), 3e38), torch.tensor([[1.0], [0.5], [0.0]])
    log_proposal = torch.tensor([-3e38, 0.0, 0.0])
    options = {"temperature": 1.0, "log_proposal": log_proposal}
    result = resample(backend, queries, keys, emc2.init_state(2), **options)
    assert result.position.tolist() == [1, 1]
    torch.testing.assert_close(result.lse, torch.full((2,), 1.5e38))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["some", "a block", "all but one", "all"])
def test_a_key_with_an_infinite_log_proposal_is_one_that_is_excluded(backend, pattern, dtype):
    n, m = 20, 150
    queries, keys, state = unit(n, 9, seed=1, dtype=dtype), unit(m, 9, seed=2, dtype=dtype), chains_at(n)
    out = (
        torch.arange(m) % 3 == 0
        if pattern == "some"
        else torch.arange(m) < {"a block": 70, "all": m}.get(pattern, m - 1)
    )
    law, own = normal(9, m), {"key_labels": torch.arange(m), "chain_ids": torch.arange(n)}
    ids = {"query_ids": torch.full((n,), 4), "key_ids": torch.where(out, 4, 5)}
    found = resample(backend, queries, keys, state, **own, log_proposal=law.masked_fill(out, INF))
    assert_identical(found, resample(backend, queries, keys, state, **own, **ids, log_proposal=law))
    assert not out[found.position[found.position >= 0]].any()
    left = resample(
        backend, queries, keys[~out], state, **own | {"key_labels": torch.arange(m)[~out]}, log_proposal=law[~out]
    )
    torch.testing.assert_close((found.lse, found.carried_weight), (left.lse, left.carried_weight))


def test_counters_may_be_tensors(backend):
    queries, keys, state, options = everything()
    expected = resample(backend, queries, keys, state, **options)
    options |= {"seed": torch.tensor(-3), "step": torch.tensor(2**32 - 1)}
    assert_identical(resample(backend, queries, keys, state, **options), expected)


def test_a_tuple_is_a_state(backend):
    queries, keys, state, options = everything()
    expected = resample(backend, queries, keys, state, **options)
    assert_identical(resample(backend, queries, keys, tuple(state), **options), expected)


def test_chains_seeds_and_steps_have_draws_of_their_own(backend):
    """Of the keys, and of what is carried: chains that share a row's candidates and differ in one of the three."""
    n = 64
    queries, keys, state = torch.zeros(n, 3), torch.zeros(40, 3), MHState(torch.zeros(n).long(), torch.full((n,), 3.7))
    options = {"seed": 1, "step": 2, "chain_ids": torch.arange(n)}
    changes = [{}, {"seed": 2}, {"seed": 1 + 2**32}, {"step": 3}, {"chain_ids": torch.arange(n) + 2**32}]
    drawn = [resample(backend, queries, keys, state, **options | change).position for change in changes]
    assert len({tuple(positions.tolist()) for positions in drawn}) == len(changes)
    assert all(10 < (positions == -1).sum() < 54 for positions in drawn)  # half of them, by the scores
    stayed = torch.stack([positions == -1 for positions in drawn])
    assert len({tuple(each.tolist()) for each in stayed}) == len(changes)


# What must not change a draw.


def test_blocks_of_rows_are_the_whole(monkeypatch):
    """Of the reference, whose memory they bound: each has its rows' own ids, temperatures and noise."""
    queries, keys, state, options = everything()
    whole = resample("reference", queries, keys, state, **options)
    monkeypatch.setattr(lse, "BLOCK_ELEMENTS", 4 * len(keys))
    assert_identical(assert_steps("reference", queries, keys, state, **options).position, whole.position)


def test_a_step_depends_neither_on_row_order_nor_on_other_rows(backend):
    queries, keys, state, options = everything()
    whole = resample(backend, queries, keys, state, **options)
    generator = torch.Generator().manual_seed(1)
    of_rows = ("temperature", "chain_ids", "query_ids", "carried_ids")
    for size in (37, 20, 3, 1):
        rows = torch.randperm(37, generator=generator)[:size]
        some = {name: value[rows] if name in of_rows else value for name, value in options.items()}
        part = resample(backend, queries[rows], keys, MHState(state.key[rows], state.score[rows]), **some)
        assert_identical((part.position, part.state.key), (whole.position[rows], whole.state.key[rows]))
        torch.testing.assert_close(part.state.score, whole.state.score[rows])
        torch.testing.assert_close(part.lse, whole.lse[rows])


def test_noise_goes_by_a_keys_position_alone(backend):
    """Where all scores are equal: not by its row, its id or its label, nor by how many keys there are."""
    n, m = 50, 41
    state = MHState(torch.full((n,), -5), torch.zeros(n))
    options = {"temperature": torch.linspace(0.1, 1, n), "chain_ids": torch.arange(n) + 2**33}
    fewer = resample(backend, torch.zeros(n, 4), normal(0, m, 4), state, **options)
    assert_identical(fewer.state.key, torch.where(fewer.position < 0, -5, fewer.position))
    ids = {
        "key_ids": torch.arange(90) * 7 % 11,
        "key_labels": torch.arange(90) - 900,
        "query_ids": torch.full((n,), 99),
    }
    more = resample(backend, torch.zeros(n, 4), normal(1, 90, 4), state, **options, **ids)
    among = more.position < m
    assert 10 < among.sum() < 40
    assert_identical(more.position[among], fewer.position[among])
    assert_identical(more.state.key, torch.where(more.position < 0, -5, more.position - 900))


def test_ties_go_to_what_is_carried_then_to_the_lowest_position(monkeypatch):
    """Equal scores with equal noise, in the reference; elsewhere two equal words are a chance of 2^-32."""
    words = rng.words
    monkeypatch.setattr(rng, "words", lambda *args, **options: torch.full_like(words(*args, **options), 2**31))
    queries, keys = torch.arange(12.0).view(4, 3), torch.ones(9, 3)
    scores, options = queries.sum(1) / 0.25, {"temperature": 0.25}  # exact
    state = MHState(torch.arange(4) + 70, scores.where(torch.arange(4) < 2, -INF))
    result = resample("reference", queries, keys, state, **options)
    assert result.position.tolist() == [-1, -1, 0, 0] and result.state.key.tolist() == [70, 71, 0, 0]
    own = (torch.arange(8).view(4, 2) + 70, scores[:, None].repeat(1, 2))
    own[1][1, 0], own[1][2] = NAN, NAN
    drawn = operator_step("reference", queries, keys, own, **options)
    assert drawn.position.tolist() == [-1, -2, 0, -1] and drawn.key.tolist() == [70, 73, 0, 76]
    for parts in itertools.permutations(shards("reference", queries, keys, own, (3, 5), **options)):
        assert_identical(merged(parts)[:3], drawn[:3])


# The operator: several candidates of a chain's own, and shards of the keys.


def handed_over(seed):
    """As isir_step does it."""
    return checks.counter("seed", seed, 64, None)


def operator_step(backend, queries, keys, own, *, seed=7, step=3, first_key=0, **options):
    options = {"temperature": 0.2, "query_ids": None, "key_ids": None} | options
    scores = ScoreParams(queries, keys, **{name: options[name] for name in ScoreParams._fields if name in options})
    named = (options.get("key_labels"), options.get("chain_ids"))
    return Drawn(*ops.isir_step(scores, CarriedParams(*own, *named, handed_over(seed), step, first_key), backend))


def own_of(n, count, seed=13):
    """Candidates that chains bring along; some are none."""
    own = torch.arange(n * count).view(n, count) + 10**6, normal(seed, n, count) * 2 + 3
    for place, score in zip(range(1, n * count, 5), itertools.cycle(NOT_STARTED)):
        own[1].view(-1)[place] = score
    return own


def assert_drawn(drawn, expected, error):
    assert drawn.position.dtype == drawn.key.dtype == torch.int64 and drawn.value.dtype == torch.float64
    clear = expected.margin > error
    assert clear.double().mean() >= 0.9
    assert_identical([drawn.position[clear], drawn.key[clear]], [expected.position[clear], expected.key[clear]])
    found = [drawn.score[clear].double(), drawn.value, drawn.lse.double()]
    torch.testing.assert_close(found, [expected.score[clear], expected.value, expected.lse], rtol=1e-6, atol=error)


@pytest.mark.parametrize(
    ("count", "first_key"), [(0, 3), (1, 2**31 + 5), (2, 0), (3, 2**33 - 45), (4, 0)], ids=lambda number: f"{number}"
)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_several_candidates_of_a_chains_own(backend, count, first_key):
    queries, keys, _, options = everything()
    own = own_of(37, count)
    for labels in ({}, {"key_labels": None, "key_ids": None, "query_ids": None, "carried_ids": None}):
        drawn = operator_step(backend, queries, keys, own, first_key=first_key, **options | labels)
        given = {name: value for name, value in (options | labels).items() if value is not None}
        expected = oracle.resample(queries, keys, own, first_key=first_key, **given)
        assert_drawn(drawn, expected, error_of(options))
        assert {*range(-count, 0)} <= {*drawn.position.tolist()}


def shards(backend, queries, keys, own, cuts, **options):
    """One step in pieces: of what the chains bring along, and of the keys between the cuts."""
    nothing = own[0][:, :0], own[1][:, :0]
    of_keys = {name for name in ("key_ids", "key_labels", "log_proposal") if options.get(name) is not None}
    parts = []
    for kept, (begin, end) in ((own, (0, 0)), *((nothing, cut) for cut in itertools.pairwise((0, *cuts, len(keys))))):
        local = {name: options[name][begin:end] for name in of_keys}
        parts.append(operator_step(backend, queries, keys[begin:end], kept, first_key=begin, **options | local))
    return parts


def merged(parts):
    return functools.reduce(Drawn.or_better, parts)


@pytest.mark.parametrize("cuts", [(1,), (8, 9), (3, 17, 18, 40), (0, 45)])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_shards_of_the_keys_are_the_whole(backend, cuts):
    queries, keys, _, options = everything()
    queries[7:9] = NAN  # a row without keys, and one without anything
    own = own_of(37, 3)
    own[1][7] = NAN
    whole = operator_step(backend, queries, keys, own, **options)
    expected = oracle.resample(queries, keys, own, **options)
    assert_drawn(whole, expected, error_of(options))
    parts = shards(backend, queries, keys, own, cuts, **options)
    for order in (parts, parts[::-1]):
        assert_drawn(merged(order), expected, error_of(options))
        assert_identical(merged(order).position, whole.position)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_step_from_nowhere_is_the_draw_of_gumbel_sample(backend):
    """Of the same noise; both with all that scores can have."""
    queries, keys, _, options = everything()
    drawn = operator_step(backend, queries, keys, own_of(37, 0), **options)
    fields = {name: options[name] for name in ScoreParams._fields if name in options}
    draw = DrawParams(options["chain_ids"], handed_over(options["seed"]), options["step"], 2)
    sampled = ops.gumbel_sample(ScoreParams(queries, keys, **fields), draw, backend)
    assert_identical(sampled[:, 0], drawn.position)
    assert not torch.equal(sampled[:, 1], drawn.position)


# Little or nothing to draw from.


@pytest.mark.parametrize("backend", RUNNABLE)
class TestDegenerate:
    STATE = MHState(torch.tensor([3, -1, 7, 8, 9]), torch.tensor([0.5, -INF, -2.0, NAN, INF]))
    STARTED = torch.tensor([True, False, True, False, False])

    def assert_stays(self, result):
        assert_identical(result.position, torch.full((5,), -1))
        assert_identical(result.state.key, torch.tensor([3, -1, 7, -1, -1]))
        assert_identical(result.state.score, torch.tensor([0.5, -INF, -2.0, -INF, -INF]))
        assert_identical(result.lse.isfinite(), self.STARTED)
        torch.testing.assert_close(result.lse, result.state.score)
        torch.testing.assert_close(result.carried_weight, self.STARTED.float())

    def test_no_keys(self, backend):
        for temperature in (0.2, torch.full((5,), 0.2)):
            self.assert_stays(resample(backend, unit(5, 4), unit(0, 4), self.STATE, temperature=temperature))
        empty = {"key_ids": torch.arange(0), "carried_ids": torch.arange(5), "log_proposal": torch.ones(0)}
        self.assert_stays(resample(backend, unit(5, 4), unit(0, 4), self.STATE, **empty))

    @pytest.mark.parametrize("size", [3, 150])
    def test_no_candidates(self, backend, size):
        queries, keys, ids = unit(5, 4), unit(size, 4, seed=1), {"key_ids": torch.full((size,), 4)}
        for name in ("query_ids", "carried_ids"):
            self.assert_stays(resample(backend, queries, keys, self.STATE, **ids, **{name: torch.full((5,), 4)}))
        for value in (NAN, INF, -INF):
            self.assert_stays(resample(backend, queries, keys * value, self.STATE))
        half = {"query_ids": torch.full((5,), 4), "carried_ids": torch.full((5,), 9)}
        ids["key_ids"][1::2] = 9
        self.assert_stays(resample(backend, queries, keys, self.STATE, **ids, **half))

    def test_no_rows(self, backend):
        for m in (4, 0):
            for temperature in (0.2, torch.ones(0)):
                ids = {"key_ids": torch.arange(m), "query_ids": torch.arange(0), "carried_ids": torch.arange(0)}
                result = resample(backend, unit(0, 3), unit(m, 3), emc2.init_state(0), temperature=temperature, **ids)
                fields = (result.position, *result.state, result.lse, result.carried_weight)
                assert [field.shape for field in fields] == [(0,)] * 5

    @pytest.mark.parametrize("score", NOT_STARTED)
    def test_a_state_that_has_not_started_is_no_candidate(self, backend, score):
        queries, keys = unit(40, 8, seed=1), unit(9, 8, seed=2)
        state = MHState(torch.arange(40), torch.full((40,), score))
        result = assert_steps(backend, queries, keys, state)
        assert (result.position >= 0).all() and not result.carried_weight.any()
        assert_identical(result, resample(backend, queries, keys, emc2.init_state(40)))
        torch.testing.assert_close(result.lse, emc2.contrastive_lse(queries, keys, temperature=0.2, backend=backend))

    def test_operands_without_components(self, backend):
        queries, keys, state = torch.zeros(30, 0), torch.zeros(20, 0), MHState(torch.arange(30), torch.ones(30))
        assert_steps(backend, queries, keys, state, temperature=torch.full((30,), 0.1))

    def test_inputs_are_left_alone(self, backend):
        queries, keys, state, options = everything()
        given = {"queries": queries, "keys": keys, "state": tuple(state), **options}
        before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        before["state"] = tuple(field.clone() for field in state)
        result = resample(backend, queries, keys, state, **options)
        result.position.zero_(), result.state.key.zero_(), result.state.score.zero_(), result.lse.zero_()
        assert_identical(given, before)
