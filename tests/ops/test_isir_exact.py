"""The law of isir_step: one step's probabilities, its stationary law for both ways in which keys may be drawn, what its
log-sum-exp estimates, and the power of these tests."""

import math

import pytest
import torch
from helpers import COMPILED, chi_square
from test_exact import CHAINS, assert_within_standard_errors, tiny_space

import emc2_kernels as emc2
from emc2_kernels import MHState, rng

TEMPERATURE = 0.4
LAW = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])  # of keys that are not drawn uniformly


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


def quiet_own_candidates(monkeypatch):
    """A planted bug: what is carried has no noise."""
    gumbel = rng.gumbel

    def quiet(*args, stream=rng.GUMBEL, **options):
        return gumbel(*args, stream=stream, **options) * (stream == rng.GUMBEL)

    monkeypatch.setattr(rng, "gumbel", quiet)


# One step from a given state, of many chains that see the same keys.


def one_step_counts(backend, start, *, times=1, seed=1, **options):
    """How often the next state is each key of a tiny space, and how often it is what was carried, the last.

    Args:
        times: how many times the carried candidate counts.
    """
    query, keys, scores, _ = tiny_space()
    score = (scores.float() - options.get("log_proposal", torch.zeros(5)))[start] + math.log(times)
    state = MHState(torch.full((CHAINS,), 99), score.expand(CHAINS))
    common = {"temperature": TEMPERATURE, "seed": seed, "step": 0, "backend": backend}
    position = emc2.isir_step(query.expand(CHAINS, -1), keys, state, **common, **options).position
    return torch.where(position < 0, 5, position).bincount(minlength=6).double()


def one_step_law(start, *, excluded=None, log_proposal=None):
    scores = tiny_space()[2]
    if log_proposal is not None:
        scores = scores - log_proposal.double()
    candidates = torch.cat((scores, scores[start : start + 1]))
    if excluded is not None:
        candidates[excluded] = -torch.inf
    return torch.softmax(candidates, 0)


@pytest.mark.parametrize("log_proposal", [None, LAW.log() + 3], ids=["", "weighted"])
def test_one_step_has_the_probabilities_of_the_softmax(backend, log_proposal):
    """Exactly: over all keys and what is carried, and where that stands for a key of its own."""
    options = {} if log_proposal is None else {"log_proposal": log_proposal}
    for start in range(5):
        counts = one_step_counts(backend, start, seed=start, **options)
        assert_within_standard_errors(counts, one_step_law(start, **options))
        ids = {"key_ids": torch.arange(5), "carried_ids": torch.full((CHAINS,), start)}
        counts = one_step_counts(backend, start, seed=start, **options, **ids)
        assert_within_standard_errors(counts, one_step_law(start, excluded=start, **options))


def test_wrong_steps_are_rejected(monkeypatch):
    def differs(counts, **options):
        with pytest.raises(AssertionError, match="standard errors"):
            assert_within_standard_errors(counts, one_step_law(1, **options))

    weights = {"log_proposal": LAW.log()}
    differs(one_step_counts("reference", 1, log_proposal=-LAW.log()), **weights)
    differs(one_step_counts("reference", 1, times=2))
    differs(one_step_counts("reference", 1), excluded=1)  # and so is the key that it stands for
    quiet_own_candidates(monkeypatch)
    differs(one_step_counts("reference", 1))


# Chains that follow their target, each with keys of its own: they still do after a step.

NUM_ITEMS, VISITS, GROUP, BATCH = 12, 100_000, 40, 8
ITEM_SCORES = torch.linspace(0, 4, NUM_ITEMS)
TARGET = torch.softmax(ITEM_SCORES.double(), 0)
ITEM_LAW = torch.softmax(torch.linspace(-1.5, 1.5, NUM_ITEMS)[torch.arange(NUM_ITEMS) * 5 % NUM_ITEMS], 0)


def following_the_target():
    return torch.multinomial(TARGET, VISITS, replacement=True, generator=torch.Generator().manual_seed(22))


def without_replacement():
    return torch.rand(VISITS, NUM_ITEMS, generator=torch.Generator().manual_seed(23)).argsort(1)[:, :BATCH]


def independent(law):
    generator = torch.Generator().manual_seed(24)
    return torch.multinomial(law, VISITS * BATCH, replacement=True, generator=generator).view(VISITS, BATCH)


