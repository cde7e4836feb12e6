"""EMC2Loss on a GPU: the chains and gradients of the CPU, in graphs, compiled, under autocast, without waiting."""

import pytest
import torch
from gpu_losses import ITEMS, OPTIONS, SAMPLERS, D, batches, forward, leaf, make, train
from gpu_support import BACKENDS, ON_GPU, assert_equal_bits, captured, loud_synchronisation
from helpers import normal, relative_rms, snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]
EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_cpu(device, backend, options):
    data = list(batches(5))
    expected = train(make("cpu", "reference", **options), data, "cpu", "reference")
    actual = train(make(device, backend, **options), data, device, backend, index_on_cpu=True)
    for (value, gradient, stats, kept), (wanted, wanted_gradient, wanted_stats, wanted_kept) in zip(
        actual, expected, strict=True
    ):
        for name in ("step", "chains.key", "bank.written_at", "bank.last_step"):
            assert_equal_bits(kept[name], wanted_kept[name])
        torch.testing.assert_close(kept["chains.score"], wanted_kept["chains.score"], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(kept["bank.embeddings"], wanted_kept["bank.embeddings"], rtol=1e-5, atol=1e-6)
        if "drift.sums" in kept:
            torch.testing.assert_close(kept["drift.sums"], wanted_kept["drift.sums"], rtol=1e-4, atol=1e-3)
        assert relative_rms(gradient, wanted_gradient) <= 1e-5
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert stats == pytest.approx(wanted_stats, rel=1e-4, abs=1e-5, nan_ok=True)


@EACH_SAMPLER
def test_recomputed_carry_equals_the_cpu(device, backend, sampler):
    """It waits for the device, which is documented: it encodes only what it needs."""
    weight = normal(5, ITEMS * 2, D)

    def encoder(where):
        table = weight.to(where)
        return lambda items, views: table[items * 2 + views]

    data, histories = list(batches(4)), []
    for where, name in (("cpu", "reference"), (device, backend)):
        loss = make(where, name, **sampler, carry="recompute", encode=encoder(where))
        histories.append(train(loss, data, where, name))
    for expected, actual in zip(*histories, strict=True):
        assert_equal_bits(actual[3]["chains.key"], expected[3]["chains.key"])
        assert relative_rms(actual[1], expected[1]) <= 1e-5


@EACH_SAMPLER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(device, backend, dtype, sampler):
    """Embeddings are normalised in float32 and rounded back: where a device rounds otherwise, a chain may differ."""
    data = list(batches(3, dtype))
    expected = train(make("cpu", "reference", **sampler), data, "cpu", "reference")
    actual = train(make(device, backend, **sampler), data, device, backend)
    for (_, gradient, _, kept), (_, wanted, _, wanted_kept) in zip(actual, expected, strict=True):
        same = (kept["chains.key"] == wanted_kept["chains.key"]).view(ITEMS, 2)
        assert gradient.dtype == dtype and same.double().mean() > 0.95
        assert relative_rms(gradient, wanted) <= (1e-2 if same.all() else 0.3)


@EACH_SAMPLER
def test_runs_are_the_same_bits(device, backend, sampler):
    data = list(batches(4, torch.bfloat16))
    first = train(make(device, backend, **sampler), data, device, backend)
    for _ in range(5 if ON_GPU else 1):
        assert_equal_bits(train(make(device, backend, **sampler), data, device, backend), first)


@EACH_SAMPLER
def test_under_autocast(device, backend, sampler):
    """Compute in bfloat16, keep states in float32, give gradients in the inputs' dtype."""
    data = list(batches(3))
    loss = make(device, backend, **sampler)
    for z0, z1, index in data:
        z0, z1 = leaf(z0, device), leaf(z1, device)
        with torch.autocast(device.type, torch.bfloat16):
            value = forward(loss, z0, z1, index.to(device), backend)
        value.backward()
        assert z0.grad.dtype == torch.float32 and z0.grad.isfinite().all() and value.isfinite()
    assert loss.chains.score.dtype == torch.float32 and (loss.chains.key >= 0).any()


@EACH_SAMPLER
def test_evaluation_writes_nothing(device, backend, sampler):
    loss = make(device, backend, **sampler)
    train(loss, batches(2), device, backend)
    before = snapshot(loss)
    train(loss.eval(), batches(2), device, backend)
    assert_equal_bits(snapshot(loss), before)


@EACH_SAMPLER
@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_compiled_without_a_break(device, backend, mode, sampler):
    data = list(batches(3))
    expected = train(make(device, backend, **sampler), data, device, backend)
    loss = make(device, backend, **sampler)
    torch.compiler.reset()
    fast = torch.compile(loss, fullgraph=True, dynamic=False, backend=mode)
    for (z0, z1, index), (value, gradient, _, kept) in zip(data, expected, strict=True):
        z0, z1 = leaf(z0, device), leaf(z1, device)
        actual = fast(z0, z1, index.to(device))
        actual.backward()
        assert actual.item() == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert relative_rms(torch.cat((z0.grad, z1.grad)).cpu(), gradient) <= 1e-4
        assert torch.equal(loss.chains.key.cpu(), kept["chains.key"])


@EACH_SAMPLER
def test_nothing_waits_for_the_device(cuda_only, device, backend, sampler):
    loss = make(device, backend, **sampler)
    z0, z1, index = (tensor.to(device) for tensor in next(batches(1)))
    pinned = index.cpu().pin_memory()

    def everything():
        for where in (index, pinned):
            first, second = leaf(z0, device), leaf(z1, device)
            value, stats = forward(loss, first, second, where, backend, return_stats=True)
            value.backward()
        return stats

    everything()
    with loud_synchronisation():
        everything()


@EACH_SAMPLER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_of_a_graph_are_the_eager_calls(cuda_only, device, backend, dtype, sampler):
    """Forward and backward: the same values, gradients and, at the end, chains, bank and step."""
    data = [tuple(tensor.to(device) for tensor in batch) for batch in batches(100, dtype)]
    eager, loss = make(device, backend, **sampler), make(device, backend, **sampler)
    start = snapshot(loss)
    z0, z1, index = leaf(data[0][0], device), leaf(data[0][1], device), data[0][2].clone()

    def advance():
        value = forward(loss, z0, z1, index, backend)
        return value, *torch.autograd.grad(value, (z0, z1))

    graph, replayed = captured(advance)
    loss.load_state_dict(start)  # warming up has advanced it
    for batch in data:
        first, second = leaf(batch[0], device), leaf(batch[1], device)
        value = eager(first, second, batch[2])
        expected = value, *torch.autograd.grad(value, (first, second))
        with torch.no_grad():
            for held, new in zip((z0, z1, index), batch, strict=True):
                held.copy_(new)
        graph.replay()
        assert_equal_bits([tensor.detach() for tensor in replayed], [tensor.detach() for tensor in expected])
    assert_equal_bits(snapshot(loss), snapshot(eager))
    assert loss.step == 100
