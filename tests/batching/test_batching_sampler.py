"""GlobalContrastiveBatchSampler: which items its batches have, over ranks, epochs and resumed epochs.

Orders are put in by load_state_dict or in the place of what update computes; test_batching_gap.py updates for real.
"""

import io
import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import assert_identical
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from emc2_kernels.batching import GlobalContrastiveBatchSampler as Sampler
from emc2_kernels.batching import GraphFacts

FACTS = GraphFacts(0.5, 0.99, 0.0, 10, 0)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


def random_order(seed, num_items):
    return np.random.default_rng([seed, 99]).permutation(num_items)


def with_order(sampler, order):
    if order is not None:
        sampler.load_state_dict(sampler.state_dict() | {"order": torch.from_numpy(order)})
    return sampler


def update(sampler, order):
    """As ``update`` does, with an order that is given."""
    sampler._new_order = lambda x, y: (order, FACTS)
    sampler.update(None)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take(sampler, count):
    """The iterator goes on where it is."""
    iterator = iter(sampler)
    return list(itertools.islice(iterator, count)), iterator


@st.composite
def settings_of_a_sampler(draw):
    """Arguments that make at least one batch, but for the rank; and an order, or None."""
    batch_size, world_size, drop_last = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.booleans())
    num_items = draw(st.integers(batch_size * world_size if drop_last else 1, 60))
    seed = draw(st.integers(0, 5) | st.just(2**64 - 1))
    arguments = {"num_items": num_items, "batch_size": batch_size, "drop_last": drop_last, "seed": seed}
    return arguments | {"world_size": world_size}, random_order(seed, num_items) if draw(st.booleans()) else None


def cyclic_start(places, num_items):
    """Of distinct places on a ring that follow one another, the first; None where they are all there are."""
    here = set(places)
    assert len(here) == len(places)
    starts = [place for place in here if (place - 1) % num_items not in here]
    assert len(starts) == (len(here) < num_items)
    return starts[0] if starts else None


def assert_runs_are_cut_over_ranks(steps, order, batch_size):
    """``steps[t][rank]``: whole batches. Each is a run of the order's ring, those of a step follow one another in the
    order of the ranks, and steps lie end to end, but for one place: where the epoch starts and what is left over ends.
    Returns that place, None where one step has all items."""
    n, run = len(order), batch_size * len(steps[0])
    place = np.argsort(order)
    starts = []
    for batches in steps:
        firsts = [cyclic_start(place[items].tolist(), n) for items in batches]
        if len(batches) > 1:
            assert all((after - before) % n == batch_size for before, after in itertools.pairwise(firsts))
        starts.append(firsts[0])
    if starts == [None]:
        return None
    starts.sort()
    ahead = [(after - before) % n or n for before, after in zip(starts, [*starts[1:], starts[0]], strict=True)]
    left_over = n - run * len(steps)
    assert sorted(ahead) == [run] * (len(steps) - 1) + [run + left_over]
    return starts[(int(np.argmax(ahead)) + 1) % len(starts)] if left_over else starts[0]


