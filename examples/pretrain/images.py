"""Images in memory, or on disk: of those a batch is decoded when it is asked for, or ahead of that in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers in a batch of images that is only encoded: 606 images of STL-10, 111 of 3 x 224 x 224.
CHUNK_NUMBERS = 2**24
AHEAD = 2  # batches
UNLABELLED = -1


class Images:
    """Indexed like a tensor (n, channels, height, width) of float32 in [0, 1], by a tensor of positions.

    Threads are enough: Pillow and copies from a mapped file let go of Python's lock. Nothing about an image is random,
    so neither their number nor their order changes a run.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        items: Tensor,
        shape: tuple[int, int, int],
        workers: int,
        device: torch.device | None = None,
    ) -> None:
        """read: item -> (channels, height, width) uint8 on the CPU; items (n,) int64; shape: of one image."""
        self.read = read
        self.items = items
        self.shape = torch.Size((len(items), *shape))
        self.workers = workers
        self.device = device or torch.device("cpu")
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self.started: dict[int, Future[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> Images:
        return Images(self.read, self.items, self.shape[1:], self.workers, device)

    def subset(self, positions: Tensor) -> Images:
        return Images(self.read, self.items[positions], self.shape[1:], self.workers, self.device)

    def start(self, positions: Tensor) -> None:
        """Reads these (k,) in the background, for the next time that they are asked for."""
        for item in self.items[positions.cpu()].tolist():
            if item not in self.started:
                self.started[item] = self.pool.submit(self.read, item)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """positions (k,) int64 -> (k, channels, height, width) on the device."""
        items = self.items[positions.cpu()].tolist()
        # An item that the batch has twice is read twice at worst.
        waiting = [self.started.pop(item, None) or self.pool.submit(self.read, item) for item in items]
        batch = torch.stack([each.result() for each in waiting]) if items else torch.empty(0, *self.shape[1:])
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch.float() / 255


class Split(NamedTuple):
    """Images are (n, channels, height, width) float32 in [0, 1], in memory or on disk; labels (n,) int64 from 0.

    Training images may be UNLABELLED: they are trained on, and the probes leave them out.
    """

    train_images: Tensor | Images
    train_labels: Tensor
    test_images: Tensor | Images
    test_labels: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(*(tensor.to(device) for tensor in self))


def batches(num_items: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of positions, (batch_size,) int64 each, in a fresh uniform order; the remainder is dropped.

    EMC² proposes the batch to its chains as if drawn uniformly from the data set. Batches that are put together in
    another way (by class, by similarity) bias it, and so would a short last batch, whose sweep is shorter.
    """
    order = torch.randperm(num_items, generator=generator)
    for start in range(0, num_items - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def ahead(batches: Iterable[Tensor], images: Tensor | Images) -> Iterator[Tensor]:
    """The batches of positions as they are. Of images on disk, those of the next ones are read meanwhile."""
    if not isinstance(images, Images):
        yield from batches
        return
    queue: deque[Tensor] = deque()
    for batch in batches:
        images.start(batch)
        queue.append(batch)
        if len(queue) > AHEAD:
            yield queue.popleft()
    yield from queue


def chunks(images: Tensor | Images, positions: Tensor) -> Iterator[Tensor]:
    """images[positions], a part after the other: up to 1,024 of them, fewer where they are large."""
    size = min(1024, max(1, CHUNK_NUMBERS // images.shape[1:].numel()))
    for part in ahead(positions.split(size), images):
        yield images[part]
