"""From images to a vision tower's input, in torch throughout: one path for training, logging and evaluation.

The library's processors go through 8-bit images, which have no gradient. Here the same geometry (antialiased resize,
then a centre crop or black bars) and the same normalisation act on floats. Two differences follow, both below
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
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from flow_grpo.errors import ConfigError

_ASSUMED = {"do_resize": True, "do_normalize": True}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class ImagePath:
    """An image processor as a function, differentiable unless `eight_bit`."""

    size: int  # pixels of the edge that `fit` names, after the resize
    crop: tuple[int, int]  # height and width of what the network sees
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel
    interpolation: str = "bicubic"  # or "bilinear"
    fit: str = "shortest"  # this edge becomes `size`; or "longest", filled up with black; or "squash": just to `crop`
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
        crops = numbers.get("do_center_crop", "crop_size" in numbers)
        resample = numbers.get("resample", 3)
        for key, value in _ASSUMED.items():
            if numbers.get(key, value) != value:
                raise ConfigError(f"the image processor of {source!r} has {key} = {numbers[key]}; it must be {value}.")
        if resample not in _RESAMPLE:
            raise ConfigError(f"the image processor of {source!r} has resample = {resample}; it must be 2 or 3.")
        size = numbers["size"]
        if not crops:
            return _squashing(numbers, source, _RESAMPLE[resample])
        crop = numbers["crop_size"]
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        if edge is None or max(height, width) > edge:
            raise ConfigError(
                f"the image processor of {source!r} has size = {size} and crop_size = {crop}; "
                "it must resize the shortest edge to at least the crop."
            )
        mean, std = tuple(numbers["image_mean"]), tuple(numbers["image_std"])
        return ImagePath(edge, (height, width), mean, std, _RESAMPLE[resample])

    @staticmethod
    def from_open_clip(numbers: Mapping[str, Any], source: str) -> ImagePath:
        """Take the numbers of an open_clip model's preprocess_cfg, for inference.

        Raises ConfigError, naming `source`, for those that do something else than this path.
        """
        size, mode = numbers["size"], numbers["resize_mode"]
        height, width = (size, size) if isinstance(size, int) else size
        if mode not in ("shortest", "longest", "squash") or (mode != "squash" and height != width):
            raise ConfigError(
                f"the preprocessing of {source!r} has resize_mode = {mode!r} and size = {height} x {width}; "
                "it must be 'squash', or 'shortest' or 'longest' with a square size."
            )
        if mode == "longest" and numbers.get("fill_color", 0) != 0:
            raise ConfigError(
                f"the preprocessing of {source!r} has fill_color = {numbers['fill_color']}; it must be 0."
            )
        return ImagePath(
            size=min(height, width),
            crop=(height, width),
            mean=tuple(numbers["mean"]),
            std=tuple(numbers["std"]),
            interpolation="bilinear" if numbers["interpolation"] == "bilinear" else "bicubic",  # "random": in training
            fit=mode,
            round_margin=True,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> normalised (B, 3, *crop), in the dtype of the images."""
        images = self._centre(self._resize(images))
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
        """The named edge to `size`, the other one in proportion: rounded down, or to the nearest with "longest"."""
        if self.fit == "squash":
            return self.crop
        if self.fit == "longest":
            long = max(height, width)
            return round(self.size * height / long), round(self.size * width / long)
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _interpolate(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        if images.shape[-2:] == target:
            return images
        return F.interpolate(images, target, mode=self.interpolation, align_corners=False, antialias=True)

    def _centre(self, images: Tensor) -> Tensor:
        """Cut to the crop, or filled up to it with black; an odd pixel goes to the right and to the bottom."""
        (height, width), (rows, columns) = images.shape[-2:], self.crop
        margins = (height - rows, width - columns)
        if self.fit == "longest":
            above, left = (-margin // 2 for margin in margins)  # no margin is above 0
            return F.pad(images, (left, columns - width - left, above, rows - height - above))
        top, left = (round(margin / 2) if self.round_margin else margin // 2 for margin in margins)
        return images[..., top : top + rows, left : left + columns]


def _squashing(numbers: Mapping[str, Any], source: str, interpolation: str) -> ImagePath:
    """A processor without a crop: it resizes to a height and a width, as SigLIP's does."""
    size = numbers["size"]
    if not isinstance(size, Mapping) or not {"height", "width"} <= set(size):
        raise ConfigError(
            f"the image processor of {source!r} has size = {size} and no crop; it must have a height and a width."
        )
    shape = (size["height"], size["width"])
    mean, std = tuple(numbers["image_mean"]), tuple(numbers["image_std"])
    return ImagePath(min(shape), shape, mean, std, interpolation, fit="squash")


def _nearest_levels(levels: Tensor) -> Tensor:
    """The nearest of 0, 1 ... 255; halves go up, as in Pillow."""
    return (levels + 0.5).floor().clamp(0, 255)


def pictures(images: Tensor) -> list[Image.Image | None]:
    """Images (B, 3, H, W) in [0, 1] -> of 8 bits each, as they are saved; None for an image with NaN."""
    return [None if image.isnan().any() else _picture(image) for image in images.detach().float().cpu()]


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


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
