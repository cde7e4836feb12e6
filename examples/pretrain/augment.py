"""Random views of images, a batch at a time on its device: of written digits, and SimCLR's of colour images.

A run trains on a fresh draw at each visit, or on a few views of each image that are drawn once. Source of the colour
views: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709, appendix A;
the steps of colour jitter come in one order here, brightness, contrast, saturation, hue, and not in a random one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.pretrain.images import Images

# Of colour images:
AREA = (0.08, 1.0)  # of a crop
ASPECT = (3 / 4, 4 / 3)
JITTERED, GREY = 0.8, 0.2  # shares of views
SIGMA = (0.1, 2.0)  # of the blur, in pixels
LUMA = (0.299, 0.587, 0.114)


class DigitNoise(NamedTuple):
    """What n random views of images differ by, uniform unless said otherwise; each (n,), `pixels` (n, 1, h, w)."""

    angle: Tensor  # of rotation, up to 20 degrees
    log_scale: Tensor  # of 0.8 to 1.25
    shift_x: Tensor  # up to an eighth of the side; the image spans -1 to 1
    shift_y: Tensor
    contrast: Tensor
    pixels: Tensor  # normal
    half: Tensor  # of the side of a square that is erased, in sides of the image
    centre_y: Tensor
    centre_x: Tensor
    erased: Tensor  # below a half: the square is

    def rows(self, positions: Tensor) -> DigitNoise:
        return DigitNoise(*(field[positions] for field in self))


def draw_digit_noise(num_views: int, like: Tensor, generator: torch.Generator) -> DigitNoise:
    """For views of images of the shape of `like` (..., h, w), on the generator's device."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(num_views, device=generator.device).uniform_(low, high, generator=generator)

    # All views draw all of it, so that what one draws does not depend on its neighbours.
    return DigitNoise(
        angle=uniform(-math.pi / 9, math.pi / 9),
        log_scale=uniform(math.log(0.8), math.log(1.25)),
        shift_x=uniform(-0.25, 0.25),
        shift_y=uniform(-0.25, 0.25),
        contrast=uniform(0.6, 1.4),
        pixels=like.new_empty(num_views, 1, *like.shape[-2:]).normal_(std=0.1, generator=generator),
        half=uniform(0.125, 0.1875),
        centre_y=uniform(0.0, 1.0),
        centre_x=uniform(0.0, 1.0),
        erased=uniform(0.0, 1.0),
    )


def augment_digits(images: Tensor, noise: DigitNoise) -> Tensor:
    """One view of every image. images (n, 1, h, w) in [0, 1] -> the same shape.

    No mirroring: a mirrored digit is another sign, or none.
    """
    changed = _affine(images, noise) * noise.contrast.view(-1, 1, 1, 1) + noise.pixels
    return _erase(changed, noise)


def _affine(images: Tensor, noise: DigitNoise) -> Tensor:
    scale = noise.log_scale.exp()
    cos, sin = noise.angle.cos() / scale, noise.angle.sin() / scale
    rows = [[cos, -sin, noise.shift_x], [sin, cos, noise.shift_y]]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _erase(images: Tensor, noise: DigitNoise) -> Tensor:
    """Half of the images lose a square of a quarter to three eighths of the side."""
    _, _, height, width = images.shape
    half = torch.where(noise.erased < 0.5, noise.half, -1.0)
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    inside_y = (y - noise.centre_y[:, None]).abs() <= half[:, None]
    inside_x = (x - noise.centre_x[:, None]).abs() <= half[:, None]
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1), 0.0)


class ColourNoise(NamedTuple):
    """What n views differ by, each (n,) and uniform on 0 to 1: what follows from it is up to `augment_colour`."""

    area: Tensor
    aspect: Tensor
    left: Tensor
    top: Tensor
    flipped: Tensor
    jittered: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    blurred: Tensor
    sigma: Tensor

    def rows(self, positions: Tensor) -> ColourNoise:
        return ColourNoise(*(field[positions] for field in self))


def draw_colour_noise(num_views: int, like: Tensor, generator: torch.Generator) -> ColourNoise:
    """On the generator's device. `like` is taken and means nothing: no noise is of an image's size."""
    # All views draw all of it, so that what one draws does not depend on its neighbours.
    shape = (len(ColourNoise._fields), num_views)
    return ColourNoise(*torch.rand(shape, device=generator.device, generator=generator))


def augment_colour(images: Tensor, noise: ColourNoise, size: int, jitter: float, blur: float) -> Tensor:
    """One view of every image. images (n, 3, h, w) in [0, 1] -> (n, 3, size, size) in [0, 1].

    Args:
        jitter: strength of the colour jitter, SimCLR's s: 1 for ImageNet, 0.5 for CIFAR; 0 for none.
        blur: share of views that are blurred; 0.5 for ImageNet, 0 for CIFAR.
    """
    views = _jitter(_crop(images, noise, size), noise, jitter)
    views = torch.where(_column(noise.grey < GREY), _luma(views), views)
    return views if blur == 0 else torch.where(_column(noise.blurred < blur), _blur(views, noise), views)


