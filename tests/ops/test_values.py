"""Values that nobody has seen before an operator runs: under compilation, in a subclass, in a direct call. What is read
there is looked at there, with the error of an eager call and before anything is written.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz_core
import pytest
import torch
from helpers import COMPILED, HOW, RUNNABLE, assert_identical, eager, int64, normal, with_rows

from emc2_kernels import (
    MHState,
    Transition,
    apply,
    compose,
    contrastive_lse,
    gumbel_sample,
    init_state,
    isir_step,
    mh_step,
    mh_transition,
    ops,
)
from emc2_kernels.backends import kernel_calls
from emc2_kernels.backends.cpu import build as native
from emc2_kernels.backends.params import WalkParams
from emc2_kernels.checks import look_within

N, M, D = 4, 5, 8
QUERIES, KEYS = normal(0, N, D), normal(1, M, D)
STATE = MHState(int64(3, -1, 11, 4), torch.tensor([0.5, -torch.inf, 2.0, -1.0]))
needs_core = pytest.mark.skipif(native.why_unavailable() is not None, reason="there is no core")
CHAINS = "must hold values in [0, 1099511627776), got"


def step(**changes):
    options = {"queries": QUERIES, "keys": KEYS, "state": STATE, "temperature": 0.2, "seed": 1, "step": 2} | changes
    return mh_step(options.pop("queries"), options.pop("keys"), options.pop("state"), **options)


def draw(**changes):
    options = {"temperature": 0.2, "seed": 1, "step": 2, "num_samples": 3} | changes
    return gumbel_sample(QUERIES, KEYS, **options)


def log_sum(**changes):
    return contrastive_lse(QUERIES, KEYS, **changes)


def resample(**changes):
    options = {"queries": QUERIES, "keys": KEYS, "state": STATE, "temperature": 0.2, "seed": 1, "step": 2} | changes
    return isir_step(**options)


def transition(**changes):
    return mh_transition(QUERIES, KEYS, **({"temperature": 0.2, "seed": 1, "step": 2} | changes))


# Name -> what is called, the tensors that are wrong, and the whole error.
WRONG = {
    "a position just past the keys": (
        step,
        {"proposal": torch.tensor([[0, 1], [4, M], [0, 0], [6, 1]])},
        "proposal must hold values in [0, 5), got 5 at [1, 1]",
    ),
    "a position whose address is no one's": (
        step,
        {"proposal": with_rows(torch.zeros(N, 3, dtype=torch.int64), 2, 2**40)},
        "proposal must hold values in [0, 5), got 1099511627776 at [2, 0]",
    ),
    "a negative position": (
        transition,
        {"proposal": with_rows(torch.zeros(N, 3, dtype=torch.int64), 3, -1)},
        "proposal must hold values in [0, 5), got -1 at [3, 0]",
    ),
    "a chain id of 41 bits": (step, {"chain_ids": int64(0, 1, 2**40, 3)}, f"chain_ids {CHAINS} 1099511627776 at [2]"),
    "a negative chain id": (draw, {"chain_ids": int64(0, -7, 2, 3)}, f"chain_ids {CHAINS} -7 at [1]"),
    "a negative query id that names a chain": (
        step,
        {"query_ids": int64(0, 1, 2, -1), "key_ids": torch.arange(M)},
        f"query_ids, which name the chains, {CHAINS} -1 at [3]",
    ),
    "a step of 33 bits": (step, {"step": torch.tensor(2**32)}, "step must be in [0, 2^32), got 4294967296"),
    "a negative step": (draw, {"step": torch.tensor(-1)}, "step must be in [0, 2^32), got -1"),
    "NaN for a log-probability": (
        transition,
        {"log_proposal": with_rows(torch.zeros(M), 2, torch.nan)},
        "log_proposal must be finite, got 1 values",
    ),
    "a temperature of 0": (draw, {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "temperature must be in ["),
    "a tiny temperature": (step, {"temperature": torch.tensor([1.0, 2.0**-121, 1.0, 1.0])}, "temperature must be in ["),
    "a huge temperature": (draw, {"temperature": torch.tensor([1.0, 1.0, 2.0**101, 1.0])}, "temperature must be in ["),
    "a log-sum-exp's temperature": (
        log_sum,
        {"temperature": with_rows(torch.ones(N), 2, 1e-38)},
        "temperature must be in [",
    ),
    "a log-sum-exp's NaN": (
        log_sum,
        {"temperature": with_rows(torch.ones(N), 2, torch.nan)},
        "temperature must be in [",
    ),
    "a negative temperature": (step, {"temperature": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "temperature must be in ["),
    "a resampled chain's id of 41 bits": (
        resample,
        {"chain_ids": int64(0, 1, 2, 2**40)},
        f"chain_ids {CHAINS} 1099511627776 at [3]",
    ),
    "a resampled chain's query id": (
        resample,
        {"query_ids": int64(0, -2, 2, 3), "carried_ids": int64(-1, -1, -1, -1), "key_ids": torch.arange(M)},
        f"query_ids, which name the chains, {CHAINS} -2 at [1]",
    ),
    "a resampling's step": (resample, {"step": torch.tensor(2**32)}, "step must be in [0, 2^32), got 4294967296"),
    "a resampling's law": (
        resample,
        {"log_proposal": with_rows(torch.zeros(M), [1, 4], -torch.inf)},
        "log_proposal must be finite or +inf, got 2 values",
    ),
    "a resampling's temperature": (
        resample,
        {"temperature": with_rows(torch.ones(N), 3, 2.0**-121)},
        "temperature must be in [",
    ),
    "a resampling's one temperature": (resample, {"temperature": torch.tensor(0.0)}, "temperature must be in ["),
    "a resampling's temperature that is NaN": (
        resample,
        {"temperature": with_rows(torch.ones(N).double(), 0, torch.nan)},
        "temperature must be in [",
    ),
}
WHERE = [(RUNNABLE[0], eager), *((backend, how) for backend in COMPILED for how in HOW)]


@pytest.mark.parametrize(
    ("call", "tensors", "message", "backend", "how"),
    [
        pytest.param(*WRONG[name], backend, how, id=f"{name}, {backend}, {how.__name__}")
        for name in WRONG
        for backend, how in WHERE
    ],
)
def test_wrong_values_are_named_wherever_they_are_first_seen(call, tensors, message, backend, how):
    before = STATE.key.clone(), STATE.score.clone()
    torch._dynamo.reset()
    with pytest.raises(ValueError) as caught:
        how(lambda **given: call(**given, backend=backend), tensors)
    assert str(caught.value).startswith(message)
    assert_identical(tuple(STATE), before)


@needs_core
def test_rows_of_temperatures_are_looked_at_by_the_core_alone(monkeypatch):
    """A reduction and two reads of it are some 4 of a call's 30 us."""

    def reduced(*_):
        raise AssertionError("a second look")

    monkeypatch.setattr(torch, "aminmax", reduced)
    for call in (step, transition, draw):
        call(temperature=torch.full((N,), 0.2), backend="cpu")
    with pytest.raises(AssertionError, match="a second look"):  # which says what is wrong
        step(temperature=with_rows(torch.ones(N), 2, 0.0), backend="cpu")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("position", "place"), [(M, 1), (-2, 0)])
