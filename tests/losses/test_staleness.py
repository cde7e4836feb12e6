"""How stale what is kept has become: the number, what i-SIR does by it, and what happens without it."""

import copy
import math

import pytest
import torch
from helpers import assert_identical, normal, snapshot
from slow_losses import value_and_gradients
from torch.nn.functional import normalize

from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses import staleness as measure
from emc2_kernels.losses.anchors import Anchors
from emc2_kernels.losses.staleness import MAX_STALENESS, Staleness, is_fresh, staleness

ITEMS, DIM, B = 40, 16, 12
FORMS = [{"views": "one"}, {"views": "both"}, {"bimodal": True}]
BY_FORM = pytest.mark.parametrize("form", FORMS, ids=str)


def formula(z0, z1, kept0, kept1, held0, held1):
    """(2,) what a batch adds to the sums, pair by pair. held: whether the bank has each row."""
    pairs = range(len(z0))
    lags = [z1[i] @ (z0[i] - kept0[i]) for i in pairs if held0[i]] + [
        z0[i] @ (z1[i] - kept1[i]) for i in pairs if held1[i]
    ]
    positive = sum(z0[i] @ z1[i] for i in pairs) / len(pairs)
    others = [z0[i] @ z1[j] for i in pairs for j in pairs if i != j]
    spread = positive - sum(others) / max(len(others), 1)
    return torch.stack((sum(lags, spread * 0), spread * len(lags))) if others else None


def pairs_and_kept(seed, b, dtype=torch.float64):
    """Unit rows of two views that are alike, and of what was kept of them."""
    home = normal(seed, b, DIM, dtype=dtype)
    return [
        normalize(home + amount * normal(seed + k, b, DIM, dtype=dtype)) for k, amount in enumerate((0.3, 0.3, 1, 1), 1)
    ]


def some_held(seed, b, share):
    return [torch.rand(b, generator=torch.Generator().manual_seed(seed + k)) < share for k in (0, 1)]


def with_batch(drift, z0, z1, kept0, kept1, held0, held1):
    z, held = torch.cat((z0, z1)), torch.cat((held0, held1))
    kept = torch.where(held[:, None], torch.cat((kept0, kept1)), 0)
    return drift.with_batch(Anchors(z, None, None), (z0 * z1).sum(1).detach(), held, kept, None)


@pytest.mark.parametrize("b", [2, 7, 30])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_adds_the_lag_of_kept_positives_and_what_tells_positives_apart(b, share, dtype):
    for seed in range(0, 50, 10):
        rows, held = pairs_and_kept(seed, b), some_held(seed, b, share)
        held[0][0] = True
        drift = Staleness()
        found = with_batch(drift, *(x.to(dtype) for x in rows), *held)
        assert found.shape == (2,) and found.dtype == torch.float32 and not drift.sums.any()
        expected = formula(*rows, *held)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(staleness(found), found[0] / found[1])


