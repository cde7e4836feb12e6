"""Whether ``index`` can be the numbers of items: class labels in their place are legal values, and train badly."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

REPEATS_CALLS = 100  # of which repeats are counted: class labels show within a few
BINS = 8191  # by which items are told apart, a prime: those of every k-th item fall into all of them, too
MOST_ROWS = 128 * BINS  # after which it is known which bins are hit; two epochs of fewer items are enough
SPARSEST = 32  # slots an item, where keys are hashed (data.hash_slots) in place of numbers
LOG_CHANCE = math.log(1e12)  # a warning is wrong once in so many runs, whatever the sampler draws uniformly


class IndexWatch:
    """Looks at a loss's batches on the CPU, and warns once. Nothing of it is in a checkpoint.

    Both bounds hold for uniform draws with replacement, and so for epochs without, where there are fewer repeats and
    more items are seen. A process counts on its share of the items alone, where there are several. Class labels are
    0, 1, 2 .., few of them. Where the second half of the numbers is in use, too, they may be hashed keys, or a part of
    the items: one number in SPARSEST is then all that is counted on.
    """

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.calls = self.rows = self.repeats = 0
        self.expected = 0.0  # repeats, of draws with replacement
        self.seen: Tensor | None = None  # (bins,) bool, from the first look to the last
        self.spread = False  # whether a number of the second half has come
        self.done = False

    def share(self) -> int:
        """Of the items, this process's at least."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return max(self.num_items // ranks // (SPARSEST if self.spread else 1), 1)

    def look(self, index: Tensor, repeats: int | None) -> None:
        """At the checked index (b,) of a training step, in which so many rows repeat an item; None: nobody has seen it.
        Called by a loss's ``forward``."""
        if self.done or repeats is None:
            return
        self.spread = self.spread or 2 * int(index.max()) >= self.num_items
        share, b = self.share(), index.shape[0]
        self.calls += 1
        self.rows += b
        if self.calls <= REPEATS_CALLS:
            self.repeats += repeats
            self.expected += _expected_repeats(b, share)
            if _beyond_chance(self.repeats, self.expected):
                self._warn(
                    f"{self.repeats} of {self.rows} rows repeat an item of their batch, where uniform draws from "
                    f"{share} items would about {self.expected:.1g} times"
                )
                return
        if self.seen is None:
            with torch.inference_mode(False):  # else no later step could write to it
                self.seen = torch.zeros(min(self.num_items, BINS), dtype=torch.bool, device="cpu")
        self.seen.index_fill_(0, index % BINS, True)
        if self.rows >= min(2 * self.num_items, MOST_ROWS):
            seen, bins = int(self.seen.sum()), min(share, BINS)
            missed = bins - seen
            if 2 * missed > bins and _beyond_chance(missed, bins * math.exp(-self.rows * (share // bins) / share)):
                what = "items" if self.num_items <= BINS else f"remainders of items modulo {BINS}"
                self._warn(f"{self.rows} rows of a data set of {self.num_items} items had {seen} different {what}")
            self.done, self.seen = True, None

    def _warn(self, what: str) -> None:
        self.done, self.seen = True, None
        seems = (
            "index seems to name classes, and not the items of the data set, for each of which state is kept (or a "
            "part of the items alone is visited, or one several times in a batch); emc2_kernels.data.indexed(dataset) "
            "yields items' numbers"
        )
        # Past look, check_call, the loss's forward, and torch's two frames of a call.
        warnings.warn(f"{seems}: {what}", stacklevel=7)


def _expected_repeats(b: int, items: int) -> float:
    """Of b draws with replacement, draw j repeats an earlier one with a chance of at most min(1, j / items)."""
    certain = max(b - items, 0)
    drawn = b - certain
    return drawn * (drawn - 1) / (2 * items) + certain


def _beyond_chance(found: int, expected: float) -> bool:
    """Chernoff's bound on a sum of chances that are independent, or favour each other's failure, as empty bins do; the
    bounds of all calls add up."""
    if found <= expected:
        return False
    return found * (math.log(found / expected) - 1) + expected > LOG_CHANCE + math.log(REPEATS_CALLS)
