"""What features are worth: a linear probe and the nearest neighbours, on images held out from pre-training.

Digits are easy: with all 1,257 training labels, raw pixels and untrained convolutions are right 97 times in 100. What
pre-training buys shows where labels are few, so both classifiers are also given only 10 labels of each class.
"""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from examples.pretrain.encoders import Encoder
from examples.pretrain.images import UNLABELLED, Images, Split, chunks

FEW_LABELS = 10
FEW_DRAWS = 10
NEIGHBOURS = 10
PROBES = ("auto", "logistic", "sgd")
LOGISTIC_IMAGES = 20_000  # labelled ones that a logistic regression takes, with "auto"
LARGE = 2**26  # numbers in a matrix of features (268 MB) beyond which it is kept in half precision
EPOCHS, BATCH_SIZE, LR, MOMENTUM = 100, 1024, 1e-3, 0.9  # of the probe by gradient descent
ROWS = 8192  # that it looks at together
BLOCK = 2**24  # numbers in a matrix of distances or features that is held at a time


class Accuracy(NamedTuple):
    """Shares of held-out images classified rightly, 0 to 1; the few-label ones are means over FEW_DRAWS label sets."""

    linear_probe: float
    nearest_neighbour: float
    few_linear_probe: float
    few_nearest_neighbour: float
    ten_nearest_neighbours: float


class Features(NamedTuple):
    """train (n, d) and test (m, d) of the labelled images, with labels (n,) and (m,) int64, all on the CPU; float32, or
    float16 where n d is large."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def centre(images: Tensor, size: int | None) -> Tensor:
    """images (n, channels, h, w) -> (n, channels, size, size), the middle of them; None: as they are."""
    if size is None or size == images.shape[-1]:
        return images
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


@torch.no_grad()
def encode(encoder: Encoder, split: Split, size: int | None = None) -> Features:
    """Backbone features, some images at a time, without augmentation. size: side of the middle that is looked at."""
    encoder.eval()
    labelled = (split.train_labels != UNLABELLED).nonzero().squeeze(1)
    train = _features(encoder, split.train_images, labelled, size)
    test = _features(encoder, split.test_images, torch.arange(len(split.test_labels), device=labelled.device), size)
    return Features(train, split.train_labels[labelled].cpu(), test, split.test_labels.cpu())


def _features(encoder: Encoder, images: Tensor | Images, positions: Tensor, size: int | None) -> Tensor:
    kept: Tensor | None = None
    done = 0
    for part in chunks(images, positions):
        found = encoder.features(centre(part, size))
        if kept is None:
            shape = (len(positions), found.shape[1])
            kept = torch.empty(shape, dtype=torch.float16 if shape[0] * shape[1] > LARGE else torch.float32)
        kept[done : done + len(found)] = found
        done += len(found)
    if kept is None:
        raise ValueError("expected labelled images to evaluate on, got none")
    return kept


def raw_pixels(split: Split) -> Features:
    """The images themselves as features: what no encoder at all would give. Of images that are in memory."""
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
    probe.fit(features.train[positions].float().numpy(), features.train_labels[positions].numpy())
    return float(probe.score(features.test.float().numpy(), features.test_labels.numpy()))


def sgd_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Accuracy of the EMC² paper's probe, for features that a logistic regression is too slow for: on `test` (m, d), of
    a linear classifier of `train` (n, d), of any float type, standardised by batches.
    device: that it is fitted on; the tensors are on the CPU.

    Source: arXiv 2404.10575, SGD with momentum. It starts at zero and draws its batches from a generator of its own, so
    that the result is the same in every run.
    """
    mean, scale = _moments(train)

    def standardised(rows: Tensor) -> Tensor:
        return ((rows.float() - mean) / scale).to(device)

    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    weight, bias = (nn.Parameter(torch.zeros(shape, device=device)) for shape in ((classes, train.shape[1]), classes))
    optimizer = torch.optim.SGD([weight, bias], lr=LR, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(F.linear(standardised(train[batch]), weight, bias), train_labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        guess = torch.cat([F.linear(standardised(rows), weight, bias).argmax(1) for rows in test.split(ROWS)])
    return (guess.cpu() == test_labels).double().mean().item()


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) of `rows` (n, d); 1 where a feature is constant."""
    mean = sum(part.double().sum(0) for part in rows.split(ROWS)) / len(rows)
    variance = sum((part.double() - mean).square().sum(0) for part in rows.split(ROWS)) / len(rows)
    return mean.float(), torch.where(variance > 0, variance.sqrt(), 1.0).float()


def nearest_labels(features: Features, positions: Tensor, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(m, count) labels of the nearest (Euclidean) of the training features at `positions` (k,), the nearest first.

    A block of distances at a time on `device`, and a block of training features: those of all pairs are never held.
    """
    count = min(count, len(positions))
    rows = max(1, BLOCK // features.train.shape[1])
    found = []
    for queries in features.test.split(max(1, BLOCK // min(rows, len(positions)))):
        distances, nearest = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for part in positions.split(rows):
            block = torch.cdist(queries.float().to(device), features.train[part].float().to(device)).cpu()
            distances = torch.cat([distances, block], dim=1)
            nearest = torch.cat([nearest, part.expand(len(queries), -1)], dim=1)
            distances, best = distances.topk(min(count, distances.shape[1]), largest=False)
            nearest = nearest.gather(1, best)
        found.append(features.train_labels[nearest])
    return torch.cat(found)


def vote(labels: Tensor) -> Tensor:
    """labels (m, k) of neighbours, the nearest first -> (m,) the most frequent; of equals, the one with the nearer."""
    count = labels.shape[1]
    # A neighbour's part above 1 is more than those of all further ones together, and of all it is less than 1.
    weights = 1 + 0.5 ** torch.arange(1, count + 1, dtype=torch.float64)
    votes = torch.zeros(len(labels), int(labels.max()) + 1, dtype=torch.float64)
    return votes.scatter_add_(1, labels, weights.expand(len(labels), -1)).argmax(1)


def _share(guess: Tensor, features: Features) -> float:
    return (guess == features.test_labels).double().mean().item()


def nearest_neighbour(features: Features, positions: Tensor) -> float:
    """Accuracy of the label of the nearest of the training features at `positions` (k,)."""
    return _share(nearest_labels(features, positions, 1)[:, 0], features)


def few_nearest_neighbour(features: Features) -> float:
    """Cheap enough to be followed during training."""
    return fmean(nearest_neighbour(features, chosen) for chosen in few_label_sets(features.train_labels))


def accuracy(features: Features, probe: str = "auto", device: torch.device | str = "cpu") -> Accuracy:
    """probe: of all labels, one of PROBES; "auto" is "logistic" up to LOGISTIC_IMAGES. Few labels have "logistic".
    device: of distances and of "sgd"."""
    every = torch.arange(len(features.train))
    nearest = nearest_labels(features, every, NEIGHBOURS, device)
    logistic = probe == "logistic" or (probe == "auto" and len(every) <= LOGISTIC_IMAGES)
    return Accuracy(
        linear_probe(features, every) if logistic else sgd_probe(*features, device),
        _share(nearest[:, 0], features),
        fmean(linear_probe(features, chosen) for chosen in few_label_sets(features.train_labels)),
        few_nearest_neighbour(features),
        _share(vote(nearest), features),
    )
