"""The CPU core's steps over all keys, and a second id of a row and the log of the proposal's law in all that looks at
every key: against plain formulas in float64, by the operators, whose arguments nobody has looked at."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_identical, chi_square, named_error, relative_rms, with_rows
from oracle import unit
from test_cpu_edges import apart
from torch import Tensor

import emc2_kernels as emc2
from emc2_kernels import ops, rng
from emc2_kernels.backends.params import CarriedParams, DrawParams, ScoreParams
from emc2_kernels.lse import differentiable_lse

INF, NAN = torch.inf, torch.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On and beside the edges of a vector (4, 8 or 16 rows), of a group, and of a tile (60 keys or more).
SIZES = [(1, 1, 1), (5, 3, 2), (8, 4, 16), (16, 59, 17), (17, 60, 64), (31, 61, 33), (33, 129, 100), (65, 517, 8)]
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def scores_of(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, **changes: object) -> ScoreParams:
    """With all that scores can have. Ids past 2^32, some of which agree in half of their bits only."""
    generator = torch.Generator().manual_seed(n + m)
    row_ids = [torch.randint(0, 6, (n,), generator=generator) + (1 << 33) for _ in range(2)]
    key_ids = torch.randint(0, 8, (m,), generator=generator) + (1 << 33)
    key_ids[::9] -= 1 << 32
    temperature = torch.rand(n, generator=generator) * 0.5 + 0.1
    law = torch.randn(m, generator=generator)
    operands = unit(n, d, seed=1, dtype=dtype), unit(m, d, seed=2, dtype=dtype)
    return ScoreParams(*operands, temperature, row_ids[0], key_ids, False, row_ids[1], law)._replace(**changes)


def carried_of(n: int, m: int, own: int, **changes: object) -> CarriedParams:
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(n, own, generator=generator) * 2
    score[::5] = torch.tensor([NAN, INF, -INF, NAN, INF])[:own]
    score[1::5, :1] = -INF
    key, labels = torch.arange(n * own).view(n, own) + 10**12, torch.arange(m) * 10**10
    chains = torch.randperm(n, generator=generator) + 2**40 - n
    return CarriedParams(key, score, labels, chains, 2**64 - 3, 2**32 - 1, 0)._replace(**changes)


def step(backend: str, scores: ScoreParams, carried: CarriedParams) -> Step:
    arguments = ops.isir_step.flatten((scores, carried, backend))
    return ops.isir_step.overload(*arguments)


def wide_scores(scores: ScoreParams, queries: Tensor, keys: Tensor, temperature: float | Tensor) -> Tensor:
    """(n, m) by the formula, of operands that are float64 and may want a gradient."""
    values = queries @ keys.T / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    values = values if scores.log_proposal is None else values - scores.log_proposal.double()
    for ids in (scores.query_ids, scores.carried_ids):
        if ids is not None:
            values = values.masked_fill(ids[:, None] == scores.key_ids, -INF)
    return values.masked_fill(~values.isfinite(), -INF)


def wide(scores: ScoreParams) -> Tensor:
    temperature = scores.temperature.double() if isinstance(scores.temperature, Tensor) else scores.temperature
    return wide_scores(scores, scores.queries.double(), scores.keys.double(), temperature)


def book(scores: ScoreParams, carried: CarriedParams) -> tuple[Step, Tensor]:
    """The step in float64, and by how much the best candidate beats the next."""
    n, m, own = len(scores.queries), len(scores.keys), carried.key.shape[1]
    brought = carried.score.double().masked_fill(~carried.score.isfinite(), -INF)
    candidates = torch.cat((brought, wide(scores)), 1)
    chains = torch.arange(n) if carried.chain_ids is None else carried.chain_ids
    draw = {"seed": carried.seed, "step": carried.step, "dtype": torch.float64}
    first = carried.first_key
    noise = rng.gumbel(chains, range(own), stream=4, **draw), rng.gumbel(chains, range(first, first + m), **draw)
    values = candidates + torch.cat(noise, 1)
    places = torch.cat((-1 - torch.arange(own), torch.arange(m) + first))
    names = torch.arange(m) + first if carried.key_labels is None else carried.key_labels
    names = torch.cat((carried.key, names.expand(n, m)), 1)
    position, key, score = torch.full((n,), -1), torch.full((n,), -1), torch.full((n,), -INF).double()
    value, margin = score.clone(), torch.full((n,), INF).double()
    for i in range(n if own + m else 0):
        column = int(values[i].argmax())
        if values[i, column] > -INF:
            position[i], key[i], score[i] = places[column], names[i, column], candidates[i, column]
            value[i] = values[i, column]
            margin[i] = value[i] - max((float(v) for j, v in enumerate(values[i]) if j != column), default=-INF)
    return (position, key, score, torch.logsumexp(candidates, 1), value), margin


def assert_by_the_book(scores: ScoreParams, carried: CarriedParams, backend: str = "cpu", least: float = 0.9) -> Step:
    """The position wherever no rounding can decide it; of all else, float32's error."""
    found = step(backend, scores, carried)
    expected, margin = book(scores, carried)
    assert [part.dtype for part in found] == [torch.int64] * 2 + [torch.float32] * 2 + [torch.float64]
    error = 3e-6 / min(0.2, float(torch.as_tensor(scores.temperature).min())) if len(margin) else 0
    clear = margin > error
    assert not len(clear) or clear.float().mean() >= least
    assert_identical([part[clear] for part in found[:2]], [part[clear] for part in expected[:2]])
    close = {"rtol": 1e-6, "atol": error}
    torch.testing.assert_close(found[2][clear].double(), expected[2][clear], **close)
    torch.testing.assert_close(found[3].double(), expected[3], **close)
    torch.testing.assert_close(found[4], expected[4], **close)
    return found


