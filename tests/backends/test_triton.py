"""Triton's kernels in its interpreter, against the oracle: tile edges, exclusions, dtypes, whole and split walks."""

import importlib
import pkgutil
import re

import pytest
import torch
from helpers import assert_identical, poisoned
from oracle import unit
from test_parity import assert_same, call, everything

import emc2_kernels as emc2
from emc2_kernels import rng
from emc2_kernels.backends import gpu

pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="with a GPU, tests/gpu runs the kernels on it")
pytest.importorskip("triton")

from emc2_kernels.backends import triton  # noqa: E402  Triton first
from emc2_kernels.backends.triton import launch, philox, tuning, view_coin  # noqa: E402

SMALL = tuning.Sweep(16, 16, 4, 1, None, "chosen for tests")  # the interpreter's time goes by programs and chunks


@pytest.fixture(autouse=True)
def rubbish_in_outputs(monkeypatch):
    """What a kernel must fill comes with rubbish in it, integers too."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **options: poisoned(real(*args, **options)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poisoned(new_empty(*args, **options)))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning, "sweep", lambda *key: SMALL)


def split_into(monkeypatch, count):
    monkeypatch.setattr(tuning, "splits", lambda *sizes: count)


def recording(monkeypatch, on_the_way):
    """Samples in the launch that walks, or in a second one that walks their tiles again."""
    monkeypatch.setattr(tuning, "records_on_the_way", lambda tiles, samples: on_the_way)


def exact(n, d, seed):
    """Rows of -1, 0 and 1, whose products no order of additions changes."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).float()


SIZES = [(1, 1, 1), (7, 5, 3), (15, 127, 16), (16, 128, 17), (17, 129, 8), (33, 260, 33), (3, 16, 70), (2, 1030, 4)]


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_sweep(n, m, d, splits, small_tiles, monkeypatch):
    split_into(monkeypatch, splits)
    recording(monkeypatch, on_the_way=splits == 2)
    queries, keys = unit(n, d, seed=1), unit(m, d, seed=2)
    options = {"burn_in": m // 3, "num_samples": max(1, (m - m // 3) // 2)}
    state = emc2.MHState(torch.arange(n), torch.linspace(-3, 3, n))
    result = call("triton", queries, keys, state, return_lse=True, **options)
    assert_same(result, state, queries, keys, **options)
    lse = torch.logsumexp(queries @ keys.T / 0.2, 1)
    torch.testing.assert_close(result.lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "splits"), [(5, 1), (129, 3), (400, 1), (400, 2)])