def _between(low: float, high: float, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _crop(images: Tensor, noise: ColourNoise, size: int) -> Tensor:
    """A rectangle of random area, aspect and place, resized to a square, mirrored half of the time."""
    area = _between(*AREA, noise.area)
    aspect = _between(math.log(ASPECT[0]), math.log(ASPECT[1]), noise.aspect).exp()
    # In shares of the image's sides; what would not fit becomes as long as the side.
    aspect = aspect * images.shape[-2] / images.shape[-1]
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # The image spans -1 to 1.
    centre_x, centre_y = (1 - width) * (2 * noise.left - 1), (1 - height) * (2 * noise.top - 1)
    zero = torch.zeros_like(width)
    mirrored = torch.where(noise.flipped < 0.5, -width, width)
    rows = [torch.stack(row, dim=1) for row in ((mirrored, zero, centre_x), (zero, height, centre_y))]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True).expand_as(images)


def _jitter(images: Tensor, noise: ColourNoise, strength: float) -> Tensor:
    if strength == 0:
        return images
    spread = 0.8 * strength
    brightness, contrast, saturation = (
        _column(_between(max(0.0, 1 - spread), 1 + spread, uniform))
        for uniform in (noise.brightness, noise.contrast, noise.saturation)
    )
    changed = (images * brightness).clamp(0, 1)
    mean = _luma(changed).mean((1, 2, 3), keepdim=True)
    changed = torch.lerp(mean, changed, contrast).clamp(0, 1)
    changed = torch.lerp(_luma(changed), changed, saturation).clamp(0, 1)
    changed = turn_hue(changed, _between(-0.2 * strength, 0.2 * strength, noise.hue))
    return torch.where(_column(noise.jittered < JITTERED), changed, images)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """images (n, 3, h, w) in [0, 1], turns (n,) of the colour circle: value and saturation of HSV stay."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1)
    offsets = images.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    place = (offsets + sixths[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def _blur(images: Tensor, noise: ColourNoise) -> Tensor:
    """Gaussian, over about a tenth of the side; the edges are mirrored."""
    reach = max(1, round(images.shape[-1] / 20))
    steps = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.softmax(-(steps**2) / (2 * _between(*SIGMA, noise.sigma)[:, None] ** 2), dim=1)
    kernels = weights.repeat_interleave(3, dim=0)[:, None, None]  # (3n, 1, 1, taps)
    rows = F.pad(images.flatten(0, 1)[None], [reach] * 4, mode="reflect")
    rows = F.conv2d(rows, kernels, groups=len(kernels))
    rows = F.conv2d(rows, kernels.transpose(2, 3), groups=len(kernels))
    return rows.view_as(images)


class Drawn(Protocol):
    def rows(self, positions: Tensor) -> Drawn:
        """What these of the views differ by."""


class Augmentation(NamedTuple):
    draw: Callable[[int, Tensor, torch.Generator], Drawn]  # number of views, images of their kind, generator
    apply: Callable[[Tensor, Drawn], Tensor]  # one view of every image


class Choice(NamedTuple):
    uniform: Tensor  # (n,) on 0 to 1, which of the fixed views

    def rows(self, positions: Tensor) -> Choice:
        return Choice(self.uniform[positions])


def choose_augmentation(size: int | None, jitter: float, blur: float) -> Augmentation:
    """SimCLR's for colour images, (n, 3, h, w) -> (n, 3, size, size); size None: that for written digits."""
    if size is None:
        return Augmentation(draw_digit_noise, augment_digits)
    return Augmentation(draw_colour_noise, partial(augment_colour, size=size, jitter=jitter, blur=blur))


class Views:
    """Makes views of a data set's images. All its randomness is in what `draw` returns, but for the fixed views."""

    def __init__(self, augmentation: Augmentation, images: Tensor | Images, count: int, seed: int) -> None:
        """count: of fixed views an image, 0: fresh ones at each visit. What the fixed ones differ by is kept, for all
        images."""
        self.augmentation = augmentation
        self.count = count
        self.fixed: Drawn | None = None
        if count > 0:
            like = images[torch.zeros(1, dtype=torch.int64)]
            self.fixed = augmentation.draw(count * len(images), like, torch.Generator(like.device).manual_seed(seed))

    def draw(self, num_views: int, like: Tensor, generator: torch.Generator) -> Drawn:
        if self.fixed is None:
            return self.augmentation.draw(num_views, like, generator)
        return Choice(torch.rand(num_views, device=generator.device, generator=generator))

    def make(self, images: Tensor, drawn: Drawn, items: Tensor, views: Tensor) -> Tensor:
        """images (n, channels, h, w) of the items (n,), as view 0 or 1 each, views (n,)."""
        if self.fixed is not None:
            # View 0 is one of the even ones and view 1 one of the odd ones: of two fixed views each is always the same.
            choices = (self.count + 1 - views) // 2
            number = 2 * (drawn.uniform * choices).long() + views
            drawn = self.fixed.rows(items * self.count + number)
        return self.augmentation.apply(images, drawn)
