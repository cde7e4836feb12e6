"""What a step over ranks sends and keeps: formulas for b rows of d numbers on each of W ranks."""

import pytest
import rank_traffic
import ranks
from rank_traffic import DIM, B

SIZES = pytest.mark.parametrize("size", ranks.SIZES)
CASES = pytest.mark.parametrize("case", rank_traffic.CASES)

KEYS = 2 * B * DIM * 4  # bytes of a rank's embeddings in float32
IDS = 2 * B * 8
STATES = 2 * B * (8 + 4)  # a chain's key and its score
AGREED = 5 * 8  # rows, and what ranks make sure to have in common; the ring's flag and a step come on top


def expected(case, size):
    """[forward, backward] bytes that each rank sends, in a group of W."""
    others = size - 1
    return {
        "ntxent all": [others * (AGREED + KEYS + IDS), others * KEYS],
        "ntxent ring": [others * (AGREED + 8 + KEYS + IDS), others * (KEYS + IDS) + (others and size) * KEYS],
        "clip all": [others * (AGREED + KEYS + IDS), others * KEYS],
        "clip ring": [others * (AGREED + 8 + KEYS + IDS), others * (KEYS + IDS) + (others and size) * KEYS],
        # Items come with the embeddings; chains' states go back to all.
        "emc2 all": [others * (AGREED + 8 + KEYS + IDS // 2 + STATES), others * KEYS],
        # One view's keys go round twice, for the walk and for its samples; then each rank's anchors go to all.
        "emc2 ring": [
            others * (AGREED + 8 + IDS // 2 + 2 * (KEYS // 2) + KEYS + 2 * IDS + STATES),
            (others and size) * KEYS // 2,
        ],
    }[case]


@SIZES
@CASES
def test_bytes_of_a_step(over_ranks, size, case):
    assert over_ranks(size, f"traffic: {case}") == [expected(case, size)] * size


@SIZES
@CASES
def test_a_ring_makes_no_tensor_that_grows_with_the_ranks(over_ranks, size, case):
    own = 2 * B * DIM
    for largest in over_ranks(size, f"largest: {case}"):
        if case.endswith("ring"):
            assert largest == own
        else:  # of CLIP's two log-sum-exps each gathers one tower
            assert largest == max(own, size * own // (2 if case == "clip all" else 1))


@SIZES
def test_a_ring_rounds_half_precision_no_more_than_gathering_does(over_ranks, size):
    for ring, gathered in over_ranks(size, "half precision"):
        assert ring <= 1.02 * gathered <= 1e-2
