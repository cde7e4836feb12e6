"""Pairs for `gcbs.py`: what is paired, the towers that are trained on it, and what retrieval is asked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.pretrain.data import digits
from examples.two_towers.halves import NOISE, Halves, Retrieval, build_towers, halves, retrieve

TRAINED_VERSES, HELD_OUT_VERSES = 8000, 2000  # of 31,067: to embed these alone takes minutes on two cores
HEAD, HEAD_DIM = 256, 128  # hidden units and outputs of the head on frozen sentence embeddings


@dataclass(frozen=True)
class Pairs:
    train: Halves  # (n, p) each; row i of the one belongs to row i of the other
    test: Halves  # what retrieval is asked on
    classes: Tensor | None  # (n,) of the training pairs
    towers: Callable[[int], nn.ModuleList]  # seed -> one for each side
    noise: float  # standard deviation of what is added to inputs in training

    @torch.no_grad()
    def embed(self, towers: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """(n, dim) of both sides of all training pairs, without noise."""
        return tuple(tower(side) for tower, side in zip(towers, self.train, strict=True))

    def views(self, towers: nn.ModuleList, items: Tensor, generator: torch.Generator) -> list[Tensor]:
        """(b, dim) of both sides of items (b,), with gradient."""
        inputs = [side[items] for side in self.train]
        return [
            tower(side + self.noise * torch.empty_like(side).normal_(generator=generator))
            for tower, side in zip(towers, inputs, strict=True)
        ]

    @torch.no_grad()
    def retrieval(self, towers: nn.ModuleList) -> tuple[Retrieval, Retrieval]:
        """Left sides ask for their right sides, and the other way round."""
        left, right = (tower(side) for tower, side in zip(towers, self.test, strict=True))
        return retrieve(left, right), retrieve(right, left)


def all_digits() -> Pairs:
    """1,792 digits, 56 batches of 32; retrieval among themselves."""
    split = digits()
    images = torch.cat([split.train_images, split.test_images])[:1792]
    pairs = Halves(*(half.flatten(1) for half in images.chunk(2, dim=3)))
    classes = torch.cat([split.train_labels, split.test_labels])[:1792]
    return Pairs(pairs, pairs, classes, lambda seed: build_towers(32, seed), NOISE)


def held_out_digits() -> Pairs:
    """1,257 digits to train on, 540 held out to retrieve from."""
    train, test = halves()
    return Pairs(train, test, digits().train_labels, lambda seed: build_towers(32, seed), NOISE)


def verse_pairs() -> Pairs:
    """8,000 verses in two translations to train on, 2,000 held out; embeddings of a frozen sentence encoder."""
    from examples.two_towers.verses import embed, encoder, verses

    pairs, model = verses(), encoder()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: TRAINED_VERSES + HELD_OUT_VERSES]
    first, second = (embed([pairs[item][side] for item in order.tolist()], model) for side in range(2))
    sides = [Halves(first[part], second[part]) for part in (slice(TRAINED_VERSES), slice(TRAINED_VERSES, None))]
    return Pairs(*sides, None, lambda seed: shared_head(first.shape[1], seed), 0.0)


def shared_head(inputs: int, seed: int) -> nn.ModuleList:
    """The same head for both sides: both are sentences of one language, and start out alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(inputs, HEAD), nn.ReLU(), nn.Linear(HEAD, HEAD_DIM))
    return nn.ModuleList([head, head])


DATASETS: dict[str, Callable[[], Pairs]] = {
    "digits": all_digits,
    "digits-held-out": held_out_digits,
    "verses": verse_pairs,
}
