"""Bad and degenerate input: a named error that changes nothing, or a finite result.

Each table has (change to a valid call, expected exception, regex with the argument's name), or changes that stay legal.
"""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import RUNNABLE, assert_identical, assert_unchanged, normal, snapshot

from emc2_kernels import MHState, Transition, apply, compose, init_state, mh_step, mh_transition
from emc2_kernels.losses import EMC2Loss, NTXentLoss

INF, NAN = torch.inf, torch.nan


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def table(cases):
    """Parametrises (change, exception, regex)."""
    return pytest.mark.parametrize(("change", "exception", "regex"), cases.values(), ids=cases)


def named_error(exception, regex):
    """An error that starts with the argument's name and says what came."""
    return pytest.raises(exception, match=rf"(?s)^(?=.*\bgot\b){regex}")


N, M, D = 4, 6, 8
QUERIES, KEYS = normal(0, N, D), normal(1, M, D)
STATE = MHState(int64(3, -1, 11, 4), torch.tensor([0.5, -INF, 2.0, -1.0]))


def step(change):
    call = {"queries": QUERIES, "keys": KEYS, "state": STATE, "temperature": 0.2, "seed": 1, "step": 2} | change
    return mh_step(call.pop("queries"), call.pop("keys"), call.pop("state"), **call)


