"""Which of EMC2Loss's options go together."""

from __future__ import annotations

from typing import Any

from .. import checks
from ..distributed.shards import GATHERS

SAMPLERS = ("mh", "isir")
# By sampler and proposals; the first is "auto".
CARRIES = {
    ("mh", "batch"): ("cached", "recompute"),
    ("mh", "bank"): ("corrected", "recompute"),
    ("isir", "batch"): ("cached", "recompute"),
}
QUEUE = 16  # items; in docs/results/options.md 64 gain nothing at batches of 8 and cost at 32
MAX_QUEUE = 2**24
PROPOSALS = ("batch", "bank")
BURN_IN = 0.5

# What 0.1.0 had and measurement showed to be dominated. docs/results/options.md has the figures.
DELETED_CARRIES = {
    "two_sided": "training collapsed in all runs, all embeddings to one point",
    "drop": "it is badly biased",
}
DELETED_PAIRS = {
    ("mh", "bank", "cached"): "training from scratch collapses, all embeddings to one point",
    ("mh", "batch", "corrected"): "it trains no better than carry='cached', which keeps half as much",
    ("isir", "batch", "corrected"): "carry='cached' has less bias and less noise, and keeps half as much",
}


def resolved_sampler(sampler: Any, proposals: Any, burn_in: Any, num_samples: Any) -> str:
    """ "auto" is what trains best, and the walk where something is asked of it."""
    checks.one_of("sampler", sampler, ("auto", *SAMPLERS))
    checks.one_of("proposals", proposals, PROPOSALS)
    if sampler != "auto":
        return sampler
    return "isir" if proposals == "batch" and burn_in is None and num_samples is None else "mh"


def resolved_carry(carry: Any, proposals: str, sampler: str) -> str:
    """ "auto" is what trains best of those that encode nothing again."""
    if (sampler, proposals) not in CARRIES:
        raise ValueError(f'proposals must be "batch" with sampler="{sampler}", got {proposals!r}')
    legal = CARRIES[sampler, proposals]
    if carry == "auto":
        return legal[0]
    if isinstance(carry, str) and carry in legal:
        return carry
    shown = ", ".join(map(repr, ("auto", *legal)))
    expected = f'carry must be one of {shown} with proposals="{proposals}", got {checks.shown(carry)}'
    deleted = DELETED_PAIRS.get((sampler, proposals, carry)) if isinstance(carry, str) else None
    if isinstance(carry, str) and (reason := DELETED_CARRIES.get(carry) or deleted):
        expected += f", which was deleted: {reason} (docs/results/options.md)"
    raise ValueError(expected)


def check_schedule(sampler: str, burn_in: Any, num_samples: Any) -> float:
    """The share of burn-in; i-SIR has no walk that it could be one of."""
    if burn_in is not None:
        burn_in = checks.number_in("burn_in", burn_in, 0, 1, open_high=True)
    for name, value in (("burn_in", burn_in), ("num_samples", num_samples)):
        if sampler != "mh" and value is not None:
            expected = f'left out with sampler="{sampler}", which walks over no proposals'
            raise ValueError(f"{name} must be {expected}, got {checks.shown(value)}")
    return BURN_IN if burn_in is None else burn_in


def check_estimator(estimator: Any) -> None:
    """The option of 0.1.0, of which one value is left."""
    if estimator == "recycled":
        gain = "it gained 1 to 2 % of the gradient's deviation, for two samples in the place of one"
        raise ValueError(f'estimator must be "states" or left out, got "recycled", which was deleted: {gain}')
    checks.one_of("estimator", estimator, ("states",))


def resolved_views(views: Any, sampler: str, proposals: str, bimodal: bool) -> str:
    """ "auto" is both where the law is exact with both."""
    checks.one_of("views", views, ("auto", "one", "both"))
    alone = 'proposals="bank", which draws from both' if proposals == "bank" else "bimodal=True" if bimodal else None
    if views == "both" and alone:
        raise ValueError(f'views must be "one" with {alone}, got {views!r}')
    if views == "auto":
        return "both" if sampler == "isir" and alone is None else "one"
    return views


def check_decoupled(decoupled: Any, sampler: str) -> None:
    checks.boolean("decoupled", decoupled)
    if sampler != "isir" and not decoupled:
        raise ValueError(f'decoupled must be True with sampler="{sampler}", which makes no denominator, got False')


def resolved_queue(queue: Any, sampler: str, carry: str) -> int:
    """How many items of the latest batches are candidates."""
    kept = sampler == "isir" and carry == "cached"
    if queue is None:
        return QUEUE if kept else 0
    queue = checks.at_least("queue", queue, 0)
    if queue > MAX_QUEUE:
        raise ValueError(f"queue must be at most 2^24, got {queue}")
    if queue > 0 and not kept:
        expected = '0 with carry="recompute"' if sampler == "isir" else 'left out with sampler="mh"'
        raise ValueError(f"queue must be {expected}, got {queue}")
    return queue


def check_proposals(proposals: str, num_proposals: Any, num_samples: Any) -> None:
    if num_samples is not None:
        checks.at_least("num_samples", num_samples, 1)
    if proposals == "batch" and num_proposals is not None:
        got = checks.shown(num_proposals)
        raise ValueError(f'num_proposals must be None with proposals="batch", whose keys are it, got {got}')
    if num_proposals is not None:
        checks.at_least("num_proposals", num_proposals, 1)


def check_ranks(gather: Any, sharded: Any, proposals: str) -> None:
    """A ring has keys one rank after another; a sharded store has a few rows of other ranks' and no whole table."""
    checks.one_of("gather", gather, GATHERS)
    checks.boolean("sharded", sharded)
    if gather == "ring" and proposals != "batch":
        raise ValueError(f'gather="ring" needs proposals="batch", got {proposals!r}')
    if sharded and (proposals != "batch" or gather == "none"):
        expected = 'proposals="batch" and gather="all" or "ring"'
        raise ValueError(f"sharded=True needs {expected}, got {proposals!r} and {gather!r}")
