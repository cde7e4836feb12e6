"""Every kernel once, on shapes small enough for compute-sanitizer, with operands whose ends are memory's ends.

``bench/gpu/check.py`` runs these under memcheck and racecheck, each tensor in an allocation of its own.
"""

import pytest
import torch
from gpu_support import BACKENDS, GPU_BACKENDS, REHEARSAL, assert_equal_bits, check_walk, generator, problem, run

from emc2_kernels import ops, rng

NAMED = BACKENDS if REHEARSAL else GPU_BACKENDS
pytestmark = [pytest.mark.gpu, pytest.mark.sanitizer, pytest.mark.parametrize("backend", NAMED, indirect=True)]

CASES = {
    "one": ((1, 1, 1), {}),
    "small": ((64, 32, 128), {"burn_in": 16, "num_samples": 16}),
    "edges": ((65, 129, 17), {"burn_in": 5, "num_samples": 9}),
    "tiles": ((130, 260, 72), {"num_samples": 3}),
    "wide": ((17, 40, 520), {"num_samples": 40}),
    "split": ((3, 3000, 24), {"burn_in": 100, "num_samples": 5}),
    "uniform": ((33, 50, 72), {"proposal": "uniform", "num_proposals": 37, "num_samples": 5}),
    "positions": ((33, 50, 17), {"proposal": 41, "num_samples": 41}),
}


def build(case, dtype):
    (n, m, d), options = CASES[case]
    values = problem(n, m, d, dtype, seed=2, **options)
    if isinstance(options.get("proposal"), int):
        values["proposal"] = torch.randint(0, m, (n, options["proposal"]), generator=generator(0))
    ids = {"query_ids": torch.arange(n) % 9, "key_ids": torch.arange(m) % 11, "chain_ids": torch.arange(n) + 2**39}
    weights = {"log_proposal": torch.linspace(-1, 1, m), "temperature": torch.linspace(0.2, 0.4, n)}
    return values | ids | weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_step(device, backend, case, dtype):
    values = build(case, dtype)
    check_walk(device, backend, values, min_rows=0.8)
    if case == "small":  # no optional vectors at all: other addresses are null
        check_walk(device, backend, problem(64, 32, 128, dtype, seed=3))


@pytest.mark.parametrize("case", ["small", "split", "uniform"])
def test_a_transition(device, backend, case):
    from emc2_kernels import mh_transition

    values = build(case, torch.bfloat16)
    values = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    del values["state"]
    queries, keys = values.pop("queries"), values.pop("keys")
    first, again = (run(mh_transition, queries, keys, backend=backend, **values) for _ in range(2))
    assert_equal_bits(first, again)


def test_view_coins(device, backend):
    items = torch.arange(1001) + 2**38
    coins = ops.view_coin(items.to(device), 3, 4, backend)
    assert torch.equal(coins.cpu(), rng.view_coin(items, seed=3, step=4))