def test_of_one_view_that_is_held():
    rows, none = pairs_and_kept(3, B), torch.zeros(B, dtype=torch.bool)
    for held in ((~none, none), (none, ~none)):
        found = with_batch(Staleness(), *rows, *held)
        torch.testing.assert_close(found.double(), formula(*rows, *held), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b", [1, B])
def test_where_nothing_is_held_it_is_not_a_number(b):
    none = torch.zeros(b, dtype=torch.bool)
    sums = with_batch(Staleness(), *pairs_and_kept(4, b), none, none)
    assert not sums.any() and staleness(sums).isnan() and not is_fresh(sums)


def test_no_gradient_goes_through_it():
    rows = pairs_and_kept(5, B)
    rows[0].requires_grad_()
    assert not with_batch(Staleness(), *rows, *torch.ones(2, B, dtype=torch.bool)).requires_grad


def test_of_earlier_batches_each_counts_nine_tenths_of_the_next():
    """Whatever their sizes, and how many of their rows the bank holds: none, too. One pair counts nothing: without a
    negative, what it has in common with all others would pass for what tells it apart."""
    drift, added = Staleness(), []
    for step, (b, share) in enumerate([(7, 0.0), (5, 1.0), (12, 0.4), (1, 1.0), (4, 0.0), (30, 0.9), (2, 0.5)]):
        rows, held = pairs_and_kept(10 * step, b), some_held(10 * step, b, share)
        more = formula(*rows, *held)
        added += [] if more is None else [more]
        sums = with_batch(drift, *rows, *held)
        expected = sum(0.9**age * some for age, some in enumerate(reversed(added)))
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
        drift.put_sums(sums, None)
        assert_identical(drift.sums, sums)
    drift.put_sums(sums + 1, torch.tensor(False))
    assert_identical(drift.sums, sums)


@pytest.mark.parametrize(
    ("lost", "spread", "fresh"),
    [
        (0.0, 1.0, True),
        (0.1999, 1.0, True),
        (0.2, 1.0, False),
        (0.2001, 1.0, False),
        (19.99, 100.0, True),
        (20.01, 100.0, False),
        (-1.0, 1.0, True),
        (9.0, 1.0, False),
        (0.0, 0.0, False),
        (-1.0, 0.0, False),
        (1.0, 0.0, False),
        (-1.0, -1.0, False),  # a ratio of 1
        (0.1, -1.0, False),  # of -0.1: a ratio below the bound says nothing where positives are no closer
        (-0.1, -1.0, False),
        (-9.0, -1.0, False),
        (math.nan, 1.0, False),
        (0.0, math.nan, False),
        (math.inf, math.inf, False),
    ],
)
def test_what_is_kept_is_fresh_below_a_fifth_of_what_tells_positives_apart(lost, spread, fresh):
    assert is_fresh(torch.tensor([lost, spread])).item() is fresh


def home(noise=0.3):
    """Two views of each item, alike."""
    return normal(1, ITEMS, 1, DIM) + noise * normal(2, ITEMS, 2, DIM)


def make(**options):
    usual = {"temperature": 0.2, "bank_dtype": torch.float32, "queue": 8}
    return EMC2Loss(ITEMS, DIM, sampler="isir", **usual | options)


def batch(step, of=None):
    index = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(step))[:B]
    z = (home() if of is None else of)[index]
    return z[:, 0], z[:, 1], index


def trained(steps=20, **options):
    """At fixed parameters, until all items have been seen."""
    loss = make(**options)
    for step in range(steps):
        loss(*batch(step))
    assert (loss.bank.written_at >= 0).all()
    return loss


def forgotten(loss):
    """The same, but for what earlier batches told."""
    loss.drift.sums.zero_()
    return loss


def measured(loss, step=100, **options):
    return loss(*batch(step, **options), return_stats=True)[1]["staleness"].item()


@BY_FORM
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_at_fixed_parameters_it_is_0(form, dtype, most):
    assert abs(measured(trained(bank_dtype=dtype, **form))) < most


@BY_FORM
def test_a_bank_of_other_embeddings_is_wholly_stale(form):
    loss = forgotten(trained(**form))
    loss.bank.embeddings.copy_(normalize(normal(9, 2 * ITEMS, DIM)))
    assert measured(loss) == pytest.approx(1, abs=0.2)


@BY_FORM
def test_the_further_embeddings_move_the_more_it_is(form):
    loss = forgotten(trained(**form)).eval()
    drift = normal(8, ITEMS, 1, DIM)
    found = [measured(loss, of=home() + amount * drift) for amount in (0.0, 0.2, 0.5, 1.0, 3.0)]
    assert found == sorted(found) and found[0] < 1e-6 and found[1] < 0.1 and 0.5 < found[4] < 1.2


def test_at_a_first_batch_there_is_nothing_to_go_by():
    loss = make()
    assert math.isnan(measured(loss, 0)) and abs(measured(loss, 0)) < 1e-6


