"""SogCLR and iSogCLR against the papers' update and weights written in plain torch, one anchor and item at a time."""

import copy
import math

import pytest
import torch
from helpers import assert_identical, assert_unchanged, named_error, normal, relative_rms, snapshot
from slow_losses import slow_pair_statistics, unit
from torch.nn import functional

from emc2_kernels.losses import ISogCLRLoss, SogCLRLoss

ITEMS, DIM, B, STEPS = 12, 8, 6, 6
RHO, LR, MOMENTUM = 0.8, 0.02, 0.6
LEARNS = {
    "individual_temperature": True,
    "rho": RHO,
    "temperature_lr": LR,
    "temperature_momentum": MOMENTUM,
    "temperature_bounds": (0.195, 0.205),
}


class PlainSogCLR:
    """u <- (1 - gamma) u + gamma * mean of exp(s); weights exp(s) / u; as published, no logarithm of a sum anywhere."""

    def __init__(self, temperature, gamma=0.9, bimodal=False, learns=False):
        self.temperature, self.gamma, self.bimodal, self.learns = temperature, gamma, bimodal, learns
        self.u, self.t, self.v = {}, {}, {}  # (item, tower) -> value

    def __call__(self, z0, z1, index):
        """The surrogate, whose gradient is the estimate, and the mean of log u - s+."""
        rows, b, items = [unit(row) for row in (*z0, *z1)], len(z0), index.tolist() * 2
        terms, values, visits = [], [], {}
        for anchor in range(2 * b):
            slot = (items[anchor], anchor // b if self.bimodal else 0)
            t = self.t.get(slot, self.temperature)
            positive = (anchor + b) % (2 * b)
            keys = [j for j in range(2 * b) if items[j] != items[anchor]]
            if self.bimodal:
                keys = [j for j in keys if j // b != anchor // b]
            s_positive = rows[anchor] @ rows[positive] / t
            terms.append(-s_positive * t / self.temperature)
            values.append(terms[-1].detach())
            if not keys:
                continue
            s = torch.stack([rows[anchor] @ rows[j] for j in keys]) / t
            g = s.detach().exp().mean()
            u = (1 - self.gamma) * self.u[slot] + self.gamma * g if slot in self.u else g
            weights = s.detach().exp() / u
            terms[-1] = terms[-1] + (weights * s).mean() * t / self.temperature
            values[-1] = (u.log() - s_positive.detach()) * t / self.temperature
            shifted = s.detach() - s_positive.detach()
            slope = (u * (-s_positive.detach()).exp()).log() + RHO - (weights * shifted).mean()
            visits.setdefault((*slot, anchor % b), []).append((u, slope))
        self.remember(visits)
        return torch.stack(terms).mean(), torch.stack(values).mean()

    def remember(self, visits):
        before = dict(self.v), dict(self.t)
        for (item, tower, _), found in visits.items():  # in the order of the rows: of duplicates the last one stays
            slot = (item, tower)
            u, slope = (sum(column) / len(column) for column in zip(*found, strict=True))
            self.u[slot] = u
            if self.learns:
                self.v[slot] = MOMENTUM * before[0].get(slot, 0.0) + (1 - MOMENTUM) * slope
                moved = before[1].get(slot, self.temperature) - LR * self.v[slot]
                self.t[slot] = moved.clamp(*LEARNS["temperature_bounds"])

    def assert_keeps_the_same(self, loss, rtol=1e-5):
        towers = 2 if self.bimodal else 1
        pairs = {"log_u": ({slot: math.log(u) for slot, u in self.u.items()}, -torch.inf)}
        if self.learns:
            pairs |= {"item_temperature": (self.t, self.temperature), "item_velocity": (self.v, 0.0)}
        for name, (kept, otherwise) in pairs.items():
            expected = [kept.get((item, tower), otherwise) for item in range(ITEMS) for tower in range(towers)]
            torch.testing.assert_close(
                getattr(loss, name), torch.tensor(expected, dtype=torch.float32), rtol=rtol, atol=rtol
            )


def batches(seed=0, steps=STEPS, size=B):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(ITEMS, generator=generator)[:size] for _ in range(steps)]


def embeddings(step, size=B, dtype=torch.float32):
    """Pairs that resemble each other, so that the positive's exponent is large and differs between visits."""
    z0 = normal(10 + step, size, DIM)
    return z0.to(dtype), (z0 + 0.7 * normal(50 + step, size, DIM)).to(dtype)


def value_and_gradient(loss, z0, z1, index):
    z0, z1 = z0.clone().requires_grad_(), z1.clone().requires_grad_()
    out = loss(z0, z1, index)
    surrogate, value = out if isinstance(out, tuple) else (out, out)
    surrogate.backward()
    return value.detach(), torch.cat((z0.grad, z1.grad))


def assert_equals_the_plain_one(loss, plain, indices, tolerance=1e-5):
    for step, index in enumerate(indices):
        z0, z1 = embeddings(step, len(index))
        value, gradient = value_and_gradient(loss, z0, z1, index)
        expected, expected_gradient = value_and_gradient(plain, z0.double(), z1.double(), index)
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
        assert relative_rms(gradient, expected_gradient) <= tolerance
        plain.assert_keeps_the_same(loss, tolerance)
    return plain


INDICES = {
    "distinct": batches(),
    "duplicates": [torch.tensor(index) for index in ([3, 1, 3, 0], [1, 1, 2, 3], [5, 3, 5, 3], [3, 3, 3, 1])],
    "one item in between": [*batches(1, 2), torch.full((B,), 4), *batches(2, 2)],
    "of other sizes": [batches(size, 1, size)[0] for size in (2, 9, 1, 5, 12, 3)],
}


@pytest.mark.parametrize("learns", [False, True], ids=["SogCLR", "iSogCLR"])
@pytest.mark.parametrize("bimodal", [False, True], ids=["one modality", "two"])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_equals_the_papers_update_and_weights(indices, bimodal, learns):
    options = LEARNS if learns else {}
    loss = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.7, bimodal=bimodal, **options)
    plain = PlainSogCLR(0.2, gamma=0.7, bimodal=bimodal, learns=learns)
    assert_equals_the_plain_one(loss, plain, indices)
    assert loss.step == len(indices)
    if learns and indices is INDICES["distinct"]:  # else the bounds, or what lies between them, were not tried
        temperatures = set(loss.item_temperature.tolist())
        assert len(temperatures) > 3 and min(temperatures) < 0.2 < max(temperatures)
        assert temperatures & {float(torch.tensor(bound)) for bound in LEARNS["temperature_bounds"]}


