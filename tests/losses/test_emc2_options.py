"""EMC2 beyond the paper: two modalities, proposals from the bank, and what stands for keys outside the batch."""

import itertools

import pytest
import torch
from helpers import assert_identical, int64, named_error, normal, snapshot
from scipy import stats
from torch.nn.functional import normalize

from emc2_kernels import mh_step
from emc2_kernels.losses import EMC2Loss
from emc2_kernels.losses.anchors import Anchors
from emc2_kernels.losses.ranks import batch_keys

ITEMS, DIM, TAU = 12, 8, 0.3


def make(encode=None, **options):
    usual = {"sampler": "mh", "temperature": TAU, "bank_dtype": torch.float32}
    return EMC2Loss(ITEMS, DIM, **usual | options, encode=encode)


def samples_of(loss, anchors):
    """Of a step of their chains, which is not kept."""
    options = loss._walk_options(anchors.embeddings, False)
    return loss._walk(anchors, batch_keys(anchors, None, "none"), options).samples


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

    @pytest.mark.parametrize("options", [{}, {"sampler": "isir"}, {"proposals": "bank"}], ids=str)
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
    @pytest.mark.parametrize("bimodal", [False, True])
    def test_samples_have_the_law_of_the_softmax_over_the_bank(self, bimodal):
        """Of one anchor's last sample, over 400 visits of 200 draws with other seeds."""
        loss = fill(make(proposals="bank", num_proposals=200, num_samples=1, bimodal=bimodal))
        z0, z1, index = (x[:1] for x in batch(0))
        anchors, counts = Anchors.of(z0, z1, index, True), torch.zeros(2 * ITEMS)
        for loss.seed in range(400):
            samples = samples_of(loss, anchors)
            counts.index_add_(0, samples.labels[0], samples.weights[0])
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