def test_what_is_encoded_again_is_never_stale():
    loss = make(carry="recompute", queue=0, encode=lambda items, views: home()[items, views])
    assert "staleness" not in loss(*batch(0), return_stats=True)[1]
    assert loss.drift is None and not any("drift" in name for name in loss.state_dict())


@BY_FORM
def test_the_sums_are_of_the_batches_of_training(form):
    """Of what the bank has, before it has the batch."""
    loss, expected = make(**form), torch.zeros(2, dtype=torch.float64)
    for step in range(12):
        z0, z1, index = batch(step, home() + 0.2 * step * normal(7, ITEMS, 1, DIM))
        labels = torch.cat((index * 2, index * 2 + 1))
        held, kept = (loss.bank.written_at[labels] >= 0).chunk(2), loss.bank.embeddings[labels].double().chunk(2)
        expected = 0.9 * expected + formula(normalize(z0).double(), normalize(z1).double(), *kept, *held)
        before = loss.drift.sums.clone()
        shown = loss.eval()(z0, z1, index, return_stats=True)[1]["staleness"]
        assert_identical(loss.drift.sums, before)
        assert_identical(loss.train()(z0, z1, index, return_stats=True)[1]["staleness"], shown)
        torch.testing.assert_close(loss.drift.sums.double(), expected, rtol=1e-5, atol=1e-4)
        assert_identical(shown, staleness(loss.drift.sums))
    assert expected[0] > 0.1


def test_a_step_that_overflows_is_none_of_them():
    class Opaque(torch.Tensor):
        """As on a GPU, where values are not looked at."""

    loss, (z0, z1, index) = trained(), batch(100)
    before = snapshot(loss)
    for place in ((0, 0), (3, 2)):
        bad = z0.clone()
        bad[place] = torch.nan
        loss(bad.as_subclass(Opaque), z1.as_subclass(Opaque), index)
        assert_identical(snapshot(loss), before)


def test_sums_that_overflow_alone_are_none_of_them():
    """Where no similarity does: of both or of neither."""
    loss, index = make(normalize=False, temperature=5.0), torch.arange(4)
    big = 1e19 * torch.ones(4, DIM) / 4 + 1e15 * normal(0, 4, DIM)
    z0, z1 = big * 1.5, big * 1.5
    loss(z0, z1, index)
    for sums in ((1.0, 2.0), (-3.0, 0.0)):
        loss.drift.sums.copy_(torch.tensor(sums))
        value, stats = loss(z0, z1, index, return_stats=True)
        assert value.isfinite() and not stats["staleness"].isfinite() and stats["carried_weight"] == 0
        assert_identical(loss.drift.sums, torch.tensor(sums))
    assert loss.step == 3


def emptied(loss):
    """The same without chains and queue."""
    loss = copy.deepcopy(loss)
    loss.chains.key.fill_(-1)
    loss.chains.score.fill_(-torch.inf)
    loss.recent.items.fill_(-1)
    return loss


def outcome(loss, of=None):
    """Value, gradient, statistics but for the gate's, and chains afterwards."""
    z0, z1, index = batch(100, of)
    value, gradient = value_and_gradients(copy.deepcopy(loss), z0, z1, index)
    _, stats = loss(z0, z1, index, return_stats=True)
    return value, gradient, {name: stat for name, stat in stats.items() if name != "staleness"}, snapshot(loss.chains)


def alike(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))


