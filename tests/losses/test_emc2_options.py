"""EMC2 beyond the paper: two modalities, proposals from the bank, and what stands for keys outside the batch."""

import itertools
import warnings

import pytest
import torch
from helpers import assert_identical, int64, normal, snapshot
from scipy import stats
from torch.nn.functional import normalize

from emc2_kernels import mh_step, rng
from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses.anchors import stack
from emc2_kernels.losses.emc2_sampler import visit

ITEMS, DIM, TAU = 12, 8, 0.3


def make(encode=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EMC2Loss(ITEMS, DIM, **({"temperature": TAU, "bank_dtype": torch.float32} | options), encode=encode)


def batch(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    return (*normal(seed, 2, size, DIM), torch.randperm(ITEMS, generator=generator)[:size])


def train(loss, steps, first=0):
    for seed in range(first, first + steps):
        z0, z1, index = batch(seed)
        loss(z0, z1, index)
    return loss


def fill(loss, seed=100):
    """Every slot of the bank written once."""
    rows = normal(seed, 2, ITEMS, DIM)
    for view in (0, 1):
        loss.bank.update(torch.arange(ITEMS), view, normalize(rows[view], dim=1), 0)
    return loss


def gradients(loss, z0, z1, index):
    z0, z1 = z0.clone().requires_grad_(), z1.clone().requires_grad_()
    return torch.autograd.grad(loss(z0, z1, index), (z0, z1))


class TestTwoModalities:
    def test_each_tower_sweeps_the_keys_of_the_other(self):
        loss = train(make(bimodal=True), 3)
        z0, z1, index = batch(7)
        unit = [normalize(z, dim=1) for z in (z0, z1)]
        expected, similarity = [], []
        for view in (0, 1):
            state = loss.chains.read(index, view, unit[view], loss.bank, TAU)
            ids = {"chain_ids": index * 2 + view, "query_ids": index, "key_ids": index}
            result = mh_step(
                unit[view], unit[1 - view], state, temperature=TAU, seed=0, step=3, key_labels=index * 2 + 1 - view,
                burn_in=2, num_samples=3, **ids,
            )  # fmt: skip
            expected.append(result.state.key)
            for row, samples in enumerate(result.samples.tolist()):
                negatives = [
                    unit[1 - view][s] if s >= 0 else loss.bank.lookup(state.key[row : row + 1])[0]
                    for s in samples
                    if s >= 0 or state.key[row] >= 0
                ]
                negative = torch.stack(negatives).mean(0) if negatives else torch.zeros(DIM)
                similarity.append(unit[view][row] @ (negative - unit[1 - view][row]))
        value = loss(z0, z1, index)
        torch.testing.assert_close(value, torch.stack(similarity).mean() / TAU)
        for view in (0, 1):
            assert torch.equal(loss.chains.read(index, view).key, expected[view])

    @pytest.mark.parametrize("options", [{}, {"proposals": "bank"}, {"carry": "two_sided", "estimator": "recycled"}])
    def test_chains_of_a_tower_are_at_keys_of_the_other(self, options):
        loss = train(make(bimodal=True, **options), 40)
        for view in (0, 1):
            key = loss.chains.key[view::2]
            assert (key >= 0).all() and (key % 2 == 1 - view).all()
            assert (key // 2 != torch.arange(ITEMS)).all()

    def test_the_in_batch_value_is_that_of_clip(self):
        z0, z1, index = batch(0)
        _, found = make(bimodal=True)(z0, z1, index, return_stats=True)
        scores = normalize(z0, dim=1) @ normalize(z1, dim=1).T / TAU
        target = torch.arange(5)
        cross_entropy = torch.nn.functional.cross_entropy
        torch.testing.assert_close(
            found["ntxent"], (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
        )


class TestProposalsFromTheBank:
    @pytest.mark.parametrize("estimator", ["states", "recycled"])
    @pytest.mark.parametrize("bimodal", [False, True])
    def test_samples_have_the_law_of_the_softmax_over_the_bank(self, estimator, bimodal):
        """Of one anchor's last sample, over 400 visits of 200 draws with other seeds."""
        loss = fill(make(proposals="bank", num_proposals=200, num_samples=1, estimator=estimator, bimodal=bimodal))
        z0, z1, index = (x[:1] for x in batch(0))
        anchors, counts = stack(z0, z1, index, normalize=True), torch.zeros(2 * ITEMS)
        for loss.seed in range(400):
            samples = visit(loss, anchors, torch.float32, False).samples
            counts.index_add_(0, samples.labels[0], samples.label_weights[0])
        target = torch.softmax(normalize(z0, dim=1)[0] @ loss.bank.embeddings.T / TAU, 0)
        target[[index.item() * 2, index.item() * 2 + 1]] = 0
        if bimodal:
            target[0::2] = 0
        target /= target.sum()
        kept = target > 0
        assert counts[~kept].sum() == 0
        assert stats.chisquare(counts[kept].numpy(), (target[kept] * counts.sum()).numpy()).pvalue > 1e-4

    def test_what_was_never_written_is_never_sampled(self):
        loss = make(proposals="bank")
        z0, z1, _ = batch(0, 3)
        for seed in range(30):
            loss(*batch(seed, 3)[:2], int64(1, 4, 7))
        started = loss.chains.key[loss.chains.key >= 0]
        assert len(started) and set((started // 2).tolist()) <= {1, 4, 7}

    def test_a_sample_that_is_in_the_batch_has_a_gradient_and_is_not_encoded_again(self):
        encoded = []

        def encode(items, views):
            encoded.extend((items * 2 + views).tolist())
            return table[items, views]

        table = normal(3, ITEMS, 2, DIM).requires_grad_()
        loss = fill(make(encode, proposals="bank", carry="recompute"))
        z0, z1, index = batch(1)
        loss(z0, z1, index).backward()
        in_batch = {item * 2 + view for item in index.tolist() for view in (0, 1)}
        assert encoded and not in_batch & set(encoded)
        assert len(encoded) == len(set(encoded))
        assert table.grad.abs().sum() > 0

    def test_time_of_a_visit_does_not_depend_on_how_many_items_there_are(self):
        """By what is allocated: nothing as long as the bank."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):
            rows = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in kept:
                        self.rows = max(self.rows, tensor.numel())
                return out

        items = 50_000
        loss = EMC2Loss(items, DIM, proposals="bank", temperature=TAU)
        kept = {table.untyped_storage().data_ptr() for table in (*loss.buffers(), *loss.state_dict().values())}
        with Largest() as largest:
            loss(*batch(0))
        assert 0 < largest.rows < items / 5


class TestRecycling:
    """A sample is marked at the proposal with the probability of the move, and at the state before with the rest."""

    @pytest.mark.parametrize("options", [{}, {"views": "both"}, {"burn_in": 0.0}, {"bimodal": True}], ids=str)
    def test_against_a_walk_step_by_step(self, options):
        loss = train(make(estimator="recycled", num_samples=2, **options), 4)
        z0, z1, index = batch(9)
        anchors = stack(z0, z1, index, normalize=True)
        unit, labels = anchors.embeddings, anchors.items * 2 + anchors.views
        coin = rng.view_coin(index, seed=0, step=4)
        step = loss.step.item()
        visited = visit(loss, anchors, torch.float32, False)
        start = loss.chains.read(anchors.items, anchors.views, unit, loss.bank, TAU)
        b = len(index)
        for row in range(2 * b):
            if loss.bimodal:
                keys = [(b + j) % (2 * b) if row < b else j for j in range(b)]
            else:
                keys = list(range(2 * b)) if loss.views == "both" else [j + b * int(coin[j]) for j in range(b)]
            burn_in = int(loss.burn_in * len(keys))
            points = [burn_in + -(-(r + 1) * (len(keys) - burn_in) // 2) - 1 for r in range(2)]
            e = rng.acceptance(labels[row : row + 1], range(len(keys)), seed=0, step=step, dtype=torch.float32)[0]
            current, score = None, start.score[row]
            mean, total = torch.zeros(DIM), 0.0
            for p, key in enumerate(keys):
                proposed = unit[row] @ unit[key] / TAU
                own = anchors.items[key] == anchors.items[row]
                if p in points:
                    move = 0.0 if own else float((proposed - score).clamp_max(0).exp())
                    before = start.key[row] if current is None else labels[current]
                    mean += move * unit[key]
                    total += move
                    if before >= 0:
                        mean += (1 - move) * (loss.bank.lookup(before[None])[0] if current is None else unit[current])
                        total += 1 - move
                if not own and proposed + e[p] > score:
                    current, score = key, proposed
            found = (visited.samples.row_weights[row, :, None] * visited.keys[visited.samples.rows[row]]).sum(0)
            found += visited.samples.label_weights[row] @ loss.bank.lookup(visited.samples.labels[row])
            torch.testing.assert_close(found, mean / total if total else mean, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("proposals", ["batch", "bank"])
    def test_a_state_score_of_nan_counts_as_not_started(self, proposals):
        """Of a chain whose key the bank does not hold, so that it is not scored again; marked from the first proposal
        on, where the state before is the chain's own."""
        every = {"burn_in": 0.0, "num_samples": 5 if proposals == "batch" else 64, "proposals": proposals}
        visits = []
        for score in (torch.nan, -torch.inf):
            loss = train(make(estimator="recycled", **every), 4)
            z0, z1, index = batch(9)
            anchors = stack(z0, z1, index, normalize=True)
            labels = anchors.items * 2 + anchors.views
            gone = next(label for label in range(2 * ITEMS) if label not in labels.tolist())
            loss.bank.written_at[gone] = -1
            loss.chains.key[labels], loss.chains.score[labels] = gone, score
            visits.append(visit(loss, anchors, torch.float32, False))
        nan, unstarted = visits
        assert_identical(tuple(nan.samples), tuple(unstarted.samples))
        assert_identical(tuple(nan.state), tuple(unstarted.state))
        assert nan.samples.row_weights.isfinite().all() and nan.samples.label_weights.isfinite().all()

    def test_chains_walk_as_without_it(self):
        for options in ({}, {"proposals": "bank"}):
            plain, recycled = (train(make(estimator=e, **options), 10) for e in ("states", "recycled"))
            assert_identical(snapshot(recycled.chains), snapshot(plain.chains))


class TestTwoSided:
    def test_sums_are_those_of_the_chains_that_sit_on_each_key(self):
        loss = make(carry="two_sided")
        for seed in range(25):
            z0, z1, index = batch(seed)
            index = index if seed % 3 else index[[0, 1, 0, 2, 1]]  # duplicates: the last one stays
            loss(z0, z1, index)
            expected = torch.zeros(2 * ITEMS, DIM)
            for slot, key in enumerate(loss.chains.key.tolist()):
                if key >= 0:
                    expected[key] += loss.bank.embeddings[slot]
            torch.testing.assert_close(loss.sitting.sums, expected, atol=1e-5, rtol=1e-5)

    def test_gradient_is_that_of_the_formula(self):
        """Query side by the samples, detached; key side by the queries that sat there before this step."""
        loss = train(make(carry="two_sided"), 30)
        z0, z1, index = batch(31)
        plain = train(make(carry="cached"), 30)
        queries = [z.clone().requires_grad_() for z in (z0, z1)]
        anchors = stack(*queries, index, normalize=True)
        visited = visit(plain, anchors, torch.float32, False)
        s = visited.samples
        mean = (s.row_weights[..., None] * visited.keys.detach()[s.rows]).sum(1)
        mean = mean + (s.label_weights[..., None] * loss.bank.lookup(s.labels.flatten()).view(10, -1, DIM)).sum(1)
        sums = torch.zeros(2 * ITEMS, DIM)
        for slot, key in enumerate(loss.chains.key.tolist()):
            if key >= 0:
                sums[key] += loss.bank.embeddings[slot]
        key_side = sums[anchors.items * 2 + anchors.views]
        value = (anchors.embeddings * (mean - anchors.positives + key_side)).sum(1).mean() / TAU
        expected = torch.autograd.grad(value, queries)
        torch.testing.assert_close(gradients(loss, z0, z1, index), expected, atol=1e-5, rtol=1e-4)

    def test_resumes_bit_by_bit(self):
        whole = train(make(carry="two_sided"), 8)
        part = train(make(carry="two_sided"), 4)
        resumed = make(carry="two_sided")
        resumed.load_state_dict(part.state_dict())
        assert_identical(snapshot(train(resumed, 4, first=4)), snapshot(whole))


class TestCorrected:
    @pytest.mark.parametrize("options", [{}, {"proposals": "bank"}, {"bimodal": True}], ids=str)
    def test_gradient_is_that_of_the_formula(self, options):
        """Kept keys shifted by what the batch's mean has moved by since; the batch's keys pushed as NT-Xent does."""
        loss, plain = (make(carry=carry, burn_in=0.0, **options) for carry in ("corrected", "cached"))
        kept = torch.zeros(2 * ITEMS, DIM)
        for seed in range(30):
            z0, z1, index = batch(seed)
            unit = [normalize(z + seed / 10, dim=1) for z in (z0, z1)]  # a drift
            loss(*unit, index), plain(*unit, index)
            for view in (0, 1):
                kept[index * 2 + view] = unit[view].mean(0) if loss.bimodal else torch.cat(unit).mean(0)
        z0, z1, index = batch(33)
        inputs = [z.clone().requires_grad_() for z in (z0, z1)]
        anchors = stack(*inputs, index, normalize=True)
        z, items = anchors.embeddings, anchors.items
        allowed = items[:, None] != items
        if loss.bimodal:
            allowed &= anchors.views[:, None] != anchors.views
        p = (z @ z.T / TAU).detach().masked_fill(~allowed, -torch.inf).softmax(1)
        samples = visit(plain, anchors, torch.float32, False).samples
        outside = samples.label_weights.sum(1)
        now = torch.stack([z[5:].mean(0)] * 5 + [z[:5].mean(0)] * 5) if loss.bimodal else z.mean(0).expand(10, -1)
        moved = samples.label_weights[..., None] * (now[:, None] - kept[samples.labels.clamp_min(0)])
        added = (z * moved.sum(1).detach()).sum(1) + outside * (z.detach() * (p @ z)).sum(1)
        added_gradients = torch.autograd.grad(added.mean() / TAU, inputs)
        expected = [a + b for a, b in zip(gradients(plain, z0, z1, index), added_gradients, strict=True)]
        assert (outside > 0).any()
        torch.testing.assert_close(list(gradients(loss, z0, z1, index)), expected, atol=1e-5, rtol=1e-4)

    def test_is_the_default_with_proposals_from_the_bank(self):
        assert EMC2Loss(ITEMS, DIM, proposals="bank").carry == "corrected"
        assert EMC2Loss(ITEMS, DIM).carry == "cached"


@pytest.mark.parametrize(("proposals", "carry"), [("bank", "cached"), ("bank", "two_sided"), ("batch", "two_sided")])
def test_settings_that_collapse_warn(proposals, carry):
    with pytest.warns(UserWarning, match=f'proposals="{proposals}" with carry="{carry}" collapses.*mean_cosine'):
        EMC2Loss(ITEMS, DIM, proposals=proposals, carry=carry)


@pytest.mark.parametrize(
    ("proposals", "carry", "estimator", "bimodal"),
    list(itertools.product(["batch", "bank"], ["cached", "corrected", "two_sided"], ["states", "recycled"], [0, 1])),
)
def test_every_combination_trains_resumes_and_leaves_evaluation_alone(proposals, carry, estimator, bimodal):
    options = {"proposals": proposals, "carry": carry, "estimator": estimator, "bimodal": bool(bimodal)}
    loss = train(make(**options), 4)
    before = snapshot(loss)
    z0, z1, index = batch(50)
    loss.eval()
    value, found = loss(z0.bfloat16(), z1.bfloat16(), index, return_stats=True)
    assert value.isfinite() and all(statistic.isfinite() for statistic in found.values())
    assert 0 <= found["acceptance"] <= 1 and 0 <= found["carry_share"] <= 1  # exact
    assert_identical(snapshot(loss), before)
    other = make(**options)
    other.load_state_dict(before)
    assert_identical(snapshot(train(other, 2, 60)), snapshot(train(loss.train(), 2, 60)))
    half = make(**options).to(torch.bfloat16)
    assert {b.dtype for b in half.state_dict().values()} <= {torch.float32, torch.int64}
