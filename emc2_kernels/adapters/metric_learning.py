"""The call of pytorch-metric-learning's ``SelfSupervisedLoss`` (checked with 2.9)."""

from __future__ import annotations

from torch import Tensor

from .base import Adapter


class SelfSupervisedLoss(Adapter):
    """A loss called as pytorch-metric-learning's ``SelfSupervisedLoss`` is: ``loss_fn(embeddings, ref_emb)``.

    With ``NTXentLoss`` in it, value and gradient are those of pytorch-metric-learning's ``NTXentLoss`` under its
    ``SelfSupervisedLoss(symmetric=True)``, the default. Their losses take class labels, by which rows are positives
    of each other; ours have one positive a row, and ``index`` numbers items, not classes.

    Arguments are those of ``Adapter``; a loss that keeps something of each item needs ``index`` in each call.

    Example:
        >>> loss_fn = SelfSupervisedLoss(EMC2Loss(len(dataset), 128))
        >>> loss_fn(encoder(x), encoder(augmented), index).backward()
    """

    def forward(self, embeddings: Tensor, ref_emb: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of b items.

        Args:
            embeddings: (b, d).
            ref_emb: (b, d), of the same items in another augmentation.
            index: (b,) int64 items, see ``emc2_kernels.data``.

        Raises:
            ValueError, TypeError: name the argument of the loss, where z0 are ``embeddings`` and z1 ``ref_emb``.
        """
        return self.value_of(embeddings, ref_emb, index)
