"""The operators under torch's own machinery: opcheck, compilation, fake tensors, autocast, inference mode, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import COMPILED, assert_identical, assert_unchanged, normal, snapshot
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from emc2_kernels import (
    ChainStore,
    EmbeddingBank,
    MHState,
    Transition,
    apply,
    compose,
    dispatch,
    init_state,
    mh_step,
    mh_transition,
)
from emc2_kernels.losses import EMC2Loss, NTXentLoss

N, M, D, ITEMS = 10, 7, 6, 20
QUERIES, KEYS = normal(0, N, D), normal(1, M, D)
STATE = MHState(torch.arange(N) - 1, normal(2, N).where(torch.arange(N) > 0, -torch.inf))
IDS = {"chain_ids": torch.arange(N) + 2**33, "query_ids": torch.arange(N) % 5, "key_ids": torch.arange(M) % 5}
POSITIONS = torch.arange(N * 9).view(N, 9) % M


def step(queries=QUERIES, keys=KEYS, state=STATE, **options):
    return mh_step(queries, keys, state, **({"temperature": 0.2, "seed": 1, "step": 2} | options))


def transition(queries=QUERIES, keys=KEYS, **options):
    return mh_transition(queries, keys, **({"temperature": 0.2, "seed": 1, "step": 2} | options))


class RecordedCalls(TorchDispatchMode):
    """What the public functions hand to the library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "emc2_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def assert_passes_opcheck(call):
    with RecordedCalls() as recorded:
        call()
    ((operator, arguments, options),) = recorded.calls
    torch.library.opcheck(operator, arguments, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_public_functions_hand_over_passes_opcheck(dtype):
    """Operators by themselves: test_opcheck.py."""
    operands = {"queries": QUERIES.to(dtype), "keys": KEYS.to(dtype)}
    state = STATE._replace(score=STATE.score.to(dtype))
    assert_passes_opcheck(lambda: step(**operands, state=state, **IDS, return_accepts=True, return_lse=True))
    assert_passes_opcheck(lambda: transition(**operands, first_proposal=3, total_proposals=20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors_get_shapes_and_dtypes_without_a_look_at_values(dtype):
    """On a GPU a look at a value would wait for the device; a fake tensor has none to look at."""
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode():
        queries, keys = torch.empty(N, D, dtype=dtype), torch.empty(M, D, dtype=dtype)
        ids = {name: torch.empty(len(value), dtype=torch.int64) for name, value in IDS.items()}
        options = ids | {
            "temperature": torch.empty(N),
            "seed": torch.empty((), dtype=torch.int64),
            "step": torch.empty((), dtype=torch.int64),
            "log_proposal": torch.empty(M),
            "num_samples": 3,
        }
        state = init_state(N)
        result = mh_step(queries, keys, state, **options, return_accepts=True, return_lse=True)
        walked = mh_transition(queries, keys, **options)
        entered = apply(compose(walked, walked), MHState(state.key, state.score.to(floats)), ids["key_ids"])
        drawn = step(queries, keys, state, proposal=torch.empty(N, 4, dtype=torch.int64))
        assert drawn.num_accepted is None and drawn.lse is None
    for tensor, shape, kind in [
        (result.samples, (N, 3), torch.int32),
        (result.state.key, (N,), torch.int64),
        (result.state.score, (N,), floats),
        (result.num_accepted, (N,), torch.int32),
        (result.threshold, (N,), floats),
        (result.lse, (N,), floats),
        (walked.threshold, (N, 3), floats),
        (walked.score, (N, 3), floats),
        (walked.position, (N, 3), torch.int64),
        (entered.samples, (N, 3), torch.int32),
        (entered.state.score, (N,), floats),
        (drawn.samples, (N, 1), torch.int32),
    ]:
        assert (tensor.shape, tensor.dtype) == (shape, kind)


BUILD = pytest.mark.parametrize(
    "build",
    [
        NTXentLoss,
        lambda: EMC2Loss(ITEMS, D, sampler="mh"),
        lambda: EMC2Loss(ITEMS, D, sampler="isir"),
        lambda: EMC2Loss(ITEMS, D, sampler="isir", views="one", queue=5),
    ],
    ids=["NT-Xent", "EMC2", "i-SIR", "i-SIR, one view"],
)


@pytest.mark.parametrize("stats", [False, True], ids=["", "statistics"])
@BUILD
def test_losses_look_at_no_value(build, stats):
    with FakeTensorMode():
        loss, index = build(), torch.empty(4, dtype=torch.int64)
        z0, z1 = (torch.empty(4, D, requires_grad=True) for _ in range(2))
        out = loss(z0, z1, index, return_stats=stats)
        value, numbers = out if stats else (out, {})
        value.backward()
    assert all(tensor.shape == () for tensor in (value, *numbers.values()))
    assert z0.grad.shape == z0.shape


def compiled(function, backend="eager", **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def walk_all(queries, keys, key, score, step_number):
    result = mh_step(
        queries,
        keys,
        MHState(key, score),
        temperature=0.2,
        seed=11,
        step=step_number,
        num_samples=3,
        return_accepts=True,
        return_lse=True,
        **IDS,
    )
    return tuple(result.state), result.samples, result.num_accepted, result.threshold, result.lse


def walk_in_shards(queries, keys, key, score, step_number):
    common = {"temperature": 0.2, "seed": 11, "step": step_number, "num_samples": 3, "total_proposals": M}
    common |= {"chain_ids": IDS["chain_ids"]}
    first = mh_transition(queries, keys[:3], **common)
    then = mh_transition(queries, keys[3:], first_proposal=3, **common)
    result = apply(
        compose(Transition(*(field[:, -1:] for field in first)), then), MHState(key, score), torch.arange(M) * 10
    )
    return tuple(result.state), result.samples, result.threshold


def draw_uniformly(queries, keys, key, score, step_number):
    result = mh_step(
        queries,
        keys,
        MHState(key, score),
        temperature=0.2,
        seed=11,
        step=step_number,
        proposal="uniform",
        num_proposals=12,
        num_samples=4,
    )
    return tuple(result.state), result.samples


@pytest.mark.parametrize("function", [walk_all, walk_in_shards, draw_uniformly], ids=lambda function: function.__name__)
def test_compiled_walks_equal_eager_ones(function):
    fast = compiled(function, "aot_eager")
    for number in (0, 1, 2**32 - 1):
        arguments = (QUERIES, KEYS, *STATE, torch.tensor(number))
        assert_identical(fast(*arguments), function(*arguments))


def test_inductor_makes_the_same_walk():
    arguments = (QUERIES, KEYS, *STATE, torch.tensor(5))
    assert_identical(compiled(walk_all, "inductor")(*arguments), walk_all(*arguments))


def test_steps_in_a_tensor_do_not_recompile():
    fast = compiled(walk_all)
    fast(QUERIES, KEYS, *STATE, torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(1, 5):
            arguments = (QUERIES, KEYS, *STATE, torch.tensor(number))
            assert_identical(fast(*arguments), walk_all(*arguments))


def test_steps_and_sizes_as_numbers_recompile_only_until_they_are_symbols():
    fast = compiled(walk_in_shards)
    for number in range(2):
        fast(QUERIES, KEYS, *STATE, number)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(2, 5):
            arguments = (QUERIES, KEYS, *STATE, number)
            assert_identical(fast(*arguments), walk_in_shards(*arguments))


def train(loss, run, steps):
    """Values and gradients of `run`, which is the loss or a compiled version of it, and all that the loss keeps."""
    history, home = [], normal(60, ITEMS, D)
    for number in range(steps):
        index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(number))[:5]
        z0, z1 = ((home[index] + 0.2 * normal(seed + number, 5, D)).requires_grad_() for seed in (0, 30))
        value = run(z0, z1, index)
        value.backward()
        history.append((value.detach(), z0.grad, z1.grad, snapshot(loss)))
    return history


def assert_histories_are_close(actual, expected):
    for (*numbers, state), (*expected_numbers, expected_state) in zip(actual, expected, strict=True):
        torch.testing.assert_close(numbers, expected_numbers)
        for name in ("step", "chains.key", "bank.written_at", "bank.last_step"):
            assert_identical(state[name], expected_state[name])
        torch.testing.assert_close(state["chains.score"], expected_state["chains.score"])
        torch.testing.assert_close(state["bank.embeddings"], expected_state["bank.embeddings"])


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("eager", {}),
        ("eager", {"views": "both", "burn_in": 0.0}),
        ("aot_eager", {"burn_in": 0.0}),
        ("eager", {"sampler": "isir", "bimodal": True}),
        ("eager", {"sampler": "isir", "views": "one", "queue": 0}),
        ("aot_eager", {"sampler": "isir"}),
        ("aot_eager", {"sampler": "isir", "views": "one", "queue": 5}),
    ],
)
def test_compiled_emc2_equals_eager_step_after_step_without_recompiling(backend, options):
    options = {"sampler": "mh", "temperature": 0.2, "carry": "cached"} | options
    expected_loss, loss = EMC2Loss(ITEMS, D, **options), EMC2Loss(ITEMS, D, **options)
    expected = train(expected_loss, expected_loss, 5)
    fast = compiled(loss, backend, dynamic=False)
    assert_histories_are_close(train(loss, fast, 1), expected[:1])
    loss.load_state_dict(EMC2Loss(ITEMS, D, **options).state_dict())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_histories_are_close(train(loss, fast, 5), expected)
    assert loss.step == 5


@pytest.mark.parametrize("index", [None, torch.tensor([0, 3, 0, 1, 3])], ids=["no index", "index"])
def test_compiled_ntxent_equals_eager(index):
    loss = NTXentLoss(temperature=0.2)
    fast = compiled(loss, "aot_eager")
    z0, z1, w0, w1 = ((normal(seed, 5, D).requires_grad_()) for seed in (0, 1, 0, 1))
    value, expected = fast(z0, z1, index), loss(w0, w1, index)
    value.backward()
    expected.backward()
    torch.testing.assert_close((value, z0.grad, z1.grad), (expected, w0.grad, w1.grad))


@BUILD
def test_compiled_statistics_equal_eager_ones(build):
    arguments = normal(0, 5, D), normal(1, 5, D), torch.arange(5)
    actual, expected = compiled(build())(*arguments, return_stats=True), build()(*arguments, return_stats=True)
    torch.testing.assert_close(actual, expected, equal_nan=True)


LARGE = {"queries": normal(6, 200, 32), "keys": normal(7, 400, 32), "state": init_state(200)}  # walked tile by tile
LARGE_OPTIONS = {"num_samples": 5, "return_accepts": True, "return_lse": True}


def large_step(backend="auto", **options):
    return step(**LARGE, **LARGE_OPTIONS, backend=backend, **options)


@pytest.mark.parametrize("backend", COMPILED)
def test_autocast_leaves_a_walk_in_its_operands_precision(backend):
    for call in (lambda: step(backend=backend, **LARGE_OPTIONS), lambda: large_step(backend)):
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert_identical(call(), expected)
    expected = transition(backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(transition(backend=backend), expected)


@pytest.mark.parametrize(
    "build",
    [
        NTXentLoss,
        lambda: EMC2Loss(40, 32, sampler="isir"),
        lambda: EMC2Loss(40, 32, sampler="isir", views="one", queue=5),
    ],
    ids=["NT-Xent", "i-SIR", "i-SIR, one view"],
)
def test_autocast_leaves_a_log_sum_exp_in_float32(build):
    """Of several calls, so that something is carried."""
    home = normal(1, 40, 32)

    def values(loss, enabled):
        found = []
        for seed in range(3):
            index = torch.arange(20) + 10 * (seed % 2)
            z0, z1 = (home[index] + 0.2 * normal(10 * seed + view, 20, 32) for view in (0, 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(loss(z0, z1, index, return_stats=True))
        return found

    expected, found = values(plain := build(), False), values(inside := build(), True)
    assert expected[-1][1].get("carried_weight", 1) > 0
    assert_identical(found, expected)
    assert_identical(snapshot(inside), snapshot(plain))


def test_under_autocast_emc2_walks_with_rounded_operands_and_keeps_float32_gradients():
    """The walk multiplies in autocast's dtype; the surrogate and what is kept stay in float32."""
    loss = EMC2Loss(ITEMS, D, sampler="mh", bank_dtype=torch.float32)
    z0, z1, index = normal(0, 5, D).requires_grad_(), normal(1, 5, D).requires_grad_(), torch.arange(5) + 3
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z0, z1, index)
    value.backward()
    unit = torch.nn.functional.normalize(torch.cat((z0, z1)).detach(), dim=1)
    coin = torch.ops.emc2_kernels.view_coin(index, 0, None, 0, None, "auto")
    keys = unit[torch.arange(5) + 5 * coin]
    items, views = index.repeat(2), torch.arange(2).repeat_interleave(5)
    by_hand = mh_step(
        unit.bfloat16(),
        keys.bfloat16(),
        init_state(10),
        temperature=0.07,
        seed=0,
        step=0,
        chain_ids=items * 2 + views,
        query_ids=items,
        key_ids=index,
        key_labels=index * 2 + coin,
    )
    slots = items * 2 + views
    assert_identical(MHState(loss.chains.key[slots], loss.chains.score[slots]), by_hand.state)
    torch.testing.assert_close(loss.bank.embeddings[slots], unit)
    assert value.dtype == torch.float32 and z0.grad.dtype == torch.float32
    rounded = EMC2Loss(ITEMS, D, sampler="mh")(z0.detach(), z1.detach(), index)
    torch.testing.assert_close(value.detach(), rounded, rtol=0.05, atol=0.05)


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


@pytest.mark.parametrize("backend", COMPILED)
def test_buffers_made_in_inference_mode_serve_later_calls_outside_it(backend):
    def both():  # in a thread that has no buffers yet
        with torch.inference_mode():
            inside = large_step(backend)
        return inside, large_step(backend)

    inside, outside = in_new_thread(both)
    expected = large_step(backend)
    assert_identical(outside, expected)
    assert_identical([field.clone() for field in inside.state], list(expected.state))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("number", [0, 2**31, 2**32 - 1])
def test_counters_in_tensors_equal_the_integers(seed, number, backend):
    bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    for options in ({}, {"proposal": "uniform", "num_proposals": 20}):
        expected = step(seed=seed, step=number, num_samples=5, backend=backend, **options)
        assert_identical(
            step(seed=bits, step=torch.tensor(number), num_samples=5, backend=backend, **options), expected
        )
    coin = torch.ops.emc2_kernels.view_coin
    signed = bits.item()
    assert_identical(
        coin(torch.arange(99), 0, bits, 0, torch.tensor(number), backend),
        coin(torch.arange(99), signed, None, number, None, backend),
    )


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_do_not_share_scratch_memory(backend):
    """Walks of different sizes at the same time, in threads that start together."""
    calls = [
        lambda: large_step(backend, step=1),
        lambda: step(LARGE["keys"], LARGE["queries"], init_state(400), backend=backend, **LARGE_OPTIONS),
        lambda: step(backend=backend, **LARGE_OPTIONS),
    ]
    expected = [call() for call in calls]
    start = threading.Barrier(len(calls))

    def repeat(call):
        start.wait(timeout=30)
        return [call() for _ in range(15)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for results, single in zip(pool.map(repeat, calls, timeout=120), expected, strict=True):
            for result in results:
                assert_identical(result, single)


def test_a_step_touches_none_of_its_inputs():
    inputs = [QUERIES, KEYS, *STATE, *IDS.values(), POSITIONS]
    before = [tensor.clone() for tensor in inputs]
    for backend in COMPILED:
        step(**IDS, backend=backend)
        step(**IDS, backend=backend, proposal=POSITIONS)
    assert_identical(inputs, before)


def test_compose_is_one_walk_after_the_other_at_ties_too():
    """Whole numbers make states, thresholds and scores meet; -inf is the identity and a chain that has not started."""
    values = [-torch.inf, 0.0, 1.0, 2.0]
    walks = torch.tensor([(t, v) for t in values for v in values if v <= t and (v > -torch.inf) == (t > -torch.inf)])
    first, then, x = torch.cartesian_prod(*(torch.arange(k) for k in (len(walks), len(walks), len(values)))).T
    state = MHState(torch.where(x > 0, 100, -1), torch.tensor(values)[x])

    def walk(number, shift):
        threshold, score = walks[number].T[..., None]
        return Transition(threshold, score, torch.where(score > -torch.inf, number[:, None] + shift, -1))

    one_by_one = apply(walk(then, 50), apply(walk(first, 0), state).state)
    at_once = apply(compose(walk(first, 0), walk(then, 50)), state)
    assert_identical(at_once.state, one_by_one.state)


def test_stores_work_in_a_compiled_function():
    store, bank = ChainStore(ITEMS), EmbeddingBank(ITEMS, D, dtype=torch.float32)

    def visit(index, queries, step_number):
        state = store.read(index, 0, queries, bank, 0.2)
        store.write(index, 0, MHState(state.key + 1, state.score))
        bank.update(index, 0, queries, step_number)
        return state.score

    fast = compiled(visit)
    for number in range(3):
        states = snapshot(store), snapshot(bank)
        arguments = torch.tensor([1, 4, 1]), normal(number, 3, D), torch.tensor(number)
        expected = visit(*arguments)
        after = snapshot(store), snapshot(bank)
        store.load_state_dict(states[0])
        bank.load_state_dict(states[1])
        assert_identical(fast(*arguments), expected)
        assert_unchanged(store, after[0])
        assert_unchanged(bank, after[1])


class TestTheDispatcherIsPassedByOnlyWhereItHasNothingToDo:
    @staticmethod
    def step():
        return mh_step(normal(0, 3, 4), normal(1, 5, 4), init_state(3), temperature=1.0, seed=0, step=0)

    def test_eager_calls_pass_it_by(self, monkeypatch):
        asked = []
        real = dispatch.nothing_to_dispatch
        monkeypatch.setattr(dispatch, "nothing_to_dispatch", lambda operand: asked.append(real(operand)) or asked[-1])
        self.step()
        assert asked == [True]

    def test_the_profiler_sees_the_operator(self):
        with torch.profiler.profile() as profile:
            self.step()
        assert "emc2_kernels::mh_step" in {event.name for event in profile.events()}

    def test_modes_see_the_operator(self):
        seen = []

        class Dispatch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        class Function(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        for mode in (Dispatch, Function):
            seen.clear()
            with mode():
                self.step()
            assert torch.ops.emc2_kernels.mh_step.default in seen, mode

    def test_subclasses_see_the_operator(self):
        seen = []

        class Logged(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})

        queries = normal(0, 3, 4).as_subclass(Logged)
        mh_step(queries, normal(1, 5, 4), init_state(3), temperature=1.0, seed=0, step=0)
        assert torch.ops.emc2_kernels.mh_step.default in seen
