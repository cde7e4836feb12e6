"""mh_step among torch's own machinery: graphs, streams, autocast, compilation, and no waiting for the device."""

import sys
import time

import pytest
import torch
from gpu_support import (
    BACKENDS,
    GPU_BACKENDS,
    REHEARSAL,
    assert_equal_bits,
    captured,
    loud_synchronisation,
    moved,
    problem,
    run,
    running,
)
from oracle import unit

import emc2_kernels as emc2

pytestmark = [pytest.mark.gpu]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

KINDS = {"sweep": {}, "uniform": {"proposal": "uniform", "num_proposals": 100}}
EACH_KIND = pytest.mark.parametrize("proposal", KINDS.values(), ids=KINDS)


def batch(device, n=64, m=32, d=128, dtype=torch.bfloat16, **options):
    """Everything that an EMC2 batch gives, on the device."""
    ids = {"chain_ids": torch.arange(n) + 2**33, "query_ids": torch.arange(n) % m, "key_ids": torch.arange(m)}
    labels = {"key_labels": torch.arange(m) * 2}
    return moved(problem(n, m, d, dtype, num_samples=16, burn_in=m // 2, **ids, **labels, **options), device)


def call(values, backend, **changes):
    values = values | changes
    return run(emc2.mh_step, *(values.pop(name) for name in ("queries", "keys", "state")), backend=backend, **values)


@EACH_BACKEND
@EACH_KIND
def test_replays_of_a_graph_are_the_eager_calls(cuda_only, device, backend, proposal):
    """1,000 replays, seed and step on the device, the step and the chains advanced by the graph itself."""
    values = batch(device, **proposal)
    seed, first = torch.tensor(-3, device=device), 2**32 - 1000
    count = 1000
    state, eager = values["state"], []
    for number in range(first, first + count):
        result = call(values, backend, state=state, seed=2**64 - 3, step=number)
        state = result.state
        eager.append(torch.cat((result.samples, state.key[:, None].int()), 1))
    step = torch.tensor(first, device=device)
    held = emc2.MHState(*(field.clone() for field in values["state"]))

    def advance():
        result = call(values, backend, state=held, seed=seed, step=step)
        for mine, new in zip(held, result.state, strict=True):
            mine.copy_(new)
        step.add_(1)
        return result.samples

    graph, samples = captured(advance)
    for mine, start in zip(held, values["state"], strict=True):
        mine.copy_(start)
    step.fill_(first)
    replayed = []
    for _ in range(count):
        graph.replay()
        replayed.append(torch.cat((samples, held.key[:, None].int()), 1))
    assert torch.equal(torch.stack(replayed), torch.stack(eager))
    assert_equal_bits(held, state)
    assert step == first + count


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(64, 32, 128), (300, 2000, 64), (4, 50_000, 64)], ids=["small", "tiles", "split"])
def test_a_graph_of_every_kind_of_sweep(cuda_only, device, backend, shape):
    values = batch(device, *shape)
    expected = call(values, backend)
    graph, result = captured(lambda: call(values, backend))
    for _ in range(3):
        for field in (result.samples, result.threshold, *result.state):
            field.fill_(-77)
        graph.replay()
        assert_equal_bits(result, expected)


@EACH_BACKEND
@EACH_KIND
def test_on_a_stream_of_its_own(cuda_only, device, backend, proposal):
    """Work queued before and after it on the same stream, and nothing that orders it with the default stream."""
    values = batch(device, n=200, m=300, **proposal)
    expected = call(values, backend)
    late = {name: torch.full_like(values[name], torch.nan) for name in ("queries", "keys")}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for name in late:
            late[name].copy_(values[name])
        result = call(values, backend, **late)
        for name in late:
            late[name].fill_(torch.nan)
    stream.synchronize()
    assert_equal_bits(result, expected)


@EACH_BACKEND
@EACH_KIND
def test_autocast_changes_nothing(device, backend, proposal):
    values = batch(device, dtype=torch.float32, **proposal)
    expected = call(values, backend)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype):
            assert_equal_bits(call(values, backend), expected)


@EACH_BACKEND
def test_inference_mode_and_gradients(device, backend):
    values = batch(device, dtype=torch.float32)
    expected = call(values, backend)
    with torch.inference_mode():
        assert_equal_bits(call(values, backend), expected)
    tracked = call(values, backend, queries=values["queries"].clone().requires_grad_())
    assert not tracked.state.score.requires_grad
    assert_equal_bits(tracked, expected)


@EACH_BACKEND
@EACH_KIND
@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_compiled_without_a_break(device, backend, proposal, mode):
    values = batch(device, **proposal)
    call(values, backend)  # skips here what the backend declines

    def rescaled(queries, step):
        changed = values | {"queries": queries * 1, "step": step}
        result = emc2.mh_step(**changed, return_accepts=True, backend=backend)
        return result.samples, tuple(result.state), result.num_accepted + 1, result.threshold * 2

    torch.compiler.reset()
    fast = torch.compile(rescaled, fullgraph=True, backend=mode)
    for number in range(3):
        arguments = (values["queries"], torch.tensor(number, device=device))
        assert_equal_bits(fast(*arguments), rescaled(*arguments))


