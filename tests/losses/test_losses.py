"""The losses against slow reimplementations: one anchor, one sample and one dictionary entry at a time, in float64."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import COMPILED, RUNNABLE, assert_identical, normal, relative_rms, snapshot
from slow_losses import DIM, DTYPES, ITEMS, B, SlowEMC2, steps_beside, unit, value_and_gradients
from torch import nn

from emc2_kernels import MHState, mh_step, rng
from emc2_kernels.distributed.keys import LocalKeys
from emc2_kernels.losses import EMC2Loss, NTXentLoss

STEPS = 36  # long enough that chains are found where they were left


def shuffled_batches(seed=0, size=B, steps=STEPS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(ITEMS, generator=generator)[:size] for _ in range(steps)]


class Table(nn.Module):
    """An encoder that has one embedding for each item and view, and counts what it is asked for again."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(normal(7, ITEMS, 2, DIM, dtype=dtype))
        self.calls = []  # labels of each call

    def forward(self, items, views):
        self.calls.append((items * 2 + views).tolist())
        return self.weight[items, views]

    def pair(self, index):
        """The two views of a batch; each row is augmented in its own way, duplicates of an item too."""
        return tuple(
            torch.stack([self.weight[item, view].roll(row) for row, item in enumerate(index.tolist())])
            for view in (0, 1)
        )

    def drift(self, seed):
        """What training would do to the weights, so that banked embeddings are old."""
        with torch.no_grad():
            self.weight += 0.3 * normal(100 + seed, ITEMS, 2, DIM, dtype=self.weight.dtype)


def run_beside_the_slow_one(batches, dtype=torch.float32, **options):
    """Yields, for each step, both losses, the gradients of the table under both, and both tables."""
    table, exact = Table(dtype), Table(torch.float64)
    recompute = options.get("carry") == "recompute"
    fast = EMC2Loss(
        ITEMS,
        DIM,
        sampler="mh",
        **({"temperature": 0.2, "bank_dtype": torch.float32} | options),
        encode=table if recompute else None,
    )
    slow = SlowEMC2(**options, walk_dtype=dtype, encode=lambda item, view: exact.weight[item, view])
    for value, _, expected in steps_beside(fast, slow, table, exact, batches):
        yield value, expected, table, exact, slow


def assert_equals_the_slow_one(batches, dtype=torch.float32, **options):
    carried = 0
    for value, expected, table, exact, slow in run_beside_the_slow_one(batches, dtype, **options):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
        assert relative_rms(table.weight.grad, exact.weight.grad) <= DTYPES[dtype]
        carried += len(slow.carried)
    assert carried > 0  # otherwise the carry term was not tried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("carry", ["cached", "recompute"])
@pytest.mark.parametrize("views", ["one", "both"])
def test_emc2_gradient_is_that_of_the_surrogate(views, carry, dtype):
    assert_equals_the_slow_one(shuffled_batches(), dtype, views=views, carry=carry)


@pytest.mark.parametrize(
    "options",
    [
        {"burn_in": 0.0},
        {"burn_in": 0.0, "num_samples": 1},
        {"burn_in": 0.4, "num_samples": 3},  # floor(0.4 * 6) = 2
        {"burn_in": 0.99, "num_samples": 1},
        {"seed": 2**64 - 1},
        {"temperature": 0.05},
        {"temperature": 2.0, "burn_in": 0.0},
        {"bank_dtype": torch.bfloat16},
        {"views": "both", "burn_in": 0.3, "num_samples": 7},  # floor(0.3 * 12) = 3
    ],
    ids=str,
)
def test_emc2_options_mean_what_they_say(options):
    assert_equals_the_slow_one(shuffled_batches(1), **options)


@pytest.mark.parametrize("carry", ["cached", "recompute"])
@pytest.mark.parametrize("views", ["one", "both"])
def test_of_duplicate_items_the_last_row_is_kept(views, carry):
    batches = [torch.tensor(batch) for batch in ([3, 1, 3, 0], [1, 1, 2, 3], [5, 3, 5, 3], [0, 1, 0, 2], [3, 3, 3, 1])]
    assert_equals_the_slow_one(batches * 5, views=views, carry=carry, burn_in=0.0)


