"""Bad and degenerate input of walks, draws and sums: a named error that changes nothing, or a legal result.

Each table has (change to a valid call, expected exception, regex with the argument's name), or changes that stay legal.
"""

import numpy as np
import pytest
import torch
from helpers import RUNNABLE, assert_identical, int64, named_error, normal, table, with_rows

from emc2_kernels import (
    MHState,
    Transition,
    apply,
    compose,
    contrastive_lse,
    gumbel_sample,
    init_state,
    mh_step,
    mh_transition,
    softmax_sample,
)

INF, NAN = torch.inf, torch.nan


N, M, D = 4, 6, 8
QUERIES, KEYS = normal(0, N, D), normal(1, M, D)
STATE = MHState(int64(3, -1, 11, 4), torch.tensor([0.5, -INF, 2.0, -1.0]))


def step(change):
    call = {"queries": QUERIES, "keys": KEYS, "state": STATE, "temperature": 0.2, "seed": 1, "step": 2} | change
    return mh_step(call.pop("queries"), call.pop("keys"), call.pop("state"), **call)


# Of every operation on queries and keys; of those that draw; of those whose rows are named; of those with a choice.
OPERAND_ERRORS = {
    "queries are a list": ({"queries": QUERIES.tolist()}, TypeError, "queries"),
    "queries are an array": ({"queries": QUERIES.numpy()}, TypeError, "queries"),
    "queries are one vector": ({"queries": QUERIES[0]}, ValueError, "queries"),
    "queries have 3 dimensions": ({"queries": QUERIES[None]}, ValueError, "queries"),
    "queries are integers": ({"queries": QUERIES.long()}, TypeError, "queries"),
    "queries are complex": ({"queries": QUERIES.cfloat()}, TypeError, "queries"),
    "queries are transposed": ({"queries": normal(0, D, N).T}, ValueError, "queries"),
    "queries are sparse": ({"queries": QUERIES.to_sparse()}, (TypeError, ValueError), "queries"),
    "keys are None": ({"keys": None}, TypeError, "keys"),
    "keys are one vector": ({"keys": KEYS[0]}, ValueError, "keys"),
    "keys have another width": ({"keys": KEYS[:, 1:]}, ValueError, "keys"),
    "keys have another dtype": ({"keys": KEYS.bfloat16()}, TypeError, "keys"),
    "keys are elsewhere": ({"keys": KEYS.to("meta")}, ValueError, "keys"),
    "keys are transposed": ({"keys": normal(1, D, M).T}, ValueError, "keys"),
    "keys are sparse": ({"keys": KEYS.to_sparse()}, (TypeError, ValueError), "keys"),
    "temperature is 0": ({"temperature": 0}, ValueError, "temperature"),
    "temperature is negative": ({"temperature": -0.1}, ValueError, "temperature"),
    "temperature is NaN": ({"temperature": NAN}, ValueError, "temperature"),
    "temperature is infinite": ({"temperature": INF}, ValueError, "temperature"),
    "temperature is no float32": ({"temperature": 1e-300}, ValueError, "temperature"),
    "temperature is a word": ({"temperature": "0.1"}, TypeError, "temperature"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature"),
    "temperature is a bool": ({"temperature": True}, TypeError, "temperature"),
    "temperature is an integer tensor": ({"temperature": torch.tensor(1)}, TypeError, "temperature"),
    "temperatures are too few": ({"temperature": torch.ones(N - 1)}, ValueError, "temperature"),
    "temperatures are a column": ({"temperature": torch.ones(N, 1)}, ValueError, "temperature"),
    "one temperature is 0": ({"temperature": torch.tensor([0.1, 0.0, 0.1, 0.1])}, ValueError, "temperature"),
    "one temperature is NaN": ({"temperature": torch.tensor([0.1, NAN, 0.1, 0.1])}, ValueError, "temperature"),
    "temperatures are elsewhere": ({"temperature": torch.ones(N, device="meta")}, ValueError, "temperature"),
    "query_ids without key_ids": ({"query_ids": torch.arange(N)}, ValueError, "query_ids"),
    "query_ids are too many": ({"query_ids": torch.arange(M), "key_ids": torch.arange(M)}, ValueError, "query_ids"),
    "key_ids are too few": ({"key_ids": torch.arange(N)}, ValueError, "key_ids"),
    "key_ids are floats": ({"key_ids": torch.zeros(M)}, TypeError, "key_ids"),
    "key_ids are 2-d": ({"key_ids": torch.zeros(M, 1, dtype=torch.int64)}, ValueError, "key_ids"),
    "an unknown argument": ({"temperatur": 0.1}, TypeError, ".*temperatur"),
}
COUNTER_ERRORS = {
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed has 65 bits": ({"seed": 2**64}, ValueError, "seed"),
    "seed is a float": ({"seed": 1.0}, TypeError, "seed"),
    "seed is a bool": ({"seed": True}, TypeError, "seed"),
    "seed is None": ({"seed": None}, TypeError, "seed"),
    "seed is a vector": ({"seed": int64(1)}, TypeError, "seed"),
    "seed is an int32 tensor": ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed"),
    "step is negative": ({"step": -1}, ValueError, "step"),
    "step has 33 bits": ({"step": 2**32}, ValueError, "step"),
    "step is a negative tensor": ({"step": torch.tensor(-1)}, ValueError, "step"),
    "step is a tensor of 33 bits": ({"step": torch.tensor(2**32)}, ValueError, "step"),
    "step is a float tensor": ({"step": torch.tensor(1.0)}, TypeError, "step"),
    "step is elsewhere": ({"step": torch.tensor(1, device="meta")}, ValueError, "step"),
}
CHAIN_ERRORS = {
    "chain_ids are too few": ({"chain_ids": int64(1, 2)}, ValueError, "chain_ids"),
    "chain_ids are int32": ({"chain_ids": torch.arange(N, dtype=torch.int32)}, TypeError, "chain_ids"),
    "chain_ids are a list": ({"chain_ids": [0, 1, 2, 3]}, TypeError, "chain_ids"),
    "a chain id is negative": ({"chain_ids": int64(0, 1, 2, -1)}, ValueError, "chain_ids"),
    "a chain id has 41 bits": ({"chain_ids": int64(0, 1, 2, 2**40)}, ValueError, "chain_ids"),
    "query_ids name chains and one is negative": (
        {"query_ids": int64(0, 1, 2, -1), "key_ids": torch.arange(M)},
        ValueError,
        "query_ids",
    ),
}
BACKEND_ERRORS = {
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "backend is None": ({"backend": None}, ValueError, "backend"),
    "backend does not take float64": (
        {"queries": QUERIES.double(), "keys": KEYS.double(), "backend": "cpu"},
        ValueError,
        "backend",
    ),
}
LAW_ERRORS = {
    "log_proposal is too short": ({"log_proposal": torch.zeros(M - 1)}, ValueError, "log_proposal"),
    "log_proposal is float64": ({"log_proposal": torch.zeros(M).double()}, TypeError, "log_proposal"),
    "log_proposal is NaN": ({"log_proposal": torch.full((M,), NAN)}, ValueError, "log_proposal"),
    "log_proposal is -inf": ({"log_proposal": torch.full((M,), -INF)}, ValueError, "log_proposal"),
}
WALK_ERRORS = OPERAND_ERRORS | COUNTER_ERRORS | CHAIN_ERRORS | BACKEND_ERRORS | LAW_ERRORS
WALK_ERRORS |= {
    "one log_proposal is +inf": ({"log_proposal": with_rows(torch.zeros(M), 2, INF)}, ValueError, "log_proposal"),
    "proposal is a typo": ({"proposal": "sweeps"}, ValueError, "proposal"),
    "proposal is None": ({"proposal": None}, ValueError, "proposal"),
    "proposal is a list": ({"proposal": [[0]] * N}, ValueError, "proposal"),
    "positions are int32": ({"proposal": torch.zeros(N, 3, dtype=torch.int32)}, ValueError, "proposal"),
    "positions are 1-d": ({"proposal": torch.zeros(N, dtype=torch.int64)}, ValueError, "proposal"),
    "positions have too few rows": ({"proposal": torch.zeros(N - 1, 3, dtype=torch.int64)}, ValueError, "proposal"),
    "a position is negative": ({"proposal": torch.full((N, 2), -1)}, ValueError, "proposal"),
    "a position is past the keys": ({"proposal": torch.full((N, 2), M)}, ValueError, "proposal"),
    "uniform without num_proposals": ({"proposal": "uniform"}, ValueError, "num_proposals"),
    "num_proposals is negative": ({"proposal": "uniform", "num_proposals": -1}, ValueError, "num_proposals"),
    "num_proposals is a float": ({"proposal": "uniform", "num_proposals": 3.0}, TypeError, "num_proposals"),
    "num_proposals with a sweep": ({"num_proposals": 3}, ValueError, "num_proposals"),
    "burn_in is negative": ({"burn_in": -1}, ValueError, "burn_in"),
    "burn_in is the whole walk": ({"burn_in": M}, ValueError, "burn_in"),
    "burn_in is a share": ({"burn_in": 0.5}, TypeError, "burn_in"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples exceeds the walk": ({"num_samples": M + 1}, ValueError, "num_samples"),
    "num_samples exceeds what burn-in leaves": ({"burn_in": 4, "num_samples": 3}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
    "num_samples is a bool": ({"num_samples": True}, TypeError, "num_samples"),
}

STATE_ERRORS = {
    "state is None": ({"state": None}, TypeError, "state"),
    "state is a tensor": ({"state": torch.zeros(2, N)}, TypeError, r"state\.key"),
    "state has three parts": ({"state": (*STATE, STATE[1])}, TypeError, "state"),
    "state has other chains": ({"state": init_state(N + 1)}, ValueError, r"state\.key"),
    "state keys are int32": ({"state": MHState(STATE.key.int(), STATE.score)}, TypeError, r"state\.key"),
    "state keys are a list": ({"state": MHState(STATE.key.tolist(), STATE.score)}, TypeError, r"state\.key"),
    "state scores are half": ({"state": MHState(STATE.key, STATE.score.half())}, TypeError, r"state\.score"),
    "state scores are float64 beside float32 queries": (
        {"state": MHState(STATE.key, STATE.score.double())},
        TypeError,
        r"state\.score",
    ),
    "state scores are too few": ({"state": MHState(STATE.key, STATE.score[1:])}, ValueError, r"state\.score"),
    "state is elsewhere": ({"state": init_state(N, "meta")}, ValueError, r"state\.key"),
    "key_labels are too few": ({"key_labels": torch.arange(M - 1)}, ValueError, "key_labels"),
    "key_labels are int32": ({"key_labels": torch.arange(M, dtype=torch.int32)}, TypeError, "key_labels"),
    "key_labels are a list": ({"key_labels": list(range(M))}, TypeError, "key_labels"),
}
STEP_ERRORS = STATE_ERRORS | {
    "return_lse of uniform draws": (
        {"return_lse": True, "proposal": "uniform", "num_proposals": 3},
        ValueError,
        "return_lse",
    ),
    "return_lse of given positions": (
        {"return_lse": True, "proposal": torch.zeros(N, 3, dtype=torch.int64)},
        ValueError,
        "return_lse",
    ),
    "return_accepts is a word": ({"return_accepts": "yes"}, (TypeError, ValueError), "return_accepts"),
    "return_lse is a word": ({"return_lse": "yes"}, (TypeError, ValueError), "return_lse"),
}


@table(WALK_ERRORS | STEP_ERRORS)
def test_mh_step_names_what_is_wrong_and_leaves_the_state_alone(change, exception, regex):
    before = STATE.key.clone(), STATE.score.clone()
    with named_error(exception, regex):
        step(change)
    assert_identical(tuple(STATE), before)


TRANSITION_ERRORS = {
    "first_proposal is negative": ({"first_proposal": -1}, ValueError, "first_proposal"),
    "first_proposal is a float": ({"first_proposal": 1.0}, TypeError, "first_proposal"),
    "total_proposals is negative": ({"total_proposals": -1}, ValueError, "total_proposals"),
    "total_proposals is a float": ({"total_proposals": 9.0}, TypeError, "total_proposals"),
    "total_proposals is less than this shard": ({"total_proposals": M - 1}, ValueError, "total_proposals"),
    "the shard ends past total_proposals": ({"first_proposal": 2, "total_proposals": M + 1}, ValueError, "total"),
    "burn_in is the whole longer walk": ({"first_proposal": 2, "burn_in": M + 2}, ValueError, "burn_in"),
    "state, which it does not take": ({"state": STATE}, TypeError, ".*state"),
    "return_accepts, which it does not take": ({"return_accepts": True}, TypeError, ".*return_accepts"),
}


@table(WALK_ERRORS | TRANSITION_ERRORS)
def test_mh_transition_names_what_is_wrong(change, exception, regex):
    call = {"queries": QUERIES, "keys": KEYS, "temperature": 0.2, "seed": 1, "step": 2} | change
    with named_error(exception, regex):
        mh_transition(call.pop("queries"), call.pop("keys"), **call)


SAMPLE_ERRORS = {
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples is 2^16": ({"num_samples": 2**16}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
}
GUMBEL_ERRORS = {"backend draws nothing of the kind": ({"backend": "cuda"}, ValueError, "backend")}
SOFTMAX_ERRORS = {
    "generator is a seed": ({"generator": 3}, TypeError, "generator"),
    "more keys than torch.multinomial takes": ({"keys": KEYS[:1].expand(2**24 + 1, D)}, ValueError, "keys"),
}
LSE_ERRORS = {"backend has no such operation": ({"backend": "cuda"}, ValueError, "backend")}


@table(OPERAND_ERRORS | COUNTER_ERRORS | CHAIN_ERRORS | BACKEND_ERRORS | SAMPLE_ERRORS | GUMBEL_ERRORS)
def test_gumbel_sample_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        gumbel_sample(**({"queries": QUERIES, "keys": KEYS, "temperature": 0.2, "seed": 0, "step": 0} | change))


@table(OPERAND_ERRORS | COUNTER_ERRORS | SAMPLE_ERRORS | SOFTMAX_ERRORS)
def test_softmax_sample_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        softmax_sample(**({"queries": QUERIES, "keys": KEYS, "temperature": 0.2} | change))


@table(OPERAND_ERRORS | BACKEND_ERRORS | LSE_ERRORS)
def test_contrastive_lse_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        contrastive_lse(**({"queries": QUERIES, "keys": KEYS, "temperature": 0.1} | change))


def transition(n=N, samples=3):
    """A walk of n chains; n > N repeats queries."""
    rows = torch.arange(n) % N
    return mh_transition(QUERIES[rows], KEYS, temperature=0.2, seed=1, step=2, num_samples=samples)


WALKED = transition()
WRONG_TRANSITIONS = {
    "None": (None, TypeError, ""),
    "a tensor": (torch.zeros(N, 3), TypeError, ""),
    "two parts": (WALKED[:2], TypeError, ""),
    "a list for a threshold": (WALKED._replace(threshold=[0.0]), TypeError, r"\.threshold"),
    "1-d fields": (Transition(*(field[:, 0] for field in WALKED)), ValueError, r"\.threshold"),
    "no samples": (Transition(*(field[:, :0] for field in WALKED)), ValueError, r"\.threshold"),
    "fewer scores than thresholds": (WALKED._replace(score=WALKED.score[1:]), ValueError, r"\.score"),
    "int32 positions": (WALKED._replace(position=WALKED.position.int()), TypeError, r"\.position"),
    "float positions": (WALKED._replace(position=WALKED.score), TypeError, r"\.position"),
}


@pytest.mark.parametrize(("wrong", "exception", "field"), WRONG_TRANSITIONS.values(), ids=WRONG_TRANSITIONS)
def test_compose_and_apply_name_a_wrong_transition(wrong, exception, field):
    with named_error(exception, "first" + field):
        compose(wrong, WALKED)
    with named_error(exception, "then" + field):
        compose(WALKED, wrong)
    with named_error(exception, "transition" + field):
        apply(wrong, STATE)


@pytest.mark.parametrize("then", [transition(n=N + 1), transition(samples=2)], ids=["other rows", "other samples"])
def test_compose_names_transitions_that_do_not_fit_each_other(then):
    with named_error(ValueError, "(first|then)"):
        compose(WALKED, then)


APPLY_ERRORS = {
    "state is None": ({"state": None}, TypeError, "state"),
    "state has other chains": ({"state": init_state(N - 1)}, ValueError, r"state\.key"),
    "state scores are float64": (
        {"state": MHState(STATE.key, STATE.score.double())},
        TypeError,
        r"state\.score",
    ),
    "key_labels are floats": ({"key_labels": torch.zeros(M)}, TypeError, "key_labels"),
    "key_labels are 2-d": ({"key_labels": torch.zeros(M, 1, dtype=torch.int64)}, ValueError, "key_labels"),
    "key_labels are too few": ({"key_labels": int64(7)}, ValueError, r"(key_labels|transition\.position)"),
    "key_labels are none": ({"key_labels": int64()}, ValueError, r"(key_labels|transition\.position)"),
}


@table(APPLY_ERRORS)
def test_apply_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        apply(WALKED, **({"state": STATE, "key_labels": torch.arange(M)} | change))


@pytest.mark.parametrize(
    ("n", "exception"), [(-1, ValueError), (2.0, TypeError), ("3", TypeError), (None, TypeError), (True, TypeError)]
)
def test_init_state_names_a_wrong_n(n, exception):
    with named_error(exception, "n "):
        init_state(n)


def assert_legal(result, state, labels):
    """Samples within the keys; each chain at its last sample's label or where it was, or not started; nothing NaN."""
    assert not any(field.isnan().any() for field in (result.state.score, result.threshold))
    started = state.score > -INF  # not where it is NaN
    for row, samples in enumerate(result.samples.tolist()):
        assert all(-1 <= position < len(labels) for position in samples)
        moved = samples[-1] >= 0
        stayed_at = state.key[row] if started[row] else -1
        assert result.state.key[row] == (labels[samples[-1]] if moved else stayed_at)
        assert (result.state.score[row] > -INF) == (moved or started[row])
        assert not moved or result.threshold[row] >= result.state.score[row]  # exact


def no_key_but_its_own():
    return {"query_ids": int64(5, 5, 5, 5), "key_ids": torch.full((M,), 5), "chain_ids": torch.arange(N)}


DEGENERATE_STEPS = {
    "no rows": {"queries": QUERIES[:0], "state": init_state(0)},
    "no keys": {"keys": KEYS[:0], "num_samples": 3, "burn_in": 2},
    "no keys, drawn uniformly": {"keys": KEYS[:0], "proposal": "uniform", "num_proposals": 5},
    "no rows and no keys": {"queries": QUERIES[:0], "keys": KEYS[:0], "state": init_state(0)},
    "no proposals": {"proposal": torch.zeros(N, 0, dtype=torch.int64)},
    "no draws": {"proposal": "uniform", "num_proposals": 0},
    "no dimensions": {"queries": QUERIES[:, :0], "keys": KEYS[:, :0]},
    "one row, one key": {"queries": QUERIES[:1], "keys": KEYS[:1], "state": init_state(1)},
    "every key excluded": no_key_but_its_own(),
    "zero queries": {"queries": QUERIES * 0},
    "zero keys": {"keys": KEYS * 0},
    "one key many times": {"keys": KEYS[:1].expand(M, D)},
    "one query many times": {"queries": QUERIES[:1].expand(N, D), "chain_ids": int64(7, 7, 7, 7)},
    "rows apart": {"queries": normal(0, 3 * N, D)[::3], "keys": normal(1, M, 2 * D)[:, :D]},
    "huge scores": {"queries": QUERIES * 1e30, "keys": KEYS * 1e30},
    "tiny scores": {"queries": QUERIES * 1e-30, "keys": KEYS * 1e-30},
    "largest float16": {"queries": (QUERIES * 0 + 65504).half(), "keys": (KEYS * 0 + 65504).half()},
    "temperature 0.01": {"temperature": 0.01},
    "tiny temperature": {"temperature": 2.0**-120},
    "huge temperature": {"temperature": 1e30},
    "one row of NaN": {"queries": with_rows(QUERIES, 1, NAN)},
    "one row of infinities": {"queries": with_rows(QUERIES, 1, INF)},
    "nothing but NaN": {"queries": QUERIES * NAN, "keys": KEYS * NAN},
    "a state of NaN": {"state": MHState(STATE.key, torch.full((N,), NAN))},
    "a state of -inf": {"state": MHState(STATE.key, torch.full((N,), -INF))},
    "a state of +inf": {"state": MHState(int64(0, 1, 2, 3), torch.full((N,), INF))},
    "a huge state": {"state": MHState(int64(0, 1, 2, 3), torch.full((N,), 3e38))},
    "huge log_proposal": {"log_proposal": torch.full((M,), 3e38)},
    "tiny log_proposal": {"log_proposal": torch.full((M,), -3e38)},
    "largest chain ids": {"chain_ids": torch.full((N,), 2**40 - 1)},
    "largest seed": {"seed": 2**64 - 1},
    "seed of the sign bit": {"seed": 2**63},
    "negative seed tensor, which is a bit pattern": {"seed": torch.tensor(-1)},
    "largest step": {"step": 2**32 - 1},
    "step tensor": {"step": torch.tensor(2**32 - 1)},
    "sizes from numpy": {"burn_in": np.int64(2), "num_samples": np.int64(3)},
    "negative labels and ids": {"key_labels": torch.arange(M) - 50, "key_ids": torch.arange(M) - 9},
    "negative query ids beside chain ids": {
        "query_ids": int64(-1, -2, -3, -4),
        "key_ids": -torch.arange(M),
        "chain_ids": torch.arange(N),
    },
    "every state kept": {"num_samples": M},
    "one proposal after burn-in": {"burn_in": M - 1},
    "one position": {"proposal": torch.full((N, 5), M - 1), "num_samples": 5},
    "inputs that require gradients": {
        "queries": QUERIES.clone().requires_grad_(),
        "keys": KEYS.clone().requires_grad_(),
        "temperature": torch.tensor(0.2, requires_grad=True),
        "log_proposal": torch.zeros(M, requires_grad=True),
    },
    "temperatures of another precision": {"temperature": torch.full((N,), 0.2, dtype=torch.float64)},
}


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("change", DEGENERATE_STEPS.values(), ids=DEGENERATE_STEPS)
def test_degenerate_input_gives_a_legal_result(change, backend):
    call = {"queries": QUERIES, "keys": KEYS, "state": STATE} | change
    labels = call.get("key_labels", call.get("key_ids", torch.arange(call["keys"].shape[0])))
    given = call["state"].key.clone(), call["state"].score.clone()
    swept = change.get("proposal", "sweep") == "sweep"
    at_once = backend == "triton" and swept  # its interpreter takes half a second a walk
    result = step(change | {"backend": backend, "return_accepts": True, "return_lse": at_once})
    assert_identical(tuple(call["state"]), given)
    assert result.samples.shape == (call["queries"].shape[0], call.get("num_samples", 1))
    assert_legal(result, call["state"], labels)
    assert torch.equal(result.num_accepted > 0, (result.samples[:, -1] >= 0))
    assert not any(field.requires_grad for field in (*result.state, result.threshold))
    if swept:
        lse = result.lse if at_once else step(change | {"backend": backend, "return_lse": True}).lse
        assert not lse.isnan().any()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(
    "change",
    [
        DEGENERATE_STEPS[name]
        for name in ("no keys", "no proposals", "no draws", "every key excluded", "nothing but NaN")
    ],
)
def test_without_a_proposable_key_chains_stay(change, backend):
    result = step(change | {"backend": backend, "return_accepts": True})
    assert (result.samples == -1).all()
    assert_identical(result.state, STATE)
    assert (result.num_accepted == 0).all()
    assert (result.threshold == -INF).all()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("samples", [1, M])
def test_a_key_without_a_finite_score_is_an_identity_step(value, backend, samples):
    excluded = {"query_ids": torch.full((N,), 9), "key_ids": with_rows(torch.zeros(M, dtype=torch.int64), [1, 4], 9)}
    common = {
        "chain_ids": torch.arange(N),
        "key_labels": torch.arange(M),
        "num_samples": samples,
        "return_accepts": True,
        "return_lse": True,
        "backend": backend,
    }
    assert_identical(step({"keys": with_rows(KEYS, [1, 4], value)} | common), step(excluded | common))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_state_score_of_nan_counts_as_not_started(backend):
    nan, fresh = (
        step({"state": state, "backend": backend}) for state in (MHState(STATE.key, STATE.score * NAN), init_state(N))
    )
    assert_identical(nan, fresh)


def test_numbers_from_numpy_are_numbers():
    changes = {"seed": np.uint64(2**63 + 1), "step": np.int64(5), "burn_in": np.int32(2), "num_samples": np.uint8(2)}
    assert_identical(step(changes), step({name: int(value) for name, value in changes.items()}))
    assert_identical(step({"temperature": np.float32(0.25)}), step({"temperature": 0.25}))


def test_the_table_has_at_least_forty_cases():
    assert len(WALK_ERRORS | STEP_ERRORS) >= 40
