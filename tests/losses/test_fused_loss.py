"""EMC2Loss in a handful of launches against the plain path: the same samples, chains and bank, the same gradients.

On CPU tensors in Triton's interpreter; tests/gpu runs the same kernels on a GPU.
"""

import pytest
import torch
from helpers import assert_identical, assert_unchanged, named_error, normal, relative_rms, snapshot

from emc2_kernels import backends
from emc2_kernels.distributed.keys import LocalKeys
from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses import emc2_fused as fused

pytestmark = pytest.mark.skipif(
    backends().get("triton") != "available", reason=f"Triton cannot run here: {backends().get('triton')}"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ITEMS, B, D, STEPS = 6, 4, 20, 3
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def make(backend="triton", dim=D, **options):
    return EMC2Loss(
        ITEMS, dim, backend=backend, **({"temperature": 0.2, "sampler": "mh", "burn_in": 0.0} | options)
    ).to(DEVICE)


def batches(steps=STEPS, b=B, dim=D, dtype=torch.float32):
    """Few items, drawn with replacement: duplicates in a batch, and chains that meet again."""
    for step in range(steps):
        index = torch.randint(0, ITEMS, (b,), generator=torch.Generator().manual_seed(step))
        yield normal(10 + step, b, dim, dtype=dtype), normal(50 + step, b, dim, dtype=dtype), index


def leaf(z):
    return z.detach().to(DEVICE, copy=True).requires_grad_()


def visit(loss, z0, z1, index, scale=1.0, **options):
    """Value, gradients of z0 and z1, statistics if asked for, and the state after it."""
    z0, z1 = leaf(z0), leaf(z1)
    out = loss(z0, z1, index.to(DEVICE), **options)
    value, stats = out if isinstance(out, tuple) else (out, {})
    (scale * value).backward()
    return value.detach(), z0.grad, z1.grad, stats, snapshot(loss)


def train(loss, data, **options):
    return [visit(loss, *batch, **options) for batch in data]


@pytest.fixture
def walks(monkeypatch):
    """Samples of every walk, by the path that asked for it."""
    seen = {"plain": [], "fused": []}

    def watch(module, name, path):
        original = getattr(module, name)

        def recorded(*arguments, **options):
            result = original(*arguments, **options)
            seen[path].append(result.samples)
            return result

        monkeypatch.setattr(module, name, recorded)

    watch(LocalKeys, "walk", "plain")
    watch(fused, "_walk", "fused")
    return seen


def assert_same_state(actual, expected):
    for name, kept in actual.items():
        if name == "chains.score" or kept.dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(kept, expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert_identical(kept, expected[name])


CASES = {
    "burn-in": ({"burn_in": 0.5}, {}),
    "both views": ({"views": "both", "num_samples": 5, "burn_in": 0.1}, {}),
    "both views, another burn-in": ({"views": "both", "burn_in": 0.3}, {}),
    "the last state alone": ({"burn_in": 0.99, "num_samples": 1}, {}),
    "every state": ({"seed": 2**64 - 1}, {}),
    "not normalised": ({"normalize": False, "temperature": 5.0}, {}),
    "a float32 bank": ({"bank_dtype": torch.float32}, {"dim": 33}),
    "a float64 bank": ({"bank_dtype": torch.float64}, {"dim": 7}),
    "bfloat16": ({"temperature": 0.07}, {"dtype": torch.bfloat16}),
    "float16": ({"bank_dtype": torch.float16}, {"dtype": torch.float16}),
    "one pair": ({}, {"b": 1}),
    "one column": ({}, {"dim": 1, "b": 5}),
}


@pytest.mark.one_seed
@pytest.mark.parametrize(("options", "shape"), CASES.values(), ids=CASES)
def test_equals_the_plain_path(options, shape, walks):
    dim, dtype = shape.get("dim", D), shape.get("dtype", torch.float32)
    data = list(batches(**shape))
    expected = train(make("reference", dim, **options), data, return_stats=True)
    actual = train(make("triton", dim, **options), data, return_stats=True)
    assert len(walks["fused"]) == STEPS
    assert_identical(walks["fused"], walks["plain"])
    for (value, *gradients, stats, kept), (wanted, *wanted_gradients, wanted_stats, wanted_kept) in zip(
        actual, expected, strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
        assert stats.keys() == wanted_stats.keys()
        for name in stats:
            torch.testing.assert_close(stats[name], wanted_stats[name], rtol=1e-5, atol=1e-6)
        assert_same_state(kept, wanted_kept)
        assert all(gradient.dtype == dtype and gradient.shape == (len(data[0][0]), dim) for gradient in gradients)
        if dim > 1:  # the gradient of a normalised number is 0, and rounding is all that is left of it
            assert relative_rms(torch.cat(gradients), torch.cat(wanted_gradients)) <= GRADIENT_ERROR[dtype]


def test_some_samples_are_carried_and_some_chains_have_not_started(walks):
    """Else the cases above would say little."""
    data = list(batches())
    keys = [loss[4]["chains.key"] for loss in train(make("reference"), data)]
    slots = [torch.cat((index * 2, index * 2 + 1)) for _, _, index in data]
    assert (walks["plain"][0] == -1).any()
    assert any((walks["plain"][step] == -1)[keys[step - 1][slots[step]] >= 0].any() for step in (1, 2))
    assert any(len(index.unique()) < B for _, _, index in data)


def test_runs_and_scaled_gradients_are_the_same_bits():
    data = list(batches(2, dtype=torch.bfloat16))
    first, again, doubled = (train(make(), data, scale=scale) for scale in (1, 1, 2))
    assert_identical(again, first)
    for (_, *gradients, _, _), (_, *twice, _, _) in zip(first, doubled, strict=True):
        assert_identical(twice, [2 * gradient for gradient in gradients])


def test_short_rows_are_left_short_as_in_the_plain_path():
    z0, z1, index = next(batches(1))
    lengths = torch.tensor([0.0, 1e-30, 1e-7, 1.0])[:, None]
    expected, actual = (visit(make(name), z0 * lengths, z1, index) for name in ("reference", "triton"))
    for gradient, wanted in zip(actual[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_multiplies_in_autocasts_dtype(dtype):
    z0, z1, index = next(batches(1))
    with torch.autocast(DEVICE, dtype):
        expected, actual = (visit(make(name), z0, z1, index) for name in ("reference", "triton"))
        loss, z0 = make(), z0.to(DEVICE)
        options = loss._walk_options(z0, False)
        kept = fused.surrogate(z0, z1.to(DEVICE), index, loss.chains, loss.bank, options, True, True).batch
    assert kept.queries.dtype == kept.keys.dtype == dtype and kept.anchors.dtype == torch.float32
    assert actual[1].dtype == torch.float32
    assert_same_state(actual[4], expected[4])
    assert relative_rms(actual[1], expected[1]) <= GRADIENT_ERROR[torch.float32]


LAYOUTS = {
    "transposed": lambda z: z.T.contiguous().T,
    "a window": lambda z: torch.nn.functional.pad(z, (3, 2), value=torch.nan)[:, 3:-2],
    "columns apart": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "rows upside down": lambda z: z.flip(0)[torch.arange(len(z) - 1, -1, -1)],
}


def test_a_second_derivative_is_refused_not_taken_for_zero():
    z0, z1, index = next(batches(1))
    z0 = leaf(z0)
    value, wanted, *_ = visit(make(), z0, z1, index)
    value = make()(z0, z1.to(DEVICE), index)
    (first,) = torch.autograd.grad(value, z0, create_graph=True)
    assert_identical(first.detach(), wanted)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (value + first.square().sum()).backward()


def test_large_batches_sort_where_small_ones_search(monkeypatch):
    from emc2_kernels.backends.triton import emc2_loss
    from emc2_kernels.backends.triton.emc2_loss import backward

    data = list(batches(2, b=5))
    for options in ({}, {"views": "both"}):
        searched = train(make(**options), data)
        with monkeypatch.context() as patch:
            patch.setattr(emc2_loss, "SCAN_ROWS", 0)
            patch.setattr(backward, "MAX_TILES", 0)
            sorted_out = train(make(**options), data)
        for (value, *gradients, _, kept), (other, *others, _, other_kept) in zip(searched, sorted_out, strict=True):
            assert_identical((value, kept), (other, other_kept))
            assert relative_rms(torch.cat(others), torch.cat(gradients)) <= GRADIENT_ERROR[torch.float32]


def test_a_search_takes_as_many_tiles_as_it_needs(monkeypatch):
    from emc2_kernels.backends.triton.emc2_loss import backward, forward, update

    data = list(batches(2, b=5))
    expected = train(make(), data)
    monkeypatch.setattr(backward, "TILE_ELEMENTS", 64)  # two rows
    monkeypatch.setattr(forward, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(update, "BLOCK_B", 2)
    for (value, *gradients, _, kept), (wanted, *wanted_gradients, _, wanted_kept) in zip(
        train(make(), data), expected, strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        assert_identical(kept, wanted_kept)
        assert relative_rms(torch.cat(gradients), torch.cat(wanted_gradients)) <= GRADIENT_ERROR[torch.float32]


Z0, Z1, INDEX = next(batches(1))
HUGE = torch.full_like(Z0, 1e19)
ERRORS = {
    "z0 has a NaN": ({"z0": torch.full_like(Z0, torch.nan)}, {}, ValueError, "z0"),
    "z0 is too wide": ({"z0": normal(0, B, D + 1), "z1": normal(1, B, D + 1)}, {}, ValueError, "z0"),
    "z0 and z1 are elsewhere": ({"z0": Z0.to("meta"), "z1": Z1.to("meta")}, {}, ValueError, "z0"),
    "an index is past the items": ({"index": INDEX + ITEMS}, {}, ValueError, "index"),
    "an index is negative": ({"index": INDEX - ITEMS}, {}, ValueError, "index"),
    "too many samples": ({}, {"num_samples": B + 1}, ValueError, "num_samples"),
    "products overflow": ({"z0": HUGE, "z1": HUGE}, {"normalize": False}, ValueError, "the similarities"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the interpreter's numpy
@pytest.mark.parametrize(("change", "options", "exception", "regex"), ERRORS.values(), ids=ERRORS)
def test_an_error_changes_nothing(change, options, exception, regex):
    if DEVICE == "cuda" and regex in ("z0", "the similarities") and "z0" in change and change["z0"].shape == Z0.shape:
        pytest.skip("values on a GPU are not looked at")
    loss = make(**options)
    before = snapshot(loss)
    call = {"z0": Z0, "z1": Z1, "index": INDEX} | change
    with named_error(exception, regex):
        loss(*(call[name] if call[name].is_meta else call[name].to(DEVICE) for name in ("z0", "z1")), call["index"])
    assert_unchanged(loss, before)


def test_which_calls_are_made_here():
    z0, z1 = Z0.to(DEVICE), Z1.to(DEVICE)

    def encode(items, views):
        return z0[:1].repeat(len(items), 1)

    def runs(z0, z1, backend="triton"):
        return fused.runs(z0, z1, backend)

    assert runs(z0, z1) and runs(z0, leaf(z1)) and runs(torch.nn.Parameter(z0), z1.half())
    assert not runs(z0, z1, "reference")
    assert runs(z0, z1, "auto") == (DEVICE == "cuda")
    assert not runs(z0.double(), z1.double())
    assert not runs(z0, z1.as_subclass(type("Named", (torch.Tensor,), {})))
    with torch._subclasses.FakeTensorMode():
        assert not runs(z0, z1)
    assert not torch.func.grad(lambda z: z.sum() + runs(z, z1))(z0).isnan().any()
    assert make()._fusable and make(views="both")._fusable
    for options in (
        {"carry": "recompute", "encode": encode},
        {"bimodal": True},
        {"proposals": "bank"},
        {"gather": "all"},
    ):
        assert not make(**options)._fusable


@pytest.mark.one_seed
def test_compiled_without_a_break_it_is_the_plain_path():
    torch.compiler.reset()
    compiled = torch.compile(make(), fullgraph=True, backend="eager")
    for batch in batches(1):
        expected = visit(make("reference"), *batch)
        actual = visit(compiled, *batch)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
        assert relative_rms(actual[1], expected[1]) <= GRADIENT_ERROR[torch.float32]
        assert_identical(compiled._orig_mod.chains.key, expected[4]["chains.key"])


@pytest.mark.parametrize(("training", "forward"), [(True, 4), (False, 3)], ids=["training", "evaluation"])
def test_launches_are_those_that_the_readme_counts(monkeypatch, training, forward):
    """gather_batch, the walk, mean_negatives, update_stores; torch's mean is the fifth, and the gradient is one."""
    from emc2_kernels.backends.triton.launch import Kernel

    launched, real = [], Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a: launched.append(self.function.__name__) or real(self, *a))
    loss = make(num_samples=2).train(training)
    z0, z1, index = next(iter(batches(1)))
    z0, z1 = leaf(z0), leaf(z1)
    value = loss(z0, z1, index.to(DEVICE))
    assert len(launched) == forward, launched
    value.backward()
    assert len(launched) == forward + 1, launched