def test_batches_of_other_sizes_follow_each_other():
    sizes = [2, 9, 1, 5, 12, 3]
    assert_equals_the_slow_one([shuffled_batches(step, size, 1)[0] for step, size in enumerate(sizes)], burn_in=0.25)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 6, 3),  # M - P = 6 - 3
        ({}, 7, 4),  # P = floor(3.5)
        ({}, 12, 6),
        ({"views": "both"}, 12, 12),
        ({"views": "both", "burn_in": 0.0}, 12, 16),  # of 24
        ({"burn_in": 0.0}, 1, 1),
        ({"num_samples": 2}, 6, 2),
    ],
)
def test_samples_of_a_row(monkeypatch, options, size, expected):
    shapes, walk = [], LocalKeys.walk

    def recorded(*arguments):
        result = walk(*arguments)
        shapes.append(tuple(result.samples.shape))
        return result

    monkeypatch.setattr(LocalKeys, "walk", recorded)
    EMC2Loss(ITEMS, DIM, sampler="mh", **options)(normal(0, size, DIM), normal(1, size, DIM), torch.arange(size))
    assert shapes == [(2 * size, expected)]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("options", [{}, {"proposal": "uniform", "num_proposals": 23}], ids=["sweep", "uniform"])
def test_samples_are_taken_after_the_documented_proposals(options, backend):
    def samples(number, burn_in):
        call = {"temperature": 0.5, "seed": 1, "step": 2, "backend": backend} | options
        state = MHState(torch.zeros(5, dtype=torch.int64), normal(2, 5))
        return mh_step(
            normal(0, 5, DIM), normal(1, 23, DIM), state, burn_in=burn_in, num_samples=number, **call
        ).samples

    every = samples(23, 0)
    for burn_in, number in itertools.product((0, 1, 7, 22), range(1, 24)):
        if number <= 23 - burn_in:
            after = [burn_in + math.ceil((r + 1) * (23 - burn_in) / number) - 1 for r in range(number)]
            assert_identical(samples(number, burn_in), every[:, after])


def test_recompute_encodes_each_distinct_carried_item_once():
    times = Counter()
    for _, _, table, _, slow in run_beside_the_slow_one(shuffled_batches(2), carry="recompute", burn_in=0.0):
        asked_for = [label for call in table.calls for label in call]
        assert len(table.calls) <= 1
        assert sorted(asked_for) == sorted(slow.carried)
        times[len(asked_for)] += 1
    assert max(times) >= 2


def test_a_chain_that_has_not_started_contributes_only_what_it_has_moved_to():
    """Three rows of item 0 can move to the fourth row's key alone, at the last proposal."""
    z0, z1, index = normal(0, 4, DIM), normal(1, 4, DIM), torch.tensor([0, 0, 0, 1])
    for size in (3, 4):  # without the fourth row there is no key to move to
        loss = EMC2Loss(ITEMS, DIM, sampler="mh", temperature=0.2, burn_in=0.0, views="one")
        _, gradient = value_and_gradients(loss, z0[:size], z1[:size], index[:size])
        a, c = z0[:size].double().requires_grad_(), z1[:size].double().requires_grad_()
        rows, coin = [unit(row) for row in (*a, *c)], rng.view_coin(index, seed=0, step=0)[-1].item()
        surrogate = -sum(rows[i] @ rows[(i + size) % (2 * size)] for i in range(2 * size))
        if size == 4:
            surrogate = surrogate + sum(rows[i] @ rows[3 + 4 * coin] for i in (0, 1, 2, 4, 5, 6))
            surrogate = surrogate + slow_mean_of_first_row_negatives(rows, loss, index)
        (surrogate / 0.2 / (2 * size)).backward()
        assert relative_rms(gradient, torch.cat((a.grad, c.grad))) <= 1e-5
        if size == 3:
            assert (loss.chains.key == -1).all() and (loss.chains.score == -torch.inf).all()


