"""Bad and degenerate input of steps over all keys: a named error that changes nothing, or a legal result."""

import pytest
import torch
from helpers import COMPILED, RUNNABLE, assert_identical, int64, named_error, normal, table, with_rows
from test_bad_input_ops import (
    BACKEND_ERRORS,
    CHAIN_ERRORS,
    COUNTER_ERRORS,
    DEGENERATE_STEPS,
    INF,
    KEYS,
    LAW_ERRORS,
    LSE_ERRORS,
    NAN,
    OPERAND_ERRORS,
    QUERIES,
    STATE,
    STATE_ERRORS,
    M,
    N,
)

from emc2_kernels import MHState, init_state, isir_step, ops
from emc2_kernels.backends.params import DrawParams, ScoreParams

FASTEST = COMPILED[0]


def resample(change):
    call = {"queries": QUERIES, "keys": KEYS, "state": STATE, "temperature": 0.2, "seed": 1, "step": 2}
    return isir_step(**call | {"backend": FASTEST} | change)


def carried(ids, **others):
    return {"key_ids": torch.arange(M), "carried_ids": ids} | others


def away(tensor):
    return tensor.to("meta")


RESAMPLING_ERRORS = OPERAND_ERRORS | COUNTER_ERRORS | CHAIN_ERRORS | BACKEND_ERRORS | LSE_ERRORS
RESAMPLING_ERRORS |= LAW_ERRORS | STATE_ERRORS
RESAMPLING_ERRORS |= {
    "queries are of no dtype that scores have": ({"queries": QUERIES.to(torch.float8_e4m3fn)}, TypeError, "queries"),
    "queries are elsewhere": ({"queries": away(QUERIES)}, ValueError, "keys"),
    "temperatures are too many": ({"temperature": torch.ones(M)}, ValueError, "temperature"),
    "one temperature is infinite": ({"temperature": torch.tensor([0.1, 0.1, INF, 0.1])}, ValueError, "temperature"),
    "one temperature is past the largest": (
        {"temperature": torch.tensor([0.1, 2.0**101, 0.1, 0.1])},
        ValueError,
        "temperature",
    ),
    "seed is elsewhere": ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed"),
    "chain_ids are elsewhere": ({"chain_ids": away(torch.arange(N))}, ValueError, "chain_ids"),
    "query_ids are int32": ({"query_ids": torch.arange(N).int(), "key_ids": torch.arange(M)}, TypeError, "query_ids"),
    "query_ids are elsewhere": ({"query_ids": away(torch.arange(N)), "key_ids": torch.arange(M)}, ValueError, "query"),
    "key_ids are elsewhere": ({"key_ids": away(torch.arange(M))}, ValueError, "key_ids"),
    "carried_ids without key_ids": ({"carried_ids": torch.arange(N)}, ValueError, "carried_ids"),
    "carried_ids are too few": (carried(torch.arange(N - 1)), ValueError, "carried_ids"),
    "carried_ids are as many as the keys": (carried(torch.arange(M)), ValueError, "carried_ids"),
    "carried_ids are a column": (carried(torch.arange(N)[:, None]), ValueError, "carried_ids"),
    "carried_ids are int32": (carried(torch.arange(N).int()), TypeError, "carried_ids"),
    "carried_ids are floats": (carried(torch.zeros(N)), TypeError, "carried_ids"),
    "carried_ids are a list": (carried(list(range(N))), TypeError, "carried_ids"),
    "carried_ids are one number": (carried(3), TypeError, "carried_ids"),
    "carried_ids are elsewhere": (carried(away(torch.arange(N))), ValueError, "carried_ids"),
    "carried_ids are wrong beside right query_ids": (
        carried(torch.arange(N - 1), query_ids=torch.arange(N)),
        ValueError,
        "carried_ids",
    ),
    "log_proposal is a list": ({"log_proposal": [0.0] * M}, TypeError, "log_proposal"),
    "log_proposal is one number": ({"log_proposal": 0.5}, TypeError, "log_proposal"),
    "log_proposal is half": ({"log_proposal": torch.zeros(M).half()}, TypeError, "log_proposal"),
    "log_proposal is of rows and keys": ({"log_proposal": torch.zeros(N, M)}, ValueError, "log_proposal"),
    "log_proposal is elsewhere": ({"log_proposal": away(torch.zeros(M))}, ValueError, "log_proposal"),
    "one log_proposal is NaN": ({"log_proposal": with_rows(torch.zeros(M), 3, NAN)}, ValueError, "log_proposal"),
    "one log_proposal is -inf": ({"log_proposal": with_rows(torch.zeros(M), 3, -INF)}, ValueError, "log_proposal"),
    "one log_proposal is NaN beside +inf": (
        {"log_proposal": with_rows(torch.full((M,), INF), 3, NAN)},
        ValueError,
        "log_proposal",
    ),
    "log_proposal beside float64 operands is float64": (
        {
            "queries": QUERIES.double(),
            "keys": KEYS.double(),
            "log_proposal": torch.zeros(M).double(),
            "backend": "auto",
        },
        TypeError,
        "log_proposal",
    ),
    "key_labels are 2-d": ({"key_labels": torch.zeros(M, 1, dtype=torch.int64)}, ValueError, "key_labels"),
    "key_labels are elsewhere": ({"key_labels": away(torch.arange(M))}, ValueError, "key_labels"),
    "state keys are two a row": ({"state": MHState(STATE.key[:, None], STATE.score)}, ValueError, r"state\.key"),
    "state scores are a column": ({"state": MHState(STATE.key, STATE.score[:, None])}, ValueError, r"state\.score"),
    "state scores are integers": ({"state": MHState(STATE.key, STATE.key)}, TypeError, r"state\.score"),
    "state scores are elsewhere": ({"state": MHState(STATE.key, away(STATE.score))}, ValueError, r"state\.score"),
    "state scores are a list": ({"state": MHState(STATE.key, STATE.score.tolist())}, TypeError, r"state\.score"),
    "num_samples, which it does not take": ({"num_samples": 2}, TypeError, ".*num_samples"),
    "burn_in, which it does not take": ({"burn_in": 0}, TypeError, ".*burn_in"),
}


