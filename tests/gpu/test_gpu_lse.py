"""contrastive_lse and the in-batch losses on a GPU: values and gradients against float64, nothing waits, memory."""

import pytest
import torch
from gpu_support import BACKENDS, captured, loud_synchronisation
from helpers import relative_rms
from oracle import unit

from emc2_kernels import contrastive_lse
from emc2_kernels.losses import EMC2Loss, NTXentLoss, SogCLRLoss

# "cuda" has no such kernel.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"], indirect=True),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def operands(n, m, d, dtype):
    return unit(n, d, seed=4, dtype=dtype), unit(m, d, seed=5, dtype=dtype), torch.arange(n) % 7, torch.arange(m) % 9


def with_gradients(queries, keys, query_ids, key_ids, temperature, backend):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (queries, keys, temperature)]
    lse = contrastive_lse(
        inputs[0], inputs[1], temperature=inputs[2], query_ids=query_ids, key_ids=key_ids, backend=backend
    )
    weights = torch.linspace(-1, 1, len(queries), dtype=lse.dtype, device=lse.device)
    return lse.detach(), *torch.autograd.grad((lse * weights).sum(), inputs)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 2, 1), (63, 127, 40), (65, 1025, 128), (129, 300, 768), (3, 20_001, 64)])
def test_values_and_gradients_are_those_of_float64(device, backend, n, m, d, per_row, dtype):
    queries, keys, query_ids, key_ids = operands(n, m, d, dtype)
    temperature = torch.linspace(0.1, 0.5, n) if per_row else torch.tensor(0.2)
    expected = with_gradients(queries.double(), keys.double(), query_ids, key_ids, temperature.double(), "reference")
    arguments = (tensor.to(device) for tensor in (queries, keys, query_ids, key_ids, temperature))
    found = with_gradients(*arguments, backend)
    for name, value, wanted in zip(("lse", "queries", "keys", "temperature"), found, expected, strict=True):
        started = wanted.isfinite()
        assert torch.equal(value.cpu().isfinite(), started), name
        if started.any() and wanted[started].abs().max() > 0:
            slack = 10 if wanted.dim() == 0 else 1  # one temperature's gradient is a sum over rows of both signs
            assert relative_rms(value.cpu()[started], wanted[started]) < slack * TOLERANCE[dtype], name


def test_a_captured_sum_follows_its_operands_and_waits_for_nothing(device, backend, cuda_only):
    queries, keys, query_ids, key_ids = (tensor.to(device) for tensor in operands(64, 5000, 64, torch.bfloat16))

    def total():
        return contrastive_lse(queries, keys, temperature=0.2, query_ids=query_ids, key_ids=key_ids, backend=backend)

    total()
    with loud_synchronisation():
        total()
    graph, out = captured(total)
    for scale in (1.0, 0.5):
        queries.mul_(scale)
        graph.replay()
        assert torch.equal(out, total())


LOSSES = {
    "ntxent": NTXentLoss,
    "sogclr": lambda **o: SogCLRLoss(100, **o),
    "emc2 from the bank": lambda **o: EMC2Loss(100, 64, proposals="bank", carry="corrected", **o),
    "emc2 by i-SIR": lambda **o: EMC2Loss(100, 64, sampler="isir", **o),
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_losses_are_those_of_the_reference_and_wait_for_nothing(device, backend, make, cuda_only):
    index = torch.arange(32, device=device)
    gradients = []
    for name in (backend, "reference"):
        loss = make(temperature=0.2, backend=name).to(device)
        for seed in range(3):
            z0, z1 = (unit(32, 64, seed=2 * seed + view).to(device).requires_grad_() for view in (0, 1))
            if seed:
                with loud_synchronisation():
                    loss(z0, z1, index).backward()
            else:
                loss(z0, z1, index).backward()
        gradients.append(z0.grad)
    assert relative_rms(gradients[0], gradients[1]) < 1e-4


def test_a_batch_of_65536_pairs_fits(device, backend, cuda_only):
    z0, z1 = (torch.randn(65_536, 128, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = NTXentLoss(temperature=0.1, backend=backend)(z0, z1)
    loss.backward()
    assert loss.isfinite() and z0.grad.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
