"""What is legal by its type and range, and still not what was meant: temperatures, class labels, containers."""

import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import RUNNABLE, certain, named_error, normal
from test_finite_state import Opaque
from test_losses_common import DIM, NAMES, batch, make

from emc2_kernels import checks, contrastive_lse, gumbel_sample, init_state, mh_step
from emc2_kernels.batching import global_train_gap
from emc2_kernels.data import hash_slots
from emc2_kernels.losses import TABLE, ClipLoss, EMC2Loss, NTXentLoss, SogCLRLoss
from emc2_kernels.losses import index_watch as watch
from emc2_kernels.losses.index_watch import IndexWatch

LEAST, MOST = 2.0**-63, 2.0**100
TINY = [1e-46, 1e-40, 1e-38]
HUGE = [MOST * 1.01, 1e38, 1e39, 10**400]
KEPT = [name for name in TABLE if "num_items" in TABLE[name].options()]


@NAMES
@pytest.mark.parametrize("temperature", [*TINY, 1e-30, LEAST * 0.99, *HUGE], ids=str)
def test_temperatures_that_float32_cannot_divide_by_are_refused(name, temperature):
    with named_error(ValueError, "temperature must be in"):
        make(name, temperature=temperature)
    if temperature < 1e39:
        with named_error(ValueError, "temperature must be in"):
            make(name, temperature=torch.tensor(temperature, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [*TINY, MOST * 1.01, torch.tensor([0.1, 1e-38, 0.1, 0.1])], ids=str)
def test_primitives_refuse_them_too(temperature):
    q, k = normal(0, 4, DIM), normal(1, 5, DIM)
    for given in {temperature if isinstance(temperature, float) else None, torch.as_tensor(temperature)} - {None}:
        for call in (
            lambda t: contrastive_lse(q, k, temperature=t),
            lambda t: mh_step(q, k, init_state(4), temperature=t, seed=0, step=0),
            lambda t: gumbel_sample(q, k, temperature=t, seed=0, step=0),
        ):
            with named_error(ValueError, "temperature must be in"):
                call(given)


@NAMES
@pytest.mark.parametrize("temperature", [LEAST, 1e-12, MOST], ids=str)
def test_at_the_ends_everything_is_finite(name, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = make(name, temperature=temperature)
    for step in range(3):
        z0, z1, index = batch(step)
        value, stats = loss(z0.requires_grad_(), z1, index, return_stats=True)
        value.backward()
        assert (
            value.isfinite() and z0.grad.isfinite().all() and all(stat.isfinite() for stat in certain(stats).values())
        )


@pytest.mark.parametrize("backend", RUNNABLE)
def test_the_log_sum_exp_is_right_at_the_ends(backend):
    """Beside float64, with scores up to 10^38 and down to 10^-30."""
    q, k = normal(0, 4, DIM), normal(1, 5, DIM)
    for temperature in (2.0**-120, 1e-30, LEAST, MOST):
        found = contrastive_lse(q, k, temperature=temperature, backend=backend)
        exact = contrastive_lse(q.double(), k.double(), temperature=temperature, backend="reference")
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_bounds_of_item_temperatures_stay_inside():
    for temperature in (LEAST, MOST):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            low, high = SogCLRLoss(3, temperature=temperature, individual_temperature=True).temperature_bounds
        assert LEAST <= low <= temperature <= high <= MOST
    for bounds in ((1e-38, 1.0), (0.05, 1e38)):
        with named_error(ValueError, "temperature_bounds"):
            SogCLRLoss(3, individual_temperature=True, temperature_bounds=bounds)
    with named_error(ValueError, "max_scale"):
        NTXentLoss(learn_temperature=True, max_scale=1e30)


@NAMES
@pytest.mark.parametrize("leaf", [True, False], ids=["parameter", "result"])
def test_a_temperature_that_wants_a_gradient_is_refused(name, leaf):
    parameter = torch.nn.Parameter(torch.tensor(0.2))
    with named_error(ValueError, "temperature must not require a gradient.*learn_temperature=True"):
        make(name, temperature=parameter if leaf else parameter * 1)
    assert make(name, temperature=parameter.detach()).temperature == pytest.approx(0.2)


def test_a_learnt_temperature_can_be_measured_with():
    """What only reads a temperature takes one that is learnt."""
    x, y, temperature = (
        normal(0, 8, DIM),
        normal(1, 8, DIM),
        ClipLoss(temperature=0.2, learn_temperature=True).temperature,
    )
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert global_train_gap(x, y, batches, temperature) == global_train_gap(x, y, batches, float(temperature))  # exact


@NAMES
def test_a_scale_given_for_a_temperature_is_warned_of(name):
    with pytest.warns(UserWarning, match="temperature=100.0 .*its inverse, 0.01") as record:
        make(name, temperature=100.0)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name, temperature=10.0)
        make(name, temperature=100.0, normalize=False)


def test_the_warning_points_at_the_caller():
    for call in (lambda: ClipLoss(temperature=20.0), lambda: EMC2Loss(3, 2, temperature=20.0)):
        with pytest.warns(UserWarning) as record:
            call()
        assert record[0].filename == __file__


class TestClassLabels:
    def steps(self, loss, indices):
        """How many warnings, and the first one."""
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for seed, index in enumerate(indices):
                loss(normal(seed, len(index), DIM), normal(seed + 1, len(index), DIM), index)
        return len(record), (str(record[0].message) if record else ""), record and record[0].filename

    def draws(self, seed, steps, b, items):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(items, (b,), generator=generator) for _ in range(steps)]

    @pytest.mark.parametrize("name", KEPT)
    def test_repeated_labels_are_warned_of_once(self, name):
        loss = make_with(name, 5000)
        count, message, file = self.steps(loss, self.draws(0, 40, 16, 10))
        assert count == 1 and "index seems to name classes" in message and "repeat an item" in message
        assert file == __file__

    @pytest.mark.parametrize("name", KEPT)
    def test_few_different_items_in_two_epochs_are_warned_of_once(self, name):
        """Where each class comes once a batch, nothing repeats within it."""
        loss = make_with(name, 300)
        count, message, _ = self.steps(loss, [torch.randperm(10) for _ in range(200)])
        assert count == 1 and "600 rows of a data set of 300 items had 10 different items" in message

    def test_many_items_are_told_apart_by_their_remainders(self, monkeypatch):
        """As with thousands of bins: 40 classes hit few, uniform draws, and a rank's every 8th item, hit all."""
        assert all(watch.BINS % k for k in range(2, 91))  # or every 8th item would hit an eighth of them
        monkeypatch.setattr(watch, "BINS", 127)
        monkeypatch.setattr(watch, "MOST_ROWS", 2000)
        classes = [torch.randperm(40)[:20] for _ in range(110)]
        count, message, _ = self.steps(SogCLRLoss(5000), classes)
        assert count == 1 and "2000 rows of a data set of 5000 items had 40 different remainders" in message
        for every in (1, 8):
            drawn = [index * every for index in self.draws(3, 110, 20, 5000 // every)]
            assert self.steps(SogCLRLoss(5000), drawn)[0] == 0

    @pytest.mark.parametrize(("ranks", "warned"), [(1, 1), (8, 0)])
    def test_a_process_with_its_share_of_the_items_is_not(self, ranks, warned, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        share = [index[:16] for _ in range(40) for index in (torch.randperm(75),)]
        assert self.steps(SogCLRLoss(600), share + share)[0] == warned

    @pytest.mark.parametrize(("items", "b"), [(3, 2), (12, 8), (100, 32), (20, 64), (2000, 128)])
    def test_draws_with_replacement_are_not(self, items, b):
        loss = SogCLRLoss(items)
        assert self.steps(loss, self.draws(1, min(4 * items // b + 150, 300), b, items))[0] == 0

    def test_a_data_set_smaller_than_num_items_is_not(self):
        """Fewer than uniform draws from all, and not so few as classes would be."""
        assert self.steps(SogCLRLoss(3000), self.draws(2, 61, 100, 1800))[0] == 0

    @pytest.mark.parametrize(("items", "b", "epochs"), [(30, 16, 25), (400, 32, 25), (9000, 128, 3)])
    @pytest.mark.parametrize("again", [False, True])
    def test_hashed_keys_are_not(self, items, b, epochs, again):
        """Ten slots an item: few of them are in use, and a stream that draws again repeats items ten times as often."""
        slots = hash_slots(range(items), 10 * items)
        if again:
            order = torch.randint(items, (epochs * items,), generator=torch.Generator().manual_seed(0))
        else:
            order = torch.cat([torch.randperm(items) for _ in range(epochs)])
        loss = SogCLRLoss(10 * items)
        assert self.steps(loss, [slots[part] for part in order.split(b)])[0] == 0
        assert loss._watch.spread and loss._watch.done == (epochs == 25)

    def test_the_second_half_of_the_numbers_is_remembered(self):
        watch = IndexWatch(6400)
        for number, share in ((3199, 6400), (3200, 200), (0, 200)):
            watch.look(torch.tensor([number]), 0)
            assert watch.share() == share

    def test_hashed_class_names_are(self):
        slots = hash_slots([f"class {number}" for number in range(10)], 50_000)
        count, message, _ = self.steps(SogCLRLoss(50_000), [slots[labels] for labels in self.draws(0, 40, 16, 10)])
        assert count == 1 and "where uniform draws from 1562 items would" in message

    def test_a_handful_of_items_says_nothing(self):
        assert self.steps(SogCLRLoss(4), [torch.zeros(1, dtype=torch.int64)] * 20)[0] == 0

    def test_epochs_are_not(self):
        order = [torch.randperm(96, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        assert self.steps(SogCLRLoss(96), torch.cat(order).split(16))[0] == 0

    def test_evaluation_and_what_is_not_looked_at_are_not(self):
        loss = SogCLRLoss(5000)
        labels = self.draws(0, 40, 16, 10)
        assert self.steps(loss.eval(), labels)[0] == 0
        assert self.steps(loss.train(), [index.as_subclass(Opaque) for index in labels])[0] == 0
        assert self.steps(loss, labels)[0] == 1

    def test_nothing_of_it_is_kept(self):
        loss, other = SogCLRLoss(50), SogCLRLoss(50)
        self.steps(loss, self.draws(0, 3, 8, 50))
        assert loss.state_dict().keys() == other.state_dict().keys()
        self.steps(loss, self.draws(1, 20, 8, 50))
        assert loss._watch.done and loss._watch.seen is None  # after two epochs it looks no more

    def test_the_chance_of_a_false_alarm_is_bounded(self):
        """Repeats up to what a hundred runs of uniform draws have are within it, and ten times as many are not."""
        for items, b in ((100, 16), (1000, 64), (10, 30)):
            expected = watch._expected_repeats(b, items) * 50
            found = [sum(b - d.unique().numel() for d in self.draws(seed, 50, b, items)) for seed in range(100)]
            assert max(found) <= expected * 1.5  # draws with replacement repeat about so often
            assert not any(watch._beyond_chance(repeats, expected) for repeats in found)
        assert watch._beyond_chance(60, 6.0) and not watch._beyond_chance(6, 6.0)

    def test_expected_repeats(self):
        for b, items in ((1, 5), (5, 5), (5, 7), (9, 4), (30, 1)):
            assert watch._expected_repeats(b, items) == pytest.approx(sum(min(1, j / items) for j in range(b)))


def make_with(name, items):
    options = {"num_items": items, "dim": DIM}
    return make_loss(name, {key: value for key, value in options.items() if key in TABLE[name].options()})


def make_loss(name, options):
    return TABLE[name].loss(**TABLE[name].fixed, **options)


BIG = {
    "a tuple of tensors": ((torch.ones(50, 3),) * 4, "(float32 tensor of shape (50, 3) on cpu, "),
    "a model's output": (
        OrderedDict(last_hidden_state=torch.ones(4, 7, 8), pooled=None),
        "{'last_hidden_state': float32 tensor of shape (4, 7, 8) on cpu, 'pooled': None} (OrderedDict)",
    ),
    "nested lists": ([[1.0] * 1000] * 1000, "[[1.0, 1.0, 1.0, ...], "),
    "an array": (np.ones((60, 60)), "array("),
    "chains": (init_state(3), "(int64 tensor of shape (3,) on cpu, float32 tensor of shape (3,) on cpu) (MHState)"),
    "a long word": ("x" * 10_000, "'xxx"),
}


@pytest.mark.parametrize(("value", "begins"), BIG.values(), ids=BIG)
def test_large_and_nested_values_are_described_in_a_line(value, begins):
    found = checks.describe(value)
    assert found.startswith(begins) and len(found) < 250 and "\n" not in found and found.endswith(")")


@NAMES
@pytest.mark.parametrize("value", [value for value, _ in BIG.values()], ids=BIG)
def test_errors_of_losses_stay_short(name, value):
    loss, (z0, z1, index) = make(name), batch(0)
    for change in ({"z0": value}, {"z1": value}, {"index": value}, {"return_stats": value}):
        arguments = {"z0": z0, "z1": z1, "index": index} | change
        with named_error((TypeError, ValueError), next(iter(change))) as caught:
            loss(**arguments)
        assert len(str(caught.value)) < 400
    for option in ("temperature", "backend", "normalize"):
        with named_error((TypeError, ValueError), option) as caught:
            make(name, **{option: value})
        assert len(str(caught.value)) < 400
