"""What a step over ranks sends and keeps, against the formulas of bench/scaling.py."""

from statistics import fmean

import pytest
import rank_traffic
import ranks
from rank_traffic import DIM, MANY, B

from bench import scaling

SIZES = pytest.mark.parametrize("size", ranks.SIZES)
CASES = pytest.mark.parametrize("case", rank_traffic.CASES)


@SIZES
@CASES
def test_bytes_of_a_step(over_ranks, size, case):
    expected = scaling.bytes_sent(*case.split(), scaling.Batch(B, DIM, size))
    assert over_ranks(size, f"traffic: {case}") == [list(expected)] * size


@SIZES
@pytest.mark.parametrize("case", rank_traffic.SHARDED)
def test_bytes_of_a_step_with_sharded_chains(over_ranks, size, case):
    """Items are drawn: how many of them are others' is near its mean only."""
    batch = scaling.Batch(MANY, DIM, size)
    expected = scaling.bytes_sent(*case.split(), batch, sharded=True)
    forward, backward = zip(*over_ranks(size, f"traffic: sharded {case}"), strict=True)
    assert backward == (expected.backward,) * size
    exchanged = expected.forward - scaling.bytes_exchanged(case.split()[0], batch, kept=2)
    assert fmean(forward) - exchanged == pytest.approx(expected.forward - exchanged, rel=0.03)


@SIZES
@CASES
def test_a_ring_makes_no_tensor_that_grows_with_the_ranks(over_ranks, size, case):
    own = 2 * B * DIM
    kept = 3 * own + 2 * scaling.QUEUE * DIM if case.startswith("isir") else own  # read from the bank at once
    for largest in over_ranks(size, f"largest: {case}"):
        assert largest == (kept if case.endswith("ring") else max(kept, size * own))


@SIZES
def test_a_ring_rounds_half_precision_no_more_than_gathering_does(over_ranks, size):
    for ring, gathered in over_ranks(size, "half precision"):
        assert ring <= 1.02 * gathered <= 1e-2
