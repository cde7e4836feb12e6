"""Where items' numbers come from: data sets' positions, names, hashed keys."""

from __future__ import annotations

import collections
import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import named_error, normal
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from emc2_kernels.data import IndexedDataset, ItemNumbers, hash_slot, hash_slots, indexed, shared_slots
from emc2_kernels.losses import CachedSoftmaxLoss, EMC2Loss, ISogCLRLoss, SogCLRLoss

N = 20
Named = collections.namedtuple("Named", "x y")


class Made(Dataset):
    """Its items are made from their position by a function."""

    def __init__(self, make, count=N):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, position):
        if not -self.count <= position < self.count:
            raise IndexError("no such item")
        return self.make(int(position) % self.count)


class Batched(Made):
    """Fetches a batch at a time."""

    def __init__(self, make):
        super().__init__(make)
        self.asked = []

    def __getitems__(self, positions):
        self.asked.append(list(positions))
        return [self[position] for position in positions]


def pair(item):
    return torch.tensor(item), torch.tensor(-item)


def two_views(item):
    return [torch.tensor(item), torch.tensor(-item)]


SAMPLES = {
    "a tuple": (pair, lambda item: (*pair(item), item)),
    "a named tuple": (lambda item: Named(item, 0), lambda item: (item, 0, item)),
    "a mapping": (lambda item: {"x": item}, lambda item: {"x": item, "index": item}),
    "an ordered one": (lambda item: collections.OrderedDict(x=item), lambda item: {"x": item, "index": item}),
    "a user's": (lambda item: collections.UserDict(x=item), lambda item: {"x": item, "index": item}),
    "two views": (two_views, lambda item: (two_views(item), item)),
    "a tensor": (torch.tensor, lambda item: (torch.tensor(item), item)),
    "a text": (lambda item: f"{item:d}", lambda item: (f"{item:d}", item)),
}


@pytest.mark.parametrize(("make", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_what_samples_become(make, expected):
    data = indexed(Made(make))
    assert len(data) == N and isinstance(data, IndexedDataset)
    for position in (0, 7, N - 1, -1, -N, np.int64(3), torch.tensor(4)):
        found = data[position]
        assert found == expected(int(position) % N)
        assert type(found) in (tuple, dict)
        assert type(found["index"] if isinstance(found, dict) else found[-1]) is int


def test_positions_outside_are_what_they_were():
    for position in (N, -N - 1):
        with pytest.raises(IndexError, match="no such item"):
            indexed(Made(pair))[position]
    assert [item for _, _, item in indexed(Made(pair))] == list(range(N))  # and so a loop over it ends

    class Endless(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, position):
            return (position,)

    for position in (3, -4):
        with named_error(IndexError, r"position must be in \[-3, 3\)"):
            indexed(Endless())[position]


def test_batches_are_fetched_as_the_inner_one_fetches_them():
    inner = Batched(pair)
    assert indexed(inner).__getitems__([3, -1, 5]) == [(*pair(item), item) for item in (3, N - 1, 5)]
    assert inner.asked == [[3, -1, 5]]
    assert indexed(Made(pair)).__getitems__([3, 0]) == [(*pair(item), item) for item in (3, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_int64_numbers(workers):
    data = indexed(Made(pair))
    for x, y, index in DataLoader(data, batch_size=8, shuffle=True, num_workers=workers):
        assert index.dtype == torch.int64 and torch.equal(x, index) and torch.equal(y, -index)


def test_what_is_wrapped_counts():
    kept = [5, 3, 11]
    assert [item for *_, item in indexed(Subset(Made(pair), kept))] == [0, 1, 2]
    assert [item for *_, item in Subset(indexed(Made(pair)), kept)] == kept
    assert [item for *_, item in indexed(ConcatDataset([Made(pair), Made(pair)]))] == list(range(2 * N))
    assert [item for *_, item in indexed(TensorDataset(torch.zeros(4, 2)))] == list(range(4))


def test_it_can_be_pickled():
    data = pickle.loads(pickle.dumps(indexed(Made(pair), key="number")))
    assert data[2] == (*pair(2), 2) and data.key == "number"


def test_a_data_set_of_the_package_datasets():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"text {item}" for item in range(N)]})
    (batch,) = DataLoader(indexed(rows), batch_size=N)
    assert batch["text"][4] == "text 4" and batch["index"].tolist() == list(range(N))
    with named_error(TypeError, "dataset must be a map-style data set.*hash_slots"):
        indexed(rows.to_iterable_dataset())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 3


def test_bad_data_sets():
    for data in (Stream(), iter([1]), None, 7):
        with named_error(TypeError, "dataset must be a map-style data set.*hash_slots"):
            indexed(data)

    class Endless(Dataset):
        def __getitem__(self, position):
            return position

    with named_error(TypeError, "dataset must have a length"):
        indexed(Endless())
    with named_error(TypeError, "key must be a string"):
        indexed([1, 2], key=3)
    with named_error(ValueError, "key must be a name"):
        indexed([1, 2], key="")
    with named_error(ValueError, r"key must be none of a sample's own, \['index'\]"):
        indexed([{"index": 1}])[0]
    with named_error(TypeError, "position must be an integer"):
        indexed({"a": 1})["a"]


NAMES = [f"class{number % 3}/{number:03}.png" for number in range(50)]


def test_names_have_the_same_numbers_in_any_order():
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    numbers, other = ItemNumbers(NAMES), ItemNumbers(iter([*shuffled, *shuffled[:5]]))
    batch = tuple(shuffled[:9])
    assert len(numbers) == len(other) == 50 and numbers.names == sorted(NAMES)
    assert torch.equal(numbers(batch), other(list(batch))) and numbers(batch).dtype == torch.int64
    assert [numbers.names[item] for item in numbers(batch)] == list(batch)
    assert torch.equal(pickle.loads(pickle.dumps(numbers))(batch), numbers(batch))
    assert numbers([]).shape == (0,)


def test_bad_names():
    numbers = ItemNumbers(NAMES)
    with pytest.raises(
        KeyError, match=r"names must be of the 50 that were numbered, .*class0/000.*got 'class9/000.png'"
    ):
        numbers(["class0/000.png", "class9/000.png"])
    for names in ("class0/000.png", b"x", None, 3):
        with named_error(TypeError, "names must be several strings"):
            numbers(names)
        with named_error(TypeError, "names must be several strings"):
            ItemNumbers(names)
    with named_error(TypeError, "names must be strings"):
        ItemNumbers(["a", 3])
    with named_error(ValueError, "names must hold at least one"):
        ItemNumbers([])


def test_slots_are_the_digests_remainders():
    """By hand, so that no version of anything changes them: chains in checkpoints are of these slots."""
    for key, data in (("über/7", "über/7".encode()), (b"\x00k", b"\x00k"), (-12, b"-12"), (np.int64(9), b"9")):
        digest = hashlib.blake2b(data, digest_size=8).digest()
        assert hash_slot(key, 1000) == int.from_bytes(digest, "little") % 1000
    assert [hash_slot(f"key {number}", 10**6) for number in range(3)] == [647594, 519314, 794554]
    assert hash_slot(7, 10**9) == hash_slot("7", 10**9) == hash_slot(b"7", 10**9)
    assert hash_slot("a", 1) == 0
    assert hash_slot("\udcff.png", 1000) == hash_slot("\udcff.png".encode(errors="surrogatepass"), 1000)


def test_several_at_a_time():
    keys = ["a", "b", "a"]
    found = hash_slots(keys, 50)
    assert found.tolist() == [hash_slot(key, 50) for key in keys] and found.dtype == torch.int64
    assert torch.equal(hash_slots(torch.tensor([3, 1, 2]), 50), hash_slots([3, 1, 2], 50))
    assert hash_slots((), 5).shape == (0,)


def test_bad_keys():
    for key in (True, 1.5, None, ["a"]):
        with named_error(TypeError, "key must be a string, bytes or an integer"):
            hash_slot(key, 10)
    for keys in ("abc", b"abc", 3, None):
        with named_error(TypeError, "keys must be a batch of keys"):
            hash_slots(keys, 10)
    for keys in (torch.rand(3), torch.tensor(3), torch.ones(3, dtype=torch.bool)):
        with named_error(TypeError, "keys must be integers"):
            hash_slots(keys, 10)
    for slots, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)):
        with named_error(error, "num_slots must be"):
            hash_slot("a", slots)
        with named_error(error, "num_slots must be"):
            hash_slots(["a"], slots)


