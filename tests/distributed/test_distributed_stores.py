"""Stores that lie over the ranks by item keep what one process keeps; see tests/support/rank_sharded.py."""

import pytest
import rank_sharded
import ranks
from helpers import named_error

from emc2_kernels import ChainStore, EmbeddingBank
from emc2_kernels.losses import EMC2Loss

SIZES = pytest.mark.parametrize("size", ranks.SIZES)
ITEMS = pytest.mark.parametrize("items", rank_sharded.ITEMS)


@SIZES
@ITEMS
def test_ranks_read_what_one_process_reads(over_ranks, size, items):
    """After writes of all ranks with repeated slots; unlike numbers of rows, ranks without any item."""
    assert over_ranks(size, f"sharded reads: {items}") == [[True] * 6] * size


@SIZES
@ITEMS
def test_states_of_one_process_and_of_ranks_load_into_each_other(over_ranks, size, items):
    for found in over_ranks(size, f"sharded loads: {items}"):
        assert found == [[True, True]] * 4


@SIZES
def test_a_distributed_checkpoint_loads_on_another_number_of_ranks(over_ranks, size):
    """2 -> 4 -> 2 and 1 -> 2 -> 1, 1 -> 3 -> 1."""
    half = max(1, size // 2)
    found = over_ranks(size, "sharded: another number of ranks")
    assert found == [[True, True]] * half + [[True]] * (size - half)


@pytest.mark.parametrize("size", ranks.SIZES[2:])
def test_a_part_of_another_number_of_ranks_is_refused(over_ranks, size):
    assert over_ranks(size, "sharded: of other ranks") == [[True, True]] * 2 + [[]] * (size - 2)


@SIZES
def test_a_part_of_a_store_is_not_written_as_a_whole_file(over_ranks, size):
    for message, exists in over_ranks(size, "sharded: single file"):
        assert "torch.distributed.checkpoint" in message and "got a DTensor" in message
        assert not exists


@pytest.mark.parametrize("make", [lambda **o: ChainStore(5, **o), lambda **o: EmbeddingBank(5, 4, **o)])
def test_stores_over_ranks_need_ranks(make):
    with pytest.raises(RuntimeError, match="sharded must be False without a process group"):
        make(sharded=True)
    with named_error(TypeError, "sharded"):
        make(sharded=1)


@pytest.mark.parametrize(
    "options",
    [
        {"gather": "none"},
        {"proposals": "bank"},
    ],
    ids=str,
)
def test_emc2_refuses_settings_that_need_a_whole_table(options):
    with named_error(ValueError, "sharded=True needs"):
        EMC2Loss(5, 4, **{"gather": "all"} | options, sharded=True)
