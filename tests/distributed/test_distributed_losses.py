"""Losses whose batch lies over 1 to 4 processes compute what one process does with the whole batch.

What is compared is made in rank_losses.py and rank_wrapped.py (tests/support/), once for each number of processes.
"""

import pytest
import rank_combinations
import rank_losses
import rank_wrapped
import ranks
import torch

from emc2_kernels import losses

SIZES = pytest.mark.parametrize("size", ranks.SIZES)
SEVERAL = pytest.mark.parametrize("size", ranks.SIZES[1:])


def assert_equal_to_one_process(found, case):
    # Gradients of bfloat16 inputs are rounded to 8 bits before ranks average them.
    tolerance = {torch.float64: 1e-14, torch.bfloat16: 1e-2}.get(case.dtype, 1e-6)
    for rank, errors in enumerate(found):
        assert errors["gradient"] <= tolerance, rank
        for what in ("value", "temperature", "evaluation"):
            assert errors[what] <= min(tolerance, 1e-6), (rank, what)
        for what in ("state", "statistics"):  # kept in float32
            assert errors[what] <= 1e-6, (rank, what)
        assert not (case.exact and errors["others"]), f"rank {rank}: other bits in {errors['others']}"
        assert errors["unchanged"], f"rank {rank}: an evaluation wrote"
        assert errors["alike"], f"rank {rank}: another staleness"
        assert errors["carried"] is None or errors["carried"] > 0


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in ranks.SIZES for case in rank_losses.cases(size)])
def test_processes_compute_what_one_does(over_ranks, size, case):
    """Uneven parts, items on several processes and several times on one, a last small batch."""
    assert_equal_to_one_process(over_ranks(size, case), rank_losses.CASES[case])


@SIZES
@pytest.mark.parametrize("case", rank_losses.IN_A_SUBGROUP)
def test_a_group_of_some_processes_does_the_same(over_ranks, size, case):
    assert_equal_to_one_process(over_ranks(size, f"subgroup: {case}"), rank_losses.CASES[case])


def test_every_loss_that_has_a_name_is_tried():
    untried = set(losses.TABLE) - {case.loss for case in rank_losses.CASES.values()}
    assert untried == {"simclr"}  # ntxent's other name


@pytest.mark.slow
def test_every_combination_of_options_matches_one_process_or_is_refused(over_ranks):
    """The cases above are its smaller twin."""
    outcomes = {}
    for name, case in rank_combinations.CASES.items():
        found = over_ranks(2, name, modules=("rank_combinations",))
        refused = [outcome for outcome in found if isinstance(outcome, str)]
        assert len(refused) in (0, len(found))
        assert all(" got " in message for message in refused)
        if not refused:
            assert_equal_to_one_process(found, case)
        outcomes[name] = bool(refused)
    assert 0 < sum(outcomes.values()) < len(outcomes)


@SIZES
@pytest.mark.parametrize("case", rank_wrapped.WRAPPED + rank_wrapped.SHARDED)
def test_wrapped_models_train_as_one_process(over_ranks, size, case):
    for errors in over_ranks(size, case):
        assert errors["gradient"] <= 1e-6
        assert errors["state"] <= (3e-6 if "isir" in case else 1e-6)  # staleness is of small differences


@SEVERAL
@pytest.mark.parametrize("name", rank_wrapped.LOCAL)
def test_inside_distributed_data_parallel_a_local_loss_keeps_its_own_state(over_ranks, size, name):
    assert over_ranks(size, f"local: {name}") == [[]] * size


@SEVERAL
@pytest.mark.parametrize("name", rank_wrapped.KEEPING)
def test_a_batch_that_is_not_finite_on_one_rank_is_forgotten_by_all(over_ranks, size, name):
    assert over_ranks(size, f"not finite: {name}") == [[]] * size