def slow_mean_of_first_row_negatives(rows, loss, index):
    """Repulsion of the two anchors of item 1, which sweep three keys of item 0."""
    fresh = SlowEMC2(temperature=loss.temperature, burn_in=0.0)
    anchors = [(item, view) for view in (0, 1) for item in index.tolist()]
    key_rows = fresh._key_rows(index)
    result = fresh._walk(anchors, rows, key_rows, [(-1, -math.inf)] * 8)
    return sum(
        rows[anchor] @ torch.stack([rows[key_rows[s]] for s in result.samples[anchor].tolist()]).mean(0)
        for anchor in (3, 7)
    )


def trained(loss, batches, first=0):
    """Values and states after each of the given steps."""
    values, states = [], [snapshot(loss)]
    for step, index in enumerate(batches, first):
        values.append(loss(normal(10 + step, B, DIM), normal(50 + step, B, DIM), index).clone())
        states.append(snapshot(loss))
    return values, states


def test_seeds_and_steps_make_other_chains():
    batches = shuffled_batches(4)
    (_, first), (_, again), (_, other) = (
        trained(EMC2Loss(ITEMS, DIM, sampler="mh", seed=seed), batches) for seed in (1, 1, 2)
    )
    assert_identical(first, again)
    assert not torch.equal(first[-1]["chains.key"], other[-1]["chains.key"])
    late = EMC2Loss(ITEMS, DIM, sampler="mh", seed=1)
    late.step.fill_(1000)
    assert not torch.equal(trained(late, batches)[1][-1]["chains.key"], first[-1]["chains.key"])


def test_nothing_but_the_batchs_slots_is_written():
    loss, index = EMC2Loss(ITEMS, DIM, sampler="mh"), torch.tensor([4, 7])
    trained(loss, shuffled_batches(6))
    before = snapshot(loss)
    loss(normal(1, 2, DIM), normal(2, 2, DIM), index)
    written = torch.tensor([8, 9, 14, 15])
    others = torch.ones(2 * ITEMS, dtype=torch.bool).index_fill(0, written, False)
    for name in ("chains.key", "chains.score", "bank.embeddings", "bank.written_at"):
        assert_identical(loss.state_dict()[name][others], before[name][others])
    assert (loss.bank.written_at[written] == before["step"]).all()
    assert not loss.bank.embeddings.requires_grad and not loss.chains.score.requires_grad