@EACH_BACKEND
@EACH_KIND
def test_nothing_waits_for_the_device(cuda_only, device, backend, proposal):
    values = batch(device, **proposal)
    asked = {"return_accepts": True, "return_lse": not proposal}
    step = torch.tensor(5, device=device)
    options = {name: value for name, value in values.items() if name not in ("state", "key_labels")}

    def everything():
        result = call(values, backend, **asked)
        call(values, backend, step=step, seed=step)
        call(values, backend, state=result.state, temperature=torch.full((64,), 0.2, device=device))
        transition = emc2.mh_transition(backend=backend, **options)
        return emc2.apply(emc2.compose(transition, transition), values["state"], values["key_labels"])

    everything()
    with loud_synchronisation():
        everything()


@EACH_BACKEND
def test_calls_return_before_the_device_is_done(cuda_only, device, backend):
    """Behind a tenth of a second of work a call takes no longer than its launch."""
    values = batch(device)
    call(values, backend)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    started = time.perf_counter()
    call(values, backend)
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    assert launched < (time.perf_counter() - started) / 2


@EACH_BACKEND
def test_float64_and_cpu_tensors_are_left_to_others(cuda_only, device, backend):
    values = batch(device, dtype=torch.float64)
    if backend == "auto":
        assert call(values, backend).state.score.dtype == torch.float64
        return
    with pytest.raises(ValueError, match=backend):
        emc2.mh_step(backend=backend, **values)


def test_a_gpu_backend_runs_here(cuda_only):
    """Else every test above was skipped, and "auto" is the slow reference."""
    from emc2_kernels.backends import resolve

    status = {name: emc2.backends().get(name, "there is no such backend") for name in GPU_BACKENDS}
    assert "available" in status.values(), status
    chosen = resolve("auto", torch.empty(1, device="cuda")).__name__
    assert not chosen.endswith(("reference", ".cpu")), chosen


OUT_OF_RANGE = {
    "a position past the keys": "step(proposal=torch.tensor([[1, 32]] * 64, device=device))",
    "a position below zero": "step(proposal=torch.tensor([[-1, 0]] * 64, device=device))",
    "a chain id of 41 bits": "step(chain_ids=torch.full((64,), 2**40, device=device))",
    "a chain id below zero": "step(chain_ids=torch.full((64,), -1, device=device))",
    "an item that no chain is kept for": "loss.chains.read(torch.full((4,), 100, device=device), 0)",
    "a view that is not there": "loss.chains.read(four, 2 * four)",
    "a label that the bank has not": "loss.bank.lookup(torch.full((4,), 200, device=device))",
    "an item that is not there": "loss(queries[:32], queries[32:], torch.full((32,), 100, device=device)).backward()",
}
PRELUDE = """
import sys
import torch
import emc2_kernels as emc2
device = torch.device("cuda")
four = torch.ones(4, dtype=torch.int64, device=device)
queries, keys = torch.randn(64, 16, device=device), torch.randn(32, 16, device=device)
state = emc2.init_state(64, device)
loss = emc2.losses.EMC2Loss(100, 16, sampler="mh", backend={backend!r}).to(device)
def step(**changes):
    options = {{"temperature": 1.0, "seed": 0, "step": 0, "backend": {backend!r}}} | changes
    return emc2.mh_step(queries, keys, state, **options)
step()
step(proposal=torch.tensor([[0, 31]] * 64, device=device))
torch.cuda.synchronize()
print("ready", flush=True)
{expression}
try:
    torch.cuda.synchronize()
except Exception as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(3)
print("nothing was noticed", flush=True)
"""


def script(backend, expression):
    return [sys.executable, "-c", PRELUDE.format(backend=backend, expression=expression)]


@pytest.fixture(scope="module")
def processes():
    """Each case in a process with a GPU context of its own, which it may ruin; one before them compiles for all."""
    available = [name for name in GPU_BACKENDS if emc2.backends().get(name) == "available"] if not REHEARSAL else []
    harmless = "loss(queries[:32], queries[32:], torch.arange(32, device=device)).backward()"
    commands = {(name, case): script(name, code) for name in available for case, code in OUT_OF_RANGE.items()}
    with running({name: script(name, harmless) for name in available}) as first:
        for process in first.values():
            process.result()
    with running(commands) as started:
        yield started


@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_a_value_out_of_range_fails_at_the_next_synchronisation(cuda_only, processes, backend, case):
    done = processes[backend, case].result(timeout=150)
    assert "ready" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "nothing was noticed" not in done.stdout, f"{case} passed in silence"
    assert "assert" in done.stderr.lower() or "CUDA error" in done.stderr, done.stderr[-2000:]


@EACH_BACKEND
def test_from_several_threads(device, backend):
    """Autograd and data-parallel wrappers call from threads of their own."""
    from concurrent.futures import ThreadPoolExecutor

    values = [
        batch(device, n, 40, 64) | {"queries": unit(n, 64, seed=n, dtype=torch.bfloat16).to(device)}
        for n in (33, 64, 65, 130)
    ]
    expected = [call(one, backend) for one in values]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(lambda one: call(one, backend), values), expected, strict=True):
                assert_equal_bits(actual, wanted)