WALK_ERRORS = {
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
    "temperature is a word": ({"temperature": "0.1"}, TypeError, "temperature"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature"),
    "temperature is a bool": ({"temperature": True}, TypeError, "temperature"),
    "temperature is an integer tensor": ({"temperature": torch.tensor(1)}, TypeError, "temperature"),
    "temperatures are too few": ({"temperature": torch.ones(N - 1)}, ValueError, "temperature"),
    "temperatures are a column": ({"temperature": torch.ones(N, 1)}, ValueError, "temperature"),
    "one temperature is 0": ({"temperature": torch.tensor([0.1, 0.0, 0.1, 0.1])}, ValueError, "temperature"),
    "one temperature is NaN": ({"temperature": torch.tensor([0.1, NAN, 0.1, 0.1])}, ValueError, "temperature"),
    "temperatures are elsewhere": ({"temperature": torch.ones(N, device="meta")}, ValueError, "temperature"),
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
    "chain_ids are too few": ({"chain_ids": int64(1, 2)}, ValueError, "chain_ids"),
    "chain_ids are int32": ({"chain_ids": torch.arange(N, dtype=torch.int32)}, TypeError, "chain_ids"),
    "chain_ids are a list": ({"chain_ids": [0, 1, 2, 3]}, TypeError, "chain_ids"),
    "a chain id is negative": ({"chain_ids": int64(0, 1, 2, -1)}, ValueError, "chain_ids"),
    "a chain id has 41 bits": ({"chain_ids": int64(0, 1, 2, 2**40)}, ValueError, "chain_ids"),
    "query_ids without key_ids": ({"query_ids": torch.arange(N)}, ValueError, "query_ids"),
    "query_ids are too many": ({"query_ids": torch.arange(M), "key_ids": torch.arange(M)}, ValueError, "query_ids"),
    "query_ids name chains and one is negative": (
        {"query_ids": int64(0, 1, 2, -1), "key_ids": torch.arange(M)},
        ValueError,
        "query_ids",
    ),
    "key_ids are too few": ({"key_ids": torch.arange(N)}, ValueError, "key_ids"),
    "key_ids are floats": ({"key_ids": torch.zeros(M)}, TypeError, "key_ids"),
    "key_ids are 2-d": ({"key_ids": torch.zeros(M, 1, dtype=torch.int64)}, ValueError, "key_ids"),
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
    "log_proposal is too short": ({"log_proposal": torch.zeros(M - 1)}, ValueError, "log_proposal"),
    "log_proposal is float64": ({"log_proposal": torch.zeros(M).double()}, TypeError, "log_proposal"),
    "log_proposal is NaN": ({"log_proposal": torch.full((M,), NAN)}, ValueError, "log_proposal"),
    "log_proposal is -inf": ({"log_proposal": torch.full((M,), -INF)}, ValueError, "log_proposal"),
    "burn_in is negative": ({"burn_in": -1}, ValueError, "burn_in"),
    "burn_in is the whole walk": ({"burn_in": M}, ValueError, "burn_in"),
    "burn_in is a share": ({"burn_in": 0.5}, TypeError, "burn_in"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples exceeds the walk": ({"num_samples": M + 1}, ValueError, "num_samples"),
    "num_samples exceeds what burn-in leaves": ({"burn_in": 4, "num_samples": 3}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
    "num_samples is a bool": ({"num_samples": True}, TypeError, "num_samples"),
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "backend is None": ({"backend": None}, ValueError, "backend"),
    "backend does not take float64": (
        {"queries": QUERIES.double(), "keys": KEYS.double(), "backend": "cpu"},
        ValueError,
        "backend",
    ),
    "an unknown argument": ({"temperatur": 0.1}, TypeError, ".*temperatur"),
}

STEP_ERRORS = {
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
        assert not moved or result.threshold[row] >= result.state.score[row]


def with_rows(tensor, row, value):
    changed = tensor.clone()
    changed[row] = value
    return changed


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
    "temperature that float32 cannot hold": {"temperature": 1e-300},
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
    result = step(change | {"backend": backend, "return_accepts": True})
    assert_identical(tuple(call["state"]), given)
    assert result.samples.shape == (call["queries"].shape[0], call.get("num_samples", 1))
    assert_legal(result, call["state"], labels)
    assert torch.equal(result.num_accepted > 0, (result.samples[:, -1] >= 0))
    assert not any(field.requires_grad for field in (*result.state, result.threshold))
    if change.get("proposal", "sweep") == "sweep":
        lse = step(change | {"backend": backend, "return_lse": True}).lse
        assert not lse.isnan().any()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(
    "change",
    [
        DEGENERATE_STEPS[name]
        for name in ("no keys", "no proposals", "no draws", "every key excluded", "nothing but NaN")
    ]
    + [DEGENERATE_STEPS["temperature that float32 cannot hold"]],
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


def test_integers_from_numpy_are_integers():
    changes = {"seed": np.uint64(2**63 + 1), "step": np.int64(5), "burn_in": np.int32(2), "num_samples": np.uint8(2)}
    assert_identical(step(changes), step({name: int(value) for name, value in changes.items()}))


ITEMS, B = 10, 4
Z0, Z1, INDEX = normal(2, B, D), normal(3, B, D), int64(1, 4, 6, 9)

EMBEDDING_ERRORS = {
    "z0 is None": ({"z0": None}, TypeError, "z0"),
    "z0 is a list": ({"z0": Z0.tolist()}, TypeError, "z0"),
    "z0 is one vector": ({"z0": Z0[0]}, ValueError, "z0"),
    "z0 has 3 dimensions": ({"z0": Z0[None]}, ValueError, "z0"),
    "z0 is integers": ({"z0": Z0.long()}, TypeError, "z0"),
    "z0 is complex": ({"z0": Z0.cfloat()}, TypeError, "z0"),
    "z0 is bools": ({"z0": Z0 > 0}, TypeError, "z0"),
    "z0 has no rows": ({"z0": Z0[:0], "z1": Z1[:0], "index": INDEX[:0]}, ValueError, "z0"),
    "z0 has no columns": ({"z0": Z0[:, :0], "z1": Z1[:, :0]}, ValueError, "z0"),
    "z0 has a NaN": ({"z0": with_rows(Z0, (2, 3), NAN)}, ValueError, "z0"),
    "z0 has an infinity": ({"z0": with_rows(Z0, (2, 3), INF)}, ValueError, "z0"),
    "z0 overflowed in float16": ({"z0": (Z0 * 1e6).half(), "z1": Z1.half()}, ValueError, "z0"),
    "z0 is sparse": ({"z0": Z0.to_sparse()}, (TypeError, ValueError), "z0"),
    "z1 is None": ({"z1": None}, TypeError, "z1"),
    "z1 is the index": ({"z1": INDEX}, ValueError, "z1"),
    "z1 has fewer rows": ({"z1": Z1[1:]}, ValueError, "z1"),
    "z1 has fewer columns": ({"z1": Z1[:, 1:]}, ValueError, "z1"),
    "z1 has another dtype": ({"z1": Z1.bfloat16()}, ValueError, "z1"),
    "z1 is elsewhere": ({"z1": Z1.to("meta")}, ValueError, "z1"),
    "z1 has a NaN": ({"z1": with_rows(Z1, (0, 0), NAN)}, ValueError, "z1"),
    "z1 has a -infinity": ({"z1": with_rows(Z1, (0, 0), -INF)}, ValueError, "z1"),
    "z1 is integers": ({"z1": Z1.int()}, TypeError, "z1"),
    "index is a list": ({"index": INDEX.tolist()}, TypeError, "index"),
    "index is an array": ({"index": INDEX.numpy()}, TypeError, "index"),
    "index is a number": ({"index": 3}, TypeError, "index"),
    "index is int32": ({"index": INDEX.int()}, TypeError, "index"),
    "index is floats": ({"index": INDEX.float()}, TypeError, "index"),
    "index is bools": ({"index": INDEX > 4}, TypeError, "index"),
    "index is too short": ({"index": INDEX[1:]}, ValueError, "index"),
    "index is of both views": ({"index": INDEX.repeat(2)}, ValueError, "index"),
    "index is a column": ({"index": INDEX[:, None]}, ValueError, "index"),
    "index is a 0-d tensor": ({"index": INDEX[0]}, ValueError, "index"),
    "index is elsewhere": ({"index": INDEX.to("meta")}, ValueError, "index"),
    "an index is negative": ({"index": int64(0, 1, -1, 2)}, ValueError, "index"),
    "an index has 41 bits": ({"index": int64(0, 1, 2**40, 2)}, ValueError, "index"),
    "return_stats is a word": ({"return_stats": "yes"}, (TypeError, ValueError), "return_stats"),
    "an unknown argument": ({"indices": INDEX}, TypeError, ".*indices"),
}

EMC2_FORWARD_ERRORS = {
    "index is None": ({"index": None}, TypeError, "index"),
    "an index is past the items": ({"index": int64(0, 1, ITEMS, 2)}, ValueError, "index"),
    "z0 and z1 are too narrow": ({"z0": Z0[:, 1:], "z1": Z1[:, 1:]}, ValueError, "z0"),
    "z0 and z1 are too wide": ({"z0": normal(0, B, D + 1), "z1": normal(1, B, D + 1)}, ValueError, "z0"),
}


def forward(loss, change):
    """The loss's value and the gradients of z0 and z1."""
    call = {"z0": Z0, "z1": Z1, "index": INDEX} | change
    for name in ("z0", "z1"):
        if isinstance(call[name], torch.Tensor) and call[name].is_floating_point():
            call[name] = call[name].clone().requires_grad_()
    out = loss(**call)
    value = out[0] if isinstance(out, tuple) else out
    value.backward()
    return value.detach(), call["z0"].grad, call["z1"].grad


def warm_emc2(**options):
    """A loss whose chains, bank and step have moved on."""
    loss = EMC2Loss(ITEMS, D, **options)
    for seed in range(3):
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(seed))[:B]
        loss(normal(10 + seed, B, D), normal(20 + seed, B, D), index)
    return loss


@table(EMBEDDING_ERRORS | EMC2_FORWARD_ERRORS)
def test_emc2_names_what_is_wrong_and_leaves_its_state_alone(change, exception, regex):
    loss = warm_emc2()
    before = snapshot(loss)
    with named_error(exception, regex):
        forward(loss, change)
    assert_unchanged(loss, before)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"num_samples": 3}, {}),  # 4 keys, burn-in 2
        ({"burn_in": 0.0, "num_samples": 5}, {}),
        ({"views": "both", "num_samples": 5}, {}),  # 8 keys, burn-in 4
        ({"num_samples": 2}, {"z0": Z0[:1], "z1": Z1[:1], "index": INDEX[:1]}),
    ],
)
def test_emc2_names_num_samples_that_a_batch_is_too_small_for(options, change):
    loss = EMC2Loss(ITEMS, D, **options)
    before = snapshot(loss)
    with named_error(ValueError, "num_samples"):
        forward(loss, change)
    assert_unchanged(loss, before)