def test_a_tiny_temperature_makes_chains_that_do_not_depend_on_the_rows_order():
    """Acceptance is then decided by the scores alone, so the order of the proposals does not matter either."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    options = {"sampler": "mh", "temperature": 1e-5, "num_samples": 1, "bank_dtype": torch.float32, "views": "one"}
    straight, permuted = EMC2Loss(ITEMS, DIM, **options), EMC2Loss(ITEMS, DIM, **options)
    for step, index in enumerate(shuffled_batches(7)):
        z0, z1 = normal(10 + step, B, DIM), normal(50 + step, B, DIM)
        value, gradient = value_and_gradients(straight, z0, z1, index)
        other, other_gradient = value_and_gradients(permuted, z0[order], z1[order], index[order])
        torch.testing.assert_close(other, value, rtol=1e-5, atol=0)
        assert relative_rms(other_gradient, gradient[torch.cat((order, order + B))]) <= 1e-5
        assert_identical(permuted.chains.key, straight.chains.key)


def coins(items, step, seed=0, backend="auto"):
    return torch.ops.emc2_kernels.view_coin(items, seed, None, step, None, backend)


@pytest.mark.one_seed
@pytest.mark.parametrize("backend", COMPILED)
def test_the_view_coin_is_fair_and_depends_on_item_step_and_seed(backend):
    n = 40_000
    items = torch.arange(n) * 977 + 2**33
    first = coins(items, 0, backend=backend)
    others = {
        "step": coins(items, 1, backend=backend),
        "seed": coins(items, 0, seed=1, backend=backend),
        "item": coins(items + 1, 0, backend=backend),
        "high bits of the item": coins(items + 2**32, 0, backend=backend),
    }
    deviation = 5 * 0.5 / math.sqrt(n)
    assert set(first.tolist()) == {0, 1}
    assert abs(first.double().mean().item() - 0.5) < deviation
    for changed, other in others.items():
        agreement = (first == other).double().mean().item()
        assert abs(agreement - 0.5) < deviation, f"the coin hardly depends on the {changed}"
    assert_identical(first, rng.view_coin(items, seed=0, step=0))


def test_only_the_view_that_the_coin_chose_is_proposed():
    loss, seen = EMC2Loss(ITEMS, DIM, sampler="mh", seed=3), set()
    for step, index in enumerate(shuffled_batches(8, steps=12)):
        chosen = set((index * 2 + rng.view_coin(index, seed=3, step=step)).tolist())
        before = loss.chains.key.clone()
        loss(normal(step, B, DIM), normal(30 + step, B, DIM), index)
        slots = torch.cat((index * 2, index * 2 + 1))
        moved = slots[(loss.chains.key != before)[slots]]
        assert set(loss.chains.key[moved].tolist()) <= chosen
        seen |= {label % 2 for label in loss.chains.key[moved].tolist()}
    assert seen == {0, 1}


def test_no_chain_sits_on_its_own_item():
    for views in ("one", "both"):
        loss = EMC2Loss(ITEMS, DIM, sampler="mh", temperature=0.02, views=views)
        same = normal(0, ITEMS, DIM)
        for _ in range(3):  # the positive is by far the best key
            loss(same, same, torch.arange(ITEMS))
        assert not (loss.chains.key // 2 == torch.arange(2 * ITEMS) // 2).any()
        assert (loss.chains.key >= 0).all()


@pytest.mark.parametrize(
    "build",
    [
        NTXentLoss,
        lambda **options: EMC2Loss(ITEMS, DIM, sampler="mh", **options),
        lambda **options: EMC2Loss(ITEMS, DIM, sampler="isir", **options),
    ],
    ids=["NT-Xent", "EMC2", "i-SIR"],
)
def test_normalisation_makes_a_loss_blind_to_lengths_and_without_it_unit_rows_are_taken_as_they_are(build):
    z0, z1, index = normal(0, B, DIM), normal(1, B, DIM), torch.arange(B)
    lengths = torch.logspace(-2, 3, B)[:, None]
    expected = build(temperature=0.2)(z0, z1, index)
    torch.testing.assert_close(build(temperature=0.2)(z0 * lengths, z1 / lengths, index), expected)
    units = (z / z.norm(dim=1, keepdim=True) for z in (z0, z1))
    torch.testing.assert_close(build(temperature=0.2, normalize=False)(*units, index), expected)
    assert not torch.isclose(build(temperature=0.2, normalize=False)(2 * z0, z1, index), expected)


def test_both_backends_make_the_same_loss():
    losses = [EMC2Loss(ITEMS, DIM, sampler="mh", backend=name) for name in RUNNABLE]
    states = [trained(loss, shuffled_batches(4, steps=6))[1][-1] for loss in losses]
    for state in states[1:]:
        assert_identical(state["chains.key"], states[0]["chains.key"])
        torch.testing.assert_close(state["chains.score"], states[0]["chains.score"])


def test_an_encoder_given_to_the_loss_does_not_become_a_part_of_it():
    class Encoder(nn.Linear):
        def forward(self, items, views):
            return super().forward(torch.ones(len(items), 3))

    loss = EMC2Loss(ITEMS, DIM, sampler="mh", carry="recompute", encode=Encoder(3, DIM))
    assert not list(loss.parameters()) and not any("encode" in name for name in loss.state_dict())
    for index in shuffled_batches():
        loss(normal(0, B, DIM), normal(1, B, DIM), index)
