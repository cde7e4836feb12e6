"""i-SIR's law, by enumeration: transition matrices over all batches and coins, in float64, whose candidates and weights
are the library's own; what follows from their detailed balance; and the bugs that would break it.

Candidates and their scores are those that the library gives to its operator, whose draws have tests of
their own (tests/ops/test_isir_exact.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, count, product
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from helpers import chi_square
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from emc2_kernels import MHState, ops
from emc2_kernels.backends.params import CarriedParams, ScoreParams
from emc2_kernels.backends.reference.lse import masked_scores
from emc2_kernels.distributed.keys import LocalKeys
from emc2_kernels.losses import EMC2Loss, emc2, emc2_isir
from emc2_kernels.losses.anchors import Anchors
from emc2_kernels.losses.emc2_isir import Carried, Resampled

ITEMS, BATCH, DIM, TEMPERATURE = 5, 3, 6, 0.5
LABELS = torch.arange(2 * ITEMS)
SETTINGS = {"one": {"views": "one"}, "both": {"views": "both"}, "bimodal": {"bimodal": True}}
CHAINS, VISITS = 100_000, 16
ISIR_STEP = ops.isir_step


def unit_table() -> Tensor:
    """(2 * ITEMS, DIM) float64: an embedding for each label. Not random: how far off a bug is depends on it."""
    return functional.normalize(torch.arange(1, 2 * ITEMS * DIM + 1).double().square().sin().view(-1, DIM))


def make_loss(setting: str, dtype: torch.dtype = torch.float64, **options) -> EMC2Loss:
    """Its bank holds the table."""
    options |= {"temperature": TEMPERATURE, "sampler": "isir", "bank_dtype": dtype, **SETTINGS[setting]}
    loss = EMC2Loss(ITEMS, DIM, backend="reference" if dtype == torch.float64 else "auto", **options)
    loss.bank.update(LABELS // 2, LABELS % 2, unit_table(), 0)
    return loss


def negatives(loss: EMC2Loss, anchor: int) -> Tensor:
    """Labels among which the anchor's chain moves."""
    legal = anchor // 2 != LABELS // 2
    return LABELS[legal & (anchor % 2 != LABELS % 2)] if loss.bimodal else LABELS[legal]


def negative_scores(loss: EMC2Loss, anchor: int, table: Tensor) -> Tensor:
    return table[negatives(loss, anchor)] @ table[anchor] / TEMPERATURE


class Visit(NamedTuple):
    items: Tensor  # (BATCH,)
    step: int  # at which their coins are the ones that are meant


def possible_visits(loss: EMC2Loss, item: int | None = None) -> list[Visit]:
    """All batches, or those that hold an item, with all outcomes of their items' coins: equally likely, all of them."""
    batches = [some for some in combinations(range(ITEMS), BATCH) if item is None or item in some]
    if loss.views == "both" or loss.bimodal:
        return [Visit(torch.tensor(batch), 0) for batch in batches]
    step_of: dict[tuple[int, ...], int] = {}
    for step in count():
        coins = ops.view_coin(torch.arange(ITEMS), loss.seed, torch.tensor(step), "auto")
        step_of.setdefault(tuple(coins.tolist()), step)
        if len(step_of) == 2**ITEMS:
            break
    visits = []
    for batch, wanted in product(batches, product((0, 1), repeat=BATCH)):
        step = next(step for coins, step in step_of.items() if tuple(coins[item] for item in batch) == wanted)
        visits.append(Visit(torch.tensor(batch), step))
    return visits