@pytest.mark.parametrize("own", range(5))
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_steps_follow_the_formula(n, m, d, own):
    for first in (0, 1, 6, 2**32 + 3):
        assert_by_the_book(scores_of(n, m, d), carried_of(n, m, own, first_key=first))
    found, expected = (step(b, scores_of(n, m, d), carried_of(n, m, own)) for b in ("cpu", "reference"))
    clear = (found[4] - expected[4]).abs() < 1e-4  # of two close ones either may win
    assert_identical(found[0][clear], expected[0][clear])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 19, 128, 600])
def test_dtypes(dtype, d):
    assert_by_the_book(scores_of(40, 70, d, dtype), carried_of(40, 70, 1))


ABSENT = [(), ("query_ids",), ("carried_ids",), ("query_ids", "carried_ids"), ("log_proposal",)]
ABSENT += [("query_ids", "key_ids", "carried_ids"), ("query_ids", "key_ids", "carried_ids", "log_proposal")]


@pytest.mark.parametrize("absent", ABSENT, ids=lambda names: " ".join(names) or "none")
def test_what_scores_may_be_without(absent):
    changes = dict.fromkeys(absent)
    scores = scores_of(40, 90, 7, **changes)
    assert_by_the_book(scores, carried_of(40, 90, 2))
    assert_by_the_book(scores._replace(temperature=0.3), carried_of(40, 90, 1, key_labels=None, chain_ids=None))
    assert_lse(scores)
    assert_draws(scores)


