"""The size of an image as JPEG: the black-box rewards, small or large files (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from flow_grpo.rewards.image_path import check_images
from flow_grpo.rewards.registry import Metadata

QUALITY = 95  # of PIL's encoder, as DDPO and Flow-GRPO


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) float in [0, 1] -> (B,) float32, in units of 1000 bytes; NaN for an image with NaN."""
    check_images(images)
    sizes = [_kilobytes(image) for image in images.detach().float().cpu()]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _kilobytes(image: Tensor) -> float:
    if image.isnan().any():
        return math.nan
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H, W, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class JpegCompressibility:
    """Minus the kilobytes. Flow-GRPO divides by 500 besides; give a weight of 1 / 500 for its scale."""

    name = "jpeg_compressibility"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B,) float32."""
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """The kilobytes."""

    name = "jpeg_incompressibility"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B,) float32."""
        return jpeg_kilobytes(images)
