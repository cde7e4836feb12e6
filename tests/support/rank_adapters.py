"""Checks of adapters that every rank makes; see ranks.py."""

import torch
import torch.distributed as dist
from rank_losses import averaged, relative
from torch.nn import functional

from emc2_kernels import losses
from emc2_kernels.adapters.open_clip import OpenClipLoss

B, D = 5, 8


def _towers_gradients(value, parameters, group=None):
    for parameter in parameters:
        parameter.grad = None
    value.backward()
    return averaged([parameter.grad for parameter in parameters], group)


def _whole_batch(images, texts, scale):
    scores = scale * images @ texts.T
    labels = torch.arange(len(scores))
    return (functional.cross_entropy(scores, labels) + functional.cross_entropy(scores.T, labels)) / 2


def _peer(rank, size):
    """open_clip's own, where it is installed."""
    try:
        from open_clip import ClipLoss
    except (ImportError, RuntimeError):
        return None
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)


def _open_clip(rank, size):
    """Relative errors of the value and of averaged gradients, of the towers and of a scale, beside one process's with
    the whole batch; and those of open_clip's own loss."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, size * B, D, generator=draw)
    weights = [torch.randn(D, D, generator=draw).requires_grad_() for _ in range(2)]
    log_scale = torch.tensor(2.0, requires_grad=True)
    parameters = [*weights, log_scale]

    def features(part):
        pairs = zip(inputs[:, part], weights, strict=True)
        return [functional.normalize(rows @ weight, dim=1) for rows, weight in pairs]

    whole = _whole_batch(*features(slice(None)), log_scale.exp())
    expected = _towers_gradients(whole, parameters)
    errors = {}
    ours = OpenClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    for name, loss in {"ours": ours, "theirs": _peer(rank, size)}.items():
        if loss is None:
            continue
        value = loss(*features(slice(rank * B, (rank + 1) * B)), log_scale.exp())
        found = _towers_gradients(value, parameters)
        of_ranks = torch.empty(size)
        dist.all_gather_into_tensor(of_ranks, value.detach().view(1))
        errors[name] = [relative(f, e) for f, e in zip(found, expected, strict=True)]
        errors[name].append(relative(of_ranks.mean(), whole.detach()))
    return errors


def _unlike_scales(rank, size):
    loss = OpenClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    features = torch.eye(2)
    try:
        loss(features, features, torch.tensor(1.0 + rank))
    except ValueError as error:
        return str(error)


def _world_of_another_size(rank, size):
    try:
        OpenClipLoss(gather_with_grad=True, rank=rank, world_size=size + 1)
    except ValueError as error:
        return str(error)


def _scale_on_one_rank(rank):
    """Of 1, whose logarithm is 0, as of none."""
    features = torch.eye(2)
    try:
        losses.ClipLoss(gather="all")(features, features, logit_scale=[None, 1.0][rank])
    except ValueError as error:
        return str(error)


def checks(rank, size):
    return {
        "open_clip": lambda: _open_clip(rank, size),
        "open_clip, unlike scales": lambda: _unlike_scales(rank, size),
        "a world of another size": lambda: _world_of_another_size(rank, size),
        "a scale on one rank": lambda: _scale_on_one_rank(rank),
    }
