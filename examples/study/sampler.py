"""Part c: how fast the chains' law approaches the softmax, beside the law by the exact transition matrix.

Scores are those of real embeddings: images with two fixed views each. An anchor's states are the views of the other
items. Chains begin unstarted, so that their law after one proposal is that of the proposals, uniform.
"""

from __future__ import annotations

import math
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import emc2_kernels as emc2
from examples.pretrain.processes import cpu_threads
from examples.study.cells import Row, measure_missing
from examples.study.finite import Finite

KINDS = ("uniform", "sweep, one view", "sweep, both views")
NAMES = ("data", "num_items", "training_steps", "chains", "temperature", "anchor", "proposals")
FILE = "sampler.csv"
BATCH = 16  # of a sweep: the anchor's item and 15 others
SIMULATIONS = 40  # of the noise that so many chains have
# Data, items, training steps, chains, temperatures, anchors, largest number of proposals.
FULL = tuple((data, 250, 300, 65_536, (0.5, 0.2, 0.07), 3, 1024) for data in ("digits", "mnist5k"))
QUICK = (("digits", 40, 5, 1000, (0.2,), 1, 64),)


@cache
def embeddings(data: str, num_items: int, steps: int) -> Tensor:
    """(n, 2, dim) of unit length, from an encoder that NT-Xent has trained for so many steps."""
    run = Finite({"name": "ntxent"}, data, num_items, min(32, num_items), seed=0)
    optimizer = torch.optim.AdamW(run.parameters, lr=1e-3)
    for index in islice(run.batches(), steps):
        optimizer.zero_grad()
        run.loss(*run.embeddings(index), index).backward()
        optimizer.step()
    with torch.no_grad():
        return normalize(run.encoder(run.views.flatten(0, 1)), dim=1).view(num_items, 2, -1)


def transition_matrix(scores: Tensor) -> Tensor:
    """(m, m) float64, from row to column: proposals uniform over the m states, accepted by Metropolis and Hastings."""
    scores = scores.double()
    kernel = (scores - scores[:, None]).exp().clamp_max(1) / len(scores)
    kernel.fill_diagonal_(0)
    return kernel + torch.diag(1 - kernel.sum(1))


def laws(scores: Tensor, marks: list[int]) -> list[Tensor]:
    """The chain's exact law (m,) after each of so many proposals, ascending; after the first it is the uniform one."""
    kernel = transition_matrix(scores)
    law = torch.full((len(scores),), 1 / len(scores), dtype=torch.float64)
    found, done = [], 1
    for mark in marks:
        for _ in range(mark - done):
            law = law @ kernel
        found.append(law)
        done = mark
    return found


def distance(law: Tensor, target: Tensor) -> float:
    """Total variation."""
    return (law - target).abs().sum().item() / 2


def bound(target: Tensor, proposals: int) -> float:
    """On the total variation distance after so many proposals of which the first starts the chain.

    Proposals are uniform, so K(x, y) = min(1 / m, pi(y) / (m pi(x))) >= pi(y) / w with w = m max pi: each step forgets
    where the chain was with probability 1 / w at least (Mengersen and Tweedie 1996, Liu 1996).
    """
    return (1 - 1 / (len(target) * target.max().item())) ** (proposals - 1)


def worst_bound(temperature: float, proposals: int) -> float:
    """The same for any embeddings of unit length: their scores differ by 2 / temperature at most."""
    return (1 - math.exp(-2 / temperature)) ** (proposals - 1)


def marks(kind: str, most: int) -> list[int]:
    """Numbers of proposals: powers of 2, or so many whole batches."""
    size = {"uniform": 1, "sweep, one view": BATCH - 1, "sweep, both views": 2 * (BATCH - 1)}[kind]
    return [size * 2**k for k in range(int(math.log2(most / size)) + 1)]


