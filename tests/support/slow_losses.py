"""The losses done slowly: one anchor, one sample and one dictionary entry at a time, in float64."""

import itertools
import math

import pytest
import torch

from emc2_kernels import MHState, mh_step, rng

ITEMS, DIM, B = 12, 8, 6
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # tolerated relative RMS of the gradient
INDICES = {"no index": None, "distinct": torch.arange(B), "duplicates": torch.tensor([3, 1, 3, 3, 0, 1])}
NORM_FLOOR = 1e-6


def steps_beside(fast, slow, table, exact, batches):
    """Yields, for each batch, the value and statistics of the loss and the value of the slow one, with their gradients
    in the tables; the table drifts afterwards, and the exact one follows it."""
    for step, index in enumerate(batches):
        exact.load_state_dict(table.state_dict())
        slow.carried.clear()
        table.calls.clear()
        table.zero_grad()
        exact.zero_grad()
        value, stats = fast(*table.pair(index), index, return_stats=True)
        expected = slow(*exact.pair(index), index)
        value.backward()
        expected.backward()
        assert_statistics(stats, slow.stats)
        slow.assert_keeps_the_same(fast)
        yield value.detach(), stats, expected.detach()
        table.drift(step)


def unit(row):
    return row / row.norm().clamp_min(NORM_FLOOR)


def scores_with(rows, anchor, temperature):
    return [(rows[anchor] @ row) / temperature for row in rows]


def slow_ntxent(z0, z1, index=None, temperature=0.07, normalize=True, bimodal=False):
    """Mean over anchors of -s+ + log(exp(s+) + sum of exp(s-)), term by term; of two modalities each row's negatives
    are the other's."""
    rows = [unit(row) if normalize else row for row in (*z0, *z1)]
    b, losses = len(z0), []
    items = [("row", row % b) for row in range(2 * b)] if index is None else index.tolist() * 2
    for anchor in range(2 * b):
        scores, positive = scores_with(rows, anchor, temperature), (anchor + b) % (2 * b)
        others = range(2 * b)
        if bimodal:
            others = range(b) if anchor >= b else range(b, 2 * b)
        negatives = [scores[j] for j in others if j not in (anchor, positive) and items[j] != items[anchor]]
        losses.append(torch.stack([scores[positive], *negatives]).logsumexp(0) - scores[positive])
    return torch.stack(losses).mean()


def slow_pair_statistics(z0, z1, index, temperature, bimodal=False):
    rows, b = [unit(row) for row in (*z0, *z1)], len(z0)
    cosines = [(rows[view + i] @ rows[view + j]) for view in (0, b) for i in range(b) for j in range(b) if i != j]
    return {
        "ntxent": slow_ntxent(z0, z1, index, temperature, bimodal=bimodal),
        "positive_similarity": torch.stack([rows[i] @ rows[i + b] for i in range(b)]).mean(),
        "mean_cosine": sum(cosines) / max(len(cosines), 1),
    }


def slow_ntxent_negative_similarity(z0, z1, index, temperature):
    """Mean over anchors that have negatives of their mean similarity under softmax weights."""
    rows, b, means = [unit(row) for row in (*z0, *z1)], len(z0), []
    items = list(range(b)) * 2 if index is None else index.tolist() * 2
    for anchor in range(2 * b):
        scores = scores_with(rows, anchor, temperature)
        negatives = torch.stack([score for score, item in zip(scores, items, strict=True) if item != items[anchor]])
        means.append((negatives.softmax(0) * negatives).sum() * temperature)
    return torch.stack(means).mean()


def value_and_gradients(loss, z0, z1, *arguments):
    z0, z1 = z0.detach().clone().requires_grad_(), z1.detach().clone().requires_grad_()
    value = loss(z0, z1, *arguments)
    value.backward()
    return value.detach(), torch.cat((z0.grad, z1.grad))


def assert_statistics(stats, expected):
    assert set(stats) == set(expected)
    for name, value in stats.items():
        assert value.shape == () and not value.requires_grad
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-5, nan_ok=True), name


class SlowStores:
    """What a loss keeps of a data set, in dictionaries."""

    def __init__(self, bank_dtype):
        self.bank_dtype = bank_dtype
        self.chains = {}  # (item, view) -> (label, score)
        self.bank = {}  # label -> (embedding, step)
        self.step = 0

    def remember(self, anchors, embeddings, states):
        """States and embeddings of (item, view) anchors, row by row: of duplicates the last stays."""
        for (item, view), embedding, (label, score) in zip(anchors, embeddings, states, strict=True):
            self.chains[item, view] = (label, score)
            if label < 0:
                del self.chains[item, view]
            self.bank[item * 2 + view] = embedding.detach().float().to(self.bank_dtype), self.step
        self.step += 1

    def assert_keeps_the_same(self, loss):
        assert loss.step.item() == self.step
        for item, view in itertools.product(range(ITEMS), (0, 1)):
            slot = item * 2 + view
            label, score = self.chains.get((item, view), (-1, -math.inf))
            assert loss.chains.key[slot].item() == label
            assert loss.chains.score[slot].item() == pytest.approx(score, rel=1e-4, abs=1e-4)
            embedding, written_at = self.bank.get(slot, (torch.full((DIM,), torch.inf, dtype=self.bank_dtype), -1))
            assert loss.bank.embeddings.dtype == self.bank_dtype
            assert loss.bank.written_at[slot].item() == written_at
            torch.testing.assert_close(loss.bank.embeddings[slot], embedding)


