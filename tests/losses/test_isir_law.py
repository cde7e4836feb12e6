"""i-SIR's law, by enumeration: transition matrices over all batches, queues and coins, in float64, whose candidates and
weights are the library's own; what follows from their detailed balance; and the bugs that would break it.

Candidates and their scores are those that the library gives to its operator, whose draws have tests of
their own (tests/ops/test_isir_exact.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from helpers import chi_square
from isir_visits import (
    ALONE,
    BATCH,
    FEW,
    ITEMS,
    LABELS,
    SETTINGS,
    TEMPERATURE,
    make_loss,
    negative_scores,
    negatives,
    possible_visits,
    step_chains,
    symmetric_table,
    unit_table,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from emc2_kernels import MHState, ops
from emc2_kernels.backends.params import CarriedParams, ScoreParams
from emc2_kernels.backends.reference.lse import masked_scores
from emc2_kernels.distributed.keys import LocalKeys
from emc2_kernels.losses import EMC2Loss, emc2, emc2_isir
from emc2_kernels.losses.emc2_isir import Carried, Kept, Resampled
from emc2_kernels.stores.queue import ItemQueue

CHAINS, VISITS = 100_000, 16
ISIR_STEP = ops.isir_step


@pytest.fixture(autouse=True)
def what_is_kept_counts(monkeypatch):
    """It is as fresh as can be, but views of an item are no more alike than others, which leaves no measure of that."""
    monkeypatch.setattr(emc2_isir, "is_fresh", lambda sums: torch.ones((), dtype=torch.bool))


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
            kept, resampled = step_chains(loss, visit, states, torch.arange(2 * n))
        sides = len(resampled.sides)
        for side, own in enumerate(shares.chunk(sides)):
            of_side = steps[side * len(steps) // sides : (side + 1) * len(steps) // sides]  # of batch and queue
            labels = [some for _, brought in of_side for some in (brought.key, brought.key_labels.expand(len(own), -1))]
            scores = [some for keys, brought in of_side for some in (brought.score, masked_scores(keys))]
            probabilities = torch.cat(scores, 1).softmax(1)
            own.scatter_add_(1, torch.cat(labels, 1).clamp_min(0), probabilities)  # of label -1 it is 0
        for row in range(2 * n):
            inverse[row] += (-log_partition(loss, kept, resampled, row)).exp()
    shares, inverse = shares / len(visits), inverse / len(visits)
    scores = [negative_scores(loss, anchor, unit_table()) for anchor in (0, 1)]
    of_views = zip(scores, states, shares.chunk(2), inverse.chunk(2), strict=True)
    return [Law(own, rows[:, labels], estimates) for own, labels, rows, estimates in of_views]


def log_partition(loss: EMC2Loss, kept: Kept, resampled: Resampled, row: int) -> Tensor:
    """() the statistic of that name, of one row."""
    per_side = len(resampled.lse) // len(resampled.sides)
    own, one = slice(row, row + 1), slice(row % per_side, row % per_side + 1)
    side = resampled.sides[row // per_side]
    of_row = {name: getattr(side, name)[one] for name in ("queries", "items", "carried_items")}
    state = MHState(*(field[own] for field in resampled.state))
    alone = Resampled(resampled.lse[own], state, resampled.position[own], [side._replace(**of_row)])
    options = loss._walk_options(side.queries, True)
    kept = kept._replace(carried=Carried(*(field[own] for field in kept.carried)))
    stats, _ = emc2_isir.resampled_stats(alone, kept, ITEMS, options)
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


def started_at_target(loss: EMC2Loss, anchors: Tensor, table: Tensor) -> list[tuple[float, Tensor]]:
    """Weights and (anchors,) states of their chains, each of which follows its own target under the weights.

    All are one function of a uniform number each, its quantiles, so that a few dozen joint starts are all there are.
    """
    laws = [negative_scores(loss, int(anchor), table).softmax(0).cumsum(0) for anchor in anchors]
    ends = torch.cat([law[:-1] for law in laws]).round(decimals=12).unique()
    ends = torch.cat((ends.new_zeros(1), ends, ends.new_ones(1)))
    middles = (ends[1:] + ends[:-1]) / 2
    places = [torch.searchsorted(law, middles).clamp_max(len(law) - 1) for law in laws]
    states = [negatives(loss, int(anchor))[place] for anchor, place in zip(anchors, places, strict=True)]
    return list(zip(ends.diff().tolist(), torch.stack(states, 1), strict=True))


def expected_gradient(setting: str, table: Tensor, carry: str = "recompute") -> Tensor:
    """Of EMC2Loss by the encoder's table: over all batches, queues, coins and starts, these from the target."""
    table = table.clone().requires_grad_()
    options = {"carry": carry, "encode": lambda items, views: table[items * 2 + views]}
    loss = make_loss(setting, table=table.detach(), **options).eval()
    visits = possible_visits(loss)
    for visit in visits:
        first = visit.items * 2
        anchors = torch.cat((first, first + 1))
        loss.step.fill_(visit.step)
        if loss.recent is not None:
            loss.recent.items.copy_(visit.queue)
        for weight, states in started_at_target(loss, anchors, table.detach()):
            loss.chains.key[anchors] = states
            (loss(table[first], table[first + 1], visit.items) * (weight / len(visits))).backward()
    return table.grad


