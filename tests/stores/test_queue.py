"""The items of the latest batches."""

import copy

import pytest
import torch
from helpers import assert_identical, assert_unchanged, int64, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from emc2_kernels.stores.queue import ItemQueue

ITEMS = 50


def filled(size, *batches):
    queue = ItemQueue(ITEMS, size)
    for batch in batches:
        queue.push(int64(*batch))
    return queue


def entries(queue):
    return queue.items.tolist()


@pytest.mark.parametrize(
    ("batches", "kept"),
    [
        ([], [-1, -1, -1, -1, -1]),
        ([[7]], [-1, -1, -1, -1, 7]),
        ([[7, 3], [9]], [-1, -1, 7, 3, 9]),
        ([[7, 3], [9, 1, 4], [0]], [3, 9, 1, 4, 0]),
        ([[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5]),
        ([[8], [1, 2, 3, 4, 5, 6, 7]], [3, 4, 5, 6, 7]),
        ([[7, 3], [3, 9]], [-1, 7, -1, 3, 9]),
        ([[7, 3], [9, 7], [7, 3]], [-1, 9, -1, 7, 3]),
        ([[4, 6, 4]], [-1, -1, -1, 6, 4]),
        ([[4], [6, 6, 4, 6]], [-1, -1, -1, 4, 6]),
        ([[2, 2, 2, 2, 2, 2, 2]], [-1, -1, -1, -1, 2]),
        ([[0], [ITEMS - 1]], [-1, -1, -1, 0, ITEMS - 1]),
    ],
    ids=str,
)
def test_the_latest_items_come_last_and_each_once(batches, kept):
    assert entries(filled(5, *batches)) == kept


def test_one_entry():
    assert entries(filled(1, [3, 5])) == [5] and entries(filled(1, [3], [3])) == [3]


def test_over_many_batches_it_has_the_latest_of_them():
    generator, queue, pushed = torch.Generator().manual_seed(0), ItemQueue(ITEMS, 16), []
    for size in torch.randint(1, 12, (200,), generator=generator).tolist():
        batch = torch.randint(ITEMS, (size,), generator=generator)
        queue.push(batch)
        pushed += batch.tolist()
        latest = pushed[-16:]
        expected = [item if item not in latest[place + 1 :] else -1 for place, item in enumerate(latest)]
        assert entries(queue) == [-1] * (16 - len(latest)) + expected


def test_outside_are_those_that_the_batch_has_not():
    queue = filled(5, [7, 3, 9], [1])
    before = snapshot(queue)
    items, usable = queue.outside(int64(9, 2, 9))
    assert items.tolist() == [-1, 7, 3, 9, 1] and usable.tolist() == [False, True, True, False, True]
    assert not queue.outside(int64(1, 3, 7, 9))[1].any() and queue.outside(int64(0))[1].tolist() == [False] + [True] * 4
    assert not ItemQueue(ITEMS, 3).outside(int64(0, 1))[1].any()
    assert_unchanged(queue, before)


@pytest.mark.parametrize("only", [True, False])
def test_a_push_can_be_called_off_on_the_device(only):
    queue = filled(3, [7, 3])
    queue.push(int64(3, 5), only=torch.tensor(only))
    assert entries(queue) == ([-1, 3, 5] if only else [-1, 7, 3])


def test_what_outside_has_given_is_not_written_to():
    queue = filled(3, [7, 3, 5])
    items, _ = queue.outside(int64(1))
    queue.push(int64(1, 2))
    assert items.tolist() == [7, 3, 5]


WAITING = ("isin", "unique", "nonzero", "masked_select", "_local_scalar_dense", "bincount", "repeat_interleave")


class Operations(TorchDispatchMode):
    """Names of all that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("size", [1, 64])
def test_nothing_is_asked_that_a_gpu_would_be_waited_for(size):
    """A batch of any size; torch.isin waits with more than a few items only."""
    queue, batch = ItemQueue(ITEMS, 16), torch.arange(size) % ITEMS
    with Operations() as seen:
        queue.outside(batch)
        queue.push(batch)
    assert "searchsorted" in seen.names and not [name for name in seen.names if any(w in name for w in WAITING)]


def test_a_state_is_loaded_as_it_was():
    queue, other = filled(4, [7, 3], [9]), filled(4, [1])
    assert list(queue.state_dict()) == ["items"]
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    assert_identical(snapshot(other), snapshot(queue))
    for each in (queue, other):
        each.push(int64(3, 8))
    assert entries(other) == entries(queue) == [-1, 9, 3, 8]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (int64(1, 2, 3), "size mismatch for items"),
        (int64(1, 2, 3, 4, 5), "size mismatch for items"),
        (int64(1, 2, 3, ITEMS), "items must hold values in [-1, 49], got values from 1 to 50"),
        (int64(1, 2, 3, 2), "items must hold each item once"),
        (int64(1, 2, 3, -2), "items must hold values in [-1, 49], got values from -2 to 3"),
        (torch.ones(4), "items must hold integers"),
        ([1, 2, 3, 4], "items must be a tensor"),
        (None, "Missing key(s) in state_dict: items"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused(items, says):
    queue = filled(4, [7, 3])
    before = snapshot(queue)
    with pytest.raises(RuntimeError) as error:
        queue.load_state_dict({} if items is None else {"items": items})
    assert says in str(error.value)
    assert_unchanged(queue, before)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_leaves_items_alone(cast):
    queue = filled(4, [7, 3])
    getattr(queue, cast)()
    assert queue.items.dtype == torch.int64 and entries(queue) == [-1, -1, 7, 3]


def test_one_that_leaves_the_meta_device_is_empty():
    with torch.device("meta"):
        queue = ItemQueue(ITEMS, 4)
    assert queue.items.device.type == "meta"
    queue.to_empty(device="cpu")
    assert entries(queue) == [-1] * 4
    queue.push(int64(2, 1))
    assert entries(queue) == [-1, -1, 2, 1]


def test_it_shows_its_size():
    assert repr(ItemQueue(ITEMS, 4)) == "ItemQueue(size=4)"
