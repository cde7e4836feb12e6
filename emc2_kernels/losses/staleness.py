"""How much of what embeddings said they still say when they come back: whether kept keys are negatives to learn from.

Where all embeddings drift together, positives are fresh and kept keys lag behind. The gradient takes that lag for what
tells the positive apart and pushes on in the same direction: from scratch, under AdamW with random augmentation,
training ends with all embeddings at one point. So the lag is measured where the fresh embedding is at hand as well: an
anchor's positive, as the bank has it from the item's last visit. Two draws of an augmentation differ whether or not one
of them was kept, so nothing but the encoder's drift makes the kept one score lower. (With normalize=False, lengths that
grow look like drift, and lengths that shrink look fresh.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..distributed.shards import Shards, sum_over_ranks
from ..stores.strict_state import FINITE, range_errors
from ..stores.table import SlotTable
from .anchors import Anchors

MAX_STALENESS = 0.2  # docs/development/decisions.md: at 0.5 features are worse, at 0.1 retrieval is
MEMORY = 0.9  # of the sums, from a batch to the next: of one batch of four alone the gate is a matter of chance


class Staleness(SlotTable):
    """Running sums over batches, in ``state_dict``."""

    # (2,) float32: by how much less similar anchors are to their positives as kept than to those of now; and to
    # negatives of the batch.
    sums: Tensor

    def __init__(self) -> None:
        super().__init__(2, views=1)
        self.keep("sums", 0, torch.float32)

    @torch.no_grad()
    def with_batch(self, anchors: Anchors, fresh: Tensor, held: Tensor, kept: Tensor, shards: Shards | None) -> Tensor:
        """(2,) the sums with a batch's, of all ranks.

        Args:
            fresh: (b,) similarity of the anchors' pairs.
            held: (2b,) bool, whether the bank has the anchors themselves.
            kept: (2b, d) what it has for them; zeros where it has nothing.
        """
        z = anchors.embeddings.detach().view(2, -1, anchors.embeddings.shape[1])
        held = held.view(2, -1)
        lost = (fresh * held).sum() - (z.flip(0) * kept.to(z.dtype).view(z.shape)).sum()
        seen, positive, of_views, b = held.sum(), fresh.sum(), z.sum(1), z.shape[1]
        if shards is not None:
            numbers = torch.stack((lost, seen.to(z.dtype), positive))
            total = sum_over_ranks(torch.cat((numbers, of_views.flatten())), shards)
            (lost, seen, positive), of_views, b = total[:3], total[3:].view(2, -1), shards.total
        before = self.whole("sums")
        if b < 2:  # without a negative nothing says what a difference is worth
            return before
        negative = (torch.dot(*of_views) - positive) / (b * (b - 1))
        return torch.stack((lost, (positive / b - negative) * seen)).float().add_(before, alpha=MEMORY)

    def put_sums(self, sums: Tensor, only: Tensor | None) -> None:
        finite = sums.isfinite().all()  # a sum may not be where no term overflows; one without the other means nothing
        only = finite if only is None else only & finite
        self.put_whole("sums", sums, only)

    def _wrong_values(self, prefix: str, **tables: Tensor) -> Iterator[str]:
        yield from range_errors(f"{prefix}sums", tables["sums"], *FINITE)

    def extra_repr(self) -> str:
        return f"at most {MAX_STALENESS}"


def staleness(sums: Tensor) -> Tensor:
    """() of the sums (2,). 0: kept positives score as fresh ones do; 1: no higher than negatives. NaN: of nothing, or
    nothing tells positives from negatives."""
    return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan)


def is_fresh(sums: Tensor) -> Tensor:
    """() bool; where it is NaN, False."""
    return staleness(sums) < MAX_STALENESS
