"""The log-sum-exp of isir_step, and of scores with all their options, on every backend: against plain formulas in
float64, and under torch's machinery."""

import pytest
import torch
from helpers import COMPILED, RUNNABLE, Plain, assert_identical, normal, relative_rms, with_rows
from oracle import unit

import emc2_kernels as emc2
from emc2_kernels import MHState
from emc2_kernels.backends.params import CarriedParams, ScoreParams
from emc2_kernels.backends.reference import lse as reference_lse
from emc2_kernels.isir import differentiable_step
from emc2_kernels.lse import differentiable_lse, mean_similarity

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the relative RMS
SIZES = [(1, 1, 1), (5, 3, 2), (16, 128, 32), (17, 129, 33), (3, 130, 70)]
INF, NAN = torch.inf, torch.nan
LEAVES = ("queries", "keys", "score", "temperature")


def options_of(n, m):
    """Ids that exclude some keys, a second id a row that excludes others, and a law of the keys."""
    ids = {"query_ids": torch.arange(n) % 7, "carried_ids": torch.arange(n) % 3 + 3, "key_ids": torch.arange(m) % 5 + 2}
    return ids | {"log_proposal": normal(7, m)}


def temperatures(n, per_row):
    return torch.linspace(0.05, 0.5, n) if per_row else 0.1


def formula(
    queries, keys, temperature, *, score=None, query_ids=None, carried_ids=None, key_ids=None, log_proposal=None
):
    """(n,): differentiable by torch, in the precision of what comes."""
    scores = queries @ keys.T / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    if log_proposal is not None:
        scores = scores - log_proposal
    for ids in (query_ids, carried_ids):
        if ids is not None:
            scores = scores.masked_fill(ids[:, None] == key_ids, -INF)
    if score is not None:
        scores = torch.cat((score.where(score.isfinite(), -INF)[:, None], scores), 1)
    return torch.logsumexp(scores, 1)


def started(given):
    """The same with scores of chains that have the share of about all keys; the third has not started."""
    queries, keys = given["queries"].double(), given["keys"]
    keys = queries if keys is None else keys.double()
    lse = formula(queries, keys, **{name: value for name, value in given.items() if name not in ("queries", "keys")})
    score = (lse.where(lse.isfinite(), 0) + normal(5, len(queries))).float()
    return given | {"score": score if len(score) < 3 else with_rows(score, 2, NAN)}


def lse_of_step(backend):
    def lse(queries, keys, temperature, *, score, **options):
        state = MHState(torch.arange(len(queries)), score)
        return emc2.isir_step(
            queries, keys, state, temperature=temperature, seed=1, step=2, backend=backend, **options
        ).lse

    return lse


def lse_of_scores(backend):
    def lse(queries, keys, temperature, *, query_ids=None, key_ids=None, **options):
        symmetric = keys is queries and query_ids is key_ids
        return differentiable_lse(
            ScoreParams(queries, keys, temperature, query_ids, key_ids, symmetric, **options), backend
        )

    return lse


