"""The encoder of the examples: three convolutions, then the projector that only the contrastive loss sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 128


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    # GroupNorm, not BatchNorm: BatchNorm makes the embedding of an image depend on the rest of its batch. The positive
    # pair can then be told by its batch's statistics, and the score that a chain carries to its next visit is that of
    # an embedding which no longer exists. The EMC² paper trains without BatchNorm, too.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.ReLU(),
    )


class Encoder(nn.Module):
    """(n, 1, height, width) -> (n, dim) projections, not normalised: the losses do that."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            _block(1, 32, stride=1),
            _block(32, 64, stride=2),
            _block(64, FEATURES, stride=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, dim))

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, height, width) -> (n, FEATURES), what the probes are given."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.features(images))


def build_encoder(dim: int, seed: int) -> Encoder:
    """The same seed gives the same initial weights on every device, and the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(dim)
