"""open_clip's call of its ``ClipLoss`` (checked with 3.3), answered by ours: no b x b scores are kept."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..losses import ClipLoss
from .base import Adapter


class OpenClipLoss(Adapter):
    """``ClipLoss`` for open_clip's training loop, in the place of what ``open_clip.create_loss`` makes.

    The value, and the gradients of the features and of ``logit_scale``, are those of open_clip's loss; memory is O(b d)
    where that is O(b^2). Features are taken as they come, and open_clip's models normalise them.

    Over several processes gradients, averaged by DistributedDataParallel, are those of one process with the whole
    batch. open_clip's are those with gather_with_grad=True. Without it they are divided by world_size in the encoder,
    or with local_loss=True lack what other processes' rows contribute: they are not imitated.

    Args:
        local_loss: taken for open_clip's sake; the gradients are the same with it and without.
        gather_with_grad: the same; see the warning.
        cache_labels: the same; there are no labels.
        rank: of this process, in [0, world_size).
        world_size: 1: negatives are this process's own. More: they are those of all, as with ``gather="all"``.
        use_horovod: False; torch.distributed is all that there is.
        report: see ``Adapter``.
        backend: of ``contrastive_lse``.

    Warns:
        UserWarning: world_size > 1 without gather_with_grad, whose gradients open_clip would make otherwise.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.

    Example:
        >>> loss = OpenClipLoss()  # was: open_clip.create_loss(args)
        >>> losses = loss(**model(images, texts), output_dict=True)
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        report: bool = False,
        backend: str = "auto",
    ) -> None:
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "cache_labels": cache_labels}
        for name, flag in (flags | {"use_horovod": use_horovod}).items():
            checks.boolean(name, flag)
        if use_horovod:
            raise ValueError("use_horovod must be False: processes talk by torch.distributed, got True")
        world_size = checks.at_least("world_size", world_size, 1)
        if not 0 <= checks.integer("rank", rank) < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if world_size > 1:
            _check_group(rank, world_size)
            if not gather_with_grad:
                expected = "gradients are those of gather_with_grad=True, with which open_clip's are the same"
                warnings.warn(f"OpenClipLoss: {expected}; got gather_with_grad=False", stacklevel=2)
        super().__init__(ClipLoss(normalize=False, gather="all" if world_size > 1 else "none", backend=backend), report)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        index: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of b pairs.

        Args:
            image_features: (b, d), of unit length as open_clip's models return them.
            text_features: (b, d).
            logit_scale: factor of the similarities, of shape () or (1,): the exponential of a model's ``logit_scale``.
            logit_bias: one number, added to all scores. A softmax does not see it, so its gradient is 0.
            output_dict: whether to return {"contrastive_loss": value}, and not the value.
            index: (b,) int64 items; pairs of an anchor's item are then no negatives of it. open_clip gives none.

        Raises:
            ValueError, TypeError: name the argument, what was expected and what came.
        """
        checks.boolean("output_dict", output_dict)
        if logit_scale is None:
            raise TypeError("logit_scale must be a number or a tensor, got None")
        for name, features in (("image_features", image_features), ("text_features", text_features)):
            if not isinstance(features, Tensor) or features.dim() != 2:
                raise ValueError(f"{name} must have shape (b, d), got {checks.describe(features)}")
        value = self.value_of(image_features, text_features, index, logit_scale=logit_scale)
        if logit_bias is not None:
            value = value + 0 * _one_number("logit_bias", logit_bias)  # a parameter that DDP then sees in use
        return {"contrastive_loss": value} if output_dict else value


def _one_number(name: str, value: float | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got {checks.describe(value)}")
        return value.sum()
    return checks.number_in(name, value, -float("inf"), float("inf"))


def _check_group(rank: int, world_size: int) -> None:
    """Where there is a group already; a call of the loss asks for one."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, given, found in (("world_size", world_size, dist.get_world_size()), ("rank", rank, dist.get_rank())):
        if given != found:
            raise ValueError(f"{name} must be {found}, as in the process group, got {given}")