class Batches:
    """Proposals of each chain's own batches: BATCH - 1 of the other items, drawn without replacement, at each visit.

    States are numbered item * 2 + view.
    """

    def __init__(self, chains: int, num_items: int, both: bool, seed: int) -> None:
        self.order = torch.arange(num_items).repeat(chains, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.both = both

    def visit(self) -> Tensor:
        """(chains, proposals) positions: view 0 of all items and then view 1, or one view of each, by a coin."""
        chains, num_items = self.order.shape
        rows = torch.arange(chains)
        for i in range(BATCH - 1):  # the beginning of Fisher and Yates' shuffle
            j = torch.randint(i, num_items, (chains,), generator=self.generator)
            chosen = self.order[rows, j]
            self.order[rows, j] = self.order[:, i]
            self.order[:, i] = chosen
        items = self.order[:, : BATCH - 1]
        if self.both:
            return torch.cat((items * 2, items * 2 + 1), dim=1)
        return items * 2 + torch.randint(2, items.shape, generator=self.generator)


def walk(query: Tensor, keys: Tensor, kind: str, chains: int, temperature: float, most: int) -> list[Tensor]:
    """Counts of the chains at each of the keys (m, d), after each mark."""
    state, found, done = emc2.init_state(chains), [], 0
    drawn = Batches(chains, len(keys) // 2, kind == "sweep, both views", seed=1)
    for mark in marks(kind, most):
        while done < mark:
            if kind == "uniform":
                proposal, count = {"proposal": "uniform", "num_proposals": mark - done}, mark - done
            else:
                proposal = {"proposal": drawn.visit()}
                count = proposal["proposal"].shape[1]
            queries = query.expand(chains, -1)
            state = emc2.mh_step(queries, keys, state, temperature=temperature, seed=0, step=done, **proposal).state
            done += count
        found.append(state.key.bincount(minlength=len(keys)).double())
    return found


def sum_items(law: Tensor) -> Tensor:
    """(m,) of the views -> (m / 2,) of the items, whose views are alike."""
    return law.view(-1, 2).sum(1)


def noisy(law: Tensor, target: Tensor, chains: int) -> tuple[float, float]:
    """Mean and standard deviation of the distance of so many independent draws from `law` to the target."""
    generator = torch.Generator().manual_seed(2)
    draws = (torch.multinomial(law, chains, True, generator=generator) for _ in range(SIMULATIONS))
    found = torch.tensor([distance(draw.bincount(minlength=len(law)) / chains, target) for draw in draws])
    return found.mean().item(), found.std().item()


def measure(
    data: str, num_items: int, steps: int, chains: int, temperature: float, anchor: int, kind: str, most: int
) -> list[Row]:
    """A row a mark, with distances to the softmax: of the chains, of the exact law, and of as many draws from that;
    over views, and over items."""
    with cpu_threads(1):
        z = embeddings(data, num_items, steps)
        query = z[anchor, 0]
        keys = torch.cat((z[:anchor], z[anchor + 1 :])).flatten(0, 1)
        scores = (keys @ query).double() / temperature
        target = scores.softmax(0)
        rows: list[Row] = []
        points = marks(kind, most)
        for mark, law, counts in zip(
            points, laws(scores, points), walk(query, keys, kind, chains, temperature, most), strict=True
        ):
            expected, deviation = noisy(law, target, chains)
            items, target_items = sum_items(counts / chains), sum_items(target)
            rows.append(
                {
                    "after": mark,
                    "chains_distance": distance(counts / chains, target),
                    "exact_distance": distance(law, target),
                    "expected_distance": expected,
                    "deviation": deviation,
                    "chains_distance_items": distance(items, target_items),
                    "exact_distance_items": distance(sum_items(law), target_items),
                    "expected_distance_items": noisy(sum_items(law), target_items, chains)[0],
                    "bound": bound(target, mark),
                    "worst_bound": worst_bound(temperature, mark),
                }
            )
    return rows


def run(folder: Path, quick: bool) -> list[Row]:
    rows: list[Row] = []
    for data, num_items, steps, chains, temperatures, anchors, most in QUICK if quick else FULL:
        cells = (
            (data, num_items, steps, chains, temperature, anchor, kind)
            for temperature in temperatures
            for anchor in range(anchors)
            for kind in KINDS
        )
        rows += measure_missing(folder / FILE, NAMES, cells, partial(measure, most=most))
    return rows
