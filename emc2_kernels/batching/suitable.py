"""Which losses can be trained on batches that are not uniform draws."""

from __future__ import annotations

import warnings

from torch import nn

from ..losses import CachedSoftmaxLoss, EMC2Loss, SogCLRLoss


def check_loss(loss: nn.Module) -> None:
    """Call it once where a loss is to be trained with ``GlobalContrastiveBatchSampler``; it may be wrapped in others.

    Args:
        loss: of ``emc2_kernels.losses``, or a module that has one in it.

    Raises:
        ValueError: for ``EMC2Loss(proposals="batch")``. Its chains take the batch for independent uniform draws; from
            batches of alike items they have another stationary law.

    Warns:
        UserWarning: for ``SogCLRLoss``, whose gradient is then biased about as much as NT-Xent's over the batch. Its
            denominators are means over the batch that stand for means over the data set; over alike items they are too
            large. Weights then sum to less than they should.
        UserWarning: for carry="corrected", likewise, the default of ``EMC2Loss(proposals="bank")`` and of
            ``CachedSoftmaxLoss``. It moves each negative by the difference of two batches' means, the drift where
            batches are uniform draws; of batches of alike items it is the way from one kind of items to another.
    """
    for module in loss.modules():
        if isinstance(module, EMC2Loss) and module.proposals == "batch":
            expected = 'sampler="mh" with proposals="bank", which makes its own uniform draws,'
            got = f'sampler="{module.sampler}" with proposals="batch"'
            raise ValueError(f"EMC2Loss must have {expected} where batches are chosen, got {got}")
        if isinstance(module, SogCLRLoss):
            _warn("SogCLRLoss", "its denominators take the batch for uniform draws, and are too large")
        if isinstance(module, EMC2Loss | CachedSoftmaxLoss) and module.carry == "corrected":
            name = f'{type(module).__name__}(carry="corrected")'
            _warn(name, 'it takes the means of batches for those of the data set; carry="recompute" does not')


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"{name} is biased by GlobalContrastiveBatchSampler: {reason}", stacklevel=3)
