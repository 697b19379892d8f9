"""Images changed a little before they are scored in training, against rewards that single pixels can fool.

A reward that is raised by a pattern of pixels sees the pattern elsewhere, and in other colours, every time; a motif
stays what it is. Differentiable; an image's changes depend on its own generator alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv


def augmented(images: Tensor, generators: Sequence[torch.Generator], strength: float) -> Tensor:
    """A random crop of each image, as large as before, with brightness, contrast and saturation a little off.

    The crop's sides are 1 - strength u of the image's, u uniform in [0, 1], at a place that is uniform where it fits.
    Each colour factor is uniform in [1 - strength, 1 + strength]; what leaves [0, 1] is cut, and has no gradient there.

    Args:
        images: (B, 3, H, W) in [0, 1].
        generators: one for each, on the CPU.
    """
    return torch.stack([_augmented(image, g, strength) for image, g in zip(images, generators, strict=True)])


def _augmented(image: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """(3, H, W) -> (3, H, W)."""
    height, width = image.shape[-2:]
    size, down, across, *factors = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    rows, columns = (max(1, round(side * (1 - strength * size))) for side in (height, width))
    top, left = round(down * (height - rows)), round(across * (width - columns))
    image = tv.resized_crop(
        image, top, left, rows, columns, [height, width], InterpolationMode.BILINEAR, antialias=True
    ).clamp(0, 1)  # rounding
    for change, u in zip((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation), factors, strict=True):
        image = change(image, 1 + strength * (2 * u - 1))
    return image