@pytest.mark.parametrize("cuts", [(0, 61, 250), (0, 1, 2, 3, 66, 66, 131, 250)], ids=str)
def test_parts_of_the_keys_make_the_whole(cuts):
    """The value says which part's state it is, the chain's own candidates being in one of them only."""
    scores, carried = scores_of(37, 250, 9), carried_of(37, 250, 1, first_key=2**31 - 5)
    whole = step("cpu", scores, carried)
    parts = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        vectors = ("key_ids", "log_proposal")
        part = scores._replace(
            keys=scores.keys[begin:end], **{name: getattr(scores, name)[begin:end] for name in vectors}
        )
        mine = carried._replace(key_labels=carried.key_labels[begin:end], first_key=carried.first_key + begin)
        if begin:
            mine = mine._replace(key=carried.key[:, :0], score=carried.score[:, :0])
        parts.append(step("cpu", part, mine))
    position, key, score, lse, value = (torch.stack(part) for part in zip(*parts, strict=True))
    best = value.max(0)
    states = [part.gather(0, best.indices[None])[0] for part in (position, key, score)]
    assert_identical((*states, best.values), (*whole[:3], whole[4]))
    torch.testing.assert_close(torch.logsumexp(lse, 0), whole[3])


def test_vectors_may_lie_apart():
    scores, carried = scores_of(40, 90, 7), carried_of(40, 90, 2)
    expected = step("cpu", scores, carried)
    wide_queries, wide_keys = torch.full((80, 3, 24), NAN), torch.full((100, 20), NAN)
    queries, keys = wide_queries[::2, 1, 5:12], wide_keys[4:94, 10:17]
    queries.copy_(scores.queries), keys.copy_(scores.keys)
    assert_identical(step("cpu", scores._replace(queries=queries, keys=keys), carried), expected)
    for given, names in (
        (scores, ("temperature", "query_ids", "key_ids", "carried_ids", "log_proposal")),
        (carried, ("key", "score", "key_labels", "chain_ids")),
    ):
        for name in names:
            changed = given._replace(**{name: apart(getattr(given, name))})
            pair = (changed, carried) if given is scores else (scores, changed)
            assert_identical(step("cpu", *pair), expected)


def test_one_temperature_in_memory():
    scores, carried = scores_of(40, 90, 7), carried_of(40, 90, 2)
    common = scores._replace(temperature=torch.tensor(0.3).expand(40))
    assert_identical(step("cpu", common, carried), step("cpu", scores._replace(temperature=0.3), carried))


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_values_go_to_the_chains_own_and_then_to_the_lowest_position(threads):
    """Of scores so large that any noise is rounded away."""
    n, m = 40, 130
    keys = torch.full((m, 1), 1.0)
    keys[77:], keys[:3] = 1e30, 2.0
    scores = ScoreParams(torch.ones(n, 1), keys, 1.0, None, None)
    own = torch.full((n, 3), 1e30)
    own[:, 0] = 1.0
    own[::2] = -1e30
    carried = CarriedParams(torch.arange(3).expand(n, 3), own, None, None, 1, 2, 5)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        position, key, score, _, value = step("cpu", scores, carried)
    finally:
        torch.set_num_threads(torch_threads)
    assert (position[::2] == 5 + 77).all() and (key[::2] == 82).all()
    assert (position[1::2] == -2).all() and (key[1::2] == 1).all()
    assert (score == torch.tensor(1e30)).all() and (value == score.double()).all()


