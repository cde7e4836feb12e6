"""Slots that a store has not, where it cannot see its arguments before the graph runs: the error of an eager call, and
nothing has been written."""

import pytest
import torch
from helpers import HOW, assert_unchanged, int64, normal, snapshot

from emc2_kernels import ChainStore, EmbeddingBank, MHState

ITEMS, D = 6, 4
INDEX, ROWS, STATE = int64(0, 3, 5), normal(1, 3, D), MHState(int64(2, 7, -1), normal(2, 3))


def filled():
    bank, chains = EmbeddingBank(ITEMS, D), ChainStore(ITEMS)
    bank.update(torch.arange(ITEMS), 0, normal(0, ITEMS, D), 3)
    chains.write(INDEX, 0, STATE)
    return torch.nn.ModuleDict({"bank": bank, "chains": chains})


# Name -> what is called with the stores, the argument that is wrong, and what it has to be in.
CALLS = {
    "find": (lambda stores, labels: stores["bank"].find(labels), "labels", -1, 2 * ITEMS),
    "lookup": (lambda stores, labels: stores["bank"].lookup(labels), "labels", -1, 2 * ITEMS),
    "age": (lambda stores, labels: stores["bank"].age(labels), "labels", -1, 2 * ITEMS),
    "update": (lambda stores, index: stores["bank"].update(index, 1, ROWS, 7), "index", 0, ITEMS),
    "update of views": (lambda stores, view: stores["bank"].update(INDEX, view, ROWS, 7), "view", 0, 2),
    "read": (lambda stores, index: stores["chains"].read(index, 0), "index", 0, ITEMS),
    "read of views": (lambda stores, view: stores["chains"].read(INDEX, view), "view", 0, 2),
    "rescored": (lambda stores, index: stores["chains"].read(index, 0, ROWS, stores["bank"], 0.2), "index", 0, ITEMS),
    "write": (lambda stores, index: stores["chains"].write(index, 1, STATE), "index", 0, ITEMS),
    "write of views": (lambda stores, view: stores["chains"].write(INDEX, view, STATE), "view", 0, 2),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("call", "name", "lowest", "end"), CALLS.values(), ids=CALLS)
def test_slots_out_of_range_are_named_and_change_nothing(call, name, lowest, end, how):
    stores = filled()
    torch._dynamo.reset()

    def run(**given):
        return call(stores, **given)

    before = snapshot(stores)
    for value in (lowest - 1, end, 2**40, -(2**62), 2**62):
        with pytest.raises(ValueError) as caught:
            how(run, {name: int64(lowest, value, end)})
        assert str(caught.value) == f"{name} must hold values in [{lowest}, {end}), got {value} at [1]"
        assert_unchanged(stores, before)


def test_a_chain_at_a_key_that_the_bank_has_no_slot_for():
    """A store of chains does not know how many keys there are; the bank that rescores it does."""
    stores = filled()
    stores["chains"].write(INDEX, 0, MHState(int64(2, 2 * ITEMS, 1), STATE.score))
    with pytest.raises(ValueError, match=r"^labels must hold values in \[-1, 12\), got 12 at \[1\]$"):
        stores["chains"].read(INDEX, 0, ROWS, stores["bank"], 0.2)
