"""SimCLR's random views of colour images, a batch at a time on its device.

Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709, appendix
A; the steps of colour jitter come in one order here, brightness, contrast, saturation, hue, and not in a random one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AREA = (0.08, 1.0)  # of a crop
ASPECT = (3 / 4, 4 / 3)
JITTERED, GREY = 0.8, 0.2  # shares of views
SIGMA = (0.1, 2.0)  # of the blur, in pixels
LUMA = (0.299, 0.587, 0.114)


class ColourNoise(NamedTuple):
    """What n views differ by, each (n,) and uniform on 0 to 1: what follows from it is up to `change`."""

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


def change(images: Tensor, noise: ColourNoise, size: int, jitter: float, blur: float) -> Tensor:
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
