"""Contrastive losses over all keys of a batch, one function in several implementations: this library's, memeff's, plain
torch, plain torch compiled; and the products alone, which cuBLAS makes.

Each is made for a batch size and calls forward and backward; all take raw embeddings, normalise them, and have one
temperature. A peer that is not installed, or that runs out of memory, says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from bench.losses import TEMPERATURE, PlainNTXent
from bench.peers import LossStep
from emc2_kernels.losses import ClipLoss, NTXentLoss

MEMEFF = "memeff==0.3.1"  # what the adapter was written for; pip install


class Missing(Exception):
    """A peer's package is not here; the message says how to get it."""


class PlainClip(nn.Module):
    """What one writes first: all scores of the b pairs, and the mean of the two cross entropies."""

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean over the 2b anchors; `z0`, `z1` (b, d). `index` is taken and means nothing."""
        images, texts = (nn.functional.normalize(z, dim=1) for z in (z0, z1))
        scores, pairs = images @ texts.T / TEMPERATURE, torch.arange(len(images), device=images.device)
        losses = [nn.functional.cross_entropy(each, pairs) for each in (scores, scores.T)]
        return (losses[0] + losses[1]) / 2


class MemeffClip(nn.Module):
    """memeff's loss, whose third argument means something else; with the gradient of its value (stable=False)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            package = importlib.import_module("memeff")
        except ImportError as error:
            raise Missing(f"not installed: pip install {MEMEFF}") from error
        self.loss = package.MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean over the 2b anchors; `z0`, `z1` (b, d). `index` is taken and means nothing."""
        return self.loss(z0, z1)


class Products:
    """The three products that forward and backward are made of, n rows and m keys: scores, and from a matrix like them
    the gradients of rows and keys. It keeps none of them: the others need the memory."""

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        """`queries` (n, d), `keys` (m, d)."""
        self.queries, self.keys = queries, keys

    def __call__(self) -> tuple[Tensor, Tensor]:
        scores = self.queries @ self.keys.T
        return scores @ self.keys, scores.T @ self.queries


def clip_products(z0: Tensor, z1: Tensor) -> Products:
    """b rows, b keys."""
    return Products(z0, z1)


def ntxent_products(z0: Tensor, z1: Tensor) -> Products:
    """2b rows, which are the keys."""
    anchors = torch.cat((z0, z1))
    return Products(anchors, anchors)


_compiled: dict[type, nn.Module] = {}


def compiled(plain: type[nn.Module], rehearsal: bool) -> nn.Module:
    """A plain loss under torch.compile, once for all sizes; in a rehearsal traced, and run as it is."""
    if plain not in _compiled:
        _compiled[plain] = torch.compile(plain(), dynamic=True, backend="eager" if rehearsal else "inductor")
    return _compiled[plain]


Contestant = Callable[[Tensor, Tensor, bool], Callable[[], object]]  # of z0, z1 (b, d), and whether this is a rehearsal


def _step(make: Callable[[bool], nn.Module]) -> Contestant:
    return lambda z0, z1, rehearsal: LossStep(make(rehearsal), z0, z1, None)


# By loss. The first of each is this library's.
CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "NT-Xent": {
        "NTXentLoss": _step(lambda _: NTXentLoss(temperature=TEMPERATURE)),
        "torch.compile": _step(lambda rehearsal: compiled(PlainNTXent, rehearsal)),
        "plain torch": _step(lambda _: PlainNTXent()),
        "cuBLAS alone": lambda z0, z1, _: ntxent_products(z0, z1),
    },
    "CLIP": {
        "ClipLoss": _step(lambda _: ClipLoss(temperature=TEMPERATURE)),
        "memeff": _step(lambda _: MemeffClip()),
        "torch.compile": _step(lambda rehearsal: compiled(PlainClip, rehearsal)),
        "plain torch": _step(lambda _: PlainClip()),
        "cuBLAS alone": lambda z0, z1, _: clip_products(z0, z1),
    },
}


def rows_and_keys(loss: str, b: int) -> tuple[int, int]:
    """n and m of its scores."""
    return (2 * b, 2 * b) if loss == "NT-Xent" else (b, b)


def useful_flops(loss: str, b: int, d: int) -> int:
    """Of forward and backward, by the mathematics, for all contestants: 3 products of n x m x d, 2 n m d each.

    The scores; and in the backward pass the gradient of the rows and that of the keys. Scores that are made again, to
    save memory, are not counted, nor are exponentials. NT-Xent's rows are its keys: two of its three products can be
    made as one, and it is credited with three all the same, as autograd makes them.
    """
    n, m = rows_and_keys(loss, b)
    return 3 * 2 * n * m * d


def memeff_version() -> str:
    """Or that it is not installed."""
    try:
        return version("memeff")
    except PackageNotFoundError:
        return "not installed"