def test_emc2_names_a_backend_that_does_not_take_the_dtype():
    loss = EMC2Loss(ITEMS, D, backend="cpu")
    before = snapshot(loss)
    with named_error(ValueError, "backend"):
        forward(loss, {"z0": Z0.double(), "z1": Z1.double()})
    assert_unchanged(loss, before)


def raises(items, views):
    raise OSError("the disk is gone")


def filled(value, dtype=torch.float32, rows=0, columns=0, device="cpu"):
    return lambda items, views: torch.full((len(items) + rows, D + columns), value, dtype=dtype, device=device)


ENCODE_ERRORS = {
    "raises": (raises, OSError, "the disk is gone"),
    "returns None": (lambda items, views: None, TypeError, "encode.*got"),
    "returns a list": (lambda items, views: [[0.0] * D] * len(items), TypeError, "encode.*got"),
    "returns a row too many": (filled(1.0, rows=1), ValueError, "encode.*got"),
    "returns a row too few": (filled(1.0, rows=-1), ValueError, "encode.*got"),
    "returns a column too many": (filled(1.0, columns=1), ValueError, "encode.*got"),
    "returns one vector": (lambda items, views: torch.ones(D), ValueError, "encode.*got"),
    "returns something elsewhere": (filled(1.0, device="meta"), ValueError, "encode.*got"),
    "returns integers": (filled(1, dtype=torch.int64), (TypeError, ValueError), "encode.*got"),
    "returns complex numbers": (filled(1.0, dtype=torch.complex64), (TypeError, ValueError), "encode.*got"),
    "returns NaN": (filled(NAN), ValueError, "encode.*got"),
    "returns infinities": (filled(INF), ValueError, "encode.*got"),
    "takes one argument": (lambda items: torch.ones(len(items), D), TypeError, "positional"),
}