def test_labels_of_positions_that_no_key_has_are_named(position, place, how):
    walked = transition()
    wrong = {"position": with_rows(torch.zeros(N, 1, dtype=torch.int64), place, position)}
    torch._dynamo.reset()
    with pytest.raises(ValueError) as caught:
        how(lambda position: apply(walked._replace(position=position), STATE, torch.arange(M)), wrong)
    expected = f"must hold values in [-1, 5), got {position} at [{place}]"
    assert str(caught.value) == f"transition.position, a position in key_labels, {expected}"


@pytest.mark.parametrize("size", [1, 1000])
def test_a_compiler_writes_nothing_before_the_look(size):
    """Inductor orders a graph anew where that saves memory: a write goes past a look that it does not depend on."""

    def call(index, kept):
        found = look_within(index, "index", 0, 3, [kept])
        kept.add_(1)
        return found.sum()

    torch.compiler.reset()
    kept, options = torch.zeros(size), {"fallback_by_default": True, "fx_graph_cache": False}
    with pytest.raises(ValueError, match=r"^index must hold values in \[0, 3\), got 7 at \[1\]$"):
        torch.compile(call, fullgraph=True, options=options)(with_rows(torch.zeros(64 * size).long(), 1, 7), kept)
    assert not kept.any()


@pytest.mark.parametrize("backend", RUNNABLE)
def test_items_of_the_view_coin_are_chains(backend):
    for item in (-1, 2**40):
        with pytest.raises(ValueError, match=rf"^items must hold values in .*, got {item} at \[1\]$"):
            ops.view_coin(int64(0, item), 1, 2, backend)


