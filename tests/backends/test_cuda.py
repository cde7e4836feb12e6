"""The CUDA backend without a GPU, in the emulator of conftest.py: what is the kernels' own, beside test_parity.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import unit
from test_parity import assert_same, call, everything

import emc2_kernels as emc2
from emc2_kernels.backends import gpu
from emc2_kernels.backends.cuda import build as cuda_build
from emc2_kernels.backends.cuda import mh as cuda
from emc2_kernels.backends.params import WalkParams
from emc2_kernels.backends.reference import mh as reference

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIFORM = {"proposal": "uniform", "num_proposals": 70}


def between_nans(tensor: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    """The same rows `stride` apart and `offset` elements after an aligned address; a read beside them gives NaN."""
    rows, dim = tensor.shape
    buffer = torch.full((rows * stride + offset + 64,), float("nan"), dtype=tensor.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer.as_strided((rows, dim), (stride, 1), offset)
    view.copy_(tensor)
    return view


# Walks.


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 1), (1, 5, 3), (7, 4, 16), (3, 31, 8), (4, 32, 128), (9, 33, 132), (17, 64, 33), (33, 65, 100)]
    + [(65, 130, 8), (6, 200, 257), (3, 70, 260), (517, 66, 4), (515, 20, 36)],
)
def test_sweep(emulated, n, m, d):
    queries, keys = unit(n, d, seed=1), unit(m, d, seed=2)
    options = {"burn_in": m // 3, "num_samples": max(1, (m - m // 3) // 2)}
    state = emc2.init_state(n)
    for step in range(2):  # carried on
        result = call(emulated, queries, keys, state, step=step, **options)
        assert_same(result, state, queries, keys, step=step, **options)
        state = result.state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 8, 19, 40, 64, 96, 128, 131, 192, 256, 264, 520, 2056])
def test_drawn_proposals(emulated, d, dtype):
    """8 to 32 lanes a key, with and without idle ones, one chunk and several; rows that are packs and that are not."""
    queries, keys = unit(6, d, seed=3, dtype=dtype), unit(50, d, seed=4, dtype=dtype)
    options = {"proposal": "uniform", "num_proposals": 97, "burn_in": 30, "num_samples": 9}
    state = emc2.init_state(6)
    assert_same(call(emulated, queries, keys, state, **options), state, queries, keys, min_rows=0.5, **options)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 257])
@pytest.mark.parametrize("proposal", ["uniform", "positions"])
def test_numbers_of_proposals(emulated, count, proposal):
    queries, keys = unit(9, 24, seed=5), unit(41, 24, seed=6)
    options = {"num_samples": 1 + count // 3, "burn_in": count // 4}
    if proposal == "uniform":
        options |= {"proposal": "uniform", "num_proposals": count}
    else:
        positions = torch.randint(0, 41, (9, count + 5), generator=torch.Generator().manual_seed(count))
        options["proposal"] = positions[:, 2 : count + 2]
    state = emc2.init_state(9)
    assert_same(call(emulated, queries, keys, state, **options), state, queries, keys, min_rows=0.8, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, UNIFORM], ids=["sweep", "uniform"])
@pytest.mark.parametrize(("d", "stride", "offset"), [(16, 16, 0), (16, 32, 8), (16, 16, 1), (16, 17, 0), (50, 56, 8)])
def test_rows_anywhere_in_memory(emulated, dtype, options, d, stride, offset):
    """Packs of 16 bytes where rows allow it, element by element elsewhere; nothing is read beside a row."""
    queries, keys = unit(11, d, seed=5, dtype=dtype), unit(60, d, seed=6, dtype=dtype)
    options = options | {"temperature": 0.07, "num_samples": 4}
    state = emc2.init_state(11)
    result = call(emulated, between_nans(queries, stride, offset), between_nans(keys, stride, offset), state, **options)
    assert_same(result, state, queries, keys, min_rows=0.8, **options)


def test_float16_at_its_extremes(emulated):
    """Subnormals, the largest values, infinities and NaN, as torch widens them."""
    keys = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    queries = torch.ones(1, 1, dtype=torch.float16)
    options = {"temperature": 1.0, "num_samples": 1}
    positions = torch.arange(2**16)[None]
    for proposal in ("sweep", positions):
        got = transition(emulated, queries, keys, proposal=proposal, **options | {"num_samples": 2**16})
        expected = transition("reference", queries, keys, proposal=proposal, **options | {"num_samples": 2**16})
        assert torch.equal(got.position, expected.position)
        assert torch.equal(got.score, expected.score)


def transition(backend, queries, keys, **options):
    return emc2.mh_transition(queries, keys, **{"temperature": 0.2, "seed": 7, "step": 3, "backend": backend} | options)


@pytest.mark.parametrize("proposal", ["sweep", "uniform", "positions"])
@pytest.mark.parametrize("cuts", [(0, 83), (0, 5, 37, 64, 83), (0, 1, 2, 3, 70, 70, 83)], ids=str)
def test_shards_compose_to_the_whole_walk(emulated, proposal, cuts):
    """Bit for bit, sample points before, in and after each shard; the whole against the reference."""
    options, _ = everything(proposal, m=83 if proposal == "sweep" else 45)
    del options["key_labels"]
    if proposal == "positions":
        options["proposal"] = torch.randint(0, 45, (37, 83), generator=torch.Generator().manual_seed(1))
    keys = unit(83 if proposal == "sweep" else 45, 24, seed=4)
    queries = unit(37, 24, seed=3)
    whole = transition(emulated, queries, keys, **options)
    composed = None
    for first, end in zip(cuts, cuts[1:], strict=False):
        part = options | {"first_proposal": first, "total_proposals": 83}
        part_keys = keys
        if proposal == "sweep":
            part_keys = keys[first:end]
            part |= {name: options[name][first:end] for name in ("key_ids", "log_proposal")}
        elif proposal == "uniform":
            part["num_proposals"] = end - first
        else:
            part["proposal"] = options["proposal"][:, first:end]
        shard = transition(emulated, queries, part_keys, **part)
        expected = transition("reference", queries, part_keys, **part)
        clear = (shard.position == expected.position).all(1)
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(shard.threshold, expected.threshold, rtol=1e-6, atol=3e-5)
        torch.testing.assert_close(shard.score[clear], expected.score[clear], rtol=1e-6, atol=3e-5)
        whole_so_far = None if composed is None else emc2.Transition(*(field[:, -1:] for field in composed))
        if composed is None:
            composed = shard
        else:  # a sample point inside an earlier shard stays what it was
            done = [point < first for point in sample_points(options, 83)]
            later = emc2.compose(whole_so_far, shard)
            columns = torch.tensor(done)
            composed = emc2.Transition(*(torch.where(columns, a, b) for a, b in zip(composed, later, strict=True)))
    for a, b in zip(composed, whole, strict=True):
        assert torch.equal(a, b)


def sample_points(options, total):
    walk = WalkParams(*[None] * 11, options["burn_in"], options["num_samples"], 0, total)
    return walk.sample_points()


def test_a_sweep_is_the_walk_over_its_positions(emulated):
    """Two kernels that share only the walk itself; the products are exact in every order of addition."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randint(-2, 3, (n, 24), generator=generator).float() for n in (21, 75))
    options = {"temperature": 0.5, "num_samples": 75}
    a = transition(emulated, queries, keys, **options)
    b = transition(emulated, queries, keys, proposal=torch.arange(75).expand(21, 75), **options)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("proposal", [{}, {"proposal": "uniform", "num_proposals": 4}], ids=["sweep", "uniform"])