@pytest.mark.parametrize("gamma", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_equals_the_plain_one_at_other_temperatures_and_rates(temperature, gamma):
    assert_equals_the_plain_one(
        SogCLRLoss(ITEMS, temperature=temperature, gamma=gamma), PlainSogCLR(temperature, gamma), batches(3)
    )


@pytest.mark.parametrize("bimodal", [False, True])
def test_a_temperature_that_overflows_the_plain_formula_does_not_overflow_this_one(bimodal):
    """exp(1 / 0.01) is infinite in float32, and finite in the float64 that ours is compared with."""
    naive = PlainSogCLR(0.01, bimodal=bimodal)
    loss, plain = SogCLRLoss(ITEMS, temperature=0.01, bimodal=bimodal), PlainSogCLR(0.01, bimodal=bimodal)
    broken = []
    for step, index in enumerate(batches()):
        z0 = normal(step, 1, DIM) + 0.1 * normal(step + 1, B, DIM)  # all rows alike: every score is near 100
        z1 = z0 + 0.1 * normal(step + 2, B, DIM)
        value, gradient = value_and_gradient(naive, z0, z1, index)
        broken.append(not (value.isfinite() and gradient.isfinite().all()))
        value, gradient = value_and_gradient(loss, z0, z1, index)
        expected, expected_gradient = value_and_gradient(plain, z0.double(), z1.double(), index)
        # Scores near 100 have 6e-6 of rounding in float32, and weights with them; the value is a difference of them.
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)
        assert relative_rms(gradient, expected_gradient) <= 1e-4
        plain.assert_keeps_the_same(loss, 1e-5)
    assert all(broken)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("options", [{}, {"bimodal": True}, {"individual_temperature": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)], ids=str
)
def test_half_precision_is_as_good_as_rounded_rows(dtype, autocast, options, temperature):
    """Measured against the same loss on unit rows that were rounded beforehand: that much the dtype itself costs."""
    loss, exact, rounded = (SogCLRLoss(ITEMS, temperature=temperature, **options) for _ in range(3))
    compute = torch.bfloat16 if autocast else dtype
    found = []
    for step, index in enumerate(batches(4, steps=20)):
        z = embeddings(step, dtype=dtype)
        for other in (loss, rounded):  # from one state at each step: what an earlier step has rounded is not counted
            other.load_state_dict(exact.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, gradient = value_and_gradient(loss, *z, index)
        wide = [x.double() for x in z]
        _, expected = value_and_gradient(exact, *wide, index)
        _, baseline = value_and_gradient(rounded, *(functional.normalize(x).to(compute).double() for x in wide), index)
        lengths = torch.cat(wide).norm(dim=1, keepdim=True)
        found.append((relative_rms(gradient, expected), relative_rms(baseline / lengths, expected)))
        assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
        assert gradient.dtype == dtype
        assert not torch.equal(loss.log_u, loss.log_u.to(compute).float())  # kept in float32
        if temperature == 0.01:  # now and then a rounded score of one item is most of a batch's error
            assert found[-1][0] < 0.3
    # Gradients are rounded to the dtype, too.
    errors, least = torch.tensor(found, dtype=torch.float64).unbind(1)
    if temperature == 0.2:
        assert (errors - 3 * least).max() <= torch.finfo(compute).eps
    assert errors.median() <= 3 * least.median() + torch.finfo(compute).eps
    assert loss.log_u.dtype == torch.float32


@pytest.mark.parametrize("bimodal", [False, True])
def test_gamma_1_is_nt_xent_without_the_positive_in_its_denominator(bimodal):
    """Then u is the batch's own mean, the weights are its softmax, and the gradient is that of log sum exp(s) - s+.

    On the scale of the other losses: the mean over 2b anchors, scores divided by the temperature and nothing else.
    """

    def in_batch(z0, z1, index):
        z = functional.normalize(torch.cat((z0, z1)))
        excluded = index.repeat(2)[:, None] == index.repeat(2)
        if bimodal:
            view = torch.arange(2).repeat_interleave(B)
            excluded = excluded | (view[:, None] == view)
        scores = z @ z.T / 0.3
        return (scores.masked_fill(excluded, -torch.inf).logsumexp(1) - (z * z.roll(B, 0)).sum(1) / 0.3).mean()

    loss = SogCLRLoss(ITEMS, temperature=0.3, gamma=1.0, bimodal=bimodal)
    for step, index in enumerate(batches()):
        z = [x.double() for x in embeddings(step)]
        value, gradient = value_and_gradient(loss, *z, index)
        expected, expected_gradient = value_and_gradient(in_batch, *z, index)
        assert relative_rms(gradient, expected_gradient) <= 1e-12
        keys = (B if bimodal else 2 * B) - (1 if bimodal else 2)
        torch.testing.assert_close(value, expected - math.log(keys))


@pytest.mark.parametrize("learns", [False, True], ids=["SogCLR", "iSogCLR"])
def test_the_published_loss_has_two_temperatures_times_our_gradient(learns):
    """Mean over items of the sum over views of -sim+ + mean of weight * sim, similarities not divided by anything."""
    loss = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.7, **(LEARNS if learns else {}))
    for step, index in enumerate(batches(9)):
        log_u = loss.log_u[index].double()
        t = loss.item_temperature[index].double().repeat(2) if learns else torch.full((2 * B,), 0.2).double()

        def published(z0, z1, index, log_u=log_u, t=t):
            z = functional.normalize(torch.cat((z0, z1)))
            sim = (z @ z.T)[index.repeat(2)[:, None] != index.repeat(2)].view(2 * B, 2 * (B - 1))
            e = (sim.detach() / t[:, None]).exp()
            u = torch.where(log_u.isinf(), e.mean(1).view(2, B), 0.3 * log_u.exp() + 0.7 * e.mean(1).view(2, B))
            terms = (e / u.view(2 * B, 1) * sim).mean(1) - (z * z.roll(B, 0)).sum(1)
            return terms.view(2, B).sum(0).mean()

        z = [x.double() for x in embeddings(step)]
        _, gradient = value_and_gradient(loss, *z, index)
        _, expected = value_and_gradient(published, *z, index)
        assert relative_rms(2 * 0.2 * gradient, expected) <= 1e-6