@table(RESAMPLING_ERRORS)
def test_isir_step_names_what_is_wrong_and_leaves_the_state_alone(change, exception, regex):
    before = STATE.key.clone(), STATE.score.clone()
    with named_error(exception, regex):
        resample(change)
    assert_identical(tuple(STATE), before)


def test_what_is_left_out_is_named():
    with pytest.raises(TypeError, match=".*state"):
        isir_step(QUERIES, KEYS, temperature=0.2, seed=1, step=2)
    for name in ("temperature", "seed", "step"):
        given = {"temperature": 0.2, "seed": 1, "step": 2}
        del given[name]
        with pytest.raises(TypeError, match=f".*{name}"):
            isir_step(QUERIES, KEYS, STATE, **given)


def both_excluded():
    ids = torch.arange(M) % 2 + 5
    return {"query_ids": torch.full((N,), 5), "carried_ids": torch.full((N,), 6), "key_ids": ids}


OF_WALKS = ("proposal", "num_proposals", "num_samples", "burn_in")
DEGENERATE = {name: change for name, change in DEGENERATE_STEPS.items() if not set(OF_WALKS) & set(change)}
DEGENERATE |= {
    "no keys": {"keys": KEYS[:0]},
    "no keys, all options": {
        "keys": KEYS[:0],
        "carried_ids": torch.arange(N),
        **dict.fromkeys(("key_ids", "key_labels"), torch.arange(0)),
        "log_proposal": torch.ones(0),
    },
    "every key excluded, by one id or the other": both_excluded(),
    "every key excluded, and no state": both_excluded() | {"state": MHState(STATE.key, torch.full((N,), NAN))},
    "one id for both": carried(torch.arange(N), query_ids=torch.arange(N)),
    "negative carried ids": {"key_ids": -torch.arange(M), "carried_ids": -torch.arange(N)},
    "smallest and largest ids": {
        "key_ids": int64(-(2**63), 2**63 - 1, 0, -1, 1, 2),
        "carried_ids": int64(-(2**63), 2**63 - 1, 0, -1),
    },
    "smallest and largest labels": {"key_labels": int64(-(2**63), 2**63 - 1, 0, -1, 1, 2)},
    "a state far below its keys": {"state": MHState(STATE.key, torch.full((N,), -3e38))},
    "a state and keys far below": {
        "state": MHState(STATE.key, torch.full((N,), -3e38)),
        "queries": QUERIES.abs(),
        "keys": -KEYS.abs() * 1e36,
    },
    "keys that are left out": {"log_proposal": with_rows(torch.zeros(M), [1, 4], INF)},
    "keys that are all left out": {"log_proposal": torch.full((M,), INF)},
    "weights that come to more than float32 has": {"log_proposal": torch.full((M,), -3e38), "keys": KEYS * 1e38},
    "a score that requires a gradient": {"state": MHState(STATE.key, torch.zeros(N).requires_grad_())},
    "float64 temperatures, for each row": {"temperature": torch.linspace(0.1, 1, N, dtype=torch.float64)},
}


