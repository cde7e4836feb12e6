"""Data on disk and its views: STL-10's files, folders of images, what can be wrong with them, and augmentations."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from stl10_files import write_stl10, write_tree

from examples.pretrain import augment, data
from examples.pretrain import images as on_disk


def test_stl10_is_read_as_it_was_written(tmp_path):
    written = write_stl10(tmp_path)
    split = data.load(f"stl10:{tmp_path}")
    every = np.concatenate([written["train"], written["unlabeled"]])
    assert split.train_images.shape == (52, 3, 96, 96) and len(split.train_images) == 52
    for found, expected in ((split.train_images, every), (split.test_images, written["test"])):
        positions = torch.tensor([len(expected) - 1, 3, 3, 0])
        torch.testing.assert_close(found[positions], torch.from_numpy(expected)[positions].float() / 255)
    assert split.train_labels.tolist() == [i % 10 for i in range(40)] + [on_disk.UNLABELLED] * 12
    assert split.test_labels.tolist() == [i % 10 for i in range(20)]


def test_stl10_is_mapped_and_not_read(tmp_path):
    write_stl10(tmp_path)
    split = data.load(f"stl10:{tmp_path}")
    for images in (split.train_images, split.test_images):
        assert all(isinstance(file, np.memmap) for file in images.read.files)


def test_stl10_without_unlabelled_images_has_the_labelled_ones(tmp_path, capsys):
    write_stl10(tmp_path, unlabelled=0)
    split = data.load(f"stl10:{tmp_path}", image_size=24)
    assert split.train_images.shape == (40, 3, 24, 24) and (split.train_labels >= 0).all()
    assert "no unlabeled_X.bin; 40 labelled images" in capsys.readouterr().err
    whole = data.load(f"stl10:{tmp_path}").train_images[torch.arange(3)]
    small = split.train_images[torch.arange(3)]
    torch.testing.assert_close(small.mean((2, 3)), whole.mean((2, 3)), atol=0.01, rtol=0)


def test_a_subset_is_always_the_same_and_labelled_first(tmp_path):
    write_stl10(tmp_path)
    first, again, more = (data.load(f"stl10:{tmp_path}", subset=count) for count in (30, 30, 45))
    assert torch.equal(first.train_images.items, again.train_images.items)
    assert len(first.train_images) == 30 and (first.train_labels >= 0).all()
    assert (more.train_labels == on_disk.UNLABELLED).sum() == 5
    assert torch.equal(first.train_labels, first.train_images.items % 10)
    whole = data.load(f"stl10:{tmp_path}").train_images
    assert torch.equal(first.train_images[torch.arange(30)], whole[first.train_images.items])
    digits = data.load("digits", subset=100)
    assert len(digits.train_images) == len(digits.train_labels) == 100
    with pytest.raises(ValueError, match=r"--subset: expected 2 to 52 \(training images\), got 53"):
        data.load(f"stl10:{tmp_path}", subset=53)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


STL10_DAMAGE = {
    "train_X.bin: expected uint8 images of 3 x 96 x 96, 27648 bytes each; no such file": lambda d: (
        d / "train_X.bin"
    ).unlink(),
    "test_X.bin: expected uint8 images of 3 x 96 x 96, 27648 bytes each, got 30000 bytes: 1.09 images": lambda d: cut(
        d / "test_X.bin", 30_000
    ),
    "unlabeled_X.bin: expected uint8 images of 3 x 96 x 96, 27648 bytes each, got 5 bytes": lambda d: cut(
        d / "unlabeled_X.bin", 5
    ),
    "train_y.bin: expected 39 labels from 1 to 10, a byte each, as many as train_X.bin has images, got 40 bytes": (
        lambda d: cut(d / "train_X.bin", 39 * 27648)
    ),
    "test_y.bin: expected 20 labels from 1 to 10, a byte each, as many as test_X.bin has images, got 0 to 9": (
        lambda d: (np.arange(20) % 10).astype(np.uint8).tofile(d / "test_y.bin")
    ),
}


@pytest.mark.parametrize("expected", STL10_DAMAGE)
def test_a_damaged_stl10_is_refused_by_its_name(expected, tmp_path):
    write_stl10(tmp_path)
    STL10_DAMAGE[expected](tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.load(f"stl10:{tmp_path}")
    assert f"{tmp_path}/{expected}" in str(error.value)


def test_a_missing_directory_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="a directory with train_X.bin, .* got .*nowhere"):
        data.load(f"stl10:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match="nowhere/train: expected train/CLASS/FILE .*; no such folder"):
        data.load(f"folder:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_folders_are_classes(held_out, tmp_path):
    write_tree(tmp_path, held_out=held_out)
    (tmp_path / "train" / "class0" / "readme.txt").write_text("not an image")
    split = data.load(f"folder:{tmp_path}", image_size=28)
    assert split.train_images.shape == (30, 3, 32, 32) and split.test_images.shape == (12, 3, 32, 32)
    assert split.train_labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    found = split.train_images[torch.tensor([29, 0, 5])]
    assert found.dtype == torch.float32 and 0 < found.min() < found.max() < 1  # exact
    colours = split.train_images[torch.arange(30)].mean((2, 3)).view(3, 10, 3)
    assert colours.std(1).max() < 0.02 < (colours.mean(1)[0] - colours.mean(1)[1]).abs().max()


def test_of_an_image_the_middle_is_taken(tmp_path):
    write_tree(tmp_path)
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    Image.fromarray(wide).save(tmp_path / "train" / "class0" / "0.png")
    square = data.load(f"folder:{tmp_path}", image_size=28).train_images[torch.tensor([0])]
    assert square.min() > 0.7


def test_a_damaged_tree_is_refused_by_its_name(tmp_path):
    write_tree(tmp_path)
    broken = tmp_path / "train" / "class1" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    split = data.load(f"folder:{tmp_path}", image_size=16)
    with pytest.raises(ValueError, match="class1/1.jpg: expected a whole image that Pillow reads"):
        split.train_images[torch.arange(30)]
    (tmp_path / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="val: expected the classes of .*, got others, too: other"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "train" / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="train/other: expected .*; no such file in it"):
        data.load(f"folder:{tmp_path}")


def test_batches_are_read_ahead_in_their_order():
    read = []

    def reader(item):
        read.append(item)
        return torch.full((3, 2, 2), item, dtype=torch.uint8)

    lazy = on_disk.Images(reader, torch.arange(100), (3, 2, 2), workers=1)
    batches = torch.randperm(100).split(10)
    for number, (batch, expected) in enumerate(zip(on_disk.ahead(batches, lazy), batches, strict=True)):
        assert torch.equal(batch, expected)
        assert torch.equal((lazy[batch][:, 0, 0, 0] * 255).round().long(), batch)
        assert len(read) <= 10 * (number + 1 + on_disk.AHEAD)
    assert sorted(read) == list(range(100)) and not lazy.started
    parts = list(on_disk.chunks(lazy, torch.arange(7)))
    assert [len(part) for part in parts] == [7]


def test_hue_turns_as_in_hsv():
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(50, 3, 1, 1, generator=generator)
    colours[0], colours[1] = 0.5, torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    turns = torch.rand(50, generator=generator) - 0.5
    found = augment.turn_hue(colours, turns)
    for colour, turn, turned in zip(colours, turns, found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour.flatten().tolist())
        expected = colorsys.hsv_to_rgb((hue + turn.item()) % 1, saturation, value)
        torch.testing.assert_close(turned.flatten(), torch.tensor(expected), atol=1e-5, rtol=0)


def noise(count, **values):
    drawn = augment.draw_colour_noise(count, torch.empty(0), torch.Generator().manual_seed(0))
    return drawn._replace(**{name: torch.full((count,), value) for name, value in values.items()})


WHOLE = {"area": 1.0, "aspect": 0.5, "flipped": 0.9, "jittered": 0.9, "grey": 0.9, "blurred": 0.9}


def test_without_a_crop_or_a_change_of_colour_a_view_is_the_image():
    images = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    plain = augment.augment_colour(images, noise(5, **WHOLE), 12, jitter=0.5, blur=0.5)
    torch.testing.assert_close(plain, images, atol=1e-5, rtol=0)
    mirrored = augment.augment_colour(images, noise(5, **WHOLE | {"flipped": 0.1}), 12, jitter=0.5, blur=0.5)
    torch.testing.assert_close(mirrored, images.flip(3), atol=1e-5, rtol=0)
    grey = augment.augment_colour(images, noise(5, **WHOLE | {"grey": 0.1}), 12, jitter=0.5, blur=0.5)
    torch.testing.assert_close(grey, augment._luma(images), atol=1e-5, rtol=0)
    # A blur keeps the mean of what is smooth, and takes the spread of what is not.
    blurred = augment.augment_colour(
        images, noise(5, **WHOLE | {"blurred": 0.1, "sigma": 1.0}), 12, jitter=0.5, blur=0.5
    )
    assert blurred.std() < 0.7 * images.std() and abs(blurred.mean() - images.mean()) < 0.02


def test_colour_jitter_changes_brightness_contrast_and_saturation_by_their_factors():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = WHOLE | {"jittered": 0.1, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5}
    luma = augment._luma(images)
    # With strength 1.25 factors are uniform on 0 to 2.
    expected = {
        None: images,
        ("brightness", 1.0): (2 * images).clamp(max=1),
        ("brightness", 0.25): 0.5 * images,
        ("contrast", 0.0): luma.mean((1, 2, 3), keepdim=True).expand_as(images),
        ("saturation", 0.0): luma,
        ("saturation", 0.25): 0.5 * images + 0.5 * luma,
        ("hue", 1.0): augment.turn_hue(images, torch.full((4,), 0.25)),
    }
    for changed, view in expected.items():
        drawn = noise(4, **plain | ({} if changed is None else dict([changed])))
        torch.testing.assert_close(
            augment.augment_colour(images, drawn, 8, jitter=1.25, blur=0.0), view, atol=1e-5, rtol=0
        )


def test_a_crop_is_the_rectangle_that_was_drawn():
    ramps = torch.arange(64.0).expand(2, 3, 64, 64) / 64
    images = torch.stack([ramps[0], ramps[0].transpose(1, 2)])
    left = augment.augment_colour(images, noise(2, **WHOLE | {"area": 0.2, "left": 0.0, "top": 1.0}), 16, 0, 0)
    right = augment.augment_colour(images, noise(2, **WHOLE | {"area": 0.2, "left": 1.0, "top": 0.0}), 16, 0, 0)
    side = (0.08 + 0.92 * 0.2) ** 0.5
    for view in (left[0].mean(1), right[1].mean(2)):
        assert view.max() < side and view.min() < 0.05
    for view in (right[0].mean(1), left[1].mean(2)):
        assert view.min() > 1 - side - 0.05 and view.max() > 0.9


def test_views_follow_their_noise_and_a_part_of_it_gives_a_part_of_them():
    images = torch.rand(40, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    drawn = [augment.draw_colour_noise(40, images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    first, again, other = (augment.augment_colour(images, each, 16, 0.5, 0.5) for each in drawn)
    assert first.shape == (40, 3, 16, 16) and first.min() > -1e-6 and first.max() < 1 + 1e-6  # rounded, not clamped
    assert torch.equal(first, again) and not torch.equal(first, other)
    part = torch.arange(10, 20)
    torch.testing.assert_close(augment.augment_colour(images[part], drawn[0].rows(part), 16, 0.5, 0.5), first[part])
    drawn = augment.draw_colour_noise(20_000, images, torch.Generator().manual_seed(0))
    assert abs((drawn.jittered < augment.JITTERED).float().mean() - 0.8) < 0.02
    assert len({tuple(field[:3].tolist()) for field in drawn}) == len(drawn)


@pytest.mark.parametrize("count", [2, 5])
def test_fixed_views_are_a_few_of_each_image(count):
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = augment.Views(augment.choose_augmentation(8, 0.5, 0.0), images, count, seed=5)
    generator = torch.Generator().manual_seed(1)
    items, number = torch.tensor([4, 4]), torch.tensor([0, 1])
    seen = [made.make(images[items], made.draw(2, images, generator), items, number) for _ in range(80)]
    own = [torch.stack([pair[view] for pair in seen]).unique(dim=0) for view in (0, 1)]
    assert [len(views) for views in own] == [(count + 1) // 2, count // 2]
    assert len(torch.cat(own).unique(dim=0)) == count
    # The same picture looks different as every item and view.
    every, alike = torch.arange(6).repeat(200), images[:1].expand(1200, -1, -1, -1)
    number = torch.arange(1200) % 2
    seen = made.make(alike, made.draw(1200, images, generator), every.repeat_interleave(2)[:1200], number)
    assert len(seen.unique(dim=0)) == 6 * count
    fresh = augment.Views(augment.choose_augmentation(8, 0.5, 0.0), images, 0, seed=5)
    seen = [fresh.make(images[items], fresh.draw(2, images, generator), items, number)[0] for _ in range(20)]
    assert len(torch.stack(seen).unique(dim=0)) == 20
