"""Every option of a step together, and what must never be moved to, on all three kinds of proposals."""

import pytest
import torch
from gpu_support import (
    BACKENDS,
    assert_equal_bits,
    check_walk,
    generator,
    on_cpu,
    problem,
    run,
    similarity_error,
    step_of,
)
from oracle import unit

import emc2_kernels as emc2

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", BACKENDS, indirect=True)]

KINDS = pytest.mark.parametrize("kind", ["sweep", "uniform", "positions"])


def proposals(kind, n, m, count):
    if kind == "uniform":
        return {"proposal": "uniform", "num_proposals": count}
    return {"proposal": torch.randint(0, m, (n, count), generator=generator(count))} if kind == "positions" else {}


@KINDS
@pytest.mark.parametrize(("n", "m", "d"), [(37, 45, 19), (130, 300, 64), (64, 32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_at_once(device, backend, kind, n, m, d, dtype):
    draw = generator(0)
    values = problem(n, m, d, dtype, seed=3) | {
        "temperature": torch.rand(n, generator=draw) * 0.5 + 0.1,
        "seed": 2**64 - 3,
        "step": 2**32 - 1,
        "chain_ids": 2**40 - 1 - torch.randperm(n, generator=draw),
        "query_ids": torch.randint(0, 6, (n,), generator=draw) + (1 << 33),
        "key_ids": torch.randint(0, 8, (m,), generator=draw) + (1 << 33),
        "key_labels": torch.randperm(m, generator=draw) * 10**12,
        "log_proposal": torch.randn(m, generator=draw),
        "burn_in": 5,
        "num_samples": 7,
        "state": emc2.MHState(torch.arange(n), torch.randn(n, generator=draw)),
        **proposals(kind, n, m, 83),
    }
    values["key_ids"][::9] -= 1 << 32  # low words of excluded ids under other high words
    values["state"].score[3] = torch.nan
    check_walk(device, backend, values)
    # The same vectors as every other element of longer ones, in which they stand twice.
    vectors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim() == 1}
    options = {name: value.to(device).repeat_interleave(2)[::2] for name, value in vectors.items()}
    options["state"] = emc2.MHState(*(field.to(device).repeat_interleave(2)[::2] for field in values["state"]))
    assert_equal_bits(step_of(values | options, device, backend), step_of(values, device, backend))


@KINDS
def test_seed_step_and_temperature_as_tensors(device, backend, kind):
    """A power of two as temperature: its reciprocal is the same number, in double and in single precision."""
    values = problem(50, 60, 32, seed=5, temperature=0.25, num_samples=5, **proposals(kind, 50, 60, 40))
    for seed, step in ((0, 0), (2**63 + 5, 2**31), (2**64 - 1, 2**32 - 1)):
        numbers = step_of(values | {"seed": seed, "step": step}, device, backend)
        bits = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=device)
        scalars = {"seed": bits, "step": torch.tensor(step, device=device), "temperature": torch.tensor(0.25)}
        assert_equal_bits(step_of(values | scalars, device, backend), numbers)
    one_each = {"temperature": torch.tensor(0.25).expand(50)}
    assert_equal_bits(step_of(values | one_each, device, backend), step_of(values, device, backend))


@KINDS
def test_exclusion_by_id(device, backend, kind):
    """Positives are never proposed; an id that only keys have excludes nothing; a row may be left with no key."""
    values = problem(60, 70, 16, seed=6, num_samples=70 if kind == "sweep" else 40, **proposals(kind, 60, 70, 40))
    check_walk(device, backend, values | {"key_ids": torch.arange(70)})
    ids = {"query_ids": torch.arange(60) % 7, "key_ids": torch.arange(70) % 7}
    result = check_walk(device, backend, values | ids)
    assert not (ids["key_ids"][result.samples.clamp_min(0).long()] == ids["query_ids"][:, None])[
        result.samples >= 0
    ].any()
    nothing = {"query_ids": torch.zeros(60, dtype=torch.int64), "key_ids": torch.zeros(70, dtype=torch.int64)}
    left = step_of(values | nothing, device, backend, return_accepts=True)
    assert (left.samples == -1).all() and (left.state.key == -1).all() and (left.num_accepted == 0).all()
    assert (left.threshold == -torch.inf).all() and (left.state.score == -torch.inf).all()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_are_not_finite(device, backend, kind, dtype):
    values = problem(66, 130, 48, dtype, seed=7, **proposals(kind, 66, 130, 90))
    values["num_samples"] = 130 if kind == "sweep" else 90
    keys, bad = values["keys"], [3, 11, 64, 129]
    keys[3], keys[11], keys[64, 2], keys[129] = torch.inf, torch.nan, -torch.inf, torch.nan
    result = check_walk(device, backend, values)
    assert not torch.isin(result.samples, torch.tensor(bad)).any()
    values["queries"][5] = torch.nan
    assert (step_of(values, device, backend).samples[5] == -1).all()


@KINDS
def test_states_that_come_in(device, backend, kind):
    """NaN has not started and cannot keep its key; a high score stays, with its key and its bits."""
    values = problem(5, 40, 16, seed=8, num_samples=4, **proposals(kind, 5, 40, 30))
    scores = torch.tensor([torch.nan, 1e30, -torch.inf, torch.inf, -1e30])
    values["state"] = emc2.MHState(torch.tensor([77, 2**62, 5, 2**40, -1]), scores)
    result = check_walk(device, backend, values)
    assert result.state.key[[1, 3]].tolist() == [2**62, 2**40] and (result.samples[[1, 3]] == -1).all()
    assert (
        result.state.score[[1, 3]].tolist() == scores[[1, 3]].tolist() and (result.samples[:, -1][[0, 2, 4]] >= 0).all()
    )
    values["query_ids"], values["key_ids"] = torch.zeros(5, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    kept = step_of(values, device, backend).state
    assert kept.key.tolist() == [-1, 2**62, -1, 2**40, -1]


@pytest.mark.parametrize("temperature", [0.005, 1e-3, 20.0])
def test_extreme_temperatures(device, backend, temperature):
    values = problem(100, 200, 64, seed=9, temperature=temperature, num_samples=3)
    check_walk(device, backend, values, min_rows=0.6)


def test_lse_without_proposal_weights(device, backend):
    values = problem(65, 200, 64, torch.bfloat16, seed=10, temperature=0.05)
    values |= {"log_proposal": torch.randn(200, generator=generator(1)), "key_ids": torch.arange(200) % 30}
    values |= {"query_ids": torch.arange(65) % 40}
    result = check_walk(device, backend, values)
    scores = values["queries"].double() @ values["keys"].double().T / 0.05
    scores[values["query_ids"][:, None] == values["key_ids"]] = -torch.inf
    error = similarity_error(64) / 0.05
    torch.testing.assert_close(result.lse.double(), torch.logsumexp(scores, 1), rtol=1e-6, atol=error)


@KINDS
def test_nothing_to_do(device, backend, kind):
    """No rows, no keys, no proposals: shapes stay, states stay."""
    state = emc2.MHState(torch.tensor([3, -1, 7, 8]), torch.tensor([0.5, -torch.inf, -2.0, torch.nan]))
    queries = unit(4, 16)
    common = {"temperature": 0.2, "seed": 1, "step": 0, "num_samples": 3, "backend": backend}
    none = {"sweep": {}, "uniform": {"proposal": "uniform", "num_proposals": 9}}
    none["positions"] = {"proposal": torch.zeros(4, 0, dtype=torch.int64, device=device)}
    on_device = emc2.MHState(*(field.to(device) for field in state))
    moved = queries.to(device)
    result = on_cpu(run(emc2.mh_step, moved, moved[:0], on_device, **common, **none[kind], return_accepts=True))
    assert result.samples.shape == (4, 3) and (result.samples == -1).all() and (result.num_accepted == 0).all()
    assert result.state.key.tolist() == [3, -1, 7, -1]
    assert result.state.score.tolist() == [0.5, -torch.inf, -2.0, -torch.inf]
    assert (result.threshold == -torch.inf).all()
    if kind == "positions":
        none[kind] = {"proposal": torch.zeros(0, 9, dtype=torch.int64, device=device)}
    empty = run(emc2.mh_step, moved[:0], moved, emc2.init_state(0, device), **common, **none[kind])
    assert empty.samples.shape == (0, 3) and empty.state.key.shape == empty.threshold.shape == (0,)


@KINDS
def test_a_step_is_the_transition_applied(device, backend, kind):
    values = problem(70, 90, 32, seed=11, burn_in=7, num_samples=6, **proposals(kind, 70, 90, 61))
    values["state"] = emc2.MHState(torch.arange(70), torch.linspace(-8, 8, 70))
    step = step_of(values, device, backend)
    options = {name: value for name, value in values.items() if name not in ("queries", "keys", "state")}
    if kind == "positions":
        options["proposal"] = options["proposal"].to(device)
    operands = (values["queries"].to(device), values["keys"].to(device))
    transition = on_cpu(run(emc2.mh_transition, *operands, **options, backend=backend))
    applied = emc2.apply(transition, values["state"])
    assert_equal_bits(applied, step)
