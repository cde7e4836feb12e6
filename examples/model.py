"""The encoders: a backbone, whose features are what is kept, and the projector that only the contrastive loss sees."""

from __future__ import annotations

import torch
from resnet import DEPTHS, make_norm, resnet
from torch import Tensor, nn

FEATURES = 128  # of the small backbone
ENCODERS = ("small", *DEPTHS)


def _block(inputs: int, outputs: int, stride: int, norm: str) -> nn.Sequential:
    # GroupNorm, not BatchNorm: BatchNorm makes the embedding of an image depend on the rest of its batch. The positive
    # pair can then be told by its batch's statistics, and the score that a chain carries to its next visit is that of
    # an embedding which no longer exists. The EMC² paper trains without BatchNorm, too.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=norm == "none"),
        make_norm(norm, outputs, groups=8),
        nn.ReLU(),
    )


def _small(channels: int, norm: str) -> tuple[nn.Sequential, int]:
    """Three convolutions, (n, channels, height, width) -> (n, FEATURES)."""
    blocks = [_block(channels, 32, 1, norm), _block(32, 64, 2, norm), _block(64, FEATURES, 1, norm)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), FEATURES


class Encoder(nn.Module):
    """(n, channels, height, width) -> (n, dim) projections, not normalised: the losses do that."""

    def __init__(
        self,
        dim: int,
        name: str = "small",
        channels: int = 1,
        stem: str = "imagenet",
        norm: str = "group",
        hidden: int | None = None,
    ) -> None:
        """name: one of ENCODERS; stem: of a ResNet; hidden: width of the projector, None: that of the features."""
        super().__init__()
        self.backbone, features = _small(channels, norm) if name == "small" else resnet(name, channels, stem, norm)
        hidden = hidden or features
        self.projector = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def features(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, features), what the probes are given."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.features(images))


def build_encoder(dim: int, seed: int, **options: object) -> Encoder:
    """The same seed gives the same initial weights on every device, and the caller's random state is left alone.
    options: Encoder's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(dim, **options)