def value_and_gradients(function, given, weights):
    """The values, and a dict of the gradients of a weighted sum of those that are finite; ``keys`` None: the
    queries."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in given.items()
        if name in LEAVES and isinstance(value, torch.Tensor)
    }
    arguments = given | leaves
    arguments["keys"] = leaves.get("keys", leaves["queries"])
    lse = function(**arguments)
    counted = lse > -INF
    (lse[counted] * weights[counted]).sum().backward()
    return lse.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_equals_formula(function, given):
    """Relative RMS of values and of each gradient, which has its leaf's dtype."""
    weights, dtype = torch.linspace(-1, 2, len(given["queries"])), given["queries"].dtype
    lse, gradients = value_and_gradients(function, given, weights)
    wide = {name: value.double() if name in LEAVES and isinstance(value, torch.Tensor) else value
            for name, value in given.items()}  # fmt: skip
    exact, exact_gradients = value_and_gradients(formula, wide, weights.double())
    assert lse.dtype == torch.float32 and torch.equal(lse.isfinite(), exact.isfinite())
    counted = exact.isfinite()
    assert relative_rms(lse[counted], exact[counted]) <= 1e-5
    for name, gradient in gradients.items():
        expected = exact_gradients[name]
        assert gradient.dtype == given[name].dtype and gradient.shape == given[name].shape
        error = relative_rms(gradient, expected)
        assert error <= TOLERANCE[dtype] or torch.equal(gradient.double(), expected), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_values_and_gradients(backend, n, m, d, dtype):
    given = {"queries": unit(n, d, seed=1, dtype=dtype), "keys": unit(m, d, seed=2, dtype=dtype)}
    given |= {"temperature": temperatures(n, per_row=n % 2 == 1)} | options_of(n, m)
    assert_equals_formula(lse_of_step(backend), started(given))


