"""The encoders: a backbone, whose features are what is kept, and the projector that only the contrastive loss sees.

Backbones are three convolutions, or ResNet-18 and ResNet-50 without their last layer (He et al., arXiv 1512.03385),
with the norm left open.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("group", "batch", "none")
STEMS = ("imagenet", "cifar")
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
FEATURES = 128  # of the small backbone
ENCODERS = ("small", *DEPTHS)


def make_norm(norm: str, channels: int, groups: int = 32) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(groups, channels)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, norm: str) -> nn.Sequential:
    # A norm brings its own bias.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, make_norm(norm, outputs))


class Residual(nn.Module):
    """Two convolutions, or with `bottleneck` three, around a quarter of the channels: (n, inputs, h, w) -> (n, outputs,
    h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            # The stride is at the 3 x 3 convolution, which then sees all pixels.
            inner = outputs // 4
            sizes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        else:
            sizes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        first, *others = (_conv(*size, norm) for size in sizes)
        self.branch = nn.Sequential(first, *(nn.Sequential(nn.ReLU(), conv) for conv in others))
        if norm == "none":
            # Without a norm activations would grow with depth: each block begins as the identity.
            nn.init.zeros_(others[-1][0].weight)
        alike = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if alike else _conv(inputs, outputs, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet(name: str, channels: int, stem: str, norm: str) -> tuple[nn.Sequential, int]:
    """(n, channels, height, width) -> (n, features), and the number of features.

    Args:
        stem: "imagenet": 7 x 7 with stride 2, then max-pooling; "cifar": 3 x 3 and no pooling, for small images.
        norm: "batch", "group" (32 groups), or "none" (biases, and residual branches that begin at zero).
    """
    bottleneck = name == "resnet50"
    if stem == "imagenet":
        layers = [_conv(channels, 64, 7, 2, norm), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    else:
        layers = [_conv(channels, 64, 3, 1, norm), nn.ReLU()]
    width = 64
    for stage, depth in enumerate(DEPTHS[name]):
        outputs = 64 * 2**stage * (4 if bottleneck else 1)
        for block in range(depth):
            layers.append(Residual(width, outputs, 2 if stage > 0 and block == 0 else 1, norm, bottleneck))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


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