def keys_of_rows(items):
    """Queries and keys, row by row (rows, BATCH) items: row i has their scores for its own, and 10^30 below zero for
    the others', which are candidates that nobody draws."""
    rows = torch.arange(len(items))
    keys = torch.full((len(items), BATCH, len(items)), -1e30)
    keys[rows, :, rows] = ITEM_SCORES[items]
    return torch.eye(len(items)), keys.flatten(0, 1)


def visited(backend, batches, log_proposal=None, *, replaced=False, times=1):
    """Chains after one step from where they followed the target, a row to a batch, each with its own draws: their items
    and log-sum-exps, and (visits, NUM_ITEMS) the share that each item had in the exponential of these.

    Args:
        log_proposal: of items.
        replaced: what is carried stands for the batch's key of its item.
        times: how many times it counts.
    """
    weight = torch.zeros(NUM_ITEMS) if log_proposal is None else log_proposal
    starts, found = following_the_target()[: len(batches)], []
    for step, (items, start) in enumerate(zip(batches.split(GROUP), starts.split(GROUP), strict=True)):
        (queries, keys), labels = keys_of_rows(items), items.flatten()
        options = {"carried_ids": start, "key_ids": labels} if replaced else {}
        if log_proposal is not None:
            options["log_proposal"] = weight[labels]
        state = MHState(start, (ITEM_SCORES - weight)[start] + math.log(times))
        result = emc2.isir_step(
            queries, keys.requires_grad_(), state, temperature=1.0, seed=3, step=step, key_labels=labels,
            backend=backend, **options,
        )  # fmt: skip
        (shares,) = torch.autograd.grad(result.lse.sum(), keys)  # of row i's keys, in column i
        shares = shares.view(GROUP, BATCH, GROUP).diagonal(dim1=0, dim2=2).T
        of_items = torch.zeros(GROUP, NUM_ITEMS).scatter_add_(1, items, shares)
        of_items[torch.arange(GROUP), start] += result.carried_weight
        found.append((result.state.key, result.lse.detach().double(), of_items.double()))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def p_value(keys):
    return chi_square(keys.bincount(minlength=NUM_ITEMS).double(), TARGET)


def assert_mean(values, expected):
    """Of independent ones (visits, ...)."""
    standard_error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() / standard_error).max() < 6


def assert_keeps_the_target(keys, shares):
    assert p_value(keys) > 1e-4
    assert_mean(shares, TARGET)


def test_batches_without_replacement_keep_the_target(backend):
    """What is carried stands for the key of its item: exact although a batch is most of the data set."""
    batches = without_replacement()
    keys, lse, shares = visited(backend, batches, replaced=True)
    assert_keeps_the_target(keys, shares)
    candidates = BATCH + (batches != following_the_target()[:, None]).all(1).double()
    assert_mean(candidates * (-lse).exp(), NUM_ITEMS / ITEM_SCORES.double().exp().sum())


@pytest.mark.parametrize("law", [torch.full((NUM_ITEMS,), 1 / NUM_ITEMS), ITEM_LAW], ids=["uniform", "weighted"])
def test_independent_keys_keep_the_target(backend, law):
    """Their law enters by its log, up to a constant."""
    keys, lse, shares = visited(backend, independent(law), law.log() + 2)
    assert_keeps_the_target(keys, shares)
    assert_mean((BATCH + 1) * (-lse - 2).exp(), 1 / ITEM_SCORES.double().exp().sum())


WRONG = {
    "sign of log_proposal": (lambda: independent(ITEM_LAW), {"log_proposal": -ITEM_LAW.log()}),
    "carried twice": (lambda: independent(torch.ones(NUM_ITEMS)), {"times": 2}),
    "carried beside the key that it stands for": (without_replacement, {}),
}


@pytest.mark.parametrize(("batches", "options"), WRONG.values(), ids=WRONG)
def test_wrong_samplers_are_rejected(batches, options):
    """Of half as many visits."""
    keys, _, shares = visited("reference", batches()[: VISITS // 2], **options)
    assert p_value(keys) < 1e-10
    with pytest.raises(AssertionError):
        assert_mean(shares, TARGET)


def test_a_carried_candidate_without_noise_is_rejected(monkeypatch):
    quiet_own_candidates(monkeypatch)
    keys, _, shares = visited("reference", independent(torch.ones(NUM_ITEMS))[: VISITS // 2])
    assert p_value(keys) < 1e-10
    assert_mean(shares, TARGET)  # in which noise has no part