def test_large_scores_are_exact():
    """Components are small integers, so that similarities are exact, and many are equal. Which of two sums with noise
    is larger, float32 with its steps of 0.25 there cannot say."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(-1, 2, (rows, 3), generator=generator).float() for rows in (200, 150))
    own = torch.randint(0, 4, (200, 4), generator=generator).float() * 2**20
    carried = CarriedParams(torch.zeros(200, 4).long(), own, None, None, 1, 2, 0)
    position, _, score, _, value = step("cpu", ScoreParams(queries, keys, 2.0**-20, None, None), carried)
    candidates = torch.cat((own, queries @ keys.T * 2**20), 1)
    draw = {"seed": 1, "step": 2, "dtype": torch.float64}
    noise = rng.gumbel(torch.arange(200), range(4), stream=4, **draw), rng.gumbel(torch.arange(200), range(150), **draw)
    best = (candidates + torch.cat(noise, 1)).max(1)
    assert torch.equal(position, torch.cat((-1 - torch.arange(4), torch.arange(150)))[best.indices])
    assert torch.equal(score, candidates.gather(1, best.indices[:, None])[:, 0])
    torch.testing.assert_close(value, best.values, rtol=0, atol=1e-8)
    assert 20 < (position < 0).sum() < 180 and (candidates == score[:, None]).sum() > 600


@pytest.mark.parametrize("own", [0, 1, 4])
def test_rows_without_candidates(own):
    n, m = 37, 70
    scores = scores_of(n, m, 5, query_ids=torch.zeros(n).long(), key_ids=torch.zeros(m).long(), carried_ids=None)
    carried = carried_of(n, m, own, score=torch.full((n, own), NAN))
    nothing = [torch.full((n,), value) for value in (-1, -1, -INF, -INF)]
    nothing.append(torch.full((n,), -INF).double())
    assert_identical(step("cpu", scores, carried), tuple(nothing))
    no_keys = scores._replace(keys=scores.keys[:0], key_ids=torch.zeros(0).long(), log_proposal=None)
    assert_identical(step("cpu", no_keys, carried._replace(key_labels=None)), tuple(nothing))
    bad_keys = scores._replace(keys=with_rows(scores.keys, slice(None), NAN), query_ids=None)
    assert_identical(step("cpu", bad_keys, carried), tuple(nothing))
    assert [len(part) for part in step("cpu", scores_of(0, m, 5), carried_of(0, m, own))] == [0] * 5
    alone = scores._replace(query_ids=with_rows(scores.query_ids, 7, 1))
    position = step("cpu", alone, carried)[0]
    assert (position[7] >= 0).all() and (position[torch.arange(n) != 7] == -1).all()
    if own:
        only = carried._replace(score=with_rows(carried.score, (9, own - 1), 0.5))
        position, key, score, lse, _ = step("cpu", scores, only)
        assert (position[9], key[9], score[9], lse[9]) == (-own, carried.key[9, own - 1], 0.5, 0.5)


def test_scores_far_apart():
    for temperature in (1e-2, 1e-4, 1e-30):
        assert_by_the_book(scores_of(33, 70, 16, temperature=temperature), carried_of(33, 70, 1))
    huge = scores_of(33, 70, 16, temperature=1.0, log_proposal=None)
    huge = huge._replace(queries=huge.queries * 1e19, keys=huge.keys * 1e19)
    assert_by_the_book(huge, carried_of(33, 70, 1))


def test_a_row_has_one_result():
    """Whatever the number of threads, and whatever rows stand beside it."""
    scores, carried = scores_of(300, 500, 40), carried_of(300, 500, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = step("cpu", scores, carried)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert_identical(step("cpu", scores, carried), expected)
        for rows in (slice(3, 4), slice(250, None), torch.randperm(300, generator=torch.Generator().manual_seed(0))):
            some = scores.slice_rows(rows)
            names = ("key", "score", "chain_ids")
            mine = carried._replace(**{name: getattr(carried, name)[rows] for name in names})
            assert_identical(step("cpu", some, mine), tuple(part[rows] for part in expected))
    finally:
        torch.set_num_threads(before)


def test_states_follow_the_softmax():
    rows, keys = 100_000, unit(11, 6, seed=8)
    query, own = unit(1, 6, seed=7), torch.tensor([1.5, NAN, -0.5])
    law = torch.linspace(-0.5, 0.5, 11)
    scores = ScoreParams(query.expand(rows, -1), keys, 0.3, None, None, log_proposal=law)
    carried = CarriedParams(torch.zeros(rows, 3).long(), own.repeat(rows, 1), None, None, 7, 3, 0)
    position, _, _, lse, _ = step("cpu", scores, carried)
    expected = torch.cat((own.flip(0), keys @ query[0] / 0.3 - law)).double()
    expected = torch.softmax(expected.nan_to_num(-INF), 0)
    counts = (position + 3).bincount(minlength=14)
    assert counts[1] == 0
    there = torch.arange(14) != 1
    assert chi_square(counts[there].double(), expected[there]) > 1e-4
    wrong = step("cpu", scores._replace(log_proposal=law * 0.9), carried)[0]
    assert chi_square((wrong + 3).bincount(minlength=14)[there].double(), expected[there]) < 1e-6
    assert lse.unique().numel() == 1
    # Noise of what a chain brings along is not that of the keys, nor that of another step.
    other = step("cpu", scores, carried._replace(step=4))[0]
    joint = (position + 3).bincount(minlength=14).double() / rows
    both = (position == other).double().mean()
    assert abs(both - joint.square().sum()) < 6 * math.sqrt(joint.square().sum() / rows)


BAD = {
    "chain_ids": ({"chain_ids": torch.arange(5) - 1}, {}, "chain_ids"),
    "chain_ids past 2^40": ({"chain_ids": torch.arange(5) + 2**40 - 4}, {}, "chain_ids"),
    "step": ({"step": torch.tensor(2**32)}, {}, "step"),
    "temperature": ({}, {"temperature": torch.tensor([1.0, 1, 1, 1, 0])}, "temperature"),
    "log_proposal": ({}, {"log_proposal": torch.tensor([0.0, INF, -INF])}, "log_proposal"),
    "five candidates": ({"key": torch.ones(5, 5).long(), "score": torch.ones(5, 5)}, {}, "state.key"),
    "first_key": ({"first_key": 2**33 - 2}, {}, "first_key"),
    "first_key below 0": ({"first_key": -1}, {}, "first_key"),
    "carried_ids": ({}, {"carried_ids": torch.arange(4)}, "carried_ids"),
}


@pytest.mark.parametrize(("of_chains", "of_scores", "name"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(of_chains, of_scores, name):
    scores, carried = scores_of(5, 3, 2, **of_scores), carried_of(5, 3, 1, **of_chains)
    with named_error(ValueError, name):
        step("cpu", scores, carried)


def test_laws_that_are_not_finite_are_named_wherever_they_come():
    scores = scores_of(5, 3, 2, log_proposal=torch.tensor([0.0, NAN, 0]))
    with named_error(ValueError, "log_proposal"):
        differentiable_lse(scores, "cpu")
    with named_error(ValueError, "log_proposal"):
        draws("cpu", scores, None, 1)


# The other primitives that look at every key.


def value_and_gradients(scores: ScoreParams, weights: Tensor, function: object) -> list[Tensor]:
    """Of a weighted sum of log-sum-exps: in queries, in keys unless they are the queries, in temperatures."""
    leaves = {"queries": scores.queries.detach().clone().requires_grad_()}
    leaves["keys"] = leaves["queries"] if scores.symmetric else scores.keys.detach().clone().requires_grad_()
    if isinstance(scores.temperature, Tensor):
        leaves["temperature"] = scores.temperature.detach().clone().requires_grad_()
    lse = function(scores._replace(**leaves))
    started = lse > -INF
    inputs = [leaf for name, leaf in leaves.items() if not (scores.symmetric and name == "keys")]
    return [lse.detach(), *torch.autograd.grad((lse[started] * weights[started]).sum(), inputs)]


def assert_lse(scores: ScoreParams, tolerance: float = 1e-5) -> None:
    """Values and gradients against the formula's in float64."""

    def formula(given: ScoreParams) -> Tensor:
        return torch.logsumexp(wide_scores(given, given.queries, given.keys, given.temperature), 1)

    widened = {name: getattr(scores, name).double() for name in ("queries", "keys")}
    if isinstance(scores.temperature, Tensor):
        widened["temperature"] = scores.temperature.double()
    weights = torch.linspace(-1, 2, len(scores.queries))
    found = value_and_gradients(scores, weights, lambda given: differentiable_lse(given, "cpu"))
    expected = value_and_gradients(scores._replace(**widened), weights.double(), formula)
    assert torch.equal(found[0].isfinite(), expected[0].isfinite())
    finite = expected[0].isfinite()
    found[0], expected[0] = found[0][finite], expected[0][finite]
    for number, (result, exact) in enumerate(zip(found, expected, strict=True)):
        assert relative_rms(result, exact) <= (tolerance if number else 1e-5) or torch.equal(result.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_log_sum_exps_and_gradients(n, m, d, dtype):
    assert_lse(scores_of(n, m, d, dtype), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 2), (37, 9), (150, 7), (300, 33)])