@pytest.mark.parametrize(("encode", "exception", "regex"), ENCODE_ERRORS.values(), ids=ENCODE_ERRORS)
def test_emc2_state_survives_an_encode_that(encode, exception, regex):
    options = {"carry": "recompute", "burn_in": 0.0, "num_samples": B}
    loss = warm_emc2(encode=filled(1.0), **options)
    loss.encode = encode
    before = snapshot(loss)
    with pytest.raises(exception, match=regex):
        forward(loss, {})
    assert_unchanged(loss, before)


EMC2_CONSTRUCTOR_ERRORS = {
    "num_items is 0": ({"num_items": 0}, ValueError, "num_items"),
    "num_items is a float": ({"num_items": 10.0}, TypeError, "num_items"),
    "num_items is a bool": ({"num_items": True}, TypeError, "num_items"),
    "num_items exceeds the chain ids": ({"num_items": 2**39 + 1}, ValueError, "num_items"),
    "dim is 0": ({"dim": 0}, ValueError, "dim"),
    "dim is a word": ({"dim": "8"}, TypeError, "dim"),
    "proposals is a typo": ({"proposals": "batches"}, ValueError, "proposals"),
    "views is a number": ({"views": 1}, ValueError, "views"),
    "views is a typo": ({"views": "two"}, ValueError, "views"),
    "num_proposals beside the batch": ({"num_proposals": 64}, ValueError, "num_proposals"),
    "burn_in is 1": ({"burn_in": 1.0}, ValueError, "burn_in"),
    "burn_in is a count": ({"burn_in": 16}, ValueError, "burn_in"),
    "burn_in is negative": ({"burn_in": -0.1}, ValueError, "burn_in"),
    "burn_in is NaN": ({"burn_in": NAN}, ValueError, "burn_in"),
    "burn_in is None": ({"burn_in": None}, (TypeError, ValueError), "burn_in"),
    "num_samples is 0": ({"num_samples": 0}, ValueError, "num_samples"),
    "num_samples is a float": ({"num_samples": 2.0}, TypeError, "num_samples"),
    "carry is a typo": ({"carry": "cache"}, ValueError, "carry"),
    "carry is None": ({"carry": None}, ValueError, "carry"),
    "recompute without encode": ({"carry": "recompute"}, ValueError, "encode"),
    "recompute with an encode that is no function": ({"carry": "recompute", "encode": 3}, ValueError, "encode"),
    "encode without recompute": ({"encode": filled(1.0)}, ValueError, "encode"),
    "estimator is a typo": ({"estimator": "state"}, ValueError, "estimator"),
    "gather is a typo": ({"gather": "some"}, ValueError, "gather"),
    "gather is a bool": ({"gather": True}, ValueError, "gather"),
    "seed is negative": ({"seed": -1}, ValueError, "seed"),
    "seed is a float": ({"seed": 0.5}, TypeError, "seed"),
    "seed is None": ({"seed": None}, TypeError, "seed"),
    "bimodal is a word": ({"bimodal": "yes"}, (TypeError, ValueError), "bimodal"),
    "bank_dtype is integer": ({"bank_dtype": torch.int8}, TypeError, "bank_dtype"),
    "bank_dtype is a word": ({"bank_dtype": "bfloat16"}, TypeError, "bank_dtype"),
    "backend is unknown": ({"backend": "fpga"}, ValueError, "backend"),
    "an unknown argument": ({"temprature": 0.1}, TypeError, ".*temprature"),
}

