"""Which of EMC2Loss's options go together."""

from __future__ import annotations

from .. import checks
from ..distributed.shards import GATHERS
from .encoding import Encode, check_encode

CARRIES = ("cached", "corrected", "two_sided", "recompute", "drop")
COLLAPSING = (("bank", "cached"), ("bank", "two_sided"), ("batch", "two_sided"))  # proposals, carry


def resolved_carry(carry: str, proposals: str) -> str:
    """ "auto" is what trains best of those that encode nothing again (docs/choosing.md)."""
    checks.one_of("proposals", proposals, ("batch", "bank"))
    checks.one_of("carry", carry, ("auto", *CARRIES))
    if carry == "auto":
        return "corrected" if proposals == "bank" else "cached"
    return carry


def check_samples(estimator: str, num_samples: int | None, carry: str, encode: Encode | None) -> None:
    checks.one_of("estimator", estimator, ("states", "recycled"))
    if num_samples is not None:
        checks.at_least("num_samples", num_samples, 1)
    check_encode(encode)
    if encode is None and carry == "recompute":
        raise ValueError('encode must be given with carry="recompute", got None')


def check_proposals(proposals: str, num_proposals: int | None, views: str, bimodal: bool, carry: str) -> None:
    checks.one_of("views", views, ("one", "both"))
    if proposals == "bank" and carry == "drop":
        raise ValueError('carry must not be "drop" with proposals="bank", whose samples are all outside, got "drop"')
    if proposals == "batch" and num_proposals is not None:
        got = checks.shown(num_proposals)
        raise ValueError(f'num_proposals must be None with proposals="batch", whose keys are it, got {got}')
    if num_proposals is not None:
        checks.at_least("num_proposals", num_proposals, 1)
    if views == "both" and (proposals == "bank" or bimodal):
        case = 'proposals="bank", which draws from both' if proposals == "bank" else "bimodal=True"
        raise ValueError(f'views must be "one" with {case}, got {views!r}')


def check_ranks(gather: str, sharded: bool, proposals: str, carry: str, estimator: str) -> None:
    """A ring has keys one rank after another; a sharded store has a few rows of other ranks' and no whole table."""
    checks.one_of("gather", gather, GATHERS)
    checks.boolean("sharded", sharded)
    by_rows = proposals == "batch" and carry in ("cached", "recompute", "drop")
    if gather == "ring" and not (by_rows and estimator == "states"):
        expected = 'proposals="batch", carry="cached", "recompute" or "drop", and estimator="states"'
        raise ValueError(f'gather="ring" needs {expected}, got {proposals!r}, {carry!r} and {estimator!r}')
    if sharded and not (by_rows and gather != "none"):
        expected = 'proposals="batch", carry="cached", "recompute" or "drop", and gather="all" or "ring"'
        raise ValueError(f"sharded=True needs {expected}, got {proposals!r}, {carry!r} and {gather!r}")
