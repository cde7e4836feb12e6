"""EMC2 by i-SIR done slowly: one anchor and one candidate at a time, in float64."""

import math
from typing import NamedTuple

import torch
from slow_losses import SlowStores, slow_pair_statistics, unit

from emc2_kernels import rng


class Candidate(NamedTuple):
    label: int
    embedding: torch.Tensor
    noise: float
    is_carried: bool


class SlowISIR(SlowStores):
    """The loss as losses/emc2_isir.py states it; only the noise and the coin are the library's.

    Called with embeddings in float64 that hold the loss's own inputs exactly.
    """

    def __init__(
        self,
        *,
        num_items,
        temperature=0.2,
        views="one",
        bimodal=False,
        carry="cached",
        seed=0,
        bank_dtype=torch.float32,
        encode=None,
    ):
        super().__init__(bank_dtype)
        self.num_items, self.temperature, self.views, self.bimodal = num_items, temperature, views, bimodal
        self.carry, self.seed, self.encode = carry, seed, encode
        self.means = {}  # label -> mean of the batch that its embedding was kept with
        self.carried = set()  # labels that chains brought along to the latest call
        self.replaced = 0  # keys of a batch that were left out since a chain had brought along what stands for them
        self.stats = {}

    def __call__(self, z0, z1, index):
        b, items = len(index), index.tolist()
        anchors = [(item, view) for view in (0, 1) for item in items]
        embeddings = [unit(row) for row in (*z0, *z1)]
        means = self._batch_means(embeddings)
        terms, states, found = [], [], []
        for row, anchor in enumerate(anchors):
            keys = self._keys(index, anchor[1])
            candidates = self._carried(anchor, means) + self._fresh(anchor, anchors, embeddings, keys)
            if not candidates:
                states.append((-1, -math.inf))
                continue
            query = embeddings[row]
            scores = torch.stack([query @ candidate.embedding for candidate in candidates]) / self.temperature
            terms.append(scores.logsumexp(0) - query @ embeddings[(row + b) % (2 * b)] / self.temperature)
            if self.carry == "corrected":
                terms.append(self._lost_side(query, anchor, anchors, embeddings, keys, candidates, scores))
            noisy = [s + candidate.noise for s, candidate in zip(scores.tolist(), candidates, strict=True)]
            drawn = noisy.index(max(noisy))
            states.append((candidates[drawn].label, scores[drawn].item()))
            found.append((scores.detach(), candidates))
        self._keep_statistics(z0, z1, index, anchors, states, found)
        self.remember(anchors, embeddings, states)
        self.means |= {item * 2 + view: means[view].float().to(self.bank_dtype) for item, view in anchors}
        return torch.stack(terms).sum() / (2 * b) if terms else torch.stack(embeddings).sum() * 0

    def _keys(self, index, view):
        """Which of the 2b rows are the keys of anchors of this view, in the order of their noise's columns."""
        b = len(index)
        if self.bimodal:
            return [(1 - view) * b + row for row in range(b)]
        if self.views == "both":
            return list(range(2 * b))
        return [
            row + b * coin for row, coin in enumerate(rng.view_coin(index, seed=self.seed, step=self.step).tolist())
        ]

    def _noise(self, anchor, columns, stream):
        chain = torch.tensor([anchor[0] * 2 + anchor[1]])
        options = {"seed": self.seed, "step": self.step, "dtype": torch.float64, "stream": stream}
        return rng.gumbel(chain, range(columns), **options)[0].tolist()

    def _carried(self, anchor, means):
        """What the chain brings along: the key that it was drawn with, or both views of that key's item."""
        label, _ = self.chains.get(anchor, (-1, None))
        if label < 0:
            return []
        labels = [label, label // 2 * 2 + 1 - label % 2][: 2 if self.views == "both" else 1]
        self.carried |= set(labels)
        noise = self._noise(anchor, len(labels), rng.CARRIED)
        return [Candidate(some, self._embedding(some, means), noise[c], True) for c, some in enumerate(labels)]

    def _embedding(self, label, means):
        if self.carry == "recompute":
            return unit(self.encode(label // 2, label % 2))
        kept = self.bank[label][0].double()
        return kept + means[label % 2] - self.means[label].double() if self.carry == "corrected" else kept

    def _fresh(self, anchor, anchors, embeddings, keys):
        """The batch's keys, but those of the anchor's item, and those for which what the chain brings along stands."""
        carried = self.chains.get(anchor, (-1, None))[0]
        noise, found = self._noise(anchor, len(keys), rng.GUMBEL), []
        for number, row in enumerate(keys):
            item, view = anchors[row]
            if item == anchor[0]:
                continue
            if carried >= 0 and item == carried // 2:
                self.replaced += 1
                continue
            found.append(Candidate(item * 2 + view, embeddings[row], noise[number], False))
        return found

    def _lost_side(self, query, anchor, anchors, embeddings, keys, candidates, scores):
        """Of value 0, with the gradient of the batch's keys as if they were all of the anchor's negatives, times the
        weight of what was carried."""
        others = [query.detach() @ embeddings[row] for row in keys if anchors[row][0] != anchor[0]]
        if not others:
            return scores.sum() * 0
        carried = torch.tensor([candidate.is_carried for candidate in candidates])
        lse = (torch.stack(others) / self.temperature).logsumexp(0)
        return scores.detach().softmax(0)[carried].sum() * (lse - lse.detach())

    def _batch_means(self, embeddings):
        rows = torch.stack(embeddings).detach()
        halves = rows.chunk(2)
        return [half.mean(0) for half in halves] if self.bimodal else [rows.mean(0)] * 2

    def _keep_statistics(self, z0, z1, index, anchors, states, found):
        moved = [state[0] != self.chains.get(anchor, (-1,))[0] for anchor, state in zip(anchors, states, strict=True)]
        weights = [scores.softmax(0) for scores, _ in found]
        carried = [torch.tensor([candidate.is_carried for candidate in candidates]) for _, candidates in found]
        negatives = (self.num_items - 1) * (1 if self.bimodal else 2)
        n = len(anchors)
        partition = [scores.logsumexp(0) - math.log(len(scores)) + math.log(negatives) for scores, _ in found]
        similarity = [(w * scores).sum() * self.temperature for w, (scores, _) in zip(weights, found, strict=True)]
        self.stats = slow_pair_statistics(z0.detach(), z1.detach(), index, self.temperature, self.bimodal) | {
            "acceptance": sum(moved) / n,
            "carried_weight": sum(w[own].sum() for w, own in zip(weights, carried, strict=True)) / n,
            "log_partition": sum(partition) / max(len(partition), 1),
            "negative_similarity": sum(similarity) / n,
        }