LOSS_CONSTRUCTOR_ERRORS = {
    "temperature is 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperature is negative": ({"temperature": -1}, ValueError, "temperature"),
    "temperature is NaN": ({"temperature": NAN}, ValueError, "temperature"),
    "temperature is infinite": ({"temperature": INF}, ValueError, "temperature"),
    "temperature is None": ({"temperature": None}, TypeError, "temperature"),
    "temperature is a word": ({"temperature": "0.1"}, TypeError, "temperature"),
    "temperature is a bool": ({"temperature": True}, TypeError, "temperature"),
    "temperatures are two": ({"temperature": torch.ones(2)}, ValueError, "temperature"),
    "temperatures are none": ({"temperature": torch.ones(0)}, ValueError, "temperature"),
    "temperature is an integer tensor": ({"temperature": torch.tensor(1)}, TypeError, "temperature"),
    "normalize is a word": ({"normalize": "no"}, (TypeError, ValueError), "normalize"),
}


@table(EMC2_CONSTRUCTOR_ERRORS | LOSS_CONSTRUCTOR_ERRORS)
def test_emc2_constructor_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        EMC2Loss(**({"num_items": ITEMS, "dim": D} | change))


NTXENT_CONSTRUCTOR_ERRORS = {"an unknown argument": ({"tau": 0.1}, TypeError, ".*tau")}


@table(LOSS_CONSTRUCTOR_ERRORS | NTXENT_CONSTRUCTOR_ERRORS)
def test_ntxent_constructor_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        NTXentLoss(**change)


@table(EMBEDDING_ERRORS)
def test_ntxent_names_what_is_wrong(change, exception, regex):
    with named_error(exception, regex):
        forward(NTXentLoss(), change)


def one_row(change=None):
    return {"z0": Z0[:1], "z1": Z1[:1], "index": INDEX[:1]} | (change or {})


