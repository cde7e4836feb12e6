"""States that version 0.1.0 has saved: they load, and training goes on as it would have there."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from emc2_kernels import losses

ITEMS, DIM, ROWS = 12, 8, 6
SAVED = torch.load(Path(__file__).parent / "states_0_1_0.pt", weights_only=True)
# Made there after four steps; "next" is the value of the fifth.
MAKE = {
    "emc2": ("emc2", {"sampler": "mh"}),
    "emc2, bimodal": ("emc2", {"sampler": "mh", "bimodal": True}),
    "emc2, bank": ("emc2", {"proposals": "bank", "num_proposals": 8}),
    "cached": ("cached", {}),
    "sogclr": ("sogclr", {}),
    "sogclr, bimodal": ("sogclr", {"bimodal": True}),
    "isogclr": ("isogclr", {}),
    "ntxent": ("ntxent", {"learn_temperature": True}),
    "clip": ("clip", {"learn_temperature": True}),
}


def make(name):
    method, options = MAKE[name]
    takes = losses.TABLE[method].options()
    given = {"num_items": ITEMS, "dim": DIM, "backend": "reference" if "dim" in takes else "auto"}
    return losses.get(method, temperature=0.2, **{k: v for k, v in given.items() if k in takes}, **options)


def test_every_saved_state_is_tried():
    assert set(SAVED) == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_it_loads_and_goes_on(name):
    loss, saved = make(name), SAVED[name]
    state = OrderedDict(saved["state"])
    state._metadata = OrderedDict(saved["metadata"])
    loss.load_state_dict(state)
    generator = torch.Generator().manual_seed(4)
    z0, z1 = torch.randn(ROWS, DIM, generator=generator), torch.randn(ROWS, DIM, generator=generator)
    index = torch.randperm(ITEMS, generator=generator)[:ROWS]
    torch.testing.assert_close(loss(z0, z1, index), saved["next"], rtol=1e-5, atol=1e-5)
