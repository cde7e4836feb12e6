"""Which losses can be trained on batches that are not uniform draws."""

from __future__ import annotations

import warnings

from torch import nn

from ..losses import EMC2Loss, SogCLRLoss


def check_loss(loss: nn.Module) -> None:
    """Call it once where a loss is to be trained with ``GlobalContrastiveBatchSampler``.

    Raises:
        ValueError: for ``EMC2Loss(proposals="batch")``. Its chains take the batch for independent uniform draws; from
            batches of alike items they have another stationary law.

    Warns (UserWarning): for ``SogCLRLoss``. Its denominators are means over the batch that stand for means over the
    data set; over alike items they are too large. Weights then sum to less than they should.
    """
    if isinstance(loss, EMC2Loss) and loss.proposals == "batch":
        expected = 'proposals="bank", which makes its own uniform draws'
        raise ValueError(f'EMC2Loss must have {expected}, where batches are chosen, got proposals="batch"')
    if isinstance(loss, SogCLRLoss):
        reason = "its denominators take the batch for uniform draws, and are too large where batches are chosen"
        warnings.warn(f"SogCLRLoss is biased by GlobalContrastiveBatchSampler: {reason}", stacklevel=2)
