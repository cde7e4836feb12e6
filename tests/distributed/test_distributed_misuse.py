"""What is refused when a batch lies over ranks: by all ranks with one error, so that none waits for another."""

import re

import pytest
import rank_misuse
import ranks
import torch
from helpers import named_error, normal
from rank_wrapped import make

from emc2_kernels import losses

SEVERAL = pytest.mark.parametrize("size", ranks.SIZES[1:])
GATHERING = pytest.mark.parametrize("case", rank_misuse.GATHERING)


@SEVERAL
@pytest.mark.parametrize("case", rank_misuse.DISAGREE)
def test_ranks_that_disagree_all_raise_the_same_error(over_ranks, size, case):
    """And leave the loss unchanged and the ranks ready for the next call, which rank_misuse.py looks at."""
    _, begins = rank_misuse.DISAGREEMENTS[case.split(": ")[0]]
    found = over_ranks(size, f"disagree on {case}")
    exception, message = found[0]
    assert exception == "ValueError"
    assert re.match(rf"{begins} must be the same on all ranks, got .+ on rank 0 and .+ on rank {size - 1}$", message)
    assert found == [found[0]] * size


@pytest.mark.parametrize("size", ranks.SIZES)
@GATHERING
def test_an_error_on_all_ranks_leaves_them_ready_for_the_next_call(over_ranks, size, case):
    for not_a_number, overflow in over_ranks(size, f"bad everywhere: {case}"):
        assert not_a_number[0] == overflow[0] == "ValueError"
        assert not_a_number[1].startswith("z0 must be finite, got")
        assert overflow[1].startswith("the similarities of z0 and z1 must be finite, got")


@SEVERAL
def test_a_process_outside_of_the_group_is_told_so(over_ranks, size):
    *outside, member = over_ranks(size, "not a member")
    assert member[0] == "" and member[1] > 0
    for exception, message in outside:
        assert exception == "RuntimeError" and message.startswith("process_group must have this process")


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", rank_misuse.SILENT)
def test_a_local_loss_is_the_loss_alone_and_says_nothing_to_other_ranks(over_ranks, size, name):
    for rank, found in enumerate(over_ranks(size, f"silent: {name}")):
        values, sums = rank_misuse.local(name, rank)
        assert found[0] == pytest.approx(values, rel=1e-5)
        assert found[1] == pytest.approx(sums, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize(("case", "what"), rank_misuse.TWICE.items())
def test_a_second_derivative_is_refused(over_ranks, size, case, what):
    for message in over_ranks(size, f"twice: {case}"):
        assert what in message and message.endswith("has no second derivative")


@GATHERING
def test_gathering_without_a_process_group_is_refused(case):
    name, gather = case.split()
    loss = make(name, {}, gather=gather)
    with pytest.raises(RuntimeError, match=r"gather must be \"none\" without a process group"):
        loss(normal(0, 3, 16), normal(1, 3, 16), torch.arange(3))


@pytest.mark.parametrize("name", ["sogclr", "isogclr", "cached"])
def test_losses_without_a_ring_refuse_it_when_they_are_made(name):
    with named_error(ValueError, "gather"):
        make(name, {}, gather="ring")


def test_emc2_refuses_a_ring_for_proposals_from_the_bank():
    with named_error(ValueError, 'gather="ring"'):
        make("emc2", {"proposals": "bank"}, gather="ring")


@pytest.mark.parametrize("over", [{"gather": "ring"}, {"gather": "all", "sharded": True}], ids=str)
def test_isir_refuses_what_needs_the_means_of_all_ranks_keys(over):
    with named_error(ValueError, "carry must be one of .*, got .corrected."):
        make("isir", {"carry": "corrected"}, **over)


@pytest.mark.parametrize("gather", ["ranks", None, True, 1])
@pytest.mark.parametrize("name", losses.TABLE)
def test_a_bad_gather_is_refused(name, gather):
    with named_error(ValueError, "gather"):
        make(name, {}, gather=gather)