def step_chains(loss: EMC2Loss, visit: Visit, start: Tensor, ids: Tensor) -> tuple[Carried, Resampled]:
    """A visit of chains at labels (2, n) of item 0's two views; row by row, those of view 0 first."""
    table = loss.bank.embeddings
    anchors = Anchors(table[:2].repeat_interleave(start.shape[1], 0), torch.zeros_like(ids), ids)
    labels = torch.cat((visit.items * 2, visit.items * 2 + 1))
    keys = LocalKeys(table[labels], visit.items.repeat(2), labels)
    options = loss._walk_options(table, True)._replace(step=torch.tensor(visit.step))
    carried = emc2_isir.bring_along(anchors, start.flatten(), loss.bank, options, None, True, None)
    return carried, emc2_isir.resample(anchors, carried, keys, options)


@contextmanager
def recorded_steps() -> Iterator[list[tuple[ScoreParams, CarriedParams]]]:
    """What the library draws from: the candidates that it gives to the operator."""
    steps = []
    with patch.object(ops, "isir_step", lambda *given: steps.append(given[:2]) or ISIR_STEP(*given)):
        yield steps


class Law(NamedTuple):
    """Of one anchor's chain, over all visits."""

    scores: Tensor  # (S,) exact, of the states
    matrix: Tensor  # (S, S) transition probabilities, from and to
    inverse: Tensor  # (S,) mean estimate of 1 / partition function, from each state

    @property
    def target(self) -> Tensor:
        return self.scores.softmax(0)

    def errors(self) -> dict[str, float]:
        """How far it is from what is claimed of it."""
        flow = self.target[:, None] * self.matrix
        return {
            "rows": float((self.matrix.sum(1) - 1).abs().max()),
            "balance": float((flow - flow.T).abs().max()),
            "law": float((flow.sum(0) - self.target).abs().sum() / 2),  # by which one visit moves it, total variation
            "partition": float(((self.target * self.inverse).sum() * self.scores.exp().sum() - 1).abs()),
        }


def enumerated(loss: EMC2Loss) -> list[Law]:
    """Of the chains of item 0's two views."""
    states = torch.stack([negatives(loss, anchor) for anchor in (0, 1)])
    n, visits = states.shape[1], possible_visits(loss, item=0)
    shares, inverse = torch.zeros(2 * n, 2 * ITEMS, dtype=torch.float64), torch.zeros(2 * n, dtype=torch.float64)
    for visit in visits:
        with recorded_steps() as steps:
            carried, resampled = step_chains(loss, visit, states, torch.arange(2 * n))
        for own, (scores, brought) in zip(shares.chunk(len(steps)), steps, strict=True):
            labels = torch.cat((brought.key, brought.key_labels.expand(len(own), -1)), 1)
            probabilities = torch.cat((brought.score, masked_scores(scores)), 1).softmax(1)
            own.scatter_add_(1, labels.clamp_min(0), probabilities)  # of label -1 it is 0
        for row in range(2 * n):
            inverse[row] += (-log_partition(loss, carried, resampled, row)).exp()
    shares, inverse = shares / len(visits), inverse / len(visits)
    scores = [negative_scores(loss, anchor, unit_table()) for anchor in (0, 1)]
    of_views = zip(scores, states, shares.chunk(2), inverse.chunk(2), strict=True)
    return [Law(own, rows[:, labels], estimates) for own, labels, rows, estimates in of_views]