def assert_legal(result, state, labels):
    """Within the keys; each chain at its key's label or where it was, or not started; nothing NaN."""
    assert not any(field.isnan().any() for field in (result.state.score, result.lse, result.carried_weight))
    assert ((result.carried_weight >= 0) & (result.carried_weight <= 1 + 1e-6)).all()
    for row, position in enumerate(result.position.tolist()):
        assert -1 <= position < len(labels)
        started = bool(state.score[row].isfinite())
        if position >= 0:
            assert result.state.key[row] == labels[position] and result.state.score[row].isfinite()
        else:
            assert result.state.key[row] == (state.key[row] if started else -1)
            assert result.state.score[row] == (state.score[row] if started else -INF)
        assert (result.lse[row] > -INF) == (result.state.score[row] > -INF)
        assert result.lse[row] >= result.state.score[row] - 1e-6 * abs(result.state.score[row])
        assert started or result.carried_weight[row] == 0


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_input_gives_a_legal_result(change, backend):
    call = {"queries": QUERIES, "keys": KEYS, "state": STATE} | change
    labels = call.get("key_labels", call.get("key_ids", torch.arange(call["keys"].shape[0])))
    leaves = [call[name].detach().clone().requires_grad_() for name in ("queries", "keys")]
    given = call["state"].key.clone(), call["state"].score.detach().clone()
    result = resample(change | {"queries": leaves[0], "keys": leaves[1], "backend": backend})
    assert_identical((call["state"].key, call["state"].score.detach()), given)
    detached = result._replace(lse=result.lse.detach())
    assert_legal(detached, MHState(*given), labels)
    gradients = torch.autograd.grad(result.lse[result.lse > -INF].sum(), leaves)
    assert not any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_key_without_a_finite_score_is_one_that_is_excluded(value, backend):
    ids = {"key_ids": with_rows(torch.zeros(M, dtype=torch.int64), [1, 4], 9), "key_labels": torch.arange(M)}
    found = resample({"keys": with_rows(KEYS, [1, 4], value), "key_labels": torch.arange(M), "backend": backend})
    for name in ("carried_ids", "query_ids"):
        named = {name: torch.full((N,), 9), "chain_ids": torch.arange(N)}
        assert_identical(resample(ids | named | {"backend": backend}), found)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_state_score_that_is_not_finite_has_not_started(value, backend):
    found = resample({"state": MHState(STATE.key, torch.full((N,), value)), "backend": backend})
    assert_identical(found, resample({"state": init_state(N), "backend": backend}))


# The operator by itself: what only its callers inside the package have looked at.

