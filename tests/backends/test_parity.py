"""Every backend walks the chains that the oracle walks, on sizes that straddle lanes, blocks and tiles."""

import pytest
import torch
from helpers import assert_identical
from oracle import unit, walk

import emc2_kernels as emc2

SIZES = [(1, 1, 1), (1, 5, 3), (7, 4, 16), (8, 3, 17), (16, 63, 64), (17, 64, 33), (33, 65, 100), (65, 130, 8)]


def call(backend, queries, keys, state=None, **options):
    state = emc2.init_state(len(queries)) if state is None else state
    options = {"temperature": 0.2, "seed": 7, "step": 3, "return_accepts": True} | options
    return emc2.mh_step(queries, keys, state, backend=backend, **options)


def assert_walks(result, expected, temperature=0.2, min_rows=0.9):
    """Index-exact in every row whose closest tie exceeds the score error, which grows as 1 / temperature."""
    error = 3e-6 / temperature
    clear = expected.closest_tie > error
    # Of a few rows one may come close to a tie; a row alone may not.
    spared = min(len(clear) - 1, max(1, (1 - min_rows) * len(clear)))
    assert (~clear).sum() <= spared
    torch.testing.assert_close(result.samples[clear].long(), expected.samples[clear], rtol=0, atol=0)
    torch.testing.assert_close(result.state.key[clear], expected.key[clear], rtol=0, atol=0)
    torch.testing.assert_close(result.num_accepted[clear].long(), expected.accepted[clear], rtol=0, atol=0)
    torch.testing.assert_close(result.state.score[clear].double(), expected.score[clear], rtol=1e-6, atol=error)
    torch.testing.assert_close(result.threshold.double(), expected.threshold, rtol=1e-6, atol=error)


def assert_same(result, state, queries, keys, min_rows=0.9, **options):
    options = {"temperature": 0.2, "seed": 7, "step": 3} | options
    lowest = min(0.2, float(torch.as_tensor(options["temperature"]).min()))
    assert_walks(result, walk(queries, keys, state, **options), lowest, min_rows)


