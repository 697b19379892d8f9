"""Pictures for the tests of image paths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def make_images(height: int, width: int, count: int = 4, seed: int = 0) -> Tensor:
    """Half noise, half smooth; values are whole multiples of 1/255, so that the library sees the same images."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count // 2, 3, height, width, generator=generator)
    coarse = torch.rand(count - count // 2, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (torch.cat([noise, smooth]) * 255).round() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