def test_exponents_shifted_by_the_positive_make_the_same_weights_while_it_stays():
    """The published two-modality update averages exp(s - s+). With fixed pairs its u is ours times exp(-s+)."""
    image = functional.normalize(normal(0, ITEMS, DIM).double())
    text = functional.normalize(image + 0.5 * functional.normalize(normal(1, ITEMS, DIM).double()))
    positive = (image * text).sum(1) / 0.2
    loss, shifted_u = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.3, bimodal=True), {}
    for index in batches(5, 8):
        z0, z1 = image[index].requires_grad_(), text[index].requires_grad_()
        loss(z0, z1, index).backward()
        terms = []
        for side, (queries, keys) in enumerate(((z0, z1), (z1, z0))):
            for row, item in enumerate(index.tolist()):
                # normalising again, as the loss does, projects the gradient
                q, k = functional.normalize(queries[row], dim=0), functional.normalize(keys, dim=1)
                h = (k @ q / 0.2 - k[row] @ q / 0.2)[torch.arange(B) != row]
                g = h.detach().exp().mean()
                u = 0.7 * shifted_u[item, side] + 0.3 * g if (item, side) in shifted_u else g
                shifted_u[item, side] = u
                weights = h.detach().exp() / u
                # here the positive's weight is the sum of the weights: 1 only on average
                terms.append((weights * h).mean() + (weights.mean() - 1) * (k[row] @ q / 0.2))
        gradient = torch.autograd.grad(torch.stack(terms).mean(), (z0, z1))
        assert relative_rms(torch.cat((z0.grad, z1.grad)), torch.cat(gradient)) <= 1e-6  # log_u is float32
    for (item, side), u in shifted_u.items():
        assert loss.log_u[item * 2 + side].item() == pytest.approx(math.log(u) + positive[item].item(), abs=1e-5)


