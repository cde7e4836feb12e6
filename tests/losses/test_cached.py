"""CachedSoftmaxLoss against a slow version, one anchor, sample and dictionary entry at a time; its order of refresh,
its mean gradient, and that an error or eval mode leaves it as it was."""

import math

import pytest
import torch
from helpers import int64, normal, relative_rms
from slow_losses import slow_pair_statistics, unit
from test_bad_input_losses import INDEX, Z0, Z1, forward, warm

from emc2_kernels import gumbel_sample
from emc2_kernels.losses import CachedSoftmaxLoss

ITEMS, DIM, B = 10, 8, 4
WEIGHTS = normal(0, 5, DIM)
DATA = normal(1, 2 * ITEMS, 5)


def encoder(weights=WEIGHTS):
    return lambda items, views: DATA.to(weights.dtype)[items * 2 + views] @ weights


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(ITEMS, generator=generator)[:B] for _ in range(steps)]


class SlowCached:
    """Literal: a dictionary from label to (embedding, step, mean of its batch); the draws alone are the library's."""

    def __init__(
        self, *, temperature=0.2, refresh=0, num_samples=5, carry="corrected", encode=None, bimodal=False, seed=0
    ):
        self.temperature, self.num_samples, self.carry = temperature, num_samples, carry
        self.count = math.ceil(refresh * 2 * ITEMS) if encode else 0
        self.encode, self.bimodal, self.seed, self.step, self.cache = encode, bimodal, seed, 0, {}

    def encoded(self, label):
        return unit(self.encode(int64(label // 2), int64(label % 2))[0])

    def __call__(self, z0, z1, index):
        labels = [item * 2 + view for view in (0, 1) for item in index.tolist()]
        rows = [unit(row) for row in (*z0, *z1)]
        views = [rows[:B], rows[B:]] if self.bimodal else [rows, rows]
        means = [torch.stack(of_view).mean(0).detach() for of_view in views]
        for label in self.oldest(labels):
            self.cache[label] = self.encoded(label).detach(), self.step, means[label % 2]
        for label, row in zip(labels, rows, strict=True):
            self.cache[label] = row.detach(), self.step, means[label % 2]
        in_batch, losses, self.ages, self.carried = dict(zip(labels, rows, strict=True)), [], [], []
        repulsions = []
        for anchor, (label, row) in enumerate(zip(labels, rows, strict=True)):
            positive = rows[(anchor + B) % (2 * B)]
            drawn = self.draw(label, row)
            terms = [self.negative(other, in_batch) for other in drawn]
            repulsion = row @ torch.stack(terms).mean(0) if terms else torch.zeros((), dtype=row.dtype)
            repulsions.append(repulsion.detach())
            outside = [other for other in drawn if other not in in_batch]
            if self.carry == "corrected" and outside:
                drift = torch.stack([means[other % 2] - self.cache[other][2] for other in outside]).sum(0)
                repulsion = repulsion + (row @ drift + len(outside) * self.push(label, row, labels, rows)) / len(drawn)
            losses.append((repulsion - row @ positive) / self.temperature)
        self.stats = slow_pair_statistics(z0.detach(), z1.detach(), index, self.temperature) | {
            "cache_age": torch.tensor(self.ages).double().mean(),
            "carry_share": torch.tensor(self.carried).double().mean(),
            "negative_similarity": torch.stack(repulsions).mean(),
        }
        self.step += 1
        return torch.stack(losses).mean()

    def push(self, label, row, labels, rows):
        """0, with the gradient that NT-Xent gives the batch's keys."""
        row = row.detach()
        keys = [
            key
            for other, key in zip(labels, rows, strict=True)
            if other // 2 != label // 2 and not (self.bimodal and other % 2 == label % 2)
        ]
        if not keys:
            return 0
        p = torch.softmax(torch.stack(keys).detach() @ row / self.temperature, 0)
        term = row @ (p @ torch.stack(keys))
        return term - term.detach()

    def oldest(self, batch):
        age = {label: self.cache[label][1] if label in self.cache else -1 for label in range(2 * ITEMS)}
        age |= dict.fromkeys(batch, self.step)
        return sorted(age, key=lambda label: (age[label], label))[: self.count]

    def draw(self, label, row):
        keys = torch.full((2 * ITEMS, DIM), torch.inf, dtype=torch.float32)
        for other, (embedding, *_) in self.cache.items():
            if not self.bimodal or other % 2 != label % 2:
                keys[other] = embedding.float()
        # the noise is that of a key's position among the keys: with two modalities, its item
        places = torch.arange(1 - label % 2, 2 * ITEMS, 2) if self.bimodal else torch.arange(2 * ITEMS)
        drawn = gumbel_sample(
            row.detach().float()[None],
            keys[places],
            temperature=self.temperature,
            seed=self.seed,
            step=self.step,
            num_samples=self.num_samples,
            chain_ids=int64(label),
            query_ids=int64(label // 2),
            key_ids=places // 2,
        )[0]
        return [int(places[position]) for position in drawn if position >= 0]

    def negative(self, label, in_batch):
        self.ages.append(self.step - self.cache[label][1])
        self.carried.append(label not in in_batch)
        if label in in_batch:
            return in_batch[label]
        return self.encoded(label) if self.carry == "recompute" else self.cache[label][0]


OPTIONS = {
    "by the batches alone": {},
    "refreshed": {"refresh": 0.22, "encode": True},
    "recompute": {"carry": "recompute", "refresh": 0.22, "encode": True},
    "refreshed whole": {"refresh": 1, "encode": True},
    "two modalities": {"bimodal": True},
    "two modalities, recompute": {"bimodal": True, "carry": "recompute", "refresh": 0.1, "encode": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_gradients_statistics_and_cache_are_those_of_the_slow_version(options):
    weights = {torch.float32: WEIGHTS.clone().requires_grad_(), torch.float64: WEIGHTS.double().requires_grad_()}
    shared = {"temperature": 0.2, "num_samples": 5, "seed": 3} | options
    slow_options, loss_options = dict(shared), dict(shared)
    if options.get("encode"):
        slow_options["encode"], loss_options["encode"] = (
            encoder(weights[torch.float64]),
            encoder(weights[torch.float32]),
        )
    slow = SlowCached(**slow_options)
    loss = CachedSoftmaxLoss(ITEMS, DIM, bank_dtype=torch.float32, **loss_options)
    for step, index in enumerate([*batches(6), int64(3, 3, 5, 3)]):
        values, gradients = [], []
        for function, dtype in ((loss, torch.float32), (slow, torch.float64)):
            z = [normal(100 * step + view, B, DIM).to(dtype).requires_grad_() for view in (0, 1)]
            weights[dtype].grad = None
            value = function(*z, index)
            value.backward()
            values.append(value.detach())
            gradients.append(torch.cat([each.grad.flatten() for each in z] + [_grad(weights[dtype])]))
        torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=1e-5)
        assert relative_rms(*gradients) <= 1e-5
        assert_same_cache(loss, slow)
    assert loss.step == 7 and (gradients[0][-WEIGHTS.numel() :] != 0).any() == (options.get("carry") == "recompute")


def _grad(weights):
    return torch.zeros(weights.numel(), dtype=weights.dtype) if weights.grad is None else weights.grad.flatten()


def assert_same_cache(loss, slow):
    for label in range(2 * ITEMS):
        embedding, written_at, _ = slow.cache.get(label, (torch.full((DIM,), torch.inf), -1, None))
        assert loss.bank.written_at[label] == written_at
        torch.testing.assert_close(loss.bank.embeddings[label].double(), embedding.double(), rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_the_slow_version():
    slow, loss = SlowCached(), CachedSoftmaxLoss(ITEMS, DIM, temperature=0.2, num_samples=5, bank_dtype=torch.float32)
    shares = []
    for step, index in enumerate(batches(6)):
        z = [normal(100 * step + view, B, DIM) for view in (0, 1)]
        value, stats = loss(*z, index, return_stats=True)
        slow(*(each.double() for each in z), index)
        assert set(stats) == set(slow.stats)
        for name, expected in slow.stats.items():
            assert not stats[name].requires_grad
            torch.testing.assert_close(stats[name].double(), expected.double(), rtol=1e-5, atol=1e-5)
        shares.append(stats["carry_share"].item())
    assert stats["cache_age"] > 0 and any(0 < share < 1 for share in shares)


def test_the_oldest_are_encoded_again_and_those_never_written_first():
    asked = []

    def encode(items, views):
        asked.append((items * 2 + views).tolist())
        assert not torch.is_grad_enabled()
        return encoder()(items, views)

    loss = CachedSoftmaxLoss(5, DIM, refresh=0.3, encode=encode)  # 3 of 10
    z = normal(0, 2, DIM)
    for index in ((0, 1), (0, 1), (4, 2), (0, 1), (0, 1)):
        loss(z, z, int64(*index))
    # item i has slots 2 i and 2 i + 1; the batch's own are new when the oldest are looked for
    assert [sorted(each) for each in asked] == [[4, 5, 6], [7, 8, 9], [0, 1, 6], [4, 5, 7], [6, 8, 9]]
    written_at = loss.bank.written_at
    assert written_at.tolist() == [4, 4, 4, 4, 3, 3, 4, 3, 4, 4]


def exact_gradient(query, keys, temperature):
    """Of <q, mean of k under softmax(<q, k> / temperature)> / temperature with the weights held."""
    weights = torch.softmax(keys @ query.detach() / temperature, 0)
    return weights @ keys / temperature


@pytest.mark.parametrize("wrong_temperature", [None, 0.22])
def test_the_mean_gradient_is_that_of_the_softmax_over_the_cache(wrong_temperature):
    """Fixed embeddings, a full cache, many draws: within 5 standard errors, and a wrong temperature is not."""
    temperature, draws = 0.2, 1600
    loss = CachedSoftmaxLoss(
        ITEMS, DIM, temperature=wrong_temperature or temperature, num_samples=64, normalize=False, carry="recompute",
        encode=lambda items, views: keys[items * 2 + views], refresh=0, bank_dtype=torch.float32,
    )  # fmt: skip
    keys = torch.nn.functional.normalize(normal(4, 2 * ITEMS, DIM), dim=1)
    loss.bank.update(torch.arange(ITEMS).repeat_interleave(2), torch.arange(2).repeat(ITEMS), keys, 0)
    z0, z1 = keys[[4]].clone().requires_grad_(), keys[[5]].clone().requires_grad_()
    gradients = torch.empty(draws, DIM)
    for step in range(draws):
        z0.grad = None
        loss(z0, z1, int64(2)).backward()
        gradients[step] = z0.grad[0] * 2 * loss.temperature  # of one of two anchors, in similarities
    others = torch.cat((keys[:4], keys[6:]))
    # z0 is an anchor, and the positive of the other anchor
    expected = exact_gradient(keys[4], others, temperature) * temperature - 2 * keys[5]
    error = (gradients.mean(0) - expected) / (gradients.std(0) / draws**0.5)
    if wrong_temperature is None:
        assert error.abs().max() < 5
    else:
        assert error.abs().max() > 5


def test_an_evaluation_draws_from_what_is_kept():
    loss = warm("cached", refresh=0.2, encode=encoder()).eval()
    value, stats = loss(Z0, Z1, INDEX, return_stats=True)
    assert value.isfinite() and stats["carry_share"] > 0
    assert CachedSoftmaxLoss(ITEMS, DIM).eval()(Z0, Z0, INDEX) == pytest.approx(-1 / 0.07)


def test_what_was_deleted_says_why():
    with pytest.raises(ValueError, match="^carry must be .*got 'cached', which was deleted: .*collapses"):
        CachedSoftmaxLoss(ITEMS, DIM, carry="cached")


def test_corrected_takes_what_it_kept_with_the_drift_of_the_batch_means():
    """All embeddings shifted alike between two batches: a kept negative is then where it is now, up to its norm."""
    loss = CachedSoftmaxLoss(ITEMS, DIM, temperature=0.2, num_samples=400, normalize=False, bank_dtype=torch.float32)
    rows = normal(5, 6, DIM)
    centred = rows - rows.mean(0)
    loss(centred[:3], centred[3:], int64(0, 1, 2))
    shift = normal(6, DIM)
    z0, z1 = (centred[:3] + shift).requires_grad_(), (centred[3:] + shift).requires_grad_()
    loss.eval()
    value = loss(z0, z1, int64(3, 4, 5))  # draws are all from outside the batch
    draw_scores = torch.cat((z0, z1)).detach() @ loss.bank.embeddings[:6].T / 0.2
    mean = draw_scores.softmax(1) @ (loss.bank.embeddings[:6] + shift)
    positives = torch.cat((z1, z0)).detach()
    expected = (torch.cat((z0, z1)).detach() * (mean - positives)).sum(1).mean() / 0.2
    torch.testing.assert_close(value.detach(), expected, rtol=0.1, atol=0.5)
    plain = (torch.cat((z0, z1)).detach() * (mean - shift - positives)).sum(1).mean() / 0.2
    assert (value - expected).abs() < 0.1 * (plain - expected).abs()


@pytest.mark.parametrize("bimodal", [False, True])
def test_what_is_encoded_again_is_kept_with_the_mean_of_the_present_batch(bimodal):
    """Beside an older one its embedding would be moved by a drift that it has had already."""
    options = {"temperature": 0.2, "refresh": 0.3, "encode": encoder(), "bank_dtype": torch.float32}
    loss = CachedSoftmaxLoss(ITEMS, DIM, carry="corrected", bimodal=bimodal, **options)
    for step, index in enumerate(batches(4)):
        z0, z1 = normal(10 + step, B, DIM), normal(20 + step, B, DIM)
        loss(z0, z1, index)
        by_view = torch.stack([torch.nn.functional.normalize(z, dim=1).mean(0) for z in (z0, z1)])
        now = loss.bank.written_at == step
        assert now.sum() == 2 * B + loss.refresh_count
        expected = by_view if bimodal else by_view.mean(0).expand(2, -1)
        torch.testing.assert_close(loss.batch_means.means[now], expected[torch.arange(2 * ITEMS)[now] % 2])


def test_a_batch_of_one_item_has_no_negatives():
    loss = CachedSoftmaxLoss(ITEMS, DIM, temperature=0.5)
    value, stats = loss(Z0, Z0, int64(3, 3, 3, 3), return_stats=True)
    assert value == pytest.approx(-2.0)
    assert all(each.isfinite() for each in stats.values()) and stats["cache_age"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    """The embeddings are widened before anything is computed, so half-precision ones give their float32 values' own."""
    half = {"z0": Z0.to(dtype), "z1": Z1.to(dtype)}
    expected = forward(warm("cached"), {name: z.float() for name, z in half.items()})
    with torch.autocast("cpu", torch.bfloat16):
        value, *gradients = forward(warm("cached"), half)
    torch.testing.assert_close(value, expected[0])
    for gradient, wide in zip(gradients, expected[1:], strict=True):
        assert gradient.dtype == dtype and relative_rms(gradient, wide) <= 1e-2
