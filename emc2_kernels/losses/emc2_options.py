"""Which of EMC2Loss's options go together."""

from __future__ import annotations

from typing import Any

from .. import checks
from ..distributed.shards import GATHERS

CARRIES = {"batch": ("cached", "recompute"), "bank": ("corrected", "recompute")}  # by proposals; the first is "auto"

# What 0.1.0 had and measurement showed to be dominated. docs/choosing.md has the figures.
DELETED_CARRIES = {
    "two_sided": "training collapsed in all runs, all embeddings to one point",
    "drop": "it is badly biased",
}
DELETED_PAIRS = {
    ("bank", "cached"): "training from scratch collapses, all embeddings to one point",
    ("batch", "corrected"): "it trains no better than carry='cached', which keeps half as much",
}


def resolved_carry(carry: Any, proposals: Any) -> str:
    """ "auto" is what trains best of those that encode nothing again."""
    checks.one_of("proposals", proposals, tuple(CARRIES))
    legal = CARRIES[proposals]
    if carry == "auto":
        return legal[0]
    if isinstance(carry, str) and carry in legal:
        return carry
    shown = ", ".join(map(repr, ("auto", *legal)))
    expected = f'carry must be one of {shown} with proposals="{proposals}", got {checks.shown(carry)}'
    if isinstance(carry, str) and (reason := DELETED_CARRIES.get(carry) or DELETED_PAIRS.get((proposals, carry))):
        expected += f", which was deleted: {reason} (docs/choosing.md)"
    raise ValueError(expected)


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


def check_ranks(gather: Any, sharded: Any, proposals: str) -> None:
    """A ring has keys one rank after another; a sharded store has a few rows of other ranks' and no whole table."""
    checks.one_of("gather", gather, GATHERS)
    checks.boolean("sharded", sharded)
    if gather == "ring" and proposals != "batch":
        raise ValueError(f'gather="ring" needs proposals="batch", got {proposals!r}')
    if sharded and (proposals != "batch" or gather == "none"):
        expected = 'proposals="batch" and gather="all" or "ring"'
        raise ValueError(f"sharded=True needs {expected}, got {proposals!r} and {gather!r}")