def test_no_rows_no_keys_no_proposals(emulated, proposal):
    queries, keys = unit(5, 8, seed=1), unit(6, 8, seed=2)
    empty = call(emulated, queries[:0], keys, return_lse=not proposal, **proposal)
    assert empty.samples.shape == (0, 1) and empty.state.key.shape == empty.threshold.shape == (0,)
    state = emc2.MHState(torch.arange(5), torch.tensor([0.5, -1.0, float("nan"), -torch.inf, 2.0]))
    options = proposal | {"num_samples": 3, "burn_in": 2}
    result = call(emulated, queries, keys[:0], state, return_lse=not proposal, **options)
    expected = call("reference", queries, keys[:0], state, return_lse=not proposal, **options)
    assert torch.equal(result.samples, expected.samples) and (result.samples == -1).all()
    assert torch.equal(result.state.key, expected.state.key) and torch.equal(result.state.score, expected.state.score)
    assert torch.equal(result.threshold, expected.threshold) and (result.num_accepted == 0).all()
    assert proposal or (result.lse == -torch.inf).all()
    nothing_left = {"first_proposal": 5, "total_proposals": 9, "num_samples": 4, "num_proposals": 0}
    shard = transition(emulated, queries, torch.zeros(0, 8), proposal="uniform", **nothing_left)
    assert (shard.position == -1).all() and (shard.threshold == -torch.inf).all()
    no_dims = call(emulated, queries[:, :0], keys[:, :0], **proposal)
    assert torch.equal(no_dims.samples, call("reference", queries[:, :0], keys[:, :0], **proposal).samples)