DEGENERATE_BATCHES = {
    "one pair": one_row(),
    "one column": {"z0": Z0[:, :1], "z1": Z1[:, :1]},
    "all rows one item": {"index": int64(3, 3, 3, 3)},
    "all rows but one one item": {"index": int64(3, 3, 3, 0)},
    "duplicate items": {"index": int64(5, 2, 5, 2)},
    "zero embeddings": {"z0": Z0 * 0, "z1": Z1 * 0},
    "one zero row": {"z0": with_rows(Z0, 1, 0.0)},
    "equal embeddings": {"z0": Z0[:1].repeat(B, 1), "z1": Z0[:1].repeat(B, 1)},
    "opposite views": {"z1": -Z0},
    "subnormal embeddings": {"z0": Z0 * 1e-42, "z1": Z1 * 1e-42},
    "tiny embeddings": {"z0": Z0 * 1e-30, "z1": Z1 * 1e-30},
    "huge embeddings": {"z0": Z0 * 1e30, "z1": Z1 * 1e30},
    "largest float16": {"z0": torch.full((B, D), 65504.0).half(), "z1": Z1.half()},
    "float16": {"z0": Z0.half(), "z1": Z1.half()},
    "bfloat16": {"z0": Z0.bfloat16(), "z1": Z1.bfloat16()},
    "float64": {"z0": Z0.double(), "z1": Z1.double()},
    "transposed": {"z0": normal(2, D, B).T, "z1": normal(3, D, B).T},
    "columns apart": {"z0": normal(2, B, 2 * D)[:, ::2]},
    "one row expanded": {"z0": Z0[:1].expand(B, D)},
    "first and last item": {"index": int64(0, ITEMS - 1, 1, 2)},
    "index apart": {"index": torch.arange(2 * B)[::2]},
    "with statistics": {"return_stats": True},
    "one pair with statistics": one_row({"return_stats": True}),
    "one item with statistics": {"index": int64(3, 3, 3, 3), "return_stats": True},
}


def assert_finite_and_differentiable(loss, change):
    for _ in range(3):  # chains that have not started, and chains that have
        value, *gradients = forward(loss, change)
        assert value.isfinite()
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("change", DEGENERATE_BATCHES.values(), ids=DEGENERATE_BATCHES)
class TestDegenerateBatch:
    def test_ntxent_is_finite(self, change, temperature):
        assert_finite_and_differentiable(NTXentLoss(temperature=temperature), change)

    @pytest.mark.parametrize("options", [{}, {"views": "both", "burn_in": 0}, {"carry": "drop", "burn_in": 0.9}])
    def test_emc2_is_finite_and_its_state_legal(self, change, temperature, options):
        dim = change.get("z0", Z0).shape[1]
        loss = EMC2Loss(ITEMS, dim, temperature=temperature, **options)
        assert_finite_and_differentiable(loss, change)
        chains = loss.chains
        assert loss.step == 3
        assert not chains.score.isnan().any()
        assert torch.equal(chains.key == -1, chains.score == -INF)
        assert loss.bank.embeddings.isfinite().all()


@pytest.mark.parametrize("options", [{"burn_in": 0}, {"seed": 2**64 - 1}, {"temperature": 1}, {"temperature": 1e30}])
def test_extreme_options_of_emc2_are_legal(options):
    assert_finite_and_differentiable(EMC2Loss(ITEMS, D, **options), {})


def test_every_statistic_of_a_degenerate_batch_is_finite():
    for loss in (NTXentLoss(), EMC2Loss(ITEMS, D)):
        for change in (one_row(), {"index": int64(3, 3, 3, 3)}, {"z0": Z0 * 0, "z1": Z1 * 0}):
            _, stats = partial(loss, return_stats=True)(**({"z0": Z0, "z1": Z1, "index": INDEX} | change))
            assert all(value.isfinite() for value in stats.values()), stats


def test_each_table_has_at_least_forty_cases():
    assert len(WALK_ERRORS | STEP_ERRORS) >= 40
    assert len(EMBEDDING_ERRORS | EMC2_FORWARD_ERRORS) >= 40
    assert len(EMC2_CONSTRUCTOR_ERRORS | LOSS_CONSTRUCTOR_ERRORS) >= 40
    assert len(EMBEDDING_ERRORS | LOSS_CONSTRUCTOR_ERRORS) >= 40