@examples(500)
@given(settings_of_a_sampler(), st.integers(0, 3))
def test_an_epoch(arguments_and_order, epoch):
    arguments, order = arguments_and_order
    num_items, size, ranks = (arguments[name] for name in ("num_items", "batch_size", "world_size"))
    samplers = [with_order(Sampler(rank=rank, **arguments), order) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    lengths = {len(sampler) for sampler in samplers}
    steps = list(zip(*samplers, strict=True))
    assert lengths == {len(steps)}
    assert {sampler.epoch for sampler in samplers} == {epoch + 1}
    counts = Counter(itertools.chain(*itertools.chain(*steps)))
    whole, rest = divmod(num_items, size * ranks)
    assert all(len(batch) == size for batches in steps[:whole] for batch in batches)
    assert all(type(item) is int for batches in steps for batch in batches for item in batch)
    if arguments["drop_last"]:
        assert len(steps) == whole and set(counts) <= set(range(num_items))
        assert set(counts.values()) == {1} and num_items - len(counts) == rest
    else:
        assert set(counts) == set(range(num_items))
        assert counts.total() - num_items < ranks
        assert [{len(batch) for batch in batches} for batches in steps[whole:]] == [{-(-rest // ranks)}] * (rest > 0)
    if order is None or not whole:
        return
    start = assert_runs_are_cut_over_ranks(steps[:whole], order, size)
    if start is not None and steps[whole:]:  # the last, smaller run ends where the epoch started
        place = np.argsort(order)
        ends = [(cyclic_start(place[items].tolist(), num_items) + len(items)) % num_items for items in steps[-1]]
        assert ends == [(start - len(steps[-1][0]) * after) % num_items for after in reversed(range(ranks))]


@examples(300)
@given(settings_of_a_sampler(), st.integers(0, 2), st.data())
def test_a_resumed_epoch_and_those_after_it(arguments_and_order, epoch, data):
    """At any position, of which the last one is the next epoch's first; with an update before it, of which the epoch
    under way has nothing; and with batches taken ahead, up to the whole epoch and the end of its iteration."""
    arguments, order = arguments_and_order
    arguments["rank"] = data.draw(st.integers(0, arguments["world_size"] - 1))
    twin, sampler = (with_order(Sampler(**arguments), order) for _ in range(2))
    length = len(sampler)
    ahead, updated = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    done = data.draw(st.integers(1 if ahead or updated else 0, length))
    for each in (twin, sampler):
        each.set_epoch(epoch)
    expected = list(twin)
    taken, iterator = take(sampler, done)
    assert taken == expected[:done]
    taken += itertools.islice(iterator, ahead)
    if updated:
        for each in (twin, sampler):
            update(each, random_order(7, arguments["num_items"]))
    state = saved(sampler.state_dict(done) if ahead else sampler.state_dict())
    resumed = Sampler(**arguments)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.facts) == (epoch + done // length, sampler.facts)
    assert_identical(saved(resumed.state_dict())["batches_done"], done % length)
    following = [list(twin) for _ in range(2)]
    assert taken + list(iterator) == expected
    if done < length:
        assert list(resumed) == expected[done:]
    for each in (sampler, resumed):
        assert [list(each) for _ in range(2)] == following


@examples(200)
@given(settings_of_a_sampler(), st.integers(1, 4), st.data())
def test_another_number_of_ranks_resumes(arguments_and_order, ranks, data):
    """Steps have the same items, but for those that fill up the last one; there, other ones may repeat."""
    arguments, order = arguments_and_order
    run = arguments["batch_size"] * arguments["world_size"]
    assume(run % ranks == 0)
    before = [with_order(Sampler(rank=rank, **arguments), order) for rank in range(arguments["world_size"])]
    done = data.draw(st.integers(0, len(before[0]) - 1))
    state = saved(before[0].state_dict(done))
    arguments |= {"batch_size": run // ranks, "world_size": ranks}
    after = [Sampler(rank=rank, **arguments) for rank in range(ranks)]
    for sampler in after:
        sampler.load_state_dict(state)
    for first in (done, 0):
        old, new = ([sum(batches, []) for batches in zip(*group, strict=True)] for group in (before, after))
        assert len(old) - first == len(new)
        whole, rest = divmod(arguments["num_items"], run)
        for step, items in enumerate(new, first):
            shared = set(items) & set(old[step])
            assert len(shared) >= rest if step == whole else sorted(items) == sorted(old[step])


@examples(200)
@given(settings_of_a_sampler(), st.integers(0, 2), st.data())
def test_batches_of_all_ranks_are_dealt_as_ranks_have_them(arguments_and_order, epoch, data):
    """``rank="all"``, from any step on: whole runs rank by rank, and what is left once; with the ranks' states."""
    arguments, order = arguments_and_order
    size, ranks = arguments["batch_size"], arguments["world_size"]
    each = [with_order(Sampler(rank=rank, **arguments), order) for rank in range(ranks)]
    steps = len(each[0])
    done = data.draw(st.integers(0, steps - 1))
    dealt = Sampler(rank="all", **arguments)
    dealt.load_state_dict(saved(each[0].state_dict() | {"epoch": epoch, "batches_done": done}))
    for sampler in each:
        sampler.set_epoch(epoch)
    expected = list(zip(*each, strict=True))[done:]
    batches, iterator = take(dealt, data.draw(st.integers(0, steps - done)) * ranks)
    if batches:
        following = done + -(-len(batches) // ranks)
        assert_identical(dealt.state_dict()["batches_done"], following % steps)
        assert dealt.epoch == epoch + following // steps
    batches += iterator
    whole, rest = divmod(arguments["num_items"], size * ranks)
    here = max(0, whole - done)
    assert batches[: here * ranks] == list(itertools.chain(*expected[:here]))
    left = batches[here * ranks :]
    assert [len(batch) for batch in left[:-1]] == [size] * (len(left) - 1)
    if arguments["drop_last"]:
        assert left == []
    else:
        items = list(itertools.chain(*left))
        assert len(set(items)) == len(items) == rest
        assert set(items) <= set(itertools.chain(*itertools.chain(*expected[here:])))
    assert len(dealt) == done * ranks + len(batches) == len(list(dealt))


def make(**options):
    return Sampler(**{"num_items": 23, "batch_size": 4} | options)


def epochs_of(**options):
    """The first four, by their numbers."""
    found = []
    for number in range(4):
        sampler = make(**options)
        sampler.set_epoch(number)
        found.append(list(sampler))
    return found


class TestEpochs:
    def test_differ_from_each_other_and_by_seed(self):
        for order in (None, np.arange(23)):
            epochs = [list(with_order(make(seed=seed), order)) for seed in range(5)]
            sampler = with_order(make(), order)
            epochs += [list(sampler) for _ in range(5)][1:]
            assert len({str(epoch) for epoch in epochs}) == 9

    def test_are_named_by_seed_and_epoch(self):
        sampler, other = make(seed=3), make(seed=3)
        epochs = [list(sampler) for _ in range(3)]
        for epoch in (2, 0, 1):
            other.set_epoch(epoch)
            assert list(other) == epochs[epoch]

    def test_batches_come_shuffled_and_are_shuffled_within(self):
        sampler = with_order(make(num_items=400, batch_size=20), np.arange(400))
        batches = np.array(list(sampler))
        number = (batches[:, 0] - cyclic_start(batches[0].tolist(), 400)) % 400 // 20
        assert ((number[1:] - number[:-1]) % 20 == 1).sum() < 10  # of 19
        assert len({tuple(np.argsort(batch)) for batch in batches}) == 20

    def test_set_epoch_with_the_epoch_that_is_resumed_keeps_its_place(self):
        sampler, resumed = make(), make()
        sampler.set_epoch(4)
        taken, iterator = take(sampler, 2)
        resumed.load_state_dict(sampler.state_dict())
        resumed.set_epoch(4)
        assert resumed.state_dict()["batches_done"] == 2
        assert list(resumed) == list(iterator)

    def test_set_epoch_with_another_begins_it(self):
        sampler = make()
        take(sampler, 2)
        sampler.set_epoch(4)
        assert (sampler.epoch, sampler.state_dict()["batches_done"], len(list(sampler))) == (4, 0, 6)

    @pytest.mark.parametrize(("done", "number"), [(2, 0), (2, 4), (2, 7), (0, 3)])
    def test_set_epoch_warns_where_it_drops_a_loaded_place(self, done, number):
        sampler, resumed = make(), make()
        sampler.set_epoch(4 if done else 5)
        resumed.load_state_dict(sampler.state_dict(done))
        kept = [warnings.catch_warnings, lambda: pytest.warns(UserWarning, match=f"drops .*batch {done} of epoch ")]
        with kept[number != 4]():
            warnings.simplefilter("error" if number == 4 else "always")
            resumed.set_epoch(number)
        assert (resumed.epoch, len(list(resumed))) == (number, 4 if number == 4 else 6)

    def test_set_epoch_goes_ahead_of_a_place_that_has_nothing_taken_silently(self):
        sampler, resumed = make(), make()
        resumed.load_state_dict(sampler.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.set_epoch(2)
        assert list(resumed) == epochs_of()[2]

    def test_set_epoch_after_a_pass_with_its_number_begins_it_again(self):
        sampler = make()
        first = list(sampler)
        sampler.set_epoch(0)
        assert [list(sampler), sampler.epoch] == [first, 1]

    def test_batches_done_after_set_epoch_are_of_its_epoch(self):
        sampler = make()
        list(sampler)
        assert [sampler.state_dict(done)["epoch"] for done in (None, 0, 2, 6)] == [1, 1, 0, 0]
        sampler.set_epoch(5)
        assert [sampler.state_dict(done)["epoch"] for done in (None, 0, 2, 6)] == [5, 5, 5, 5]

    @pytest.mark.parametrize("count", [1, 3, 5, 6])
    def test_every_pass_is_another_epoch_however_far_it_went(self, count):
        """Up to the last batch of 6, and not on to the end of the iteration."""
        sampler, expected = make(), epochs_of()
        for number in range(4):
            assert take(sampler, count)[0] == expected[number][:count]
            assert sampler.epoch == number + (count == 6)

    def test_an_iterator_that_nothing_is_taken_from_is_no_pass(self):
        sampler = make()
        for _ in range(3):
            iter(sampler)
        assert sampler.epoch == 0 and list(sampler) == epochs_of()[0]

    def test_two_iterators_at_once_are_two_passes_and_a_state_is_of_the_later(self):
        sampler, expected, later = make(), epochs_of(), make()
        (first, old), (second, new) = take(sampler, 2), take(sampler, 1)
        first += itertools.islice(old, 3)
        state = sampler.state_dict()
        assert (state["epoch"], state["batches_done"]) == (1, 1)
        later.load_state_dict(state)
        assert [first + list(old), second + list(new)] == expected[:2]
        assert [list(later), list(later)] == [expected[1][1:], expected[2]]
        assert list(sampler) == expected[2]

    def test_a_state_after_the_last_batch_is_of_the_next_epoch(self):
        """Also while the iteration has not ended, and where the number of batches is said."""
        sampler, expected = make(), epochs_of()
        taken, _ = take(sampler, 6)
        update(sampler, np.arange(23))
        for done in (None, 6):
            resumed, twin = make(), make()
            resumed.load_state_dict(saved(sampler.state_dict(done)))
            update(twin, np.arange(23))
            twin.set_epoch(1)
            assert taken == expected[0]
            assert resumed.epoch == 1 and list(resumed) == list(twin)

    def test_a_resumed_pass_that_was_given_up_is_over(self):
        sampler, resumed, expected = make(), make(), epochs_of()
        take(sampler, 3)
        resumed.load_state_dict(sampler.state_dict())
        assert take(resumed, 1)[0] == expected[0][3:4]
        assert [list(resumed), list(resumed)] == expected[1:3]

    def test_set_epoch_before_each_pass_names_it(self):
        sampler, expected = make(), epochs_of()
        for number in (0, 1, 1, 2, 0, 3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sampler.set_epoch(number)
                assert (sampler.epoch, take(sampler, 4)[0]) == (number, expected[number][:4])

    def test_an_epoch_that_begins_again_though_it_was_not_ended_is_warned_of(self):
        """As a loader's own count has it that goes up with whole passes only."""
        sampler = make()
        take(sampler, 2)
        sampler.set_epoch(0)
        with pytest.warns(UserWarning, match="epoch 0 begins again, after 2 of its 6 batches; set_epoch with another"):
            again = list(sampler)
        assert again == epochs_of()[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler.set_epoch(0)
            assert list(sampler) == again

    def test_no_item_is_left_out_more_often(self):
        """Of 7, one in each epoch. The bound is passed once in a million."""
        sampler = with_order(make(num_items=7, batch_size=3, drop_last=True), np.arange(7))
        left_out = Counter(item for _ in range(2100) for item in set(range(7)).difference(*sampler))
        chi_square = sum((left_out[item] - 300) ** 2 / 300 for item in range(7))
        assert chi_square < stats.chi2.isf(1e-6, 6)

    def test_without_an_order_are_uniform_permutations(self):
        sampler = make(num_items=4, batch_size=2)
        counts = Counter(tuple(itertools.chain(*sampler)) for _ in range(4800))
        chi_square = sum((counts[order] - 200) ** 2 / 200 for order in itertools.permutations(range(4)))
        assert chi_square < stats.chi2.isf(1e-6, 23)


class TestUpdate:
    def test_before_the_first_epoch(self):
        sampler = make(num_items=24)
        update(sampler, np.arange(24))
        assert sampler.facts == FACTS
        assert all(max(batch) - min(batch) in (3, 23) for batch in sampler)

    def test_in_the_middle_of_an_epoch_takes_effect_at_the_next(self):
        sampler, twin = make(num_items=24), make(num_items=24)
        expected = list(twin)
        taken, iterator = take(sampler, 2)
        update(sampler, np.arange(24))
        update(twin, np.arange(24))
        assert taken + list(iterator) == expected
        assert list(sampler) == list(twin) != list(make(num_items=24, seed=1))

    def test_in_the_middle_of_an_epoch_that_is_given_up_takes_effect_at_the_next(self):
        sampler, twin = make(), make()
        take(sampler, 2)
        for each in (sampler, twin):
            update(each, np.arange(23))
        twin.set_epoch(1)
        assert list(sampler) == list(twin)

    def test_after_a_loaded_start_of_an_epoch_takes_effect_in_it(self):
        sampler, loaded, twin = make(), make(), make()
        sampler.set_epoch(1)
        loaded.load_state_dict(sampler.state_dict())
        twin.set_epoch(1)
        for each in (loaded, twin):
            update(each, np.arange(23))
        assert_identical(loaded.state_dict(), twin.state_dict())
        assert list(loaded) == list(twin)

    def test_the_latest_of_several_counts(self):
        sampler, twin = make(), make()
        _, iterator = take(sampler, 2)
        for seed in range(3):
            update(sampler, random_order(seed, 23))
        update(twin, random_order(2, 23))
        list(iterator)
        twin.set_epoch(1)
        assert list(sampler) == list(twin)

    def test_of_a_resumed_epoch_waits_for_its_end(self):
        sampler, resumed = with_order(make(), random_order(0, 23)), make()
        _, iterator = take(sampler, 2)
        resumed.load_state_dict(sampler.state_dict())
        for each in (sampler, resumed):
            update(each, np.arange(23))
        assert [list(resumed), list(resumed)] == [list(iterator), list(sampler)]

    def test_a_state_shares_no_memory_with_a_sampler(self):
        sampler, twin, loaded = make(), make(), make()
        update(sampler, random_order(0, 23))
        update(twin, random_order(0, 23))
        state = sampler.state_dict()
        loaded.load_state_dict(state)
        state["order"].zero_()
        assert list(sampler) == list(loaded) == list(twin)

    def test_a_state_has_an_order_twice_only_where_the_next_epoch_has_another(self):
        sampler, loaded = make(), make()
        update(sampler, random_order(0, 23))
        take(sampler, 2)
        loaded.load_state_dict(sampler.state_dict())
        assert sampler.state_dict()["next_order"] is None and loaded.state_dict()["next_order"] is None
        update(sampler, random_order(1, 23))
        assert sampler.state_dict()["next_order"].tolist() == random_order(1, 23).tolist()


class TestFewItems:
    @pytest.mark.parametrize("order", [None, np.array([1, 2, 0])], ids=["", "order"])
    @pytest.mark.parametrize("ranks", [1, 2, 3, 5])
    def test_make_one_batch_of_each_rank(self, ranks, order):
        samplers = [with_order(make(num_items=3, rank=rank, world_size=ranks), order) for rank in range(ranks)]
        batches = [list(sampler) for sampler in samplers]
        assert all([len(batch)] == [len(sampler)] == [1] for batch, sampler in zip(batches, samplers, strict=True))
        items = [item for (batch,) in batches for item in batch]
        assert set(items) == {0, 1, 2} and len(items) == -(-3 // ranks) * ranks

    def test_are_an_error_where_there_would_be_no_batch(self):
        with pytest.raises(ValueError, match="^num_items must be at least batch_size . world_size = 8 .*got 7"):
            make(num_items=7, rank=1, world_size=2, drop_last=True)
        assert len(list(make(num_items=8, rank=1, world_size=2, drop_last=True))) == 1


@pytest.mark.parametrize("workers", [0, 2])
class TestDataLoader:
    def test_loads_the_batches(self, workers):
        sampler, twin = make(), make()
        loader = DataLoader(torch.arange(23) * 10, batch_sampler=sampler, num_workers=workers)
        assert len(loader) == 6
        for _ in range(2):
            assert [batch.tolist() for batch in loader] == [[10 * item for item in batch] for batch in twin]

    def test_resumes_though_batches_are_loaded_ahead(self, workers):
        """With workers, the sampler's epoch has ended some batches before they are trained on."""
        sampler = with_order(make(), random_order(0, 23))
        states, trained = [], []
        for batch in DataLoader(torch.arange(23), batch_sampler=sampler, num_workers=workers):
            trained.append(batch.tolist())
            if len(trained) == 2:
                update(sampler, np.arange(23))
            states.append(saved(sampler.state_dict(batches_done=len(trained))))
        following = list(sampler)
        for done, state in enumerate(states, 1):
            resumed = make()
            resumed.load_state_dict(state)
            if done == 1:
                update(resumed, np.arange(23))
            ends = [trained[done:], following] if done < 6 else [following]
            assert [list(resumed) for _ in ends] == ends

    def test_loads_another_epoch_in_a_pass_that_is_given_up(self, workers):
        loader = DataLoader(torch.arange(23), batch_sampler=make(), num_workers=workers)
        for epoch in epochs_of():
            assert [batch.tolist() for _, batch in zip(range(2), loader, strict=False)] == epoch[:2]


@pytest.mark.parametrize("integer", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_a_state_is_of_python_numbers_whatever_integers_came(integer):
    sampler = make(num_items=integer(23), batch_size=integer(4), rank=integer(0), world_size=integer(1))
    sampler.set_epoch(integer(5))
    state = saved(sampler.state_dict(integer(2)))
    make().load_state_dict(state)
    assert {type(value) for name, value in state.items() if name != "drop_last"} == {int, type(None)}


def test_a_state_of_integers_of_other_kinds_is_taken_as_numbers():
    sampler = make()
    sampler.load_state_dict(sampler.state_dict() | {"epoch": torch.tensor(3), "batches_done": np.int64(2)})
    assert (sampler.epoch, len(list(sampler)), sampler.epoch) == (3, 4, 4)
