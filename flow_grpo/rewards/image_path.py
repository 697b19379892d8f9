"""From images to a vision tower's input, in torch throughout: one path for training, logging and evaluation.

The library's processors go through 8-bit images, which have no gradient. Here the same geometry (antialiased bicubic
resize of the shortest edge, centre crop) and the same normalisation act on floats. Two differences follow, both below
the bounds stated in tests/test_rewards.py: no rounding to 1/255, and the overshoot of the bicubic kernel beyond [0, 1]
is kept, since clamping it would cut the gradient of white and black areas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from flow_grpo.errors import ConfigError

_ASSUMED = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}  # 3: PIL's bicubic


@dataclass(frozen=True)
class ImagePath:
    """A CLIP image processor as a differentiable function."""

    size: int  # pixels of the shortest edge after the resize
    crop: tuple[int, int]  # height and width of the centre crop, none above `size`
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel

    @staticmethod
    def load(checkpoint: str) -> ImagePath:
        """Read the processor's numbers from a directory or hub id."""
        numbers, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
        return ImagePath.from_dict(numbers, checkpoint)

    @staticmethod
    def from_dict(numbers: Mapping[str, Any], source: str) -> ImagePath:
        """Take the numbers of a preprocessor_config.json, old (sizes are integers) or new (they are dicts).

        Raises ConfigError, naming `source`, for a processor that does something else than this path.
        """
        for key, value in _ASSUMED.items():
            if numbers.get(key, value) != value:
                raise ConfigError(f"the image processor of {source!r} has {key} = {numbers[key]}; it must be {value}.")
        size, crop = numbers["size"], numbers["crop_size"]
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        if edge is None or max(height, width) > edge:
            raise ConfigError(
                f"the image processor of {source!r} has size = {size} and crop_size = {crop}; "
                "it must resize the shortest edge to at least the crop."
            )
        return ImagePath(edge, (height, width), tuple(numbers["image_mean"]), tuple(numbers["image_std"]))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> normalised (B, 3, *crop), in the dtype of the images."""
        images = self._crop(self._resize(images))
        mean, std = (torch.tensor(value).to(images).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        """Shortest edge to `size`, the longer one in proportion and rounded down, as the library does."""
        height, width = images.shape[-2:]
        short = min(height, width)
        if short == self.size:
            return images
        target = (int(self.size * height / short), int(self.size * width / short))
        return F.interpolate(images, target, mode="bicubic", align_corners=False, antialias=True)

    def _crop(self, images: Tensor) -> Tensor:
        (height, width), (rows, columns) = images.shape[-2:], self.crop
        top, left = (height - rows) // 2, (width - columns) // 2
        return images[..., top : top + rows, left : left + columns]


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are float (B, 3, H, W) in [0, 1]; NaN passes and makes that image's reward NaN."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"a reward takes float images of shape (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if low < 0 or high > 1:
        raise ValueError(f"a reward takes images in [0, 1], got values from {low} to {high}")
