"""EMC2Loss by i-SIR in a handful of launches against the plain path: the same chains, bank, queue and drift, the same
gradients.

On CPU tensors in Triton's interpreter; tests/gpu runs the same kernels on a GPU.
"""

import pytest
import torch
from helpers import assert_identical, assert_unchanged, normal, relative_rms, snapshot
from test_fused_loss import DEVICE, GRADIENT_ERROR, LAYOUTS, assert_same_state, leaf, pytestmark, visit

from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses import emc2_isir_fused as fused

__all__ = ["pytestmark"]
ITEMS, B, D, STEPS = 12, 6, 20, 5


def make(backend="triton", dim=D, **options):
    return EMC2Loss(ITEMS, dim, backend=backend, **({"temperature": 0.2} | options)).to(DEVICE)


def batches(steps=STEPS, b=B, dim=D, dtype=torch.float32, drift=0.0):
    """Views of an item that look alike, or what is kept would never be fresh; drawn with replacement, so that items
    come twice in a batch and again soon. drift: how far all embeddings move from step to step, from the fourth on."""
    centers, away = normal(1, ITEMS, dim), normal(2, 1, dim)
    for step in range(steps):
        index = torch.randint(0, ITEMS, (b,), generator=torch.Generator().manual_seed(step))
        views = [
            centers[index] + 0.3 * normal(seed + step, b, dim) + drift * max(0, step - 2) * away for seed in (10, 50)
        ]
        yield *(view.to(dtype) for view in views), index


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What kernels must fill comes with rubbish in it."""
    new_empty = torch.Tensor.new_empty

    def filled(*sizes, **options):
        tensor = new_empty(*sizes, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.fixture
def calls(monkeypatch):
    """A list with an entry for each call of the fused path: what it has made."""
    found, original = [], fused.loss

    def recorded(*arguments):
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(fused, "loss", recorded)
    return found


def train(loss, data, **options):
    return [visit(loss, *batch, **options) for batch in data]


def assert_same_visit(found, wanted, gradient_error=GRADIENT_ERROR[torch.float32]):
    (value, *gradients, stats, kept), (wanted, *wanted_gradients, wanted_stats, wanted_kept) = found, wanted
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    assert stats.keys() == wanted_stats.keys()
    for name in stats:
        torch.testing.assert_close(stats[name], wanted_stats[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert_same_state(kept, wanted_kept)
    off, whole = torch.cat(gradients) - torch.cat(wanted_gradients), torch.cat(wanted_gradients)
    assert off.norm() <= gradient_error * whole.norm()  # both 0 for a pair alone


CASES = {
    "the default": ({}, {}),
    "coupled": ({"decoupled": False}, {}),
    "no queue": ({"queue": 0}, {}),
    "coupled, no queue": ({"decoupled": False, "queue": 0}, {}),
    "a queue shorter than the batch": ({"queue": 3}, {}),
    "a queue of one": ({"queue": 1}, {}),
    "the longest queue": ({"queue": fused.MAX_QUEUE}, {"steps": 3}),
    "another seed": ({"seed": 2**64 - 1, "temperature": 0.05}, {}),
    "a hot softmax": ({"temperature": 9.0, "decoupled": False}, {}),
    "a float32 bank": ({"bank_dtype": torch.float32}, {"dim": 33}),
    "a float64 bank": ({"bank_dtype": torch.float64}, {"dim": 7}),
    "a float16 bank": ({"bank_dtype": torch.float16}, {}),
    "many rows and tiles": ({}, {"b": 23, "steps": 3}),
    "one pair": ({}, {"b": 1}),
    "two elements": ({}, {"dim": 2}),
    "drift": ({}, {"drift": 1.0}),
}


@pytest.mark.one_seed
@pytest.mark.parametrize(("options", "shape"), CASES.values(), ids=CASES)
def test_equals_the_plain_path(options, shape, calls):
    dim, data = shape.get("dim", D), list(batches(**shape))
    expected = train(make("reference", dim, **options), data, return_stats=True)
    assert not calls
    actual = train(make("triton", dim, **options), data, return_stats=True)
    assert len(calls) == len(data)
    for found, wanted in zip(actual, expected, strict=True):
        assert_same_visit(found, wanted)


@pytest.mark.one_seed
def test_one_pair_among_what_is_kept():
    """The sums that say whether that is fresh stay as they are, and the gate open."""
    data = [*batches(4), *batches(2, b=1)]
    expected, actual = (train(make(name), data, return_stats=True) for name in ("reference", "triton"))
    assert all(visited[1].norm() > 0.01 for visited in expected[4:])
    for found, wanted in zip(actual, expected, strict=True):
        assert_same_visit(found, wanted)


def test_the_cases_have_all_kinds_of_candidates(calls):
    """Else they would say little: chains that brought something along and moved to it, or have not started; entries of
    the queue that are candidates, and some in the batch; a gate that is open, and one that closes again."""
    train(make(), list(batches()))
    carried = [made.candidates.carried_items for made in calls]
    assert any((items >= 0).any() and (items < 0).any() for items in carried)
    assert any((made.drawn.position < -1).any() for made in calls)
    usable = [made.candidates.log_proposal[2 * B :] == 0 for made in calls]
    assert any(entries.any() and not entries.all() for entries in usable)
    assert any((made.drawn.position >= 2 * B).any() for made in calls)
    assert any(len(index.unique()) < B for _, _, index in batches())
    calls.clear()
    train(make(), list(batches(drift=1.0)))
    opened = [bool((made.candidates.carried_items >= 0).any()) for made in calls]
    assert opened != sorted(opened), opened


HALVES = {torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["inputs", "autocast"])
def test_in_half_precision(dtype, autocast, calls):
    """On the CPU the plain path multiplies in float32; so each step begins at its state, and is the same but for the
    products' rounding."""
    plain, other = make("reference"), make()
    data = list(batches(dtype=torch.float32 if autocast else dtype))
    for batch in data:
        other.load_state_dict(plain.state_dict())
        wanted = visit(plain, *batch)
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            found = visit(other, *batch)
        assert abs(found[0] - wanted[0]) <= HALVES[dtype]
        assert all(gradient.dtype == batch[0].dtype for gradient in found[1:3])
        assert relative_rms(torch.cat(found[1:3]), torch.cat(wanted[1:3])) <= HALVES[dtype]
        chosen = found[4].pop("chains.key") == wanted[4].pop("chains.key")
        assert chosen.float().mean() >= 0.9
        close = (found[4].pop("chains.score") - wanted[4].pop("chains.score"))[chosen].nan_to_num()
        assert close.abs().max() <= HALVES[dtype]
        assert_same_state(found[4], wanted[4])
    assert [made.candidates.keys.dtype for made in calls] == [dtype] * len(data)
    assert all(made.candidates.anchors.dtype == torch.float32 for made in calls)


