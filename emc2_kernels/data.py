"""Items' numbers, by which losses keep what they know of each: of a data set's positions, of names, of a stream's keys.

A loss wants ``index`` (b,) int64 in [0, num_items), alike on all processes. ``indexed`` has a data set yield it,
``ItemNumbers`` numbers names, and ``hash_slots`` gives keys of which nobody has a list a slot each.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from . import checks

__all__ = ["IndexedDataset", "ItemNumbers", "hash_slot", "hash_slots", "indexed", "shared_slots"]

SLOT_BYTES = 8  # of a digest: a slot is its remainder, even to one in 2^64 / num_slots
STREAMS = "a stream has keys in the place of numbers: emc2_kernels.data.hash_slots(keys, num_slots)"


class IndexedDataset(Dataset):
    """A map-style data set whose items come with their numbers, the positions in it.

    A tuple ``(x, y)`` becomes ``(x, y, number)``, a named one a plain one; a mapping a dict with one key more; anything
    else, a list of two views among it, ``(sample, number)``. Numbers are ints, which torch's ``default_collate`` makes
    an int64 tensor of. What is wrapped counts: of ``indexed(Subset(dataset, kept))`` the numbers are positions in the
    subset, with ``num_items = len(kept)``; of ``Subset(indexed(dataset), kept)`` those of the whole data set. Several
    data sets are joined first: ``indexed(ConcatDataset([a, b]))``, or both would have an item 0.

    Args:
        dataset: has ``__len__`` and ``__getitem__``. A data set of the package datasets is one.
        key: of the number in a mapping.

    Raises:
        TypeError: ``dataset`` is a stream, or ``key`` no string. ValueError: ``key`` is empty.
    """

    def __init__(self, dataset: Any, key: str = "index") -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            expected = "a map-style data set, with __len__ and __getitem__"
            raise TypeError(f"dataset must be {expected} ({STREAMS}), got {checks.describe(dataset)}")
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length, got {checks.describe(dataset)}")
        if not isinstance(key, str):
            raise TypeError(f"key must be a string, got {checks.describe(key)}")
        if not key:
            raise ValueError("key must be a name, got an empty string")
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Any, ...] | dict[Any, Any]:
        """The item at a position, and its number.

        Args:
            position: an integer as ``dataset`` takes it; a negative one counts from the end.

        Raises:
            IndexError: the position is outside the data set. ValueError: a mapping has the key already.
        """
        return self._numbered(self.dataset[position], position)

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Any, ...] | dict[Any, Any]]:
        """The items at these positions, as torch's loaders ask for a batch."""
        several = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[position] for position in positions] if several is None else several(positions)
        return [self._numbered(sample, position) for sample, position in zip(samples, positions, strict=True)]

    def _numbered(self, sample: Any, position: Any) -> tuple[Any, ...] | dict[Any, Any]:
        number, items = checks.integer("position", position), len(self)
        number += items if number < 0 else 0
        if not 0 <= number < items:  # a data set that makes its items up may have yielded one
            raise IndexError(f"position must be in [{-items}, {items}), got {position}")
        if isinstance(sample, Mapping):
            if self.key in sample:
                expected = f"none of a sample's own, {checks.shown([*sample])}"
                raise ValueError(f"key must be {expected}, got {self.key!r}")
            return {**sample, self.key: number}
        return (*sample, number) if isinstance(sample, tuple) else (sample, number)


def indexed(dataset: Any, key: str = "index") -> IndexedDataset:
    """A data set that yields its items' numbers, too: see ``IndexedDataset``.

    Args:
        dataset: map-style, with ``__len__`` and ``__getitem__``.
        key: of the number in a mapping.

    Example:
        >>> for x0, x1, index in DataLoader(indexed(pairs), batch_size=32, shuffle=True):
        ...     loss(encoder(x0), encoder(x1), index).backward()
    """
    return IndexedDataset(dataset, key)