def log_partition(loss: EMC2Loss, carried: Carried, resampled: Resampled, row: int) -> Tensor:
    """() the statistic of that name, of one row."""
    per_side = len(resampled.lse) // len(resampled.sides)
    own, one = slice(row, row + 1), slice(row % per_side, row % per_side + 1)
    side = resampled.sides[row // per_side]
    of_row = {name: getattr(side, name)[one] for name in ("queries", "items", "carried_items")}
    state = MHState(*(field[own] for field in resampled.state))
    alone = Resampled(resampled.lse[own], state, resampled.position[own], [side._replace(**of_row)])
    options = loss._walk_options(side.queries, True)
    stats, _ = emc2_isir.resampled_stats(alone, Carried(*(field[own] for field in carried)), ITEMS, options)
    return stats["log_partition"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_transitions_are_in_detailed_balance_with_the_softmax_over_all_negatives(setting):
    for law in enumerated(make_loss(setting)):
        errors = law.errors()
        assert max(errors.values()) < 1e-12, errors
        assert law.matrix.min() >= 0 and torch.linalg.matrix_power(law.matrix, 3).min() > 1e-3
        forgotten = torch.linalg.eigvals(law.matrix).abs().sort().values[-2] ** VISITS
        assert forgotten < 5e-3, "of where it began, by the end of a simulation"
        function = torch.randn(len(law.scores), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        estimate = (law.target * (law.matrix @ function)).sum()
        torch.testing.assert_close(estimate, (law.target * function).sum(), rtol=0, atol=1e-12)


def started_at_target(loss: EMC2Loss, anchors: Tensor) -> list[tuple[float, Tensor]]:
    """Weights and (anchors,) states of their chains, each of which follows its own target under the weights.

    All are one function of a uniform number each, its quantiles, so that a few dozen joint starts are all there are.
    """
    table = unit_table()
    laws = [negative_scores(loss, int(anchor), table).softmax(0).cumsum(0) for anchor in anchors]
    ends = torch.cat([law[:-1] for law in laws]).sort().values
    ends = torch.cat((ends.new_zeros(1), ends, ends.new_ones(1)))
    middles = (ends[1:] + ends[:-1]) / 2
    places = [torch.searchsorted(law, middles).clamp_max(len(law) - 1) for law in laws]
    states = [negatives(loss, int(anchor))[place] for anchor, place in zip(anchors, places, strict=True)]
    return list(zip(ends.diff().tolist(), torch.stack(states, 1), strict=True))


def expected_gradient(setting: str) -> Tensor:
    """Of EMC2Loss by the encoder's table: over all batches, coins and starts, these from the target."""
    table = unit_table().requires_grad_()
    loss = make_loss(setting, carry="recompute", encode=lambda items, views: table[items * 2 + views]).eval()
    visits = possible_visits(loss)
    for visit in visits:
        first = visit.items * 2
        anchors = torch.cat((first, first + 1))
        loss.step.fill_(visit.step)
        for weight, states in started_at_target(loss, anchors):
            loss.chains.key[anchors] = states
            (loss(table[first], table[first + 1], visit.items) * (weight / len(visits))).backward()
    return table.grad


def global_gradient(setting: str) -> Tensor:
    """Of the mean over all anchors of log sum exp(s) over all negatives, less s+."""
    table, loss = unit_table().requires_grad_(), make_loss(setting)
    unit = functional.normalize(table)
    terms = [
        negative_scores(loss, anchor, unit).logsumexp(0) - unit[anchor] @ unit[anchor ^ 1] / TEMPERATURE
        for anchor in LABELS.tolist()
    ]
    torch.stack(terms).mean().backward()
    return table.grad


def gradient_error(setting: str) -> float:
    exact = global_gradient(setting)
    return float((expected_gradient(setting) - exact).norm() / exact.norm())


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_mean_gradient_is_that_of_the_global_loss(setting):
    assert gradient_error(setting) < 1e-10


def batch_keys_left_in(original, keys, queries, items, carried_items, *rest):
    """The batch's keys of the carried item are candidates, too."""
    return original(keys, queries, items, torch.full_like(carried_items, -1), *rest)


def same_key_left_out(original, keys, queries, items, carried_items, temperature, carried, backend):
    """Of these only the carried key itself is none, which would be one twice. All rows are of one item."""
    others = keys.items != items[0]
    keys = LocalKeys(*(field[others] for field in keys))._replace(items=keys.labels[others])
    carried = carried._replace(key_labels=keys.labels)
    return original(keys, queries, torch.full_like(items, -1), carried.key[:, 0], temperature, carried, backend)


def other_view_forgotten(original, anchors, key, bank, options, *rest):
    return original(anchors, key, bank, options._replace(views="one"), *rest)


def nothing_brought_along(original, anchors, key, *rest):
    """NT-Xent: whatever the chain does, only the batch counts."""
    return original(anchors, torch.full_like(key, -1), *rest)


def replaced_keys_counted(original, side):
    return original(side._replace(carried_items=side.items))


def plant(monkeypatch, *bugs):
    for name, bug in bugs:
        owners = [emc2_isir, emc2] if name == "bring_along" else [emc2_isir]
        owners = [LocalKeys] if name in ("resample", "lse_gradient") else owners
        for owner in owners:
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args, original=original, bug=bug: bug(original, *args))


LEFT_IN = (("resample", batch_keys_left_in), ("lse_gradient", batch_keys_left_in))
ONLY_SAME = (("resample", same_key_left_out),)
FORGOTTEN = (("bring_along", other_view_forgotten),)
NOTHING = (("bring_along", nothing_brought_along),)
BUGS = {
    "one, keys left in": ("one", LEFT_IN),
    "one, same key left out": ("one", ONLY_SAME),
    "one, nothing brought along": ("one", NOTHING),
    "both, keys left in": ("both", LEFT_IN),
    "both, same key left out": ("both", ONLY_SAME),
    "both, other view forgotten": ("both", FORGOTTEN),
    "both, one key beside the batch's": ("both", FORGOTTEN + ONLY_SAME),
    "both, nothing brought along": ("both", NOTHING),
    "bimodal, keys left in": ("bimodal", LEFT_IN),
    "bimodal, nothing brought along": ("bimodal", NOTHING),
}
WHOLE_LOSS = [name for name, (setting, bugs) in BUGS.items() if setting != "one" and ONLY_SAME[0] not in bugs]
CHAINED = [name for name, (_, bugs) in BUGS.items() if bugs != NOTHING]


@pytest.mark.parametrize("name", BUGS)
def test_bugs_break_the_law(name, monkeypatch):
    setting, bugs = BUGS[name]
    plant(monkeypatch, *bugs)
    errors = [law.errors() for law in enumerated(make_loss(setting))]
    worst = {what: max(of_view[what] for of_view in errors) for what in errors[0]}
    assert worst["rows"] < 1e-12, "it is a law still"
    assert worst["balance"] > 1e-3 and worst["law"] > 5e-3 and worst["partition"] > 1e-2, worst


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_count_of_candidates_breaks_the_partition_function_alone(setting, monkeypatch):
    plant(monkeypatch, ("_count_keys", replaced_keys_counted))
    for law in enumerated(make_loss(setting)):
        errors = law.errors()
        assert errors.pop("partition") > 0.1 and max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("name", WHOLE_LOSS)
def test_bugs_bias_the_gradient(name, monkeypatch):
    setting, bugs = BUGS[name]
    plant(monkeypatch, *bugs)
    assert gradient_error(setting) > 5e-3


@torch.no_grad()
def simulated(setting: str, chains: int = CHAINS, visits: int = VISITS) -> tuple[Tensor, Tensor]:
    """Keys (2, chains) of independent chains of item 0's two views after so many visits, each with a batch and coins of
    its own; and each chain's last estimate of 1 / mean of exp(score) over all negatives."""
    loss, generator = make_loss(setting, torch.float32, seed=4), torch.Generator().manual_seed(5)
    key, ids = torch.full((2, chains), -1), torch.arange(2 * chains).view(2, chains)
    inverse = torch.zeros(2, chains)
    for _ in range(visits):
        loss.seed += 1  # other noise for the same steps
        possible = possible_visits(loss, item=0)
        drawn = torch.randint(len(possible), (2, chains), generator=generator)
        for number, visit in enumerate(possible):
            who = drawn == number
            present, start, some_ids = (chosen(field, who) for field in (who, key, ids))
            carried, resampled = step_chains(loss, visit, torch.where(present, start, -1), some_ids.flatten())
            key[who] = resampled.state.key.view(2, -1)[present]
            estimates = (candidates(carried, resampled).log() - resampled.lse).exp()
            inverse[who] = estimates.view(2, -1)[present]
    return key, inverse


def chosen(field: Tensor, who: Tensor) -> Tensor:
    """Of each row of a field (2, n) what is chosen; zeros at the end of the shorter one."""
    return pad_sequence([row[some] for row, some in zip(field, who, strict=True)], batch_first=True)


def candidates(carried: Carried, resampled: Resampled) -> Tensor:
    """(rows,) how many there are."""
    keys = [
        ((keys.items != items[:, None]) & (keys.items != own[:, None])).sum(1)
        for _, items, own, keys, _ in resampled.sides
    ]
    return carried.scores.isfinite().sum(1) + torch.cat(keys)


def p_value(setting: str, key: Tensor) -> float:
    """Of the keys (2, chains), of item 0's two views each for itself; the sum of two statistics as of one, with a
    degree of freedom too many."""
    loss = make_loss(setting)
    counts = [row.bincount(minlength=2 * ITEMS)[negatives(loss, view)] for view, row in enumerate(key)]
    targets = [negative_scores(loss, view, unit_table()).softmax(0) for view in (0, 1)]
    return chi_square(torch.cat(counts).double(), torch.cat(targets) / 2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_final_states_of_independent_chains_follow_the_softmax(setting):
    """And the mean of their estimates is that of 1 / mean of exp(score)."""
    check_simulation(setting, CHAINS, VISITS)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_final_states_of_many_chains_follow_the_softmax(setting):
    check_simulation(setting, 10 * CHAINS, 24)


def check_simulation(setting: str, chains: int, visits: int) -> None:
    key, inverse = simulated(setting, chains, visits)
    assert p_value(setting, key) > 1e-4
    for view, estimates in enumerate(inverse.double()):
        exact = 1 / negative_scores(make_loss(setting), view, unit_table()).exp().mean()
        assert (estimates.mean() - exact).abs() < 5 * estimates.std() / chains**0.5


@pytest.mark.parametrize("name", CHAINED)
def test_final_states_show_the_bugs(name, monkeypatch):
    setting, bugs = BUGS[name]
    plant(monkeypatch, *bugs)
    key, _ = simulated(setting)
    assert p_value(setting, key) < 1e-6


def smallest_p_value(setting: str, steps: int, gap: int = 8) -> float:
    """Of the chains of all anchors, which EMC2Loss moves and keeps by itself: every gap-th state of each, as after so
    many visits it has forgotten."""
    loss, generator = make_loss(setting, torch.float32, seed=6), torch.Generator().manual_seed(7)
    table, visits, found = unit_table().float(), torch.zeros(ITEMS, dtype=torch.int64), [[] for _ in LABELS]
    for _ in range(steps):
        items = torch.randperm(ITEMS, generator=generator)[:BATCH]
        loss(table[items * 2], table[items * 2 + 1], items)
        visits[items] += 1
        for item in items[visits[items] % gap == 0].tolist():
            for anchor in (2 * item, 2 * item + 1):
                found[anchor].append(int(loss.chains.key[anchor]))
    values = []
    for anchor, keys in enumerate(found):
        counts = torch.tensor(keys).bincount(minlength=2 * ITEMS)[negatives(loss, anchor)]
        values.append(chi_square(counts.double(), negative_scores(loss, anchor, unit_table()).softmax(0)))
    return min(values)


@pytest.mark.parametrize("setting", SETTINGS)
def test_chains_that_the_loss_keeps_follow_the_softmax(setting):
    assert smallest_p_value(setting, 4_000) > 1e-5  # of ten


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_chains_that_the_loss_keeps_follow_the_softmax_for_long(setting):
    assert smallest_p_value(setting, 60_000) > 1e-5


def test_chains_that_the_loss_keeps_show_a_bug(monkeypatch):
    plant(monkeypatch, *NOTHING)
    assert smallest_p_value("one", 4_000) < 1e-6
