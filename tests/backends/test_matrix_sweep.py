"""The sweep on Hopper's matrix units, in the emulator of conftest.py: its copies, barriers, clusters and products too
(tests/cpp/hopper_emulator.h). What nvcc makes of it is in test_cuda_build.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import assert_identical
from oracle import unit, walk
from test_cuda import between_nans
from test_parity import assert_walks, everything

import emc2_kernels as emc2
from emc2_kernels.backends import gpu
from emc2_kernels.backends.cuda import mh as cuda
from emc2_kernels.backends.params import WalkParams

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def hopper(emulated, emulated_module, monkeypatch):
    """The backend's name while every sweep that the kernel can take goes to it; ``hopper.launches`` counts them."""
    launches = []

    class Module:
        def __getattr__(self, name):
            if name == "walk_matrix_sweep":
                launches.append(name)
            return getattr(emulated_module, name)

    monkeypatch.setattr(cuda, "library", lambda device: Module())
    monkeypatch.setattr(gpu, "architecture", lambda index=None: 90)
    monkeypatch.setattr(gpu, "is_small_sweep", lambda walk: False)
    name = type("Name", (str,), {})(emulated)
    name.launches, name.module = launches, emulated_module
    return name


def step(backend, queries, keys, state=None, **options):
    options = {"temperature": 0.2, "seed": 7, "step": 3} | options
    state = emc2.init_state(len(queries)) if state is None else state
    return emc2.mh_step(queries, keys, state, backend=str(backend), **options)