@pytest.mark.parametrize("per_row", [False, True], ids=["", "temperatures"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_queries_that_are_the_keys(backend, dtype, per_row):
    """One operand with one set of ids: what else a score has, of rows or of keys, makes them no more symmetric."""
    n, ids = 150, torch.arange(150) % 75
    given = {"queries": unit(n, 7, dtype=dtype), "keys": None, "temperature": temperatures(n, per_row)}
    names = {"query_ids": ids, "key_ids": ids}
    for options in ({}, {"key_ids": ids.flip(0)}, options_of(n, n) | names):
        assert_equals_formula(lse_of_step(backend), started(given | names | options))
    for options in ({"carried_ids": (ids + 1) % 75}, {"log_proposal": normal(7, n)}):
        assert_equals_formula(lse_of_scores(backend), given | names | options)


@pytest.mark.parametrize(("n", "m"), [(300, 700), (130, 3001)])
@pytest.mark.parametrize("backend", COMPILED)
def test_many_keys_and_rows(backend, n, m):
    """Several blocks of rows and of keys, and some that are narrower; excluded keys are everywhere, or at one end."""
    given = {"queries": unit(n, 9, seed=1), "keys": unit(m, 9, seed=2), "temperature": 0.07}
    assert_equals_formula(lse_of_step(backend), started(given | options_of(n, m)))
    few = {"query_ids": torch.arange(n), "carried_ids": torch.arange(n) + 1, "key_ids": (m - 1 - torch.arange(m)) // 3}
    assert_equals_formula(lse_of_step(backend), started(given | few))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", RUNNABLE)
def test_log_sum_exp_of_scores_with_all_their_options(backend, dtype):
    n, m = 33, 140
    given = {"queries": unit(n, 20, seed=1, dtype=dtype), "keys": unit(m, 20, seed=2, dtype=dtype)}
    options = options_of(n, m)
    for per_row in (True, False):
        given["temperature"] = temperatures(n, per_row)
        for left_out in ((), ("query_ids",), ("carried_ids",), ("log_proposal",)):
            some = {name: value for name, value in options.items() if name not in left_out}
            assert_equals_formula(lse_of_scores(backend), given | some)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_mean_similarity_is_without_the_log_of_the_law(backend):
    queries, keys, options = unit(12, 6, seed=1), unit(9, 6, seed=2), options_of(12, 9)
    lse = lse_of_scores(backend)(queries, keys, 0.2, **options)
    counted = (options["query_ids"][:, None] != options["key_ids"]) & (
        options["carried_ids"][:, None] != options["key_ids"]
    )
    products = queries @ keys.T
    weights = (products / 0.2 - options["log_proposal"]).masked_fill(~counted, -INF).softmax(1)
    fields = [options[name] for name in ("query_ids", "key_ids")]
    rest = {name: options[name] for name in ("carried_ids", "log_proposal")}
    found = mean_similarity(lse, ScoreParams(queries, keys, 0.2, *fields, **rest), backend)
    torch.testing.assert_close(found, (weights * products).sum(1))


@pytest.mark.parametrize("options", [False, True], ids=["", "options"])
@pytest.mark.parametrize("temperature", [0.3, torch.tensor(0.3), torch.linspace(0.2, 1, 6)], ids=["", "0-d", "rows"])
def test_gradcheck(temperature, options):
    double = torch.float64
    leaves = [normal(seed, *shape, dtype=double).requires_grad_() for seed, shape in enumerate(((6, 3), (5, 3), (6,)))]
    if isinstance(temperature, torch.Tensor):
        leaves.append(temperature.double().requires_grad_())
    given = options_of(6, 5) if options else {}

    def lse(queries, keys, score, t=temperature):
        score = score.where(torch.arange(6) != 2, -INF)
        return lse_of_step("auto")(queries, keys, t, score=score, **given)

    def among_themselves(queries, *rest):
        return lse(queries, queries, *rest)

    assert torch.autograd.gradcheck(lse, leaves)
    if options:
        given |= {"key_ids": torch.arange(6) % 5 + 2, "log_proposal": normal(7, 6)}
    del leaves[1]
    assert torch.autograd.gradcheck(among_themselves, leaves)
    if options:
        given["key_ids"] = given["query_ids"]  # one tensor: one gradient for both
        assert torch.autograd.gradcheck(among_themselves, leaves)


@pytest.mark.parametrize("backend", RUNNABLE)
class TestDegenerate:
    def test_rows_apart(self, backend):
        given = {"queries": unit(10, 24, seed=1)[:, 3:11], "keys": unit(40, 8, seed=2)[::3], "temperature": 0.1}
        given = started(given | options_of(10, 14))
        given["score"] = given["score"].repeat_interleave(3)[::3]
        assert_equals_formula(lse_of_step(backend), given)
        assert_equals_formula(lse_of_step(backend), given | {"queries": unit(1, 8).expand(10, 8)})

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
    def test_nothing(self, backend, n, m):
        for temperature in (0.1, torch.full((n,), 0.1)):
            given = {"queries": unit(n, 3), "keys": unit(m, 3), "temperature": temperature, "score": torch.ones(n)}
            lse, gradients = value_and_gradients(lse_of_step(backend), given, torch.ones(n))
            assert_identical(lse, torch.ones(n))
            assert_identical(gradients.pop("score"), torch.ones(n))
            assert not any(gradient.any() for gradient in gradients.values())

    @pytest.mark.parametrize("size", [5, 200])
    def test_rows_without_candidates(self, backend, size):
        """Of rows 0 .. 3 the first has neither keys nor a state, the next only keys, only a state, and both."""
        ids = {"query_ids": torch.zeros(size).long(), "key_ids": torch.zeros(size).long()}
        ids["query_ids"][[1, 3]] = 1
        leaves = [unit(size, 4, seed=seed).requires_grad_() for seed in (1, 2)]
        leaves += [torch.full((size,), -INF), torch.full((size,), 0.1, requires_grad=True)]
        leaves[2][2:4] = 3.0
        queries, keys, score, temperature = leaves
        score.requires_grad_()
        lse = lse_of_step(backend)(queries, keys, temperature, score=score, **ids)
        lse.backward(torch.ones(size))
        rows = torch.arange(size)
        assert_identical(lse > -INF, (rows > 0) & (rows < 4))
        for gradient in (queries.grad, temperature.grad):
            assert gradient.isfinite().all()
            assert gradient[1].all() and gradient[3].all() and not gradient[(rows != 1) & (rows != 3)].any()
        assert score.grad[2] == 1 and 0 < score.grad[3] < 1 and not score.grad[(rows < 2) | (rows > 3)].any()
        assert keys.grad.isfinite().all() and keys.grad.any()

    @pytest.mark.parametrize("pattern", ["some", "a block", "all but one", "all"])
    def test_keys_with_an_infinite_log_proposal_are_left_out(self, backend, pattern):
        n, m = 20, 150
        out = torch.arange(m) < {"some": 3, "a block": 70, "all but one": m - 1, "all": m}[pattern]
        out = out.roll(1)
        given = {"queries": unit(n, 5, seed=1), "keys": unit(m, 5, seed=2), "temperature": torch.full((n,), 0.2)}
        given |= {"log_proposal": normal(7, m), "score": torch.linspace(-1, 3, n)}
        without = given | {"keys": given["keys"][~out], "log_proposal": given["log_proposal"][~out]}
        weights = torch.linspace(-1, 2, n)
        infinite = given | {"log_proposal": given["log_proposal"].masked_fill(out, INF)}
        lse, found = value_and_gradients(lse_of_step(backend), infinite, weights)
        wide = {name: value.double() for name, value in without.items()}
        exact, expected = value_and_gradients(formula, wide, weights.double())
        torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)
        assert not found["keys"][out].any()
        expected["keys"] = torch.zeros(m, 5).double().index_copy(0, (~out).nonzero()[:, 0], expected["keys"])
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].double(), gradient, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("size", [6, 150])
    @pytest.mark.parametrize("bad", [INF, -INF, NAN])
    def test_what_is_not_finite_is_left_out(self, backend, bad, size):
        """Bad keys, queries and states change nothing for the others, whose values and gradients are those without."""
        given = {"queries": unit(size, 5, seed=1), "keys": unit(size, 5, seed=2), "score": torch.full((size,), 2.0)}
        given |= {"temperature": torch.full((size,), 0.2), "log_proposal": normal(7, size)}
        wrong = given | {
            "queries": with_rows(given["queries"], (2, 1), bad),
            "score": with_rows(given["score"], 4, bad),
        }
        wrong["keys"] = with_rows(given["keys"], (3, 0), bad)
        weights = torch.linspace(-1, 2, size)
        lse, found = value_and_gradients(lse_of_step(backend), wrong, weights)
        without = given | {"score": with_rows(given["score"], 4, -INF), "queries": with_rows(given["queries"], 2, 0.0)}
        columns = torch.arange(size) != 3
        without |= {"keys": given["keys"][columns], "log_proposal": given["log_proposal"][columns]}
        wide = {name: value.double() for name, value in without.items()}
        exact, expected = value_and_gradients(formula, wide, weights.double().where(torch.arange(size) != 2, 0))
        rows = torch.arange(size) != 2
        assert relative_rms(lse[rows], exact[rows]) <= 1e-5 and lse[2] == 2
        assert not found["queries"][2].any() and not found["keys"][3].any() and found["score"][4] == 0
        assert found["score"][2] == weights[2]
        for name in ("queries", "score", "temperature"):
            assert relative_rms(found[name][rows], expected[name][rows]) <= 1e-5, name
        assert relative_rms(found["keys"][columns], expected["keys"]) <= 1e-5


@pytest.mark.parametrize("backend", RUNNABLE)
def test_the_carried_weight_is_the_gradient_of_the_carried_score(backend):
    given = started({"queries": unit(20, 6, seed=1), "keys": unit(30, 6, seed=2), "temperature": 0.1})
    score = given.pop("score").requires_grad_()
    result = emc2.isir_step(**given, state=MHState(torch.arange(20), score), seed=1, step=2, backend=backend)
    (gradient,) = torch.autograd.grad(result.lse.sum(), score)
    assert_identical(gradient, result.carried_weight)
    assert result.carried_weight.max() > 0.2 and result.carried_weight[2] == 0


@pytest.mark.parametrize("backend", RUNNABLE)
def test_several_candidates_of_a_chains_own(backend):
    n, m = 20, 30
    given = {"queries": unit(n, 6, seed=1), "keys": unit(m, 6, seed=2), "temperature": temperatures(n, True)}
    score = with_rows(normal(5, n, 3) + 4, (2, 1), NAN)
    options, weights = options_of(n, m), torch.linspace(-1, 2, n)

    def lse(queries, keys, temperature, *, score, query_ids, key_ids, **options):
        scores = ScoreParams(queries, keys, temperature, query_ids, key_ids, **options)
        own = torch.zeros(n, 3, dtype=torch.int64)
        return differentiable_step(scores, CarriedParams(own, score, None, None, 1, 2, 0), backend)[3]

    def exact(score, **given):
        of_keys = formula(**given)
        return torch.logsumexp(torch.cat((score.where(score.isfinite(), -INF), of_keys[:, None]), 1), 1)

    value, found = value_and_gradients(lse, given | {"score": score} | options, weights)
    wide = {name: given[name].double() for name in given} | {"score": score.double()} | options
    expected_value, expected = value_and_gradients(exact, wide, weights.double())
    assert relative_rms(value, expected_value) <= 1e-5
    for name in LEAVES:
        assert found[name].shape == expected[name].shape and relative_rms(found[name], expected[name]) <= 1e-5, name
    assert found["score"][2, 1] == 0


def test_blocks_of_rows_are_the_whole(monkeypatch):
    """Of the reference: each has its rows' own ids and temperatures."""
    given = {"queries": unit(17, 8, seed=1), "keys": unit(9, 8, seed=2), "temperature": temperatures(17, True)}
    monkeypatch.setattr(reference_lse, "BLOCK_ELEMENTS", 4 * 9)
    assert_equals_formula(lse_of_step("reference"), started(given | options_of(17, 9)))


@pytest.mark.parametrize("backend", COMPILED)
def test_nothing_else_is_differentiable(backend):
    given = {"queries": unit(6, 3, seed=1), "keys": unit(5, 3, seed=2), "temperature": torch.full((6,), 0.2)}
    given |= {"log_proposal": normal(7, 5)}
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    state = MHState(torch.arange(6), normal(5, 6).requires_grad_())
    result = emc2.isir_step(**leaves, state=state, seed=1, step=2, backend=backend)
    assert result.lse.requires_grad
    assert not any(field.requires_grad for field in (result.position, *result.state, result.carried_weight))
    result.lse.sum().backward()
    assert leaves["log_proposal"].grad is None
    detached = {name: leaf.detach() for name, leaf in leaves.items()} | {"log_proposal": leaves["log_proposal"]}
    state = MHState(state.key, state.score.detach())
    assert not emc2.isir_step(**detached, state=state, seed=1, step=2, backend=backend).lse.requires_grad


# Torch's machinery.


def tensors_of(size, per_row=True):
    given = {"queries": unit(size, 4, seed=1), "keys": unit(size, 4, seed=2), "temperature": torch.full((size,), 0.2)}
    return started(given) | ({} if per_row else {"temperature": torch.tensor(0.2)})


@pytest.mark.one_seed  # what moves seeds looks at the callers, which Dynamo does not trace
@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_equals_eager(backend):
    options = options_of(6, 5)

    def run(queries, keys, score, temperature, seed, step):
        state = MHState(torch.arange(6) * 5, score)
        common = {"seed": seed, "step": step, "backend": backend}
        first = emc2.isir_step(queries, keys, state, temperature=temperature, **options, **common)
        # Chains without a state; one operand; a number for a temperature; a state from the step before.
        own = emc2.isir_step(queries, queries, first.state, temperature=0.2, **common)
        loss = (first.lse * torch.arange(6)).sum() + own.lse.sum()
        return loss, (first.position, *own.state, own.position, first.carried_weight)

    torch.compiler.reset()
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        for counters in ((3, 4), (torch.tensor(-3), torch.tensor(2**32 - 1))):
            given = tensors_of(6) | {"keys": unit(5, 4, seed=3)}
            leaves = [given[name].requires_grad_() for name in LEAVES]
            loss, rest = call(*leaves, *counters)
            loss.backward()
            results.append((loss.detach(), rest, [leaf.grad for leaf in leaves]))
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(compiled, eager)
        assert_identical(compiled[1][:2], eager[1][:2])


@pytest.mark.parametrize("per_row", [False, True], ids=["0-d", "rows"])
@pytest.mark.parametrize("backend", COMPILED)
def test_what_passes_through_torchs_dispatcher_is_the_same(backend, per_row):
    """As it does where a mode, a profiler or a subclass is there to see it."""
    given = tensors_of(12, per_row)
    for options in ({}, options_of(12, 12), {"keys": None}):
        expected = value_and_gradients(lse_of_step(backend), given | options, torch.ones(12))
        with torch.overrides.BaseTorchFunctionMode():
            assert_identical(value_and_gradients(lse_of_step(backend), given | options, torch.ones(12)), expected)
    leaves = {name: value.as_subclass(Plain).requires_grad_() for name, value in given.items()}
    lse = lse_of_step(backend)(**leaves)
    gradients = torch.autograd.grad(lse.sum(), list(leaves.values()))
    expected = value_and_gradients(lse_of_step(backend), given, torch.ones(12))
    assert_identical([each.as_subclass(torch.Tensor) for each in (lse.detach(), *gradients)],
                     [expected[0], *expected[1].values()])  # fmt: skip


@pytest.mark.parametrize("size", [6, 200])
@pytest.mark.parametrize("backend", COMPILED)
def test_autocast_and_inference_mode_change_nothing(backend, size):
    given = tensors_of(size) | options_of(size, size)
    expected = value_and_gradients(lse_of_step(backend), given, torch.ones(size))
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(value_and_gradients(lse_of_step(backend), given, torch.ones(size)), expected)
    with torch.inference_mode():
        assert_identical(lse_of_step(backend)(**given).clone(), expected[0])


@pytest.mark.parametrize("per_row", [False, True], ids=["0-d", "rows"])
@pytest.mark.parametrize("backend", COMPILED)
def test_torch_func(backend, per_row):
    given, options, weights = tensors_of(12, per_row), options_of(12, 12), torch.linspace(-1, 2, 12)

    def loss(queries, keys, score, temperature):
        return (lse_of_step(backend)(queries, keys, temperature, score=score, **options) * weights).sum()

    order = [given[name] for name in LEAVES]
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*order)
    _, expected = value_and_gradients(lse_of_step(backend), given | options, weights)
    assert_identical(list(found), [expected[name] for name in LEAVES])
    (one,) = torch.func.grad(lambda q, *rest: loss(q, q, *rest), argnums=(0,))(*order[:1], *order[2:])
    _, expected = value_and_gradients(lse_of_step(backend), given | options | {"keys": None}, weights)
    torch.testing.assert_close(one, expected["queries"])


@pytest.mark.parametrize("name", LEAVES)
def test_a_second_derivative_is_an_error(name):
    """Of the gradient of each, whatever is differentiated again."""
    given = tensors_of(5)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    lse = lse_of_step("reference")(**leaves)
    (gradient,) = torch.autograd.grad(lse.sum(), leaves[name], create_graph=True)
    with pytest.raises(NotImplementedError, match="isir_step has no second derivative"):
        (lse.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("again", LEAVES)
@pytest.mark.parametrize("name", LEAVES)
def test_a_second_derivative_by_torch_func_is_an_error(name, again):
    given = tensors_of(5)

    def penalty(other):
        def lse(value):
            return lse_of_step("reference")(**given | {again: other, name: value}).sum()

        return torch.func.grad(lse)(other if name == again else given[name]).square().sum()

    with pytest.raises(NotImplementedError, match="isir_step has no second derivative"):
        torch.func.grad(penalty)(given[again])