class SlowEMC2(SlowStores):
    """EMC2 as section 4 of the design states it; only ``mh_step`` and the coin are the library's.

    Called with embeddings in float64 that hold the loss's own inputs exactly.
    """

    def __init__(
        self,
        *,
        temperature=0.2,
        views="one",
        burn_in=0.5,
        num_samples=None,
        carry="cached",
        seed=0,
        bank_dtype=torch.float32,
        walk_dtype=torch.float32,
        encode=None,
    ):
        super().__init__(bank_dtype)
        self.temperature, self.views, self.burn_in, self.num_samples = temperature, views, burn_in, num_samples
        self.carry, self.seed, self.encode = carry, seed, encode
        self.walk_dtype = walk_dtype
        self.carried = set()  # labels of the latest call's samples outside the batch
        self.stats = {}

    def __call__(self, z0, z1, index):
        items, b = index.tolist(), len(index)
        anchors = [(item, view) for view in (0, 1) for item in items]
        embeddings = [unit(row) for row in (*z0, *z1)]
        key_rows = self._key_rows(index)
        states = [self._incoming(anchor, row) for anchor, row in zip(anchors, embeddings, strict=True)]
        result = self._walk(anchors, embeddings, key_rows, states)
        means = [
            self._mean_negative([key_rows[s] if s >= 0 else None for s in samples], embeddings, state[0])
            for samples, state in zip(result.samples.tolist(), states, strict=True)
        ]
        positives = [embeddings[(row + b) % (2 * b)] for row in range(2 * b)]
        attraction = torch.stack([q @ k for q, k in zip(embeddings, positives, strict=True)])
        repulsion = torch.stack([q @ k for q, k in zip(embeddings, means, strict=True)])
        self._keep_statistics(z0, z1, index, anchors, key_rows, result, repulsion)
        self.remember(anchors, embeddings, zip(*(field.tolist() for field in result.state), strict=True))
        return (repulsion - attraction).sum() / self.temperature / (2 * b)

    def _key_rows(self, index):
        """Which rows of the 2b anchors are proposed."""
        b = len(index)
        if self.views == "both":
            return list(range(2 * b))
        coins = rng.view_coin(index, seed=self.seed, step=self.step).tolist()
        return [row + b * coin for row, coin in enumerate(coins)]

    def _incoming(self, anchor, embedding):
        """The chain's key, and its score with the present embedding where the bank has the key."""
        label, score = self.chains.get(anchor, (-1, -math.inf))
        if label in self.bank:
            score = (embedding.detach() @ self.bank[label][0].double()).item() / self.temperature
        return label, score

    def _walk(self, anchors, embeddings, key_rows, states):
        rows = torch.stack(embeddings).detach().to(self.walk_dtype)
        item_of, view_of = (torch.tensor(column) for column in zip(*anchors, strict=True))
        m = len(key_rows)
        burn_in = math.floor(self.burn_in * m)
        labels, scores = zip(*states, strict=True)
        return mh_step(
            rows,
            rows[key_rows],
            MHState(torch.tensor(labels), torch.tensor(scores, dtype=torch.float32)),
            temperature=self.temperature,
            seed=self.seed,
            step=self.step,
            chain_ids=item_of * 2 + view_of,
            query_ids=item_of,
            key_ids=item_of[key_rows],
            key_labels=(item_of * 2 + view_of)[key_rows],
            burn_in=burn_in,
            num_samples=min(16, m - burn_in) if self.num_samples is None else self.num_samples,
            return_accepts=True,
        )

    def _mean_negative(self, samples, embeddings, carried_label):
        """Mean of the samples' embeddings; None among the samples is the key that the chain brought along."""
        terms = []
        for row in samples:
            if row is not None:
                terms.append(embeddings[row])
            elif carried_label >= 0:
                terms.append(self._carried_embedding(carried_label))
        return torch.stack(terms).mean(0) if terms else torch.zeros_like(embeddings[0])

    def _carried_embedding(self, label):
        self.carried.add(label)
        return self.bank[label][0].double() if self.carry == "cached" else unit(self.encode(label // 2, label % 2))

    def _keep_statistics(self, z0, z1, index, anchors, key_rows, result, repulsion):
        proposed = sum(anchor[0] != anchors[key][0] for anchor in anchors for key in key_rows)
        self.stats = slow_pair_statistics(z0.detach(), z1.detach(), index, self.temperature) | {
            "acceptance": result.num_accepted.sum() / max(proposed, 1),
            "carry_share": (result.samples < 0).sum() / result.samples.numel(),
            "negative_similarity": repulsion.detach().mean(),
        }