def test_views_that_the_bank_has_not_bring_nothing():
    """The first view of some items, as where its embedding has overflowed in the bank's dtype; the second of others."""
    losses, data = [make(name) for name in ("reference", "triton")], list(batches(4))
    found = [train(loss, data[:3]) for loss in losses]
    assert_same_visit(found[1][-1], found[0][-1])
    for loss in losses:
        gone = torch.tensor([0, 2, 4, 7, 9, 11, 12, 14])
        loss.bank.written_at[gone], loss.bank.embeddings[gone] = -1, torch.inf
    first, second = (train(loss, data[3:], return_stats=True)[0] for loss in losses)
    assert_same_visit(second, first)


@pytest.mark.parametrize("place", [0, 1], ids=["lost", "worth"])
def test_sums_of_which_one_overflows_stay_as_they_are(place, monkeypatch):
    monkeypatch.setattr(fused, "MEMORY", 2.0)  # or no number that a store may hold would get there
    loss, data = make(), list(batches(2))
    train(loss, data[:1])
    loss.drift.sums[place] = 3e38
    before = loss.drift.sums.clone()
    train(loss, data[1:])
    assert_identical(loss.drift.sums, before)
    assert loss.step == 2


def test_runs_and_scaled_gradients_are_the_same_bits():
    data = list(batches(3, dtype=torch.bfloat16))
    first, again, doubled = (train(make(), data, scale=scale) for scale in (1, 1, 2))
    assert_identical(again, first)
    for (_, *gradients, _, _), (_, *twice, _, _) in zip(first, doubled, strict=True):
        assert_identical(twice, [2 * gradient for gradient in gradients])