def test_queries_that_are_the_keys(n, d, dtype):
    """Each pair in both roles: a query's second id, and a key's law, go by the role."""
    scores = scores_of(n, n, d, dtype)
    # Every row has its own, since which rows a second id excludes is no symmetric relation.
    ids, carried = torch.arange(n) // 2 + (1 << 40), (torch.arange(n) * 5 % (n + 2)) // 2 + (1 << 40)
    same = scores._replace(keys=scores.queries, query_ids=ids, key_ids=ids, symmetric=True, carried_ids=carried)
    for changes in ({}, {"carried_ids": None}, {"log_proposal": None}, {"temperature": 0.2}):
        assert_lse(same._replace(**changes), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("n", "m"), [(300, 700), (130, 5001)])
def test_tiles(n, m):
    """Several blocks of rows and tiles of keys, also where keys are the rows, and a last one that is narrower."""
    assert_lse(scores_of(n, m, 9))


def test_keys_that_are_not_finite_are_left_out():
    scores = scores_of(40, 70, 9)
    bad = scores._replace(keys=with_rows(scores.keys, [3, 11, 69], NAN))
    weights = torch.linspace(-1, 2, 40)
    found = value_and_gradients(bad, weights, lambda g: differentiable_lse(g, "cpu"))
    assert not found[2][[3, 11, 69]].any()
    for far in (3e38, INF):
        left_out = scores._replace(log_proposal=with_rows(scores.log_proposal, [3, 11, 69], far))
        assert_identical(value_and_gradients(left_out, weights, lambda g: differentiable_lse(g, "cpu")), found)


