"""The linear probe of the EMC² paper, by gradient descent, for features that a logistic regression is too slow for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPOCHS, BATCH_SIZE, LR, MOMENTUM = 100, 1024, 1e-3, 0.9
ROWS = 8192  # that are looked at together


def sgd_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Accuracy on `test` (m, d) of a linear classifier of `train` (n, d), of any float type, standardised by batches.
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