@pytest.mark.parametrize("factor", [1, 3, 10, 30])
def test_the_share_of_items_that_share_a_slot(factor):
    """As counted: a share s of N keys has a standard deviation of about sqrt(2 s / N)."""
    count = 20_000
    slots = hash_slots([f"shard-{key:05}/{key}" for key in range(count)], factor * count)
    in_slot = torch.bincount(slots, minlength=factor * count)[slots]
    found, expected = (in_slot > 1).double().mean().item(), shared_slots(count, factor * count)
    assert abs(found - expected) < 6 * (2 * expected / count) ** 0.5


def test_shares_that_are_known():
    assert shared_slots(10**6, 10**7) == pytest.approx(0.0952, abs=1e-4)
    assert shared_slots(10**6, 10**8) == pytest.approx(0.00995, abs=1e-5)
    assert shared_slots(2, 4) == pytest.approx(0.25) and shared_slots(1, 5) == 0.0 and shared_slots(3, 1) == 1.0
    with named_error(ValueError, "num_items must be at least 1"):
        shared_slots(0, 5)
    with named_error(ValueError, "num_slots must be at least 1"):
        shared_slots(5, 0)


@pytest.mark.parametrize("make", [lambda: SogCLRLoss(10, temperature=0.5), lambda: EMC2Loss(10, 4, temperature=0.5)])
def test_items_that_share_a_slot_are_no_negatives_of_each_other(make):
    """The gradient of one does not see the other, as it does where their slots differ."""

    def gradient_of_first(second, slots):
        first = normal(0, 1, 4).requires_grad_()
        make()(torch.cat((first, second)), normal(1, 2, 4), torch.tensor(slots)).backward()
        return first.grad

    seconds = normal(5, 1, 4), normal(6, 1, 4)
    same, apart = ([gradient_of_first(second, slots) for second in seconds] for slots in ([4, 4], [4, 9]))
    assert torch.equal(*same)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


LOSSES = {
    "EMC2": lambda slots: EMC2Loss(slots, 128),
    "SogCLR": lambda slots: SogCLRLoss(slots),
    "iSogCLR": lambda slots: ISogCLRLoss(slots),
    "cached": lambda slots: CachedSoftmaxLoss(slots, 128),
}
BYTES = {"EMC2": 40 + 4 * 128, "SogCLR": 4, "iSogCLR": 12, "cached": 16 + 8 * 128}


@pytest.mark.parametrize("name", LOSSES)
def test_the_memory_of_a_slot(name):
    """What docs/guide/data.md says."""
    sizes = [sum(value.nbytes for value in LOSSES[name](slots).state_dict().values()) for slots in (1000, 2000)]
    assert (sizes[1] - sizes[0]) / 1000 == BYTES[name]
