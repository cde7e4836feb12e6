"""What all adapters have: a loss inside, and its statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks


class Adapter(nn.Module):
    """A loss of ``emc2_kernels.losses`` for a library that calls losses in its own way.

    ``stats`` are the statistics of the latest call with ``report=True``, detached 0-d tensors, ``ntxent`` among them:
    the in-batch value, which runs of all losses can be compared by. EMC2's own value leaves the positive out of its sum
    and may be negative. They are no entries of what is returned: trainers add up all entries of a dict of losses.

    Args:
        loss: called ``loss(z0, z1, index, return_stats=...)``. What it keeps is saved by ``adapter.loss.state_dict()``.
        report: whether statistics are made. They cost up to a backward pass of the loss.

    Raises:
        TypeError: ``loss`` is no module, ``report`` no bool.
    """

    def __init__(self, loss: nn.Module, report: bool = False) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a loss of emc2_kernels.losses, got {checks.describe(loss)}")
        checks.boolean("report", report)
        self.loss, self.report = loss, report
        self.stats: dict[str, Tensor] = {}

    @property
    def keeps_items(self) -> bool:
        """Whether the loss has a state for each item, and so cannot do without their numbers."""
        return hasattr(self.loss, "num_items")

    def value_of(self, z0: Tensor, z1: Tensor, index: Tensor | None, **options: Any) -> Tensor:
        """The loss's value; fills ``stats``."""
        if not self.report:
            return self.loss(z0, z1, index, **options)
        value, self.stats = self.loss(z0, z1, index, return_stats=True, **options)
        return value

    def extra_repr(self) -> str:
        return f"report={self.report}"
