"""Planted bugs, each of which the comparison with the oracle must catch."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from oracle import unit, walk

import emc2_kernels as emc2
from emc2_kernels import rng
from emc2_kernels.backends.reference import mh as reference
from emc2_kernels.transition import Transition


def disagreements(backend):
    """How many of 64 rows differ from the oracle in samples, key or accepts, after two steps of a carried walk."""
    queries, keys = unit(64, 8, seed=1), unit(50, 8, seed=2)
    options = {"temperature": 0.3, "seed": 3, "query_ids": torch.arange(64) % 25, "key_ids": torch.arange(50) % 25}
    options |= {"chain_ids": torch.arange(64), "key_labels": torch.arange(50) + 1000, "burn_in": 3, "num_samples": 9}
    state = emc2.init_state(64)
    differs = torch.zeros(64, dtype=torch.bool)
    for step in range(2):
        expected = walk(queries, keys, state, step=step, **options)
        result = emc2.mh_step(queries, keys, state, step=step, return_accepts=True, backend=backend, **options)
        clear = expected.closest_tie > 1e-4
        differs |= clear & (result.samples.long() != expected.samples).any(1)
        differs |= clear & ((result.state.key != expected.key) | (result.num_accepted.long() != expected.accepted))
        state = emc2.MHState(expected.key, expected.score.float())
    return int(differs.sum())


def patched(module, name, change):
    original = getattr(module, name)
    return module, name, lambda *args, **kwargs: change(original, *args, **kwargs)


def inverted_ratio(original, *args, **kwargs):
    return -original(*args, **kwargs)


def shared_stream(original, chain_ids, *args, **kwargs):
    return original(torch.zeros_like(chain_ids), *args, **kwargs)


def draws_off_by_one(original, chain_ids, proposals, **kwargs):
    return original(chain_ids, range(proposals.start + 1, proposals.stop + 1), **kwargs)


def positive_proposed(original, walk, *args):
    return original(walk._replace(query_ids=None), *args)


def stale_position(original, first, then):
    composed = original(first, then)
    return composed._replace(position=torch.where(first.position >= 0, first.position, then.position))


def composed_backwards(original, first, then):
    return original(then, first)


def burn_in_off_by_one(original, walk, prefixes):
    return original(walk._replace(burn_in=walk.burn_in + 1), prefixes)


def last_state_forgotten(original, transition, state, labels):
    return original(Transition(*(field[:, :1].expand_as(field) for field in transition)), state, labels)


MUTANTS = {
    "inverted ratio": patched(rng, "acceptance", inverted_ratio),
    "shared stream": patched(rng, "acceptance", shared_stream),
    "draws off by one": patched(rng, "acceptance", draws_off_by_one),
    "positive proposed": patched(reference, "_where_proposable", positive_proposed),
    "stale position": patched(reference, "compose", stale_position),
    "composed backwards": patched(reference, "compose", composed_backwards),
    "burn-in off by one": patched(reference, "_at_sample_points", burn_in_off_by_one),
    "samples of the first mark": patched(reference, "apply", last_state_forgotten),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backends_agree_with_the_oracle(backend):
    assert disagreements(backend) == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_reference_are_caught(name, monkeypatch):
    right_draws = SimpleNamespace(acceptance=rng.acceptance, proposal_positions=rng.proposal_positions)
    monkeypatch.setattr(oracle, "rng", right_draws)  # the oracle keeps its draws where the mutant is in them
    monkeypatch.setattr(*MUTANTS[name])
    assert disagreements("reference") > 3