def test_gamma_falls_from_1_along_half_a_cosine_and_stays():
    loss = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.4, gamma_schedule="cosine", gamma_steps=4)
    plain = PlainSogCLR(0.2)
    for step, index in enumerate(batches(6, 7)):
        plain.gamma = 0.4 + 0.6 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2
        z0, z1 = embeddings(step)
        _, gradient = value_and_gradient(loss, z0, z1, index)
        _, expected = value_and_gradient(plain, z0.double(), z1.double(), index)
        assert relative_rms(gradient, expected) <= 1e-5
        plain.assert_keeps_the_same(loss)
    assert plain.gamma == pytest.approx(0.4)


def test_an_item_is_at_its_first_visit_whatever_its_neighbours_are():
    """The public code sets gamma to 1 only where the whole batch is new."""
    loss = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.1)
    loss(*embeddings(0), torch.arange(B))
    fresh = SogCLRLoss(ITEMS, temperature=0.2, gamma=1.0)
    index = torch.arange(B) + B - 1  # one of them was visited
    loss(*embeddings(1), index)
    fresh(*embeddings(1), index)
    assert_identical(loss.log_u[B:], fresh.log_u[B:])
    assert loss.log_u[B - 1] != fresh.log_u[B - 1]


def test_an_unchanged_temperature_is_that_of_the_other_losses_and_a_learned_one_moves_the_right_way():
    """Below rho nats between the weights and uniform ones the temperature falls, above it grows."""
    z0, z1, index = *embeddings(0), torch.arange(B)
    fixed, still = SogCLRLoss(ITEMS, temperature=0.2), SogCLRLoss(ITEMS, temperature=0.2, **LEARNS)
    for a, b in zip(*(value_and_gradient(loss, z0, z1, index) for loss in (fixed, still)), strict=True):
        torch.testing.assert_close(a, b)
    units = functional.normalize(torch.cat((z0, z1)))
    others = ~torch.eye(B, dtype=torch.bool).repeat(2, 2)
    p = (units @ units.T / 0.2)[others].view(2 * B, -1).log_softmax(1)
    divergence = ((p.exp() * p).sum(1) + math.log(2 * B - 2)).view(2, B).mean(0)
    torch.testing.assert_close(still.item_velocity[:B], (1 - MOMENTUM) * (RHO - divergence), rtol=1e-4, atol=1e-5)
    assert ((still.item_temperature[:B] > 0.2) == (divergence > RHO)).all()