def global_gradient(setting: str, table: Tensor) -> Tensor:
    """Of the mean over all anchors of log sum exp(s) over all negatives, less s+."""
    table, loss = table.clone().requires_grad_(), make_loss(setting)
    unit = functional.normalize(table)
    terms = [
        negative_scores(loss, anchor, unit).logsumexp(0) - unit[anchor] @ unit[anchor ^ 1] / TEMPERATURE
        for anchor in LABELS.tolist()
    ]
    torch.stack(terms).mean().backward()
    return table.grad


def gradient_error(setting: str, table: Tensor | None = None, carry: str = "recompute") -> float:
    table = unit_table() if table is None else table
    exact = global_gradient(setting, table)
    return float((expected_gradient(setting, table, carry) - exact).norm() / exact.norm())


@pytest.mark.parametrize("setting", ALONE)
def test_the_mean_gradient_is_that_of_the_global_loss(setting):
    assert gradient_error(setting) < 1e-10


def counted_once(original, anchors, kept, *rest, **form):
    """The keys' side of what is kept is lost."""
    return original(anchors, kept._replace(drift=None), *rest, **form)


@pytest.mark.parametrize("setting", FEW[1:])
def test_where_partition_functions_are_equal_kept_keys_lose_nothing(setting, monkeypatch):
    """The anchor's side of their gradient, twice, is that of both sides."""
    assert gradient_error(setting, symmetric_table(), "cached") < 1e-10
    plant(monkeypatch, ("mean_loss", counted_once))
    assert gradient_error(setting, symmetric_table(), "cached") > 0.1


def test_where_they_are_not_kept_keys_lose_less_than_their_side(monkeypatch):
    twice = gradient_error("both", carry="cached")
    plant(monkeypatch, ("mean_loss", counted_once))
    assert 0.01 < twice < 0.8 * gradient_error("both", carry="cached")


def batch_keys_left_in(original, keys, queries, items, carried_items, *rest):
    """The batch's keys of the carried item are candidates, too."""
    of_queue = keys.log_proposal is not None
    return original(keys, queries, items, carried_items if of_queue else torch.full_like(carried_items, -1), *rest)


def queue_keys_left_in(original, keys, queries, items, carried_items, *rest):
    """The queue's are."""
    of_queue = keys.log_proposal is not None
    return original(keys, queries, items, torch.full_like(carried_items, -1) if of_queue else carried_items, *rest)


def batch_items_left_in(original, queue, batch):
    """The queue's keys of the batch's items are candidates, too."""
    items, _ = original(queue, batch)
    return items, items >= 0


def same_key_left_out(original, keys, queries, items, carried_items, temperature, carried, backend):
    """Of these only the carried key itself is none, which would be one twice. All rows are of one item."""
    others = keys.items != items[0]
    keys = LocalKeys(*(field[others] for field in keys[:3]))._replace(items=keys.labels[others])
    carried = carried._replace(key_labels=keys.labels)
    return original(keys, queries, torch.full_like(items, -1), carried.key[:, 0], temperature, carried, backend)


def other_view_forgotten(original, anchors, key, bank, options, *rest):
    return original(anchors, key, bank, options._replace(views="one"), *rest)


def nothing_brought_along(original, anchors, key, *rest):
    """NT-Xent: whatever the chain does, only the batch counts."""
    return original(anchors, torch.full_like(key, -1), *rest)


def replaced_keys_counted(original, side):
    return original(side._replace(carried_items=side.items))


def queue_not_counted(original, side):
    return original(side._replace(queue=None))


def replaced_keys_of_queue_counted(original, side):
    return original(side._replace(queue=None)) + (side.queue.log_proposal == 0).sum()


def whole_queue_counted(original, side):
    usable = torch.zeros_like(side.queue.log_proposal)
    return original(side._replace(queue=side.queue._replace(log_proposal=usable)))


OWNERS = dict.fromkeys(("bring_along", "encode_along", "mean_loss"), [emc2_isir, emc2])
OWNERS |= {"resample": [LocalKeys], "lse_gradient": [LocalKeys], "outside": [ItemQueue], "_count_keys": [emc2_isir]}


def plant(monkeypatch, *bugs):
    for name, bug in bugs:
        for owner in OWNERS[name]:
            original = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *args, original=original, bug=bug, **named: bug(original, *args, **named)
            )


