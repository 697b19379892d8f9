"""From images to a vision tower's input, in torch throughout: one path for training, logging and evaluation.

The library's processors go through 8-bit images, which have no gradient. Here the same geometry (antialiased bicubic
resize of the shortest edge, centre crop) and the same normalisation act on floats. Two differences follow, both below
the bounds stated in tests/rewards/test_image_path.py: no rounding to 1/255, and the overshoot of the bicubic kernel
beyond [0, 1] is kept, since clamping it would cut the gradient of white and black areas. Where no gradient is needed,
`eight_bit` does both as the libraries do, and the pixels are theirs to within 1/255
(tests/diversity/test_extractors.py).
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
    """An image processor as a function, differentiable unless `eight_bit`."""

    size: int  # pixels of the shortest edge after the resize
    crop: tuple[int, int]  # height and width of the centre crop, none above `size`
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel
    interpolation: str = "bicubic"  # or "bilinear"
    squash: bool = False  # resize straight to `crop`, whatever the shape; `size` is then not read
    round_margin: bool = False  # half an odd margin is rounded to even, as torchvision does, not down
    eight_bit: bool = False  # images and both passes of the resize are rounded to 1/255 and cut to [0, 1]

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

    @staticmethod
    def from_open_clip(numbers: Mapping[str, Any], source: str) -> ImagePath:
        """Take the numbers of an open_clip model's preprocess_cfg, for inference.

        Raises ConfigError, naming `source`, for those that do something else than this path.
        """
        size, mode = numbers["size"], numbers["resize_mode"]
        height, width = (size, size) if isinstance(size, int) else size
        if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
            raise ConfigError(
                f"the preprocessing of {source!r} has resize_mode = {mode!r} and size = {height} x {width}; "
                "it must be 'squash', or 'shortest' with a square size."
            )
        return ImagePath(
            size=min(height, width),
            crop=(height, width),
            mean=tuple(numbers["mean"]),
            std=tuple(numbers["std"]),
            interpolation="bilinear" if numbers["interpolation"] == "bilinear" else "bicubic",  # "random": in training
            squash=mode == "squash",
            round_margin=True,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> normalised (B, 3, *crop), in the dtype of the images."""
        images = self._crop(self._resize(images))
        mean, std = (torch.tensor(value).to(images).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        target = self._target(height, width)
        if not self.eight_bit:
            return self._interpolate(images, target)
        levels = _nearest_levels(images * 255)
        for shape in ((height, target[1]), target):  # first along the rows, as Pillow does
            levels = _nearest_levels(self._interpolate(levels, shape))
        return levels / 255

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Shortest edge to `size`, the longer one in proportion and rounded down, as the library does."""
        short = min(height, width)
        return self.crop if self.squash else (int(self.size * height / short), int(self.size * width / short))

    def _interpolate(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        if images.shape[-2:] == target:
            return images
        return F.interpolate(images, target, mode=self.interpolation, align_corners=False, antialias=True)

    def _crop(self, images: Tensor) -> Tensor:
        (height, width), (rows, columns) = images.shape[-2:], self.crop
        margins = (height - rows, width - columns)
        top, left = (round(margin / 2) if self.round_margin else margin // 2 for margin in margins)
        return images[..., top : top + rows, left : left + columns]


def _nearest_levels(levels: Tensor) -> Tensor:
    """The nearest of 0, 1 ... 255; halves go up, as in Pillow."""
    return (levels + 0.5).floor().clamp(0, 255)


def check_images(images: Tensor, taker: str = "a reward") -> None:
    """Raise ValueError unless images are float (B, 3, H, W) in [0, 1]; NaN passes and makes that image's reward NaN.

    The values are looked at on the CPU alone; on a GPU images come from the decoder, which keeps them in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"{taker} takes float images of shape (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )
    if images.device.type != "cpu":  # looking would wait for all that the device has still to do
        return
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if low < 0 or high > 1:
        raise ValueError(f"{taker} takes images in [0, 1], got values from {low} to {high}")
