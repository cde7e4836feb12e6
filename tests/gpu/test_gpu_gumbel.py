"""Exact draws from the softmax on a GPU: index-exact against float64 away from ties, replayed in a graph, without
waiting for the device."""

import pytest
import torch
from gpu_support import BACKENDS, captured, generator, loud_synchronisation, rehearsed, similarity_error
from oracle import unit

from emc2_kernels import gumbel_sample, rng

# "cuda" has no such kernel.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"], indirect=True),
]

NOISE_ERROR = 2e-5  # of two noises: philox.py's bound in powers of two, and the roundings of score and sum
OPTIONS = {"temperature": 0.2, "seed": 2**63 + 5, "step": 2**32 - 1}


def expected(queries, keys, ids, num_samples):
    """Positions (n, R) and by how much the runner-up lost, in float64, on the CPU."""
    scores = queries.double() @ keys.double().T / OPTIONS["temperature"]
    scores = scores.masked_fill(ids["query_ids"][:, None] == ids["key_ids"], -torch.inf)
    options = {"seed": OPTIONS["seed"], "step": OPTIONS["step"], "dtype": torch.float64}
    noise = [rng.gumbel(ids["chain_ids"], range(len(keys)), sample=r, **options) for r in range(num_samples)]
    two = torch.stack([scores + each for each in noise], 1).topk(2)
    return two.indices[..., 0], two.values[..., 0] - two.values[..., 1]


def operands(n, m, d, dtype):
    ids = {
        "chain_ids": torch.randint(0, 2**40, (n,), generator=generator(1)),
        "query_ids": torch.randint(0, 9, (n,), generator=generator(2)),
        "key_ids": torch.randint(0, 12, (m,), generator=generator(3)),
    }
    return unit(n, d, seed=4, dtype=dtype), unit(m, d, seed=5, dtype=dtype), ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_samples", [1, 2, 5])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 2, 1), (63, 127, 40), (65, 1025, 128), (129, 300, 768), (3, 20_001, 64)])
def test_positions_are_those_of_float64(device, backend, n, m, d, num_samples, dtype):
    queries, keys, ids = operands(n, m, d, dtype)
    on_device = {name: value.to(device) for name, value in ids.items()}
    drawn = gumbel_sample(
        queries.to(device), keys.to(device), backend=backend, num_samples=num_samples, **on_device, **OPTIONS
    ).cpu()
    positions, margins = expected(queries, keys, ids, num_samples)
    clear = margins > similarity_error(d) / OPTIONS["temperature"] + NOISE_ERROR
    clear |= margins.isnan()  # both infinite: a row without keys
    positions = torch.where(margins.isnan(), -1, positions)
    assert clear.double().mean() >= 0.9
    assert torch.equal(drawn[clear], positions[clear])


def test_a_captured_draw_advances_with_its_step_and_waits_for_nothing(device, backend, cuda_only):
    queries, keys, ids = operands(64, rehearsed(100_000, 1000), 64, torch.bfloat16)
    queries, keys = queries.to(device), keys.to(device)
    ids = {name: value.to(device) for name, value in ids.items()}
    step = torch.zeros((), dtype=torch.int64, device=device)

    def draw():
        return gumbel_sample(queries, keys, temperature=0.2, seed=3, step=step, num_samples=4, backend=backend, **ids)

    draw()
    with loud_synchronisation():
        draw()
    graph, out = captured(draw)
    for value in (0, 5):
        step.fill_(value)
        graph.replay()
        assert torch.equal(out, draw())