def test_statistics():
    z0, z1, index = *embeddings(0), torch.arange(B)
    for options in ({}, {"individual_temperature": True}):
        loss = SogCLRLoss(ITEMS, temperature=0.2, gamma=0.5, **options)
        loss(*embeddings(1), index)
        u, t = loss.log_u[index].exp().repeat(2), loss.item_temperature[index].repeat(2) if options else 0.2
        value, stats = loss(z0, z1, index, return_stats=True)
        units = functional.normalize(torch.cat((z0, z1)))
        cosines = (units @ units.T)[~torch.eye(B, dtype=torch.bool).repeat(2, 2)].view(2 * B, -1)
        scores = cosines / (t[:, None] if options else t)
        g = scores.exp().mean(1)
        expected = slow_pair_statistics(z0.double(), z1.double(), index, 0.2) | {
            "negative_similarity": (scores.softmax(1) * cosines).sum(1).mean(),
            "weight_sum": (g / (0.5 * u + 0.5 * g)).mean(),
        }
        expected |= {"temperature": t.mean()} if options else {}
        assert set(stats) == set(expected)
        for name, stat in stats.items():
            assert stat.shape == () and not stat.requires_grad
            assert stat.item() == pytest.approx(float(expected[name]), rel=1e-4), name
        assert not torch.equal(value, stats["ntxent"])


@pytest.mark.parametrize("options", [{}, {"bimodal": True}, {"individual_temperature": True}], ids=str)
def test_the_rows_order_does_not_matter(options):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    straight, permuted = SogCLRLoss(ITEMS, **options), SogCLRLoss(ITEMS, **options)
    for step, index in enumerate(batches(7)):
        z0, z1 = embeddings(step)
        value, gradient = value_and_gradient(straight, z0, z1, index)
        other, other_gradient = value_and_gradient(permuted, z0[order], z1[order], index[order])
        torch.testing.assert_close(other, value)
        assert relative_rms(other_gradient, gradient[torch.cat((order, order + B))]) <= 1e-5
        torch.testing.assert_close(snapshot(permuted), snapshot(straight))


@pytest.mark.parametrize("options", [{}, {"bimodal": True}, {"individual_temperature": True}], ids=str)
def test_a_batch_of_one_item_only_attracts_and_changes_nothing_but_the_step(options):
    loss = SogCLRLoss(ITEMS, temperature=0.2, **options)
    for step, index in enumerate(batches(8)):
        loss(*embeddings(step), index)
    before, (z0, z1) = snapshot(loss), embeddings(0)
    index = torch.full((B,), batches(8)[0][0])
    value, gradient = value_and_gradient(loss, z0, z1, index)
    slot = int(index[0]) * loss.views
    t = loss.item_temperature[slot : slot + loss.views].mean() if loss.individual_temperature else torch.tensor(0.2)

    def attraction(z0, z1, index):
        return -(functional.normalize(z0) * functional.normalize(z1)).sum(1).mean() / 0.2

    assert t > 0
    for found, expected in zip((value, gradient), value_and_gradient(attraction, z0, z1, index), strict=True):
        torch.testing.assert_close(found, expected)
    assert_unchanged(loss, before | {"step": before["step"] + 1})


@pytest.mark.parametrize("option", ["temperature_lr", "temperature_momentum", "temperature_bounds", "rho"])
def test_one_temperature_has_no_options_of_many(option):
    with pytest.raises(TypeError, match=option):
        SogCLRLoss(ITEMS, **{option: 0.1})


def test_0_1_0_s_spelling_of_isogclr():
    assert type(SogCLRLoss(ITEMS, individual_temperature=True, rho=2.0)) is ISogCLRLoss
    assert type(SogCLRLoss(ITEMS, individual_temperature=False)) is SogCLRLoss
    assert type(copy.deepcopy(ISogCLRLoss(ITEMS))) is ISogCLRLoss
    assert SogCLRLoss(ITEMS, individual_temperature=True, rho=None, temperature_lr=None).rho == 1

    class Mine(SogCLRLoss):
        pass

    with named_error(ValueError, "individual_temperature"):
        Mine(ITEMS, individual_temperature=True)
    with named_error(ValueError, "individual_temperature"):
        ISogCLRLoss(ITEMS, individual_temperature=False)
