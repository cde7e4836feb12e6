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
    ("isir", "batch"): ("cached", "recompute", "corrected"),
}
PROPOSALS = ("batch", "bank")
BURN_IN = 0.5

# What 0.1.0 had and measurement showed to be dominated. docs/choosing.md has the figures.
DELETED_CARRIES = {
    "two_sided": "training collapsed in all runs, all embeddings to one point",
    "drop": "it is badly biased",
}
DELETED_PAIRS = {
    ("mh", "bank", "cached"): "training from scratch collapses, all embeddings to one point",
    ("mh", "batch", "corrected"): "it trains no better than carry='cached', which keeps half as much",
}


def resolved_carry(carry: Any, proposals: Any, sampler: Any) -> str:
    """ "auto" is what trains best of those that encode nothing again."""
    checks.one_of("sampler", sampler, SAMPLERS)
    checks.one_of("proposals", proposals, PROPOSALS)
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
        expected += f", which was deleted: {reason} (docs/choosing.md)"
    raise ValueError(expected)


def check_schedule(sampler: str, burn_in: Any, num_samples: Any) -> float:
    """The share of burn-in; i-SIR has no walk that it could be one of."""
    burn_in = checks.number_in("burn_in", burn_in, 0, 1, open_high=True)
    for name, value, default in (("burn_in", burn_in, BURN_IN), ("num_samples", num_samples, None)):
        if sampler != "mh" and value != default:
            expected = f'left out with sampler="{sampler}", which walks over no proposals'
            raise ValueError(f"{name} must be {expected}, got {checks.shown(value)}")
    return burn_in


def check_estimator(estimator: Any) -> None:
    """The option of 0.1.0, of which one value is left."""
    if estimator == "recycled":
        gain = "it gained 1 to 2 % of the gradient's deviation, for two samples in the place of one"
        raise ValueError(f'estimator must be "states" or left out, got "recycled", which was deleted: {gain}')
    checks.one_of("estimator", estimator, ("states",))


def check_proposals(proposals: str, num_proposals: Any, num_samples: Any, views: Any, bimodal: bool) -> None:
    checks.one_of("views", views, ("one", "both"))
    if num_samples is not None:
        checks.at_least("num_samples", num_samples, 1)
    if proposals == "batch" and num_proposals is not None:
        got = checks.shown(num_proposals)
        raise ValueError(f'num_proposals must be None with proposals="batch", whose keys are it, got {got}')
    if num_proposals is not None:
        checks.at_least("num_proposals", num_proposals, 1)
    if views == "both" and (proposals == "bank" or bimodal):
        case = 'proposals="bank", which draws from both' if proposals == "bank" else "bimodal=True"
        raise ValueError(f'views must be "one" with {case}, got {views!r}')


def check_ranks(gather: Any, sharded: Any, proposals: str, carry: str) -> None:
    """A ring has keys one rank after another; a sharded store has a few rows of other ranks' and no whole table."""
    checks.one_of("gather", gather, GATHERS)
    checks.boolean("sharded", sharded)
    if gather == "ring" and proposals != "batch":
        raise ValueError(f'gather="ring" needs proposals="batch", got {proposals!r}')
    if carry == "corrected" and (gather == "ring" or sharded):  # whose keys' means no rank has
        raise ValueError(f'carry must not be "corrected" with gather="ring" or sharded=True, got {carry!r}')
    if sharded and (proposals != "batch" or gather == "none"):
        expected = 'proposals="batch" and gather="all" or "ring"'
        raise ValueError(f"sharded=True needs {expected}, got {proposals!r} and {gather!r}")