@pytest.mark.parametrize("samples", ["one", "two", "a few", "most"])
def test_samples_replayed_are_those_recorded_on_the_way(m, splits, samples, small_tiles, monkeypatch):
    """To the bit, in every output, and the reference's; of whole walks and of shards that begin anywhere in a tile."""
    split_into(monkeypatch, splits)
    queries, keys = exact(5, 3, seed=1), exact(m, 3, seed=2)
    state = emc2.MHState(torch.arange(5), torch.linspace(-3, 3, 5))
    kept = m - m // 3
    counts = {"one": 1, "two": 2, "a few": -(-kept // 29), "most": kept - kept // 7}
    options = {"burn_in": m // 3, "num_samples": counts[samples]}
    shard = {"first_proposal": 7, "total_proposals": m + 31, "temperature": 0.2, "seed": 3, "step": 5}
    results = []
    for on_the_way in (True, False):
        recording(monkeypatch, on_the_way)
        results.append(call("triton", queries, keys, state, return_accepts=True, return_lse=True, **options))
        results.append(emc2.mh_transition(queries, keys, backend="triton", **shard, **options))
    assert_identical(results[2], results[0])
    assert_identical(results[3], results[1])
    expected = call("reference", queries, keys, state, **options)
    assert torch.equal(results[0].samples, expected.samples) and torch.equal(results[0].state.key, expected.state.key)
    expected = emc2.mh_transition(queries, keys, backend="reference", **shard, **options)
    assert torch.equal(results[1].position, expected.position)


@pytest.mark.parametrize("splits", [1, 2])
def test_plain_tiles_and_those_with_a_score_of_infinity_that_are_walked_again(splits, small_tiles, monkeypatch):
    """All keys of 512 exist. Two in the first half score +inf for a row of ones, for others -inf or NaN, too."""
    split_into(monkeypatch, splits)
    queries, keys = exact(5, 3, seed=1), exact(512, 3, seed=2)
    queries[0], keys[[3, 100]] = 1.0, torch.inf
    options = {"num_samples": 5, "burn_in": 30, "return_accepts": True, "return_lse": True}
    options |= {"query_ids": torch.arange(5), "key_ids": torch.arange(512) % 7}
    options |= {"log_proposal": torch.arange(512) % 3 * 0.5}
    state = emc2.MHState(torch.arange(5), torch.linspace(-3, 3, 5))
    results = []
    for on_the_way in (True, False):
        recording(monkeypatch, on_the_way)
        results.append(call("triton", queries, keys, state, **options))
    assert_identical(results[1], results[0])
    expected = call("reference", queries, keys, state, **options)
    assert torch.equal(results[1].samples, expected.samples) and torch.equal(results[1].state.key, expected.state.key)
    assert torch.equal(results[1].num_accepted, expected.num_accepted)
    assert results[1].threshold.isfinite().all() and results[1].state.score.isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("proposal", ["sweep", "uniform", "positions"])
def test_everything_at_once(proposal, splits, small_tiles, monkeypatch):
    split_into(monkeypatch, splits)
    options, state = everything(proposal, n=9)
    queries, keys = unit(9, 19, seed=3), unit(45, 19, seed=4)
    assert_same(call("triton", queries, keys, state, **options), state, queries, keys, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 40}], ids=["sweep", "uniform"])
def test_dtypes(dtype, options, small_tiles):
    queries, keys = unit(11, 50, seed=5, dtype=dtype), unit(60, 50, seed=6, dtype=dtype)
    options = options | {"temperature": 0.07, "num_samples": 4}
    state = emc2.init_state(11)
    assert_same(call("triton", queries, keys, state, **options), state, queries, keys, **options)


@pytest.mark.parametrize("stride", [20, 33])
def test_rows_any_distance_apart(stride, small_tiles):
    wide = unit(60, stride, seed=8)
    queries, keys = wide[:9, 1:18], wide[9:, 2:19]
    state = emc2.init_state(9)
    assert_same(call("triton", queries, keys, state), state, queries, keys)


def test_a_chain_that_has_not_started_has_no_key(small_tiles):
    """Whatever key it came with, where it is proposed none to start at."""
    queries, keys = unit(3, 8, seed=1), unit(20, 8, seed=2)
    state = emc2.MHState(torch.tensor([4, 5, 6]), torch.tensor([-torch.inf, torch.nan, 1.0]))
    ids = {"query_ids": torch.zeros(3, dtype=torch.int64), "key_ids": torch.zeros(20, dtype=torch.int64)}
    result = call("triton", queries, keys, state, **ids)
    assert result.state.key.tolist() == [-1, -1, 6]
    assert result.state.score.tolist() == [-torch.inf, -torch.inf, 1.0]


@pytest.mark.parametrize("proposal", ["sweep", "uniform"])
def test_split_is_the_walk_unsplit(proposal, small_tiles, monkeypatch):
    """To the bit, in every output: composing only selects."""
    queries, keys = exact(5, 12, seed=1), exact(300, 12, seed=2)
    options = {"burn_in": 37, "num_samples": 51, "temperature": 3.0, "query_ids": torch.arange(5)}
    options |= {"key_ids": torch.arange(300) % 7}
    if proposal == "uniform":
        options |= {"proposal": "uniform", "num_proposals": 200}
    results = []
    for splits in (1, 2, 3):
        split_into(monkeypatch, splits)
        results.append(call("triton", queries, keys, emc2.init_state(5), **options))
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("cut", [3, 16, 50, 99])
def test_shards_compose_to_the_whole_walk(cut, splits, small_tiles, monkeypatch):
    split_into(monkeypatch, splits)
    queries, keys = exact(4, 6, seed=3), exact(100, 6, seed=4)
    common = {"temperature": 2.0, "seed": 1, "step": 2, "burn_in": 20, "num_samples": 9, "backend": "triton"}
    whole = emc2.mh_transition(queries, keys, **common)
    parts = [
        emc2.mh_transition(queries, part, first_proposal=first, total_proposals=100, **common)
        for first, part in ((0, keys[:cut]), (cut, keys[cut:]))
    ]
    first_whole = emc2.Transition(*(field[:, -1:] for field in parts[0]))
    done = torch.tensor([point < cut for point in sample_points(20, 100, 9)])
    composed = emc2.compose(first_whole, parts[1])
    joined = emc2.Transition(*(torch.where(done, a, b) for a, b in zip(parts[0], composed, strict=True)))
    assert_identical(joined, whole)
    state = emc2.MHState(torch.arange(4), torch.tensor([-1.0, 0.0, 1.0, -torch.inf]))
    applied = emc2.apply(whole, state)
    stepped = emc2.mh_step(queries, keys, state, **common)
    assert_identical(
        (stepped.samples, *stepped.state, stepped.threshold), (applied.samples, *applied.state, applied.threshold)
    )


def sample_points(burn_in, total, samples):
    return [burn_in + -(-(r + 1) * (total - burn_in) // samples) - 1 for r in range(samples)]


def test_seed_and_step_as_tensors(small_tiles):
    queries, keys, state = unit(3, 8, seed=1), unit(40, 8, seed=2), emc2.init_state(3)
    numbers = call("triton", queries, keys, state, seed=2**64 - 5, step=2**32 - 2)
    tensors = call("triton", queries, keys, state, seed=torch.tensor(-5), step=torch.tensor(2**32 - 2))
    assert_identical(tensors, numbers)


def test_every_state_of_a_long_schedule(small_tiles):
    """Sample points in every tile, and every one of them recorded."""
    queries, keys, state = exact(2, 5, seed=1), exact(150, 5, seed=2), emc2.init_state(2)
    options = {"temperature": 2.0, "burn_in": 3, "num_samples": 147}
    assert_identical(
        call("triton", queries, keys, state, **options).samples,
        call("reference", queries, keys, state, **options).samples,
    )


def test_the_clamp_of_an_exponential_draw_is_as_interpreted():
    """Its PTX, which no interpreter runs: -log2 u / 32 as it is, and 0 for a logarithm that came out above 0."""
    opcode, operands, constant = re.fullmatch(r"(\S+) (.*), 0f(\w+);", philox.SCALE_AND_CLAMP.value).groups()
    factor = torch.tensor(int(constant, 16) - 2**32, dtype=torch.int32).view(torch.float32)
    log2 = torch.cat((-torch.rand(1000) * 24, torch.tensor([-24.0, -(2.0**-24), -0.0, 0.0, 2.0**-22])))
    assert (opcode, operands) == ("mul.sat.f32", "$0, $1")
    assert torch.equal((log2 * factor).clamp(0, 1) * -32, log2.clamp_max(0))


def test_view_coin():
    items = torch.cat((torch.arange(300), torch.tensor([2**39])))
    coins = view_coin.view_coin(items, 2**63 + 1, torch.tensor(2**32 - 1))
    assert torch.equal(coins, rng.view_coin(items, seed=2**63 + 1, step=2**32 - 1))


# How walks are cut, and how kernels are launched.


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 7813), (512, 256), (313, 200), (1, 1), (4, 3), (100_000, 1000)])
def test_splits_fill_the_gpu_without_idle_waves(blocks, tiles):
    count, places = tuning.splits(blocks, tiles, 132), tuning.PROGRAMS_PER_PROCESSOR * 132
    assert 1 <= count <= min(tuning.MAX_SPLITS, tiles)
    work = blocks * count * (-(-tiles // count) + tuning.ENDING)
    waves = -(-blocks * count // places)
    if tiles >= 64:  # else the ends of the programs are most of it
        assert work / (waves * places * (-(-tiles // count) + tuning.ENDING)) > (0.7 if blocks < places else 0.85)


def test_a_gpu_of_any_age_and_any_size_of_walk_has_a_row():
    sizes = (1, 64, 65, 10**6)
    for generation in (8, 9, 10, 12):
        for half in (True, False):
            used = {tuning.sweep(generation, half, d, n) for d in (0, 1, 128, 129, 512, 4096) for n in sizes}
            rows = [key for key in tuning.SWEEPS if key[0] == min(generation, 10) and key[1] == half]
            assert used == {tuning.SWEEPS[key] for key in rows}, "a row that no size reaches"
            used = {tuning.lse_gradient(generation, half, d) for d in (0, 1, 128, 129, 256, 257, 512, 513, 4096)}
            rows = [key for key in tuning.LSE_GRADIENTS if key[0] == min(generation, 10) and key[1] == half]
            assert used == {tuning.LSE_GRADIENTS[key] for key in rows}, "a row that no size reaches"
    assert tuning.sweep(9, True, 128, 64) == tuning.SWEEPS[9, True, 128, tuning.ANY]
    assert tuning.sweep(9, True, 512, 64).block_m == 64  # no product is half empty
    assert tuning.sweep(9, True, 512, 65) == tuning.SWEEPS[9, True, tuning.ANY, tuning.ANY]


def test_a_binary_is_kept_for_all_it_does_not_depend_on():
    """The launcher's key: other sizes and numbers share a binary; another dtype, alignment or constant does not."""

    class Function:
        arg_names = ("queries_ptr", "stride_query_row", "n", "D", "labels_ptr")

    kernel = launch.Kernel(Function)
    base = {"queries_ptr": torch.zeros(8), "stride_query_row": 128, "n": 5, "D": 64, "labels_ptr": None}

    def key(options=(("num_warps", 4),), **changes):
        values = [(base | changes)[name] for name in kernel.names]
        return kernel.bind(values, dict(options))[0]

    assert key(n=6) == key() and key(stride_query_row=64) == key() and key(queries_ptr=torch.zeros(9)) == key()
    others = [{"D": 65}, {"stride_query_row": 129}, {"stride_query_row": 1}, {"labels_ptr": torch.zeros(8)}]
    others += [{"queries_ptr": torch.zeros(9)[1:]}, {"queries_ptr": torch.zeros(8, dtype=torch.bfloat16)}]
    others += [{"options": (("num_warps", 8),)}]
    assert all(key(**other) != key() for other in others)


def test_a_binary_is_given_addresses():
    class Function:
        arg_names = ("queries_ptr", "n", "labels_ptr", "out_ptr")

    values = [torch.zeros(8), 5, None, torch.zeros(3)]
    addresses = launch.Kernel(Function).bind(values, {})[1]
    assert addresses == [values[0].data_ptr(), 5, None, values[3].data_ptr()]
    assert isinstance(values[0], torch.Tensor)  # what Triton is given where it has no binary yet


@pytest.fixture
def torch_precision():
    """The setting of float32 products, which tests change: as it comes with torch, and afterwards as it was."""
    settings_of = torch.backends.cuda.matmul, torch.backends
    before = [each.fp32_precision for each in settings_of]
    for each in settings_of:
        each.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision("highest")  # or its getter would find the two at odds
    for each, value in zip(settings_of, before, strict=True):
        each.fp32_precision = value


PRECISIONS = {
    "as it comes": (lambda: None, "ieee"),
    "the former setting, high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "the former setting, highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
    "of products": (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
    "of everything": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
}


@pytest.mark.parametrize(("change", "expected"), PRECISIONS.values(), ids=PRECISIONS)
def test_float32_products_are_as_precise_as_those_of_torch(change, expected, torch_precision, small_tiles):
    change()
    assert launch.precision(torch.float32) == expected
    assert {launch.precision(dtype) for dtype in (torch.bfloat16, torch.float16)} == {"ieee"}, "would compile twice"
    call("triton", unit(2, 3, seed=1), unit(4, 3, seed=2))  # torch's former getter raises after some of the changes


def test_every_number_of_a_kernel_is_named_as_one():
    """Else Triton would compile for the divisibility of the first value, and the binary be kept for all others."""
    names = [each.name for each in pkgutil.walk_packages(triton.__path__, f"{triton.__name__}.")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    kernels = {id(value): value for value in values if isinstance(value, launch.Kernel)}.values()
    assert len(kernels) >= 14
    for kernel in kernels:
        others = set(kernel.names) - {*kernel.pointers, *kernel.strides, *kernel.constants}
        assert others <= set(launch.NUMBERS), others - set(launch.NUMBERS)