def assert_same(result, queries, keys, state=None, min_rows=0.9, **options):
    """As the oracle, in every row without a near tie."""
    state = emc2.init_state(len(queries)) if state is None else state
    options = {"temperature": 0.2, "seed": 7, "step": 3} | options
    expected = walk(queries, keys, state, **options)
    lowest = float(torch.as_tensor(options["temperature"]).min())
    assert_walks(result._replace(num_accepted=expected.accepted), expected, lowest, min_rows)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype"),
    [(1, 128, 8, BF16), (65, 128, 16, FP16), (128, 256, 64, BF16), (200, 384, 72, FP16), (257, 128, 128, FP16)]
    + [(5, 256, 136, BF16), (300, 128, 40, BF16), (3, 512, 512, BF16), (130, 128, 448, FP16), (17, 1280, 24, BF16)],
)
def test_a_sweep_is_the_oracles(hopper, n, m, d, dtype):
    """One cluster and several, chunks of 64 dimensions and parts of one."""
    queries, keys = unit(n, d, seed=1, dtype=dtype), unit(m, d, seed=2, dtype=dtype)
    state, options = emc2.MHState(torch.arange(n), torch.linspace(-5, 5, n)), {"burn_in": m // 3, "num_samples": 13}
    result = step(hopper, queries, keys, state, **options)
    assert_same(result, queries, keys, state, **options)
    for _ in range(3):  # threads run in other orders, copies and products come later
        assert_identical(tuple(step(hopper, queries, keys, state, **options)), tuple(result))
    assert len(hopper.launches) == 4


def test_results_do_not_depend_on_how_the_keys_are_split(hopper, monkeypatch):
    """Bit for bit: 2 clusters of rows, and 1 to 12 splits of 12 tiles; several pieces of work a cluster."""
    queries, keys = unit(258, 32, seed=1, dtype=BF16), unit(12 * 128, 32, seed=2, dtype=BF16)
    options = {"burn_in": 100, "num_samples": 64}
    expected = step("reference", queries, keys, **options)
    results, sizes = [], set()
    for processors in (2, 1, 5, 8, 24, 132):
        monkeypatch.setenv("EMC2_EMULATED_PROCESSORS", str(processors))
        results.append(step(hopper, queries, keys, **options))
        sizes.add(hopper.module.matrix_sweep_scratch(258, 12 * 128, 64, 0))
        assert_identical(tuple(results[-1]), tuple(results[0]))
    assert len(sizes) >= 4  # numbers of splits, one of them 6: 48 segments, which a warp composes 32 at a time
    same = (results[0].samples == expected.samples).all(1)
    assert same.float().mean() > 0.95  # the rest came closer to a tie than the scores' error
    torch.testing.assert_close(results[0].threshold, expected.threshold, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("d", [64, 200])
def test_everything_at_once(hopper, d):
    options, state = everything("sweep", n=150, m=512)
    del options["log_proposal"]
    queries, keys = unit(150, d, seed=3, dtype=BF16), unit(512, d, seed=4, dtype=BF16)
    result = step(hopper, queries, keys, state, **options)
    assert_same(result, queries, keys, state, **options)
    in_memory = {"seed": torch.tensor(-3), "step": torch.tensor(2**32 - 1)}
    assert_identical(tuple(step(hopper, queries, keys, state, **options | in_memory)), tuple(result))
    assert len(hopper.launches) == 2


@pytest.mark.parametrize("share", ["none", "one", "all", "row"])
def test_ids(hopper, share):
    """No key has a row's id; one has; all have; all have one row's. Ids differ in any of their words."""
    n, m = 70, 256
    query_ids, key_ids = torch.arange(n), torch.arange(m) + (1 << 40) - m
    if share == "one":
        key_ids[200] = query_ids[33]  # in the first of two tiles, the sixth of eight segments
        key_ids[60] = query_ids[5]  # in the second, of a row of another warp
        key_ids[7] = query_ids[33] + (1 << 32)  # the low word alone
    elif share == "all":
        query_ids, key_ids = torch.zeros(n, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    elif share == "row":
        key_ids[:] = query_ids[69]
    queries, keys = unit(n, 64, seed=3, dtype=BF16), unit(m, 64, seed=4, dtype=BF16)
    keys[200], keys[60] = queries[33], queries[5]  # which they would take
    options = {"query_ids": query_ids, "key_ids": key_ids, "chain_ids": torch.arange(n), "num_samples": m}
    for number in range(2):
        result = step(hopper, queries, keys, step=number, **options)
        assert_same(result, queries, keys, step=number, **options)
    if share == "all":
        assert (result.samples == -1).all()
    if share == "one":
        assert not (result.samples[33] == 200).any() and not (result.samples[5] == 60).any()
        assert (result.samples != -1).all()
    if share == "row":
        assert (result.samples[69] == -1).all() and (result.samples[:69] != -1).all()


@pytest.mark.parametrize("samples", [1, 5, 256, 300])
@pytest.mark.parametrize("burn_in", [0, 1, 84])
def test_samples(hopper, samples, burn_in):
    """Few, one a tile, several a tile of one segment, all of them."""
    queries, keys = unit(20, 16, seed=5, dtype=FP16), unit(384, 16, seed=6, dtype=FP16)
    options = {"burn_in": burn_in, "num_samples": samples}
    assert_same(step(hopper, queries, keys, **options), queries, keys, **options)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 60000.0])
@pytest.mark.parametrize("samples", [2, 256])
def test_scores_that_are_not_finite_are_not_taken(hopper, value, samples):
    """In tiles with sample points and in tiles without, of some rows or of all."""
    queries, keys = unit(40, 16, seed=5, dtype=FP16), unit(256, 16, seed=6, dtype=FP16)
    keys[3], keys[130] = 0.0, 0.0
    keys[3, 5], keys[130, 5], keys[255, 2] = value, value, value  # of either sign, by the row
    queries[7, 5] = value
    options = {"temperature": 1e-34 if value == 60000.0 else 0.2, "num_samples": samples}
    result, expected = step(hopper, queries, keys, **options), step("reference", queries, keys, **options)
    assert torch.equal(result.samples, expected.samples)
    assert torch.equal(result.state.key, expected.state.key)
    torch.testing.assert_close(result.state.score, expected.state.score)
    torch.testing.assert_close(result.threshold, expected.threshold)
    assert result.threshold[8:].isfinite().all()


@pytest.mark.parametrize("segment", range(8))
def test_one_infinite_score(hopper, segment):
    """Of one row, in a tile without sample points: no other thread or chain would have the tile walked again."""
    queries, keys = unit(32, 16, seed=5, dtype=FP16), unit(256, 16, seed=6, dtype=FP16)
    keys[32 * segment + 3] = 0.0
    keys[32 * segment + 3, 5] = torch.inf
    queries[:, 5] = -queries[:, 5].abs() - 0.01
    for row in (2, 13):  # a thread's first and its second
        ones = queries.clone()
        ones[row, 5] = 0.1
        result, expected = step(hopper, ones, keys), step("reference", ones, keys)
        assert torch.equal(result.samples, expected.samples)
        torch.testing.assert_close(result.threshold, expected.threshold)
        assert result.threshold.isfinite().all()


@pytest.mark.parametrize(("d", "stride", "offset"), [(16, 16, 0), (16, 24, 8), (40, 64, 0), (12, 16, 8), (100, 104, 0)])
def test_rows_anywhere_in_memory(hopper, d, stride, offset):
    """Nothing is read beside a row, also where its last chunk is not full."""
    queries, keys = unit(50, d, seed=5, dtype=BF16), unit(128, d, seed=6, dtype=BF16)
    options = {"num_samples": 4}
    result = step(hopper, between_nans(queries, stride, offset), between_nans(keys, stride, offset), **options)
    assert_same(result, queries, keys, **options)
    assert len(hopper.launches) == 1


@pytest.mark.parametrize("cuts", [(0, 512), (0, 128, 512), (0, 128, 256, 384, 512)], ids=str)
@pytest.mark.parametrize("samples", [9, 250])
def test_shards_compose_to_the_whole_walk(hopper, cuts, samples):
    """Sample points before, in and after each shard, also more than a warp has lanes."""
    queries, keys = unit(30, 24, seed=3, dtype=BF16), unit(512, 24, seed=4, dtype=BF16)
    options = {"temperature": 0.2, "seed": 7, "step": 3, "burn_in": 60, "total_proposals": 512}
    options["num_samples"] = samples
    whole = emc2.mh_transition(queries, keys, backend="reference", **options)
    composed = None
    for first, end in zip(cuts, cuts[1:], strict=False):
        shard = emc2.mh_transition(queries, keys[first:end], backend=str(hopper), first_proposal=first, **options)
        expected = emc2.mh_transition(queries, keys[first:end], backend="reference", first_proposal=first, **options)
        torch.testing.assert_close(shard.threshold, expected.threshold, rtol=1e-6, atol=2e-5)
        assert torch.equal(shard.position, expected.position)
        composed = shard if composed is None else emc2.compose(composed, shard)
    assert torch.equal(composed.position[:, -1], whole.position[:, -1])
    assert len(hopper.launches) == len(cuts) - 1


@pytest.mark.parametrize("first", [2**31 - 128, 2**32, 2**33 - 256])
def test_a_shard_far_along_a_long_walk(hopper, first):
    """Numbers of proposals and of blocks of draws past 32 bits, and products of both with samples."""
    queries, keys = unit(20, 24, seed=3, dtype=BF16), unit(256, 24, seed=4, dtype=BF16)
    options = {"temperature": 0.2, "seed": 7, "step": 3, "first_proposal": first, "total_proposals": 2**33}
    for burn_in, samples in ((0, 3), (first + 100, 100), (first - 1, 50)):
        options |= {"burn_in": burn_in, "num_samples": samples}
        shard = emc2.mh_transition(queries, keys, backend=str(hopper), **options)
        expected = emc2.mh_transition(queries, keys, backend="reference", **options)
        assert torch.equal(shard.position, expected.position)
        torch.testing.assert_close(shard.threshold, expected.threshold, rtol=1e-6, atol=2e-5)
    assert len(hopper.launches) == 3


def test_the_chain_ids_of_a_row_are_looked_at(hopper):
    queries, keys = unit(8, 16, seed=1, dtype=BF16), unit(128, 16, seed=2, dtype=BF16)
    chains = torch.arange(8)
    chains[5] = 2**40
    params = WalkParams(queries, keys, 0.2, 0, 0, chains, None, None, None, None, None, 0, 1, 0, 128)
    with pytest.raises(RuntimeError, match=r"chain_ids \(or query_ids\) must be in \[0, 2\^40\)"):
        cuda.transition(params)


def test_no_rows(hopper):
    result = step(hopper, torch.zeros(0, 16, dtype=BF16), unit(128, 16, seed=2, dtype=BF16))
    assert result.samples.shape == (0, 1)


# Which walks it takes, and who chooses it.


def sweep(n=8, m=128, d=64, dtype=BF16, **changes):
    operands = unit(n, d, seed=1, dtype=dtype), unit(m, d, seed=2, dtype=dtype)
    fields = {"positions": None, "num_draws": None, "log_proposal": None, "first_proposal": 0} | changes
    return WalkParams(
        *operands, 0.2, 0, 0, None, None, None, fields["positions"], fields["num_draws"], fields["log_proposal"],
        0, 1, fields["first_proposal"], m + fields["first_proposal"],
    )  # fmt: skip


REFUSED = {
    "takes bfloat16 and float16": sweep(dtype=torch.float32),
    "rows of 1 to 512": sweep(d=520),
    "multiples of 128 keys": sweep(m=130),
    "starts at a block of draws": sweep(first_proposal=2),
    "start at multiples of 16 bytes": sweep(d=20),
    "rows that do not overlap": sweep()._replace(queries=unit(1, 64, seed=1, dtype=BF16).expand(8, 64)),
    "no proposal weights": sweep(log_proposal=torch.zeros(128)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take(hopper, emulated_module, reason, monkeypatch):
    """Neither Python nor the kernel's own side; the other kernels walk it."""
    assert gpu.takes_matrix_sweep(sweep(), False) and not gpu.takes_matrix_sweep(sweep(), True)
    assert not gpu.takes_matrix_sweep(REFUSED[reason], False)
    expected = cuda.transition(REFUSED[reason])
    assert hopper.launches == []
    monkeypatch.setattr(gpu, "takes_matrix_sweep", lambda walk, more_results: True)
    with pytest.raises(RuntimeError, match=reason):
        cuda.transition(REFUSED[reason])
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("capability", ["80", "86", "89", "100"])
def test_other_cards_load_the_rest(hopper, emulated_module, capability, monkeypatch):
    """They have not so much shared memory, and must not be asked for it."""
    monkeypatch.setenv("EMC2_EMULATED_CAPABILITY", capability)
    emulated_module.load(0)
    with pytest.raises(RuntimeError, match="compute capability 9.0"):
        cuda.transition(sweep())


@pytest.mark.parametrize("wanted", ["return_accepts", "return_lse"])
def test_counts_and_sums_come_from_another_kernel(hopper, wanted):
    queries, keys = unit(8, 16, seed=1, dtype=BF16), unit(128, 16, seed=2, dtype=BF16)
    result = step(hopper, queries, keys, **{wanted: True})
    assert (result.num_accepted if wanted == "return_accepts" else result.lse) is not None
    assert hopper.launches == []


def test_other_walks_and_cards(hopper, monkeypatch):
    draws = sweep(num_draws=128)
    assert not gpu.takes_matrix_sweep(draws, False)
    monkeypatch.setattr(gpu, "architecture", lambda index=None: 100)
    assert not gpu.takes_matrix_sweep(sweep(), False)


def test_auto_takes_it_where_it_has_won(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA H100")
    won = gpu.Won("NVIDIA H100", 256, 100)
    assert not gpu.prefers_cuda_kernels(sweep(n=128))
    for rows, card_of_row, expected in [
        ((won,), "NVIDIA H100", True), ((won,), "NVIDIA H200", False), ((), "NVIDIA H100", False)
    ]:  # fmt: skip
        monkeypatch.setattr(gpu, "MATRIX_SWEEP_WON", rows)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None, name=card_of_row: name)
        assert gpu.prefers_cuda_kernels(sweep(n=128)) == expected
    monkeypatch.setattr(gpu, "MATRIX_SWEEP_WON", (won,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA H100")
    assert not gpu.prefers_cuda_kernels(sweep(n=64)) and not gpu.prefers_cuda_kernels(sweep(n=128, d=320))
    assert not gpu.prefers_cuda_kernels(sweep(n=128), True) and not gpu.prefers_cuda_kernels(sweep(n=128, m=130))


def test_auto_is_told_what_else_is_wanted(monkeypatch):
    """A count or a log-sum-exp is what the kernel does not make."""
    asked, backends = [], importlib.import_module("emc2_kernels.backends")

    def prefers(walk, more_results):
        asked.append(more_results)
        return False

    monkeypatch.setattr(backends, "_able", lambda *operands: ("cuda", "cpu"))
    monkeypatch.setitem(backends.TABLE, "cuda", backends.TABLE["cuda"]._replace(prefers=prefers))
    operands = torch.zeros(4, 8), torch.zeros(4, 8)
    for wanted in ({}, {"return_lse": True}, {"return_accepts": True}):
        emc2.mh_step(*operands, emc2.init_state(4), temperature=1.0, seed=0, step=0, **wanted)
    emc2.mh_transition(*operands, temperature=1.0, seed=0, step=0)
    assert asked == [False, True, True, False]