OWN = torch.arange(N * 2).view(N, 2), normal(2, N, 2)
WRONG_SHAPES = {
    "keys narrower than queries": ({"keys": KEYS[:, :4]}, "keys"),
    "too few key ids": ({"query_ids": torch.arange(N), "key_ids": torch.arange(M - 1)}, "key_ids"),
    "no key ids": ({"carried_ids": torch.arange(N)}, "carried_ids"),
    "too few carried ids": ({"carried_ids": torch.arange(N - 1), "key_ids": torch.arange(M)}, "carried_ids"),
    "short carried ids": ({"carried_ids": torch.arange(N).int(), "key_ids": torch.arange(M)}, "carried_ids"),
    "too few chain ids": ({"chain_ids": torch.arange(N - 1)}, "chain_ids"),
    "too few temperatures": ({"temperature_tensor": torch.ones(N - 1)}, "temperature"),
    "double temperatures": ({"temperature_tensor": torch.ones(N).double()}, "temperature"),
    "too few weights": ({"log_proposal": torch.zeros(M - 1)}, "log_proposal"),
    "double weights": ({"log_proposal": torch.zeros(M).double()}, "log_proposal"),
    "too few labels": ({"key_labels": torch.arange(M - 1)}, "key_labels"),
    "too few states": ({"key": OWN[0][1:]}, r"state\.key"),
    "one number for states": ({"key": torch.tensor(3)}, r"state\.key"),
    "states of one dimension": ({"key": torch.arange(N), "score": normal(2, N)}, r"state\.key"),
    "states of three": ({"key": OWN[0][None], "score": OWN[1][None]}, r"state\.key"),
    "short states": ({"key": OWN[0].int()}, r"state\.key"),
    "fewer scores than states": ({"score": OWN[1][:, 1:]}, r"state\.score"),
    "scores of fewer rows": ({"score": OWN[1][1:]}, r"state\.score"),
    "half scores": ({"score": OWN[1].half()}, r"state\.score"),
    "double scores": ({"score": OWN[1].double()}, r"state\.score"),
    "more than four of its own": ({"key": torch.zeros(N, 5).long(), "score": torch.zeros(N, 5)}, r"state\.key"),
    "a negative first key": ({"first_key": -1}, "first_key"),
    "more keys than are numbered": ({"first_key": 2**33 - M + 1}, "first_key"),
    "a first key that is none": ({"first_key": 2**62}, "first_key"),
    "an unsigned chain": ({"chain_ids": int64(0, 1, 2, 2**40)}, "chain_ids"),
    "a step of 33 bits": ({"step_tensor": torch.tensor(2**32)}, "step"),
    "a weight that is not finite": ({"log_proposal": with_rows(torch.zeros(M), 2, NAN)}, "log_proposal"),
    "a temperature of 0": ({"temperature_tensor": with_rows(torch.ones(N), 2, 0.0)}, "temperature"),
    "a number of 0 for a temperature": ({"temperature": 0.0}, "temperature"),
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("changes", "name"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_the_operator_by_itself_names_what_does_not_fit(changes, name, backend):
    given = {"queries": QUERIES, "keys": KEYS, "temperature": 0.2, "symmetric": False, "key": OWN[0], "score": OWN[1]}
    given |= {"seed": 1, "step": 2, "first_key": 0, "backend": backend} | changes
    operator = torch.ops.emc2_kernels.isir_step.default
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^{name}\b.*\bgot\b"):
        operator(*(given.get(argument.name) for argument in operator._schema.arguments))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_sums_and_draws_by_themselves_name_a_law_that_is_none(backend, value):
    scores = ScoreParams(QUERIES, KEYS, 0.2, None, None, log_proposal=with_rows(torch.full((M,), INF), 2, value))
    draw = DrawParams(None, 1, 2, 3)
    calls = [lambda: ops.gumbel_sample(scores, draw, backend)]
    calls += [lambda: ops.contrastive_lse.overload(*ops.contrastive_lse.flatten((scores, backend)))]
    for call in calls:
        with named_error(ValueError, r"log_proposal must be finite or \+inf, got 1 values"):
            call()


def test_the_table_has_at_least_forty_cases():
    assert len(RESAMPLING_ERRORS) >= 40
