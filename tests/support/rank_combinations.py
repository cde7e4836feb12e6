"""Run by every rank (see ranks.py): all combinations of the options that say where keys, samples and chains are."""

from functools import partial
from itertools import product

from rank_losses import CARRIES, Case, Encoder, compare

BOOLEANS = (False, True)


def _cases():
    emc2 = product(("mh", "isir"), ("all", "ring"), BOOLEANS, ("batch", "bank"), CARRIES, ("one", "both"), BOOLEANS)
    for sampler, gather, sharded, proposals, carry, views, bimodal in emc2:
        options = {"proposals": proposals, "carry": carry, "views": views, "bimodal": bimodal, "sampler": sampler}
        yield Case("emc2", options, gather, exact=True, sharded=sharded)
    for carry, refresh, bimodal in product(("corrected", "recompute"), (0, 0.1), BOOLEANS):
        yield Case("cached", {"carry": carry, "refresh": refresh, "bimodal": bimodal}, exact=True)


CASES = {case.name: case for case in _cases()}


def outcome(case):
    """What ``compare`` says, or the message with which the loss refuses to be made."""
    try:
        case.make(Encoder(case.wide, seed=0), **case.over(None))
    except (ValueError, TypeError) as error:
        return str(error)
    return compare(case)


def checks(rank, size):
    return {name: partial(outcome, case) for name, case in CASES.items()}
