"""EMC2 by i-SIR done slowly: one anchor and one candidate at a time, in float64."""

import math
from typing import NamedTuple

import torch
from slow_losses import SlowStores, slow_pair_statistics, unit

from emc2_kernels import rng

MAX_STALENESS, MEMORY = 0.2, 0.9


class Candidate(NamedTuple):
    label: int
    embedding: torch.Tensor
    noise: float
    is_carried: bool = False
    has_no_gradient: bool = False  # the anchor has it in its place


class SlowISIR(SlowStores):
    """The loss as losses/emc2_isir.py states it; only the noise and the coin are the library's.

    Called with embeddings in float64 that hold the loss's own inputs exactly.
    """

    def __init__(
        self,
        *,
        num_items,
        temperature=0.2,
        views="auto",
        queue=None,
        bimodal=False,
        carry="cached",
        seed=0,
        bank_dtype=torch.float32,
        encode=None,
        memory=MEMORY,
        decoupled=True,
    ):
        super().__init__(bank_dtype)
        views = ("one" if bimodal else "both") if views == "auto" else views
        self.num_items, self.temperature, self.views, self.bimodal = num_items, temperature, views, bimodal
        self.carry, self.seed, self.encode, self.decoupled = carry, seed, encode, decoupled
        self.queue = queue if queue is not None else 16 if carry == "cached" else 0
        self.visited = []  # items of all batches, row by row
        self.carried = set()  # labels that chains brought along to the latest call
        self.replaced = 0  # keys of a batch that were left out since a chain had brought along what stands for them
        self.replaced_of_queue = 0
        self.queued = 0  # keys of the queue that were candidates
        self.memory, self.lost, self.spread = memory, 0.0, 0.0  # of batches, each a little less than the next
        self.stalenesses = []  # of every call
        self.steady = []
        self.stats = {}

    def __call__(self, z0, z1, index):
        b, items = len(index), index.tolist()
        anchors = [(item, view) for view in (0, 1) for item in items]
        embeddings = [unit(row) for row in (*z0, *z1)]
        steady = self._is_steady(anchors, embeddings)
        queued = self._usable_of_queue(items) if steady else []
        starts = [self.chains.get(anchor, (-1, None))[0] if steady else -1 for anchor in anchors]
        terms, states, found = [], [], []
        for row, (anchor, chain) in enumerate(zip(anchors, starts, strict=True)):
            keys = self._keys(index, anchor[1])
            candidates = self._carried(anchor, chain) + self._fresh(anchor, chain, anchors, embeddings, keys)
            candidates += self._queued(anchor, chain, queued, len(keys))
            if not candidates:
                states.append((-1, -math.inf))
                continue
            query = embeddings[row]
            scores = torch.stack([self._score(query, candidate) for candidate in candidates])
            positive = query @ embeddings[(row + b) % (2 * b)] / self.temperature
            exponents = scores if self.decoupled else torch.cat((scores, positive[None]))
            terms.append(exponents.logsumexp(0) - positive)
            noisy = [s + candidate.noise for s, candidate in zip(scores.tolist(), candidates, strict=True)]
            drawn = noisy.index(max(noisy))
            states.append((candidates[drawn].label, scores[drawn].item()))
            found.append((scores.detach(), candidates))
        self._keep_statistics(z0, z1, index, starts, states, found)
        self.remember(anchors, embeddings, states)
        self.visited += items
        return torch.stack(terms).sum() / (2 * b) if terms else torch.stack(embeddings).sum() * 0

    def _score(self, query, candidate):
        score = query @ candidate.embedding / self.temperature
        return score + (score - score.detach()) if candidate.has_no_gradient else score

    def _is_steady(self, anchors, embeddings):
        """Whether kept positives score nearly as high as fresh ones, to which those of other items are the scale, in
        the batches up to this one."""
        if self.carry == "recompute":
            return True
        b, held = len(anchors) // 2, [row for row, (item, view) in enumerate(anchors) if item * 2 + view in self.bank]
        partners = [(row + b) % (2 * b) for row in range(2 * b)]
        rows = [embedding.detach() for embedding in embeddings]
        lags = [(rows[row] - self._kept(*anchors[row])) @ rows[partners[row]] for row in held]
        positives = [rows[row] @ rows[row + b] for row in range(b)]
        others = [rows[i] @ rows[b + j] for i in range(b) for j in range(b) if i != j]
        if others:
            scale = sum(positives) / b - sum(others) / len(others)
            self.lost = self.memory * self.lost + float(sum(lags))
            self.spread = self.memory * self.spread + float(scale) * len(held)
        self.stalenesses.append(self.lost / self.spread if self.spread > 0 else math.nan)
        self.steady.append(self.spread > 0 and self.lost < MAX_STALENESS * self.spread)
        return self.steady[-1]

    def _usable_of_queue(self, items):
        """(place, item) of what the queue adds to a batch of these items: of items that came twice the later place."""
        latest = self.visited[max(len(self.visited) - self.queue, 0) :]
        first = self.queue - len(latest)
        return [
            (first + number, item)
            for number, item in enumerate(latest)
            if item not in items and item not in latest[number + 1 :]
        ]

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

    def _kept(self, item, view):
        return self.bank[item * 2 + view][0].double()

    def _carried(self, anchor, label):
        """What the chain brings along: the key that it was drawn with, or both views of that key's item."""
        if label < 0:
            return []
        labels = [label, label // 2 * 2 + 1 - label % 2][: 2 if self.views == "both" else 1]
        self.carried |= set(labels)
        noise, again = self._noise(anchor, len(labels), rng.CARRIED), self.carry == "recompute"
        places = [(some // 2, some % 2) for some in labels]
        embeddings = [unit(self.encode(*place)) if again else self._kept(*place) for place in places]
        return [Candidate(*of_label, True, not again) for of_label in zip(labels, embeddings, noise, strict=True)]

    def _fresh(self, anchor, carried, anchors, embeddings, keys):
        """The batch's keys, but those of the anchor's item, and those for which what the chain brings along stands."""
        noise, found = self._noise(anchor, len(keys), rng.GUMBEL), []
        for number, row in enumerate(keys):
            item, view = anchors[row]
            if item == anchor[0]:
                continue
            if carried >= 0 and item == carried // 2:
                self.replaced += 1
                continue
            found.append(Candidate(item * 2 + view, embeddings[row], noise[number]))
        return found

    def _queued(self, anchor, carried, usable, first):
        """The queue's keys, whose numbers come after the batch's, view by view."""
        noise, found = self._noise(anchor, first + 2 * self.queue, rng.GUMBEL), []
        for block, view in enumerate(range(2) if self.views == "both" else [None]):
            for place, item in usable:
                if carried >= 0 and item == carried // 2:
                    self.replaced_of_queue += 1
                    continue
                some = view if view is not None else 1 - anchor[1] if self.bimodal else self._coin(item)
                column = first + block * self.queue + place
                found.append(Candidate(item * 2 + some, self._kept(item, some), noise[column], has_no_gradient=True))
        self.queued += len(found)
        return found

    def _coin(self, item):
        return rng.view_coin(torch.tensor([item]), seed=self.seed, step=self.step).item()

    def assert_keeps_the_same(self, loss):
        super().assert_keeps_the_same(loss)
        if self.carry == "recompute":
            assert loss.drift is None
        else:
            sums = torch.tensor([self.lost, self.spread])
            torch.testing.assert_close(loss.drift.sums, sums, rtol=1e-4, atol=1e-4)
        if self.queue == 0:
            assert loss.recent is None
            return
        latest = self.visited[max(len(self.visited) - self.queue, 0) :]
        items = [-1 if item in latest[number + 1 :] else item for number, item in enumerate(latest)]
        assert loss.recent.items.tolist() == [-1] * (self.queue - len(items)) + items

    def _keep_statistics(self, z0, z1, index, starts, states, found):
        moved = [state[0] != start for start, state in zip(starts, states, strict=True)]
        weights = [scores.softmax(0) for scores, _ in found]
        carried = [torch.tensor([candidate.is_carried for candidate in candidates]) for _, candidates in found]
        negatives = (self.num_items - 1) * (1 if self.bimodal else 2)
        n = len(states)
        partition = [scores.logsumexp(0) - math.log(len(scores)) + math.log(negatives) for scores, _ in found]
        similarity = [(w * scores).sum() * self.temperature for w, (scores, _) in zip(weights, found, strict=True)]
        self.stats = slow_pair_statistics(z0.detach(), z1.detach(), index, self.temperature, self.bimodal) | {
            "acceptance": sum(moved) / n,
            "carried_weight": sum(w[own].sum() for w, own in zip(weights, carried, strict=True)) / n,
            "log_partition": sum(partition) / max(len(partition), 1),
            "negative_similarity": sum(similarity) / n,
        }
        if self.carry == "cached":
            self.stats["staleness"] = self.stalenesses[-1]