# Arguments of the operator by itself that would have the core read past the end of something.
WRONG_SHAPES = {
    "keys narrower than queries": ({"keys": KEYS[:, :4]}, "keys"),
    "keys of another dtype": ({"keys": KEYS.half()}, "keys"),
    "columns for rows": ({"queries": QUERIES.T.contiguous().T}, "queries"),
    "too few key ids": ({"query_ids": torch.arange(N), "key_ids": torch.arange(M - 1)}, "key_ids"),
    "no key ids": ({"query_ids": torch.arange(N)}, "query_ids"),
    "too few chain ids": ({"chain_ids": torch.arange(N - 1)}, "chain_ids"),
    "short ids": ({"chain_ids": torch.arange(N, dtype=torch.int32)}, "chain_ids"),
    "too few temperatures": ({"temperature_tensor": torch.ones(N - 1)}, "temperature"),
    "double temperatures": ({"temperature_tensor": torch.ones(N).double()}, "temperature"),
    "too few weights": ({"log_proposal": torch.zeros(M - 1)}, "log_proposal"),
    "too few rows of positions": ({"positions": torch.zeros(N - 1, M, dtype=torch.int64)}, "proposal"),
    "too few states": ({"state_key": torch.zeros(N - 1, dtype=torch.int64)}, r"state\.key"),
    "half states": ({"state_score": torch.zeros(N).half()}, r"state\.score"),
    "too few labels": ({"key_labels": torch.arange(M - 1)}, "key_labels"),
    "no samples": ({"num_samples": 0}, "num_samples"),
    "more samples than proposals": ({"num_samples": M + 1}, "num_samples"),
    "burn-in to the end": ({"burn_in": M}, "burn_in"),
    "fewer proposals than there are": ({"total_proposals": M - 1}, "total_proposals"),
    "more proposals than are numbered": ({"total_proposals": 2**33 + 1}, "total_proposals"),
    "a log-sum-exp of draws": ({"num_draws": M, "return_lse": True}, "return_lse"),
    "draws without end": ({"num_draws": 2**40, "total_proposals": 2**40}, "num_proposals"),
}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("changes", "name"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_an_operator_by_itself_names_what_does_not_fit(changes, name, backend):
    given = {"queries": QUERIES, "keys": KEYS, "temperature": 0.2, "seed": 1, "step": 2, "burn_in": 0, "num_samples": 1}
    given |= {"first_proposal": 0, "total_proposals": M, "state_key": STATE.key, "state_score": STATE.score}
    given |= {"return_accepts": False, "return_lse": False, "backend": backend} | changes
    operator = torch.ops.emc2_kernels.mh_step.default
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^{name}\b.*\bgot\b"):
        operator(*(given.get(argument.name) for argument in operator._schema.arguments))


def test_the_core_refuses_what_its_python_side_has_not_looked_at():
    """Its own guard, which the operators rely on in an eager call: no shape of a walk is looked at twice there."""
    with pytest.raises(ValueError, match="at most 2\\^33"):
        mh_transition(QUERIES, KEYS, temperature=0.2, seed=1, step=2, first_proposal=2**33)
    core = native.library()
    walk = WalkParams(
        QUERIES, KEYS, 1.0, 0, 0, *[None] * 6, burn_in=M, num_samples=1, first_proposal=0, total_proposals=M
    )
    params = kernel_calls.walk_params(core, walk, (0, 0), (0, 0), 1)
    with pytest.raises(ValueError, match="do not fit each other"):  # burn-in of the whole walk would divide by zero
        core.walk_sweep(params, kernel_calls.operands(core, QUERIES, KEYS), None, None, None)


# The negative bit: memory holds the values with the other sign.


def negative(tensor):
    view = torch._neg_view(-tensor)
    assert view.is_neg() and torch.equal(view, tensor)
    return view


OF_STEPS = {
    "queries": QUERIES,
    "keys": KEYS,
    "state": STATE,
    "temperature": torch.full((N,), 0.3),
    "log_proposal": normal(2, M),
    "chain_ids": torch.arange(N) + 7,
    "query_ids": torch.arange(N) - 2,
    "key_ids": torch.arange(M) - 2,
    "key_labels": torch.arange(M) + 50,
}


def negated(name, given):
    value = given[name]
    return given | {name: MHState(*map(negative, value)) if name == "state" else negative(value)}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", OF_STEPS)
def test_views_with_the_negative_bit_are_what_they_look_like(name, backend):
    given = OF_STEPS | {"backend": backend}
    assert_identical(tuple(step(**negated(name, given))), tuple(step(**given)))
    shared = ("temperature", "chain_ids", "query_ids", "key_ids", "backend")
    if name in shared:
        given = {name: given[name] for name in shared}
        assert_identical(draw(**negated(name, given)), draw(**given))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("name", [*OF_STEPS, "carried_ids"])
def test_what_is_resampled_from_views_with_the_negative_bit_is_what_it_looks_like(name, backend):
    given = OF_STEPS | {"carried_ids": torch.arange(N) - 1, "backend": backend}
    assert_identical(resample(**negated(name, given)), resample(**given))


@pytest.mark.parametrize("backend", COMPILED)
def test_positions_and_sums_of_views_with_the_negative_bit(backend):
    positions = torch.arange(N * 7).view(N, 7) % M
    assert_identical(
        tuple(step(proposal=negative(positions), backend=backend)), tuple(step(proposal=positions, backend=backend))
    )
    found = [contrastive_lse(negative(QUERIES), keys, temperature=0.2) for keys in (KEYS, negative(KEYS))]
    expected = contrastive_lse(QUERIES, KEYS, temperature=0.2)
    assert_identical(found, [expected, expected])


# What is no dense tensor, and what is no tensor with values.


def no_dense_tensors(values):
    yield values.to_sparse()
    yield torch.nested.nested_tensor([values, values])
    yield torch.nested.nested_tensor([values, values], layout=torch.jagged)


TENSORS = {
    "queries": (QUERIES, step, resample),
    "keys": (KEYS, step, resample),
    "temperature": (torch.ones(N), step, resample),
    "seed": (torch.tensor([1]), step, resample),
    "chain_ids": (torch.arange(N), step, resample),
    "key_ids": (torch.arange(M), step, resample),
    "key_labels": (torch.arange(M), step, resample),
    "log_proposal": (torch.ones(M), step, resample),
    "proposal": (torch.ones(N, 3, dtype=torch.int64), step),
    "carried_ids": (torch.arange(N), lambda carried_ids: resample(key_ids=torch.arange(M), carried_ids=carried_ids)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", TENSORS)
def test_sparse_and_nested_tensors_are_named(name):
    values, *calls = TENSORS[name]
    for call in calls:
        for wrong in no_dense_tensors(values):
            with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got a tensor that is"):
                call(**{name: wrong})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_states_and_transitions_are_named():
    walked = transition()
    for wrong in no_dense_tensors(STATE.score):
        for call in (step, resample):
            with pytest.raises(TypeError, match=r"^state\.score must be a dense tensor, got"):
                call(state=MHState(STATE.key, wrong))
        with pytest.raises(TypeError, match=r"^then\.score must be a dense tensor, got"):
            compose(walked, walked._replace(score=wrong))


def test_meta_tensors_get_shapes_and_nothing_is_read():
    queries, keys, state = QUERIES.to("meta"), KEYS.to("meta"), init_state(N, "meta")
    options = {"temperature": 0.2, "seed": 1, "step": 2}
    result = mh_step(queries, keys, state, num_samples=3, **options)
    assert result.samples.shape == (N, 3) and result.state.score.is_meta
    assert gumbel_sample(queries, keys, num_samples=2, **options).shape == (N, 2)
    resampled = isir_step(queries, keys, state, log_proposal=torch.zeros(M, device="meta"), **options)
    fields = (resampled.position, *resampled.state, resampled.lse, resampled.carried_weight)
    assert all(field.is_meta and field.shape == (N,) for field in fields)
    assert contrastive_lse(queries, keys, temperature=0.2).shape == (N,)


# Numbers that no operator takes.


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 2**70}, "seed"),
        ({"step": 2**40}, "step"),
        ({"proposal": "uniform", "num_proposals": 2**63}, "num_proposals"),
        ({"proposal": "uniform", "num_proposals": 2**31}, "num_proposals"),
        ({"burn_in": 10**30}, "burn_in"),
        ({"keys": KEYS[:0], "burn_in": 10**30}, "burn_in"),
        ({"keys": KEYS[:0], "num_samples": 10**30}, "num_samples"),
        ({"keys": KEYS[:0], "num_samples": 2**62}, "num_samples"),
    ],
)
def test_numbers_too_large_are_named(changes, name):
    with pytest.raises(ValueError, match=rf"^{name} must .*, got \d+$"):
        step(**changes)