class ItemNumbers:
    """The numbers of items that have names: file names, as lightly's loaders yield them, or ids.

    A name's number is its place among the sorted names, each counted one time: the same on all processes, and in the
    next run, whatever order a folder was listed in. Another set of names has other numbers.

    Args:
        names: strings, of the whole data set.

    Raises:
        TypeError: they are none, or one string. ValueError: there are none.

    Example:
        >>> numbers = ItemNumbers(dataset.get_filenames())
        >>> loss = EMC2Loss(len(numbers), 128)
        >>> for (x0, x1), _, filenames in loader:
        ...     loss(encoder(x0), encoder(x1), numbers(filenames)).backward()
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(_strings("names", names)))
        if not self.names:
            raise ValueError("names must hold at least one name, got none")
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, names: Iterable[str]) -> Tensor:
        """(b,) int64, on the CPU: the numbers of a batch's names.

        Raises:
            KeyError: a name is not among those that were numbered. TypeError: ``names`` are no strings, or one.
        """
        batch = _strings("names", names)
        try:
            return torch.tensor([self._numbers[name] for name in batch], dtype=torch.int64, device="cpu")
        except KeyError as error:
            expected = f"of the {len(self)} that were numbered, {self.names[0]!r} .. {self.names[-1]!r}"
            raise KeyError(f"names must be {expected}, got {error.args[0]!r}") from None


def hash_slot(key: str | bytes | int, num_slots: int) -> int:
    """A slot in [0, num_slots) that a key has in all processes, on all machines and in all versions.

    It is the remainder of BLAKE2b's first 8 bytes, little-endian, of the key: of a string's UTF-8, of an integer's
    decimal digits (so that 7 and "7" are one key).

    Items that share a slot share what a loss keeps of an item (chain, denominator, embedding), and are no negatives of
    each other; see ``shared_slots`` for how many do.

    Args:
        key: names an item: the URL of an image, ``__key__`` of a webdataset. Not its class.
        num_slots: at least 1; of the loss, its ``num_items``.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
    """
    return _slot(key, checks.at_least("num_slots", num_slots, 1))


def hash_slots(keys: Iterable[str | bytes | int] | Tensor, num_slots: int) -> Tensor:
    """(b,) int64, on the CPU: the slots of a batch's keys, see ``hash_slot``.

    Args:
        keys: b of them, or (b,) integers in a tensor.
        num_slots: at least 1.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Example:
        >>> loss = EMC2Loss(num_slots, 128)
        >>> for x0, x1, keys in stream:
        ...     loss(encoder(x0), encoder(x1), hash_slots(keys, num_slots)).backward()
    """
    num_slots = checks.at_least("num_slots", num_slots, 1)
    if isinstance(keys, Tensor):
        if keys.dim() != 1 or keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool:
            raise TypeError(f"keys must be integers of shape (b,) in a tensor, got {checks.describe(keys)}")
        keys = keys.tolist()
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise TypeError(f"keys must be a batch of keys, got {checks.describe(keys)}")
    return torch.tensor([_slot(key, num_slots) for key in keys], dtype=torch.int64, device="cpu")


def shared_slots(num_items: int, num_slots: int) -> float:
    """The expected share of items that share their slot with another: 1 - (1 - 1 / num_slots)^(num_items - 1).

    9.5 % with ten slots an item, 3.3 % with thirty. Above 32 an item losses may take hashed keys for class labels, and
    warn.

    Args:
        num_items: at least 1, of the stream.
        num_slots: at least 1.
    """
    num_items = checks.at_least("num_items", num_items, 1)
    num_slots = checks.at_least("num_slots", num_slots, 1)
    if num_slots == 1:
        return float(num_items > 1)
    return -math.expm1((num_items - 1) * math.log1p(-1 / num_slots))


def _slot(key: Any, num_slots: int) -> int:
    if isinstance(key, str):
        data = key.encode(errors="surrogatepass")  # names of files may be no text
    elif isinstance(key, bytes):
        data = key
    else:
        try:
            data = str(operator.index(key)).encode()
        except TypeError:
            data = None
        if data is None or isinstance(key, bool):
            raise TypeError(f"key must be a string, bytes or an integer, got {checks.describe(key)}")
    return int.from_bytes(hashlib.blake2b(data, digest_size=SLOT_BYTES).digest(), "little") % num_slots


def _strings(name: str, values: Any) -> list[str]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several strings, got {checks.describe(values)}")
    strings = list(values)
    for value in strings:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be strings, got {checks.describe(value)}")
    return strings