@BY_FORM
def test_where_it_is_much_nothing_that_is_kept_is_a_candidate(form):
    """Neither chains' keys nor the queue's, and chains start again from the batch."""
    loss, moved = forgotten(trained(**form)), home() + 3 * normal(8, ITEMS, 1, DIM)
    index = batch(100)[2]
    started = loss.chains.key.view(-1, 2)[index]
    without = emptied(loss)
    found, expected = outcome(loss, moved), outcome(without, moved)
    assert found[2]["carried_weight"] == 0
    assert_identical(found[:3], expected[:3])
    keys = loss.chains.key.view(-1, 2)[index]
    assert torch.isin(keys // 2, index).all() and not torch.isin(started // 2, index).all()
    assert_identical(keys, without.chains.key.view(-1, 2)[index])
    assert not alike(outcome(trained(**form)), outcome(emptied(trained(**form))))  # where it is little


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        ((-1e6, 1e6), True),
        ((0.0, 1e6), True),
        ((0.19e6, 1e6), True),
        ((0.21e6, 1e6), False),
        ((1e6, 1e6), False),
        ((0.0, -1e6), False),  # of positives that are less alike than negatives, as before anything has been learnt
        ((-1e6, -1e6), False),
        ((-9e6, -1e6), False),
    ],
)
def test_below_a_fifth_what_is_kept_counts(sums, counts):
    """Earlier batches outweigh one."""
    loss = trained()
    loss.drift.sums.copy_(torch.tensor(sums))
    assert alike(outcome(loss), outcome(emptied(loss))) != counts


@BY_FORM
def test_of_positives_that_are_less_alike_than_negatives_nothing_is_kept(form):
    """However often they come, and at fixed parameters."""
    loss, opposite = make(**form), home()
    opposite[:, 1] *= -1
    for step in range(30):
        stats = loss(*batch(step, opposite), return_stats=True)[1]
        assert stats["carried_weight"] == 0
    assert loss.drift.sums[1] < 0 and abs(loss.drift.sums[0]) < 1e-3 and stats["staleness"].isnan()


def test_it_counts_again_once_embeddings_are_steady():
    loss, moved, found = forgotten(trained()), home() + 3 * normal(8, ITEMS, 1, DIM), []
    for step in range(40):
        stats = loss(*batch(100 + step, moved), return_stats=True)[1]
        found.append(stats["staleness"].item())
        assert (stats["carried_weight"] > 0) == (found[-1] < MAX_STALENESS)
    assert found[0] > 0.5 and found[3] > MAX_STALENESS > found[-1]
    assert sum(before < MAX_STALENESS <= now for before, now in zip(found, found[1:], strict=False)) == 0


def turned(z, angle):
    """Rows in the plane of their first two coordinates."""
    x, y = z[..., :1], z[..., 1:2]
    return torch.cat((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos(), z[..., 2:]), -1)


def drift_from_a_common_start(seed=0, pushed=16, free=64, rate=0.1):
    """Embeddings that are nearly all alike are turned together, a little at each step, as a new encoder's are; then by
    their gradient alone. A batch's loss does not depend on the angle, but beside keys of another angle it does.

    Returns: the gradient by the angle at the last push, and how far they turn afterwards."""
    draw = torch.Generator().manual_seed(seed)
    z = 0.1 * (torch.randn(64, 1, DIM, generator=draw) + 0.3 * torch.randn(64, 2, DIM, generator=draw))
    z[..., 0] += 1
    loss = EMC2Loss(64, DIM, temperature=0.1, sampler="isir", bank_dtype=torch.float32)
    angle, pushing = torch.zeros((), requires_grad=True), 0.0
    order: list[int] = []
    for step in range(pushed + free):
        order = order or torch.randperm(64, generator=draw).tolist()
        index, order = torch.tensor(order[:8]), order[8:]
        rows = turned(z[index], angle)
        (gradient,) = torch.autograd.grad(loss(rows[:, 0], rows[:, 1], index), angle)
        with torch.no_grad():
            angle += 0.1 if step < pushed else -rate * gradient
        if step == pushed - 1:
            pushing, start = gradient.item(), angle.item()
    return pushing, angle.item() - start


def test_without_it_a_common_drift_drives_itself(monkeypatch):
    for seed in range(3):
        pushing, further = drift_from_a_common_start(seed)
        assert abs(pushing) < 1e-6 and abs(further) < 4
    monkeypatch.setattr(measure, "MAX_STALENESS", math.inf)
    for seed in range(3):
        pushing, further = drift_from_a_common_start(seed)
        assert pushing < -0.5 and further > 12