def test_numbers_too_large_are_named_elsewhere():
    for name in ("first_proposal", "total_proposals"):
        with pytest.raises(ValueError, match=r"_proposals? must .*, got \d+$"):
            transition(**{name: 2**70})
    with pytest.raises(ValueError, match=r"^n must be below 2\^63, got \d+$"):
        init_state(2**70)
    with pytest.raises(ValueError, match=r"^num_samples must .*, got \d+$"):
        draw(num_samples=2**70)


# Plain tuples.


def test_tuples_are_states_and_transitions():
    first, then = transition(), transition(step=3)
    assert_identical(tuple(compose(tuple(first), list(then))), tuple(compose(first, then)))
    assert_identical(tuple(apply(tuple(first), tuple(STATE))), tuple(apply(first, STATE)))
    assert_identical(tuple(step(state=tuple(STATE))), tuple(step()))


def test_transitions_of_other_dtypes_and_devices_are_named():
    walked = transition()
    for field in ("threshold", "score"):
        wrong = walked._replace(**{field: getattr(walked, field).long()})
        with pytest.raises(TypeError, match=rf"^transition\.{field} must .*, got int64"):
            apply(wrong, STATE)
    with pytest.raises(ValueError, match=r"^then\.score must be on cpu, .*, got .* on meta"):
        compose(walked, walked._replace(score=walked.score.to("meta")))
    double = Transition(walked.threshold.double(), walked.score.double(), walked.position)
    for other in (double, Transition(*(field.to("meta") for field in walked))):
        with pytest.raises(ValueError, match=r"^then must be torch\.float32 on cpu, as first is, got"):
            compose(walked, other)