class TestCorrected:
    @pytest.mark.parametrize("bimodal", [False, True])
    def test_gradient_is_that_of_the_formula(self, bimodal):
        """Kept keys shifted by what the batch's mean has moved by since; the batch's keys pushed as NT-Xent does."""
        loss = make(proposals="bank", bimodal=bimodal, burn_in=0.0)
        kept = torch.zeros(2 * ITEMS, DIM)
        for seed in range(30):
            z0, z1, index = batch(seed)
            unit = [normalize(z + seed / 10, dim=1) for z in (z0, z1)]  # a drift
            loss(*unit, index)
            for view in (0, 1):
                kept[index * 2 + view] = unit[view].mean(0) if bimodal else torch.cat(unit).mean(0)
        z0, z1, index = batch(33)
        inputs = [z.clone().requires_grad_() for z in (z0, z1)]
        anchors = Anchors.of(*inputs, index, True)
        z, views = anchors.embeddings, anchors.labels % 2
        allowed = anchors.items[:, None] != anchors.items
        if bimodal:
            allowed &= views[:, None] != views
        p = (z @ z.T / TAU).detach().masked_fill(~allowed, -torch.inf).softmax(1)
        samples = samples_of(loss, anchors)
        outside = samples.weights.sum(1)
        now = torch.stack([z[5:].mean(0)] * 5 + [z[:5].mean(0)] * 5) if bimodal else z.mean(0).expand(10, -1)
        labels, weights = samples.labels.clamp_min(0), samples.weights[..., None]
        drift = (weights * (now[:, None] - kept[labels])).sum(1).detach()
        mean = samples.inside + (weights * loss.bank.lookup(labels.flatten()).view(*labels.shape, DIM)).sum(1)
        terms = (z * (mean - z.roll(len(z) // 2, 0) + drift)).sum(1) + outside * (z.detach() * (p @ z)).sum(1)
        expected = torch.autograd.grad(terms.mean() / TAU, inputs)
        assert (outside > 0).any()
        torch.testing.assert_close(gradients(loss, z0, z1, index), expected, atol=1e-5, rtol=1e-4)

    def test_is_the_default_with_proposals_from_the_bank(self):
        assert EMC2Loss(ITEMS, DIM, proposals="bank").carry == "corrected"
        assert EMC2Loss(ITEMS, DIM, sampler="mh").carry == EMC2Loss(ITEMS, DIM, sampler="isir").carry == "cached"


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, "isir"),
        ({"proposals": "batch"}, "isir"),
        ({"views": "one", "bimodal": True, "queue": 3, "seed": 1, "estimator": "states"}, "isir"),
        ({"burn_in": None, "num_samples": None, "num_proposals": None}, "isir"),
        ({"views": "both"}, "isir"),
        ({"carry": "cached"}, "isir"),
        ({"decoupled": False}, "isir"),
        ({"carry": "recompute"}, "isir"),
        ({"proposals": "bank"}, "mh"),
        ({"proposals": "bank", "num_proposals": 9}, "mh"),
        ({"burn_in": 0.5}, "mh"),
        ({"burn_in": 0.0}, "mh"),
        ({"burn_in": 0}, "mh"),
        ({"num_samples": 1}, "mh"),
        ({"num_samples": 2, "views": "both", "bimodal": False}, "mh"),
    ],
    ids=str,
)
def test_the_sampler_is_isir_unless_an_option_is_the_walks(options, sampler):
    """And asking for that one makes the same loss."""
    encode = torch.stack if options.get("carry") == "recompute" else None
    for asked in ({}, {"sampler": "auto"}):
        loss = EMC2Loss(ITEMS, DIM, **options | asked, encode=encode)
        assert loss.sampler == sampler
        assert loss.burn_in == (options.get("burn_in") if options.get("burn_in") is not None else 0.5)
        assert repr(loss) == repr(EMC2Loss(ITEMS, DIM, **options | {"sampler": sampler}, encode=encode))
        assert (loss.drift is None) == (sampler == "mh" or encode is not None)
        assert ("drift.sums" in loss.state_dict()) == (loss.drift is not None)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": "isir", "burn_in": 0.5}, "burn_in"),
        ({"sampler": "isir", "burn_in": 0.0}, "burn_in"),
        ({"sampler": "isir", "burn_in": 0.25, "num_samples": 2}, "burn_in"),
        ({"sampler": "isir", "num_samples": 1}, "num_samples"),
        ({"sampler": "isir", "proposals": "bank"}, "proposals"),
        ({"sampler": "isir", "num_proposals": 3}, "num_proposals"),
        ({"num_proposals": 3}, "num_proposals"),
        ({"burn_in": 0.5, "queue": 3}, "queue"),
        ({"num_samples": 2, "queue": 3}, "queue"),
        ({"proposals": "bank", "queue": 3}, "queue"),
        ({"burn_in": 0.5, "decoupled": False}, "decoupled"),
        ({"burn_in": 1.0}, "burn_in"),
        ({"burn_in": -0.1}, "burn_in"),
        ({"num_samples": 0}, "num_samples"),
        ({"sampler": "gibbs"}, "sampler"),
        ({"sampler": None}, "sampler"),
        ({"proposals": "queue"}, "proposals"),
    ],
    ids=str,
)
def test_options_that_the_sampler_has_not_are_named(options, name):
    with named_error(ValueError, f"{name} must be "):
        EMC2Loss(ITEMS, DIM, **options)


