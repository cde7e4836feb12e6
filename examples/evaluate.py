"""What features are worth: a linear probe and the nearest neighbour, on images held out from pre-training.

Digits are easy: with all 1,257 training labels, raw pixels and untrained convolutions are right 97 times in 100. What
pre-training buys shows where labels are few, so both classifiers are also given only 10 labels of each class.
"""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

import torch
from data import Split
from model import Encoder
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

FEW_LABELS = 10
FEW_DRAWS = 10


class Accuracy(NamedTuple):
    """Shares of held-out images classified rightly, 0 to 1; the few-label ones are means over FEW_DRAWS label sets."""

    linear_probe: float
    nearest_neighbour: float
    few_linear_probe: float
    few_nearest_neighbour: float


class Features(NamedTuple):
    """train (n, d) and test (m, d) float32 with labels (n,) and (m,) int64, all on the CPU."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@torch.no_grad()
def encode(encoder: Encoder, split: Split) -> Features:
    """Backbone features, 1,024 images at a time, without augmentation."""
    encoder.eval()
    train, test = (
        torch.cat([encoder.features(part) for part in images.split(1024)]).float().cpu()
        for images in (split.train_images, split.test_images)
    )
    return Features(train, split.train_labels.cpu(), test, split.test_labels.cpu())


def raw_pixels(split: Split) -> Features:
    """The images themselves as features: what no encoder at all would give."""
    return Features(
        split.train_images.flatten(1).cpu(),
        split.train_labels.cpu(),
        split.test_images.flatten(1).cpu(),
        split.test_labels.cpu(),
    )


def few_label_sets(labels: Tensor) -> list[Tensor]:
    """labels (n,) -> FEW_DRAWS sets of positions, FEW_LABELS of each class; the same sets in every run."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(FEW_DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        sets.append(torch.cat([order[labels[order] == c][:FEW_LABELS] for c in labels.unique()]))
    return sets


def linear_probe(features: Features, positions: Tensor) -> float:
    """Accuracy of a logistic regression fitted to the training features at `positions` (k,), standardised."""
    # Standardising makes the default regularisation mean the same for every encoder.
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features.train[positions].numpy(), features.train_labels[positions].numpy())
    return float(probe.score(features.test.numpy(), features.test_labels.numpy()))


def nearest_neighbour(features: Features, positions: Tensor) -> float:
    """Accuracy of the label of the nearest (Euclidean) of the training features at `positions` (k,)."""
    nearest = torch.cdist(features.test, features.train[positions]).argmin(dim=1)
    guess = features.train_labels[positions][nearest]
    return (guess == features.test_labels).double().mean().item()


def few_nearest_neighbour(features: Features) -> float:
    """Cheap enough to be followed during training."""
    return fmean(nearest_neighbour(features, chosen) for chosen in few_label_sets(features.train_labels))


def accuracy(features: Features) -> Accuracy:
    every = torch.arange(len(features.train))
    return Accuracy(
        linear_probe(features, every),
        nearest_neighbour(features, every),
        fmean(linear_probe(features, chosen) for chosen in few_label_sets(features.train_labels)),
        few_nearest_neighbour(features),
    )