def test_small_blocks_give_the_same(monkeypatch):
    from emc2_kernels.backends.triton.emc2_loss import update
    from emc2_kernels.backends.triton.isir_loss import gather, value

    data = list(batches(3, b=9))
    expected = train(make(), data)
    for module, name, size in [(gather, "BLOCK_B", 2), (gather, "GATE_ELEMENTS", 64), (gather, "GATE_ROWS", 4),
                               (value, "BLOCK_ROWS", 4), (update, "BLOCK_B", 2)]:  # fmt: skip
        monkeypatch.setattr(module, name, size)
    for found, wanted in zip(train(make(), data), expected, strict=True):
        assert_same_visit(found, wanted)


def test_short_rows_are_left_short_as_in_the_plain_path():
    z0, z1, index = next(batches(1))
    lengths = torch.tensor([0.0, 1e-30, 1e-7, 1.0, 2.0, 1e-5])[:, None]
    expected, actual = (visit(make(name), z0 * lengths, z1, index) for name in ("reference", "triton"))
    for gradient, wanted in zip(actual[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_long_rows_are_as_in_the_plain_path():
    z0, z1, index = next(batches(1))
    long = torch.tensor([1.0, 2.0**60, 2.0**80, 2.0**100, 1.0, 2.0**53])[:, None]
    expected, actual = (visit(make(name), z0 * long, z1, index) for name in ("reference", "triton"))
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1] * long, expected[1] * long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["isir", "mh"])
def test_inputs_may_lie_anywhere(sampler):
    z0, z1, index = next(batches(1))
    expected = visit(make(sampler=sampler), z0, z1, index)
    for layout in LAYOUTS.values():
        loss, leaves = make(sampler=sampler), [leaf(z) for z in (z0, z1)]
        value = loss(*map(layout, leaves), index.repeat_interleave(2).to(DEVICE)[::2])
        value.backward()
        assert_identical([value.detach(), *(z.grad for z in leaves), {}, snapshot(loss)], list(expected))
    row = z0[:1].to(DEVICE)
    one, copies = (make(sampler=sampler)(rows, rows, index) for rows in (row.expand(B, D), row.repeat(B, 1)))
    assert_identical(one, copies)


@pytest.mark.parametrize("sampler", ["isir", "mh"])
def test_evaluation_writes_nothing(sampler):
    loss, data = make(sampler=sampler), list(batches(3))
    train(loss, data[:2])
    before = snapshot(loss)
    evaluated = visit(loss.eval(), *data[2])
    assert_unchanged(loss, before)
    assert_identical(visit(loss.train(), *data[2])[:3], evaluated[:3])


def test_what_is_kept_may_change_before_the_gradient():
    """Two forward passes, and then both backward."""
    data = list(batches(4))
    loss, other = make(), make()
    train(loss, data[:2])
    train(other, data[:2])
    expected = train(loss, data[2:])
    leaves = [[leaf(z) for z in batch[:2]] for batch in data[2:]]
    values = [other(*z, batch[2].to(DEVICE)) for z, batch in zip(leaves, data[2:], strict=True)]
    for value in values:
        value.backward()
    for z, wanted in zip(leaves, expected, strict=True):
        assert_identical([x.grad for x in z], list(wanted[1:3]))


