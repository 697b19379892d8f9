"""The size of an image as JPEG: the black-box rewards, small or large files (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from flow_grpo.rewards.image_path import check_images, pictures
from flow_grpo.rewards.registry import Metadata

QUALITY = 95  # of PIL's encoder, as DDPO and Flow-GRPO


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) float in [0, 1] -> (B,) float32, in units of 1000 bytes; NaN for an image with NaN."""
    check_images(images)
    sizes = [math.nan if picture is None else _kilobytes(picture) for picture in pictures(images)]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def _kilobytes(picture: Image.Image) -> float:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
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