LEFT_IN = (("resample", batch_keys_left_in), ("lse_gradient", batch_keys_left_in))
ONLY_SAME = (("resample", same_key_left_out),)
FORGOTTEN = (("bring_along", other_view_forgotten), ("encode_along", other_view_forgotten))
NOTHING = (("bring_along", nothing_brought_along), ("encode_along", nothing_brought_along))
QUEUE_LEFT_IN = (("resample", queue_keys_left_in), ("lse_gradient", queue_keys_left_in))
TWICE = (("outside", batch_items_left_in),)
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
OF_QUEUE = {f"{setting}, the queue's left in": (setting, QUEUE_LEFT_IN) for setting in FEW[3:]}
OF_QUEUE |= {f"{setting}, the batch's items too": (setting, TWICE) for setting in FEW[3:]}
OF_QUEUE |= {"both, queue, keys left in": ("both, queue", LEFT_IN)}
WHOLE_LOSS = [name for name, (setting, bugs) in BUGS.items() if setting != "one" and ONLY_SAME[0] not in bugs]
CHAINED = [name for name, (_, bugs) in BUGS.items() if bugs != NOTHING]
CHAINED += [name for name, (setting, _) in OF_QUEUE.items() if setting == "both, queue"]
BUGS |= OF_QUEUE


@pytest.mark.parametrize("name", BUGS)
def test_bugs_break_the_law(name, monkeypatch):
    setting, bugs = BUGS[name]
    plant(monkeypatch, *bugs)
    errors = [law.errors() for law in enumerated(make_loss(setting))]
    worst = {what: max(of_view[what] for of_view in errors) for what in errors[0]}
    assert worst["rows"] < 1e-12, "it is a law still"
    assert worst["balance"] > 1e-3 and worst["law"] > 5e-3 and worst["partition"] > 1e-2, worst


COUNTS = [(setting, replaced_keys_counted) for setting in FEW]
COUNTS += [(setting, queue_not_counted) for setting in FEW[3:]]
COUNTS += [("both, queue", replaced_keys_of_queue_counted), ("both, queue", whole_queue_counted)]


@pytest.mark.parametrize(("setting", "bug"), COUNTS)
def test_a_wrong_count_of_candidates_breaks_the_partition_function_alone(setting, bug, monkeypatch):
    plant(monkeypatch, ("_count_keys", bug))
    for law in enumerated(make_loss(setting)):
        errors = law.errors()
        assert errors.pop("partition") > 0.05 and max(errors.values()) < 1e-12, errors


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
            kept, resampled = step_chains(loss, visit, torch.where(present, start, -1), some_ids.flatten())
            key[who] = resampled.state.key.view(2, -1)[present]
            estimates = (candidates(kept, resampled).log() - resampled.lse).exp()
            inverse[who] = estimates.view(2, -1)[present]
    return key, inverse


def chosen(field: Tensor, who: Tensor) -> Tensor:
    """Of each row of a field (2, n) what is chosen; zeros at the end of the shorter one."""
    return pad_sequence([row[some] for row, some in zip(field, who, strict=True)], batch_first=True)


def candidates(kept: Kept, resampled: Resampled) -> Tensor:
    """(rows,) how many there are."""
    counts = []
    for _, items, own, keys, queue, _ in resampled.sides:
        ids = keys.items
        if queue is not None:
            ids = torch.cat((ids, queue.items[~torch.isin(queue.items, keys.items)]))
        counts.append(((ids != items[:, None]) & (ids != own[:, None])).sum(1))
    return kept.carried.scores.isfinite().sum(1) + torch.cat(counts)


def p_value(setting: str, key: Tensor) -> float:
    """Of the keys (2, chains), of item 0's two views each for itself; the sum of two statistics as of one, with a
    degree of freedom too many."""
    loss = make_loss(setting)
    counts = [row.bincount(minlength=2 * ITEMS)[negatives(loss, view)] for view, row in enumerate(key)]
    targets = [negative_scores(loss, view, unit_table()).softmax(0) for view in (0, 1)]
    return chi_square(torch.cat(counts).double(), torch.cat(targets) / 2)


@pytest.mark.parametrize("setting", FEW)
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
        if loss.recent is not None:  # of a data set so small, the latest items are those that chains have just met
            loss.recent.items.random_(ITEMS, generator=generator)
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


@pytest.mark.parametrize("setting", FEW[:4])
def test_chains_that_the_loss_keeps_follow_the_softmax(setting):
    assert smallest_p_value(setting, 4_000) > 1e-5  # of ten


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_chains_that_the_loss_keeps_follow_the_softmax_for_long(setting):
    assert smallest_p_value(setting, 60_000) > 1e-5


def test_chains_that_the_loss_keeps_show_a_bug(monkeypatch):
    plant(monkeypatch, *NOTHING)
    assert smallest_p_value("one", 4_000) < 1e-6
