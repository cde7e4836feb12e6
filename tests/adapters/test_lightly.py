"""lightly's data sets and loaders: their file names are items, and their loss has the value of ours."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch.utils.data import DataLoader

from emc2_kernels.data import ItemNumbers, indexed
from emc2_kernels.losses import EMC2Loss, NTXentLoss

REASON = "needs torchvision: make test-peers"
IMAGES, B = 12, 4


@pytest.fixture
def dataset(tmp_path):
    """A folder a class, small images; each is shown as two views, its own brightness and half of it."""
    lightly_data = pytest.importorskip("lightly.data", reason=REASON)
    from PIL import Image

    for number in range(IMAGES):
        folder = tmp_path / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number * 20).save(folder / f"{number:02}.png")

    def views(image):
        pixels = torch.tensor([*image.convert("L").tobytes()]) / 255
        return [pixels, pixels / 2]

    return lightly_data.LightlyDataset(str(tmp_path), transform=views)


def brightness(view):
    return (view[:, 0] * 255 / 20).round().long().tolist()


def test_file_names_are_numbered(dataset):
    from lightly.data.multi_view_collate import MultiViewCollate

    numbers = ItemNumbers(dataset.get_filenames())
    assert len(numbers) == IMAGES
    loss = EMC2Loss(len(numbers), 16, temperature=0.2)
    loader = DataLoader(dataset, batch_size=B, shuffle=True, drop_last=True, collate_fn=MultiViewCollate())
    for epoch in range(2):
        for (x0, x1), labels, filenames in loader:
            index = numbers(filenames)
            assert [numbers.names[item] for item in index] == list(filenames)
            names = [f"class{each % 3}/{each:02}.png" for each in brightness(x0)]
            assert names == list(filenames) and labels.max() < 3
            loss(x0 + normal(epoch, B, 16), x1 + normal(9, B, 16), index)
    assert loss.step == 2 * IMAGES // B
    assert (loss.chains.state_dict()["key"] >= 0).all()


def test_a_data_set_of_theirs_can_be_indexed(dataset):
    for (x0, _), _, filenames, index in DataLoader(indexed(dataset), batch_size=B, shuffle=True):
        assert [dataset.get_filenames()[item] for item in index] == list(filenames)
        assert len(x0) == B and index.dtype == torch.int64


def test_their_loss_has_our_value():
    loss = pytest.importorskip("lightly.loss", reason=REASON)
    z0, z1 = normal(0, 8, 16), normal(1, 8, 16)
    theirs = loss.NTXentLoss(temperature=0.3)(z0, z1)
    torch.testing.assert_close(NTXentLoss(temperature=0.3)(z0, z1), theirs, rtol=1e-5, atol=1e-6)