# Random calls.


def random_calls(calls, seed, **environment):
    command = [sys.executable, fuzz_core.__file__, str(calls), str(seed)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@needs_core
def test_random_calls_give_legal_results_or_named_errors():
    done = random_calls(2000, 0)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers are GCC's")


def sanitizer(name):
    """The path of a sanitizer's library."""
    asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(asked.stdout.strip())
    if not path.is_absolute():
        pytest.skip("this compiler has no sanitizers")
    return str(path)


@pytest.mark.slow
@needs_gcc
def test_random_calls_read_and_write_nothing_foreign(tmp_path):
    """The core built with the address and the undefined behaviour sanitizer, whose first finding ends the process."""
    done = random_calls(
        100_000,
        1_000_000,
        CXX="g++",
        EMC2_ARCH=" ".join(("-march=native", *SANITIZERS)),
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        LD_PRELOAD=f"{sanitizer('libasan.so')}:{sanitizer('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@needs_gcc
def test_the_core_passes_its_own_tests_under_the_sanitizers(tmp_path):
    sanitizer("libasan.so")
    root = Path(__file__).resolve().parents[2]
    files = [root / "tests" / "cpp" / "core_test.cpp", *(root / "csrc" / "cpu").glob("*.cpp")]
    flags = ["-std=c++17", "-O1", "-march=native", "-fopenmp", "-Wno-psabi", f"-I{root / 'csrc'}", *SANITIZERS]
    subprocess.run(["g++", *flags, *map(str, files), "-o", str(tmp_path / "core_test")], check=True)
    done = subprocess.run([tmp_path / "core_test"], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