def draws(backend: str, scores: ScoreParams, chain_ids: Tensor | None, count: int) -> Tensor:
    return ops.gumbel_sample.overload(*ops.gumbel_sample.flatten((scores, DrawParams(chain_ids, 5, 6, count), backend)))


def assert_draws(scores: ScoreParams) -> None:
    chains = torch.arange(len(scores.queries)) * 2**33
    found = draws("cpu", scores, chains, 3)
    values = wide(scores)
    for sample in range(3):
        noise = rng.gumbel(chains, range(values.shape[1]), seed=5, step=6, sample=sample, dtype=torch.float64)
        best = (values + noise).topk(2, 1)
        clear = (best.values[:, 0] - best.values[:, 1]) > 3e-5
        assert clear.float().mean() > 0.9
        assert_identical(found[clear, sample], best.indices[clear, 0])


@pytest.mark.parametrize(("n", "m", "d"), [size for size in SIZES if size[1] > 50])
def test_draws(n, m, d):
    assert_draws(scores_of(n, m, d))


def test_a_sweeps_log_sum_exp_is_of_similarities():
    scores = scores_of(20, 70, 5)
    options = {"temperature": 0.3, "query_ids": scores.query_ids, "key_ids": scores.key_ids, "backend": "cpu"}
    lse = emc2.contrastive_lse(scores.queries, scores.keys, **options)
    options |= {"seed": 1, "step": 2, "return_lse": True}
    for law in (None, scores.log_proposal):
        walk = emc2.mh_step(scores.queries, scores.keys, emc2.init_state(20), log_proposal=law, **options)
        assert_identical(walk.lse, lse)