@pytest.mark.parametrize("outside", [-1, 45, 2**40])
def test_a_position_outside_the_keys_stops_the_kernel(emulated, outside):
    """Nothing is read there, and the message names the argument. On a GPU it is printed at the next synchronisation."""
    positions = torch.zeros(8, 40, dtype=torch.int64)
    positions[5, 33] = outside
    walk = WalkParams(
        unit(8, 16, seed=1), unit(45, 16, seed=2), 0.2, 0, 0, None, None, None, positions, None, None, 0, 1, 0, 40
    )
    with pytest.raises(RuntimeError, match=r"proposal must hold positions in \[0, number of keys\)"):
        cuda.transition(walk)
    with pytest.raises(RuntimeError, match="no positions where there are no keys"):
        cuda.transition(walk._replace(keys=walk.keys[:0]))


@pytest.mark.parametrize("count", [0, 1, 128, 1000])
def test_view_coin(emulated, count):
    items = torch.randint(0, 2**40, (2 * count,), generator=torch.Generator().manual_seed(1))[::2]
    expected = reference.view_coin(items, 2**64 - 5, 2**32 - 2)
    assert torch.equal(cuda.view_coin(items, 2**64 - 5, 2**32 - 2), expected)
    assert torch.equal(cuda.view_coin(items, torch.tensor(-5), torch.tensor(2**32 - 2)), expected)


def test_acceptance_without_a_conversion():
    """warp_draws.cuh makes u by a bit pattern and one subtraction: the contract's u, for all 2^23 of them."""
    draws = np.arange(2**23, dtype=np.uint32)
    u = (draws | np.uint32(0x3F800000)).view(np.float32) - np.float32(1 - 2**-24)
    assert np.array_equal(u.astype(np.float64), draws * 2.0**-23 + 2.0**-24)


# What the walk looks like to those who choose a backend.


def test_prefers():
    def walk(n, m, d, num_draws=None):
        return WalkParams(
            *(torch.empty(rows, d, device="meta") for rows in (n, m)), *[None] * 7, num_draws, *[None] * 5
        )

    assert gpu.prefers_cuda_kernels(walk(64, 32, 128)) and gpu.prefers_cuda_kernels(walk(64, 64, 128))
    assert not gpu.prefers_cuda_kernels(walk(2048, 64, 8)) and not gpu.prefers_cuda_kernels(walk(64, 2048, 8))
    assert not gpu.prefers_cuda_kernels(walk(1024, 1024, 4096))
    assert gpu.prefers_cuda_kernels(walk(32768, 10**7, 128, num_draws=256))


def test_why_unavailable(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in cuda_build.why_unavailable_here()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in cuda_build.why_unavailable_here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (7, 5))
    assert "8.0" in cuda_build.why_unavailable_here() and "7.5" in cuda_build.why_unavailable_here()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (10, 0))
    asked = []
    monkeypatch.setattr(cuda_build, "why_unavailable", lambda architecture: asked.append(architecture))
    assert cuda_build.why_unavailable_here() is None and asked == [100]