@pytest.mark.parametrize(
    ("options", "views", "queue"),
    [
        ({}, "both", 16),
        ({"bimodal": True}, "one", 16),
        ({"proposals": "bank"}, "one", 0),
        ({"burn_in": 0.5}, "one", 0),
        ({"sampler": "mh"}, "one", 0),
        ({"sampler": "mh", "bimodal": True}, "one", 0),
        ({"sampler": "isir"}, "both", 16),
        ({"sampler": "isir", "bimodal": True}, "one", 16),
        ({"sampler": "isir", "carry": "recompute"}, "both", 0),
        ({"carry": "recompute"}, "both", 0),
        ({"sampler": "isir", "views": "one", "queue": 3}, "one", 3),
        ({"sampler": "isir", "queue": 0}, "both", 0),
        ({"sampler": "mh", "views": "both", "queue": 0}, "both", 0),
        ({"num_samples": 1, "views": "both"}, "both", 0),
    ],
    ids=str,
)
def test_views_and_queue_are_those_that_suit_the_sampler(options, views, queue):
    encode = torch.stack if options.get("carry") == "recompute" else None
    loss = EMC2Loss(ITEMS, DIM, **options, encode=encode)
    assert loss.views == views and loss.queue == queue
    kept = {name: tuple(table.shape) for name, table in loss.state_dict().items() if name.startswith("recent")}
    assert kept == ({"recent.items": (queue,)} if queue else {})


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ({"carry": "two_sided"}, "two_sided", "collapsed"),
        ({"carry": "two_sided", "proposals": "bank"}, "two_sided", "collapsed"),
        ({"carry": "drop"}, "drop", "biased"),
        ({"carry": "drop", "sampler": "isir"}, "drop", "biased"),
        ({"carry": "cached", "proposals": "bank"}, "cached", "collapses"),
        ({"carry": "corrected", "sampler": "mh"}, "corrected", "trains no better"),
        ({"carry": "corrected", "burn_in": 0.5}, "corrected", "trains no better"),
        ({"carry": "corrected", "sampler": "isir"}, "corrected", "less bias"),
        ({"carry": "corrected"}, "corrected", "less bias"),
        ({"estimator": "recycled"}, "recycled", "1 to 2 %"),
    ],
    ids=str,
)
def test_what_was_deleted_says_why(option, value, reason):
    with pytest.raises(ValueError, match=rf"^(carry|estimator) must be .*got .{value}., which was deleted: .*{reason}"):
        EMC2Loss(ITEMS, DIM, **option)


def legal_combinations():
    choices = {
        "sampler": ("mh", "isir"),
        "proposals": ("batch", "bank"),
        "views": ("one", "both"),
        "carry": ("cached", "corrected", "recompute", "two_sided", "drop"),
        "estimator": ("states", "recycled"),
        "bimodal": (False, True),
        "gather": ("none", "all", "ring"),
        "sharded": (False, True),
    }
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        try:
            make(torch.stack, **options)
        except ValueError:
            continue
        except RuntimeError:  # sharded, without a process group
            pass
        yield options


@pytest.mark.parametrize("sampler", ["mh", "isir"])
def test_fewer_than_40_combinations_are_legal(sampler):
    assert 30 <= sum(options["sampler"] == sampler for options in legal_combinations()) < 40


@pytest.mark.parametrize(
    "options",
    [options for options in legal_combinations() if options["gather"] == "none"],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_every_combination_trains_resumes_and_leaves_evaluation_alone(options):
    options = options | {"encode": lambda items, views: normal(3, ITEMS, 2, DIM)[items, views]}
    loss = train(make(**options), 4)
    before = snapshot(loss)
    z0, z1, index = batch(50)
    loss.eval()
    value, found = loss(z0.bfloat16(), z1.bfloat16(), index, return_stats=True)
    assert value.isfinite() and all(statistic.isfinite() for statistic in found.values())
    carried = found["carry_share" if options["sampler"] == "mh" else "carried_weight"]
    assert 0 <= found["acceptance"] <= 1 and 0 <= carried <= 1 + 1e-6
    assert_identical(snapshot(loss), before)
    other = make(**options)
    other.load_state_dict(before)
    assert_identical(snapshot(train(other, 2, 60)), snapshot(train(loss.train(), 2, 60)))
    half = make(**options).to(torch.bfloat16)
    assert {b.dtype for b in half.state_dict().values()} <= {torch.float32, torch.int64}