@pytest.mark.parametrize("sampler", ["isir", "mh"])
def test_gradients_that_nobody_asks_for_are_not_needed(sampler):
    z0, z1, index = next(batches(1))
    value, wanted, *_ = visit(make(sampler=sampler), z0, z1, index)
    z0 = leaf(z0)
    make(sampler=sampler)(z0, z1.to(DEVICE), index).backward()
    assert_identical(z0.grad, wanted)
    with torch.no_grad():
        assert_identical(make(sampler=sampler)(z0, z1.to(DEVICE), index), value)


@pytest.mark.parametrize("sampler", ["isir", "mh"])
def test_a_view_may_come_from_inference_mode(sampler):
    z0, z1, index = next(batches(1))
    with torch.inference_mode():
        teachers = z1.to(DEVICE, copy=True)
    expected, actual = leaf(z0), leaf(z0)
    make(sampler=sampler)(expected, z1.to(DEVICE), index).backward()
    make(sampler=sampler)(actual, teachers, index).backward()
    assert_identical(actual.grad, expected.grad)


@pytest.mark.parametrize("sampler", ["isir", "mh"])
def test_tables_of_an_assigned_state_may_have_gaps(sampler):
    data = list(batches(3))
    loss, other = make(sampler=sampler), make(sampler=sampler)
    train(loss, data[:2])
    state = loss.state_dict()
    for name, kept in state.items():
        if isinstance(kept, torch.Tensor):
            state[name] = torch.stack((kept, kept), -1)[..., 0]
    other.load_state_dict(state, assign=True)
    assert_identical(*(visit(some, *data[2]) for some in (other, loss)))


def test_a_second_derivative_is_refused_not_taken_for_zero():
    *views, index = next(batches(1))
    for view in (0, 1):
        z = [some.to(DEVICE) for some in views]
        z[view] = leaf(z[view])
        value = make()(*z, index)
        (first,) = torch.autograd.grad(value, z[view], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(first.square().sum(), z[view])


REFUSED = {
    "one view": {"views": "one"},
    "bimodal": {"bimodal": True},
    "not normalised": {"normalize": False},
    "a long queue": {"queue": fused.MAX_QUEUE + 1},
    "encoded again": {"carry": "recompute", "encode": lambda items, views: normal(0, len(items), D).to(DEVICE)},
    "another backend": {"backend": "reference"},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_other_options_take_the_plain_path(options, calls):
    train(make(**options), batches(1))
    assert not calls


def test_larger_batches_take_the_plain_path(monkeypatch, calls):
    for limit, size in (("MAX_PAIRS", B), ("MAX_DIM", D)):
        for limited in (size, size - 1):
            with monkeypatch.context() as patch:
                patch.setattr(fused, limit, limited)
                train(make(), batches(1))
            assert len(calls) == (limited == size)
            calls.clear()
    assert not make(backend="cuda")._fusable and make(gather="none")._fusable and not make(gather="all")._fusable
    assert make(backend="auto")._fusable and not fused.runs_small(*(z.double() for z in normal(0, 2, B, D)), "triton")


@pytest.mark.parametrize(("training", "forward"), [(True, 5), (False, 4)], ids=["training", "evaluation"])
def test_launches_are_those_that_the_documentation_counts(monkeypatch, training, forward):
    from emc2_kernels.backends.triton.launch import Kernel

    launched, real = [], Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a: launched.append(self.function.__name__) or real(self, *a))
    loss = make().train(training)
    z0, z1, index = next(batches(1))
    z0, z1 = leaf(z0), leaf(z1)
    value = loss(z0, z1, index.to(DEVICE))
    assert len(launched) == forward, launched
    value.backward()
    assert len(launched) == forward + 1, launched