@pytest.fixture(params=["reference", "cpu", "emulated"])
def backend(request, rubbish_in_outputs):
    """The reference, the cpu backend, and the CUDA backend's kernels in an emulator."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return request.param


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_cpu_sweep(n, m, d, rubbish_in_outputs):
    queries, keys = unit(n, d, seed=1), unit(m, d, seed=2)
    options = {"burn_in": m // 3, "num_samples": max(1, (m - m // 3) // 2)}
    state = emc2.init_state(n)
    for step in range(3):  # carried on
        result = call("cpu", queries, keys, state, step=step, **options)
        assert_same(result, state, queries, keys, step=step, **options)
        state = result.state


def everything(proposal, n=37, m=45):
    """Options with all that a walk can have, and an incoming state with a NaN in it."""
    generator = torch.Generator().manual_seed(0)
    options = {
        "temperature": torch.rand(n, generator=generator) * 0.5 + 0.1,
        "seed": 2**64 - 3,
        "step": 2**32 - 1,
        "chain_ids": torch.randperm(n, generator=generator) + 2**40 - n,
        "query_ids": torch.randint(0, 6, (n,), generator=generator) + (1 << 33),
        "key_ids": torch.randint(0, 8, (m,), generator=generator) + (1 << 33),
        "key_labels": torch.randperm(m, generator=generator) * 10**12,
        "log_proposal": torch.randn(m, generator=generator),
        "burn_in": 5,
        "num_samples": 7,
    }
    options["key_ids"][::9] -= 1 << 32  # low words of excluded ids under other high words
    if proposal == "uniform":
        options |= {"proposal": "uniform", "num_proposals": 83}
    elif proposal == "positions":
        options["proposal"] = torch.randint(0, m, (n, 71), generator=generator)
    state = emc2.MHState(torch.arange(n), torch.randn(n, generator=generator))
    state.score[3] = float("nan")
    return options, state


@pytest.mark.parametrize("proposal", ["sweep", "uniform", "positions"])
@pytest.mark.parametrize("d", [19, 32])
def test_everything_at_once(backend, proposal, d):
    options, state = everything(proposal)
    queries, keys = unit(37, d, seed=3), unit(45, d, seed=4)
    result = call(backend, queries, keys, state, **options)
    assert_same(result, state, queries, keys, **options)
    in_memory = {"seed": torch.tensor(-3), "step": torch.tensor(2**32 - 1)}
    again = call(backend, queries, keys, state, **options | in_memory)  # threads run in another order, too
    assert_identical(tuple(again), tuple(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 70}], ids=["sweep", "uniform"])
def test_dtypes(backend, dtype, options):
    queries, keys = unit(40, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    options = options | {"temperature": 0.07, "num_samples": 4}
    state = emc2.init_state(40)
    assert_same(call(backend, queries, keys, state, **options), state, queries, keys, **options)


@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 70}], ids=["sweep", "uniform"])
def test_strided_operands(backend, options):
    """Rows may be any distance apart, vectors too; one query may stand for all rows."""
    wide_queries, wide_keys = unit(80, 3, 24, seed=7), unit(90, 40, seed=8)
    queries, keys = wide_queries[::2, 1, :20], wide_keys[5::2, 10:30]
    options = options | {"query_ids": torch.arange(80)[::2] % 5, "key_ids": torch.arange(86)[::2] % 7}
    state = emc2.MHState(torch.arange(80)[::2], torch.zeros(80)[::2])
    assert_same(call(backend, queries, keys, state, **options), state, queries, keys, **options)
    one_query = queries[:1].expand(40, 20)
    one_temperature = options | {"temperature": torch.tensor(0.2)}
    assert_same(call(backend, one_query, keys, state, **one_temperature), state, one_query, keys, **options)


@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 31}], ids=["sweep", "uniform"])
def test_every_state_after_burn_in(backend, options):
    queries, keys = unit(20, 8, seed=9), unit(31, 8, seed=10)
    for kept in (20, 31):
        asked_for = options | {"burn_in": 31 - kept, "num_samples": kept}
        state = emc2.init_state(20)
        assert_same(call(backend, queries, keys, state, **asked_for), state, queries, keys, **asked_for)


def test_cpu_at_training_size():
    """Several real tiles, both cores, against the reference."""
    n, m = 1500, 2100
    queries, keys = unit(n, 64, seed=11), unit(m, 64, seed=12)
    options = {"temperature": 0.07, "burn_in": m // 2, "num_samples": 16, "return_lse": True}
    a, b = call("cpu", queries, keys, **options), call("reference", queries, keys, **options)
    same = (a.samples == b.samples).all(1)
    assert same.float().mean() > 0.99  # the rest came closer to a tie than the scores' error
    assert (a.num_accepted == b.num_accepted).float().mean() > 0.99
    torch.testing.assert_close(a.threshold, b.threshold, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", [30, 530])
def test_lse(backend, n):
    """Over similarity / temperature of the keys not excluded, without the proposal weights; -inf without any."""
    queries, keys = unit(n, 12, seed=13), unit(90, 12, seed=14)
    keys[7] = float("nan")
    query_ids, key_ids = torch.arange(n) % 10, torch.arange(90) % 12
    scores = queries.double() @ keys.double().T / 0.05
    scores[:, 7] = -torch.inf
    scores[query_ids[:, None] == key_ids] = -torch.inf
    options = {"temperature": 0.05, "query_ids": query_ids, "key_ids": key_ids, "log_proposal": torch.randn(90)}
    result = call(backend, queries, keys, return_lse=True, **options)
    torch.testing.assert_close(result.lse.double(), torch.logsumexp(scores, 1), rtol=1e-6, atol=2e-6)
    nothing = call(backend, queries, keys[:1], query_ids=query_ids * 0, key_ids=key_ids[:1] * 0, return_lse=True)
    assert (nothing.lse == -torch.inf).all() and (nothing.samples == -1).all() and (nothing.state.key == -1).all()


@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 30}], ids=["sweep", "uniform"])
def test_scores_that_are_not_finite_are_never_moved_to(backend, options):
    queries, keys = unit(20, 6, seed=15), unit(30, 6, seed=16)
    keys[3], keys[11], keys[12, 2], keys[29] = float("inf"), float("nan"), float("-inf"), float("nan")
    options = options | {"num_samples": 30}
    state = emc2.init_state(20)
    result = call(backend, queries, keys, state, **options)
    assert_same(result, state, queries, keys, **options)
    assert not torch.isin(result.samples, torch.tensor([3, 11, 12, 29])).any()
    assert torch.isfinite(result.state.score).all() and torch.isfinite(result.threshold).all()


def test_reference_in_float64_is_the_oracle():
    queries, keys = unit(30, 10, seed=19).double(), unit(40, 10, seed=20).double()
    state = emc2.MHState(torch.arange(30), torch.randn(30, dtype=torch.float64))
    result = call("auto", queries, keys, state, num_samples=40)
    expected = walk(queries, keys, state, temperature=0.2, seed=7, step=3, num_samples=40)
    assert result.state.score.dtype == result.threshold.dtype == torch.float64
    assert torch.equal(result.samples.long(), expected.samples)
    torch.testing.assert_close(result.state.score, expected.score, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.threshold, expected.threshold, rtol=1e-13, atol=1e-13)


def test_reference_takes_rows_in_blocks(monkeypatch):
    from emc2_kernels.backends.reference import mh as reference

    queries, keys = unit(30, 10, seed=21), unit(40, 10, seed=22)
    options = {"temperature": torch.linspace(0.1, 1, 30), "num_samples": 5, "return_lse": True}
    whole = call("reference", queries, keys, **options)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 7 * 40)
    blocks = call("reference", queries, keys, **options)
    assert torch.equal(whole.samples, blocks.samples) and torch.equal(whole.state.key, blocks.state.key)
    torch.testing.assert_close(whole.lse, blocks.lse)


@pytest.mark.parametrize("proposal", [{}, {"proposal": "uniform", "num_proposals": 40}], ids=["sweep", "uniform"])
def test_a_proposal_weight_that_overflows_the_score_is_an_identity_step(backend, proposal):
    """Scores of 10^38 less -3 * 10^38: infinite as a difference, though neither is. The lse keeps the score itself."""
    queries, keys = torch.ones(20, 4), torch.ones(8, 4) * torch.linspace(-1, 1, 8)[:, None]
    keys[2] = 2.5e37
    log_proposal = torch.zeros(8)
    log_proposal[2] = -3e38
    options = proposal | {"temperature": 1.0, "log_proposal": log_proposal, "num_samples": 8}
    result = call(backend, queries, keys, return_lse=not proposal, **options)
    assert not (result.samples == 2).any() and (result.state.key != 2).all()
    assert result.threshold.isfinite().all() and result.state.score.isfinite().all()
    if not proposal:
        torch.testing.assert_close(result.lse, torch.full((20,), 1e38))
