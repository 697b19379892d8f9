"""How near the mean colour, or the brightness, of an image is to a target: for trials, and to see a method at work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor

from flow_grpo.rewards.image_path import check_images
from flow_grpo.rewards.prompt_words import named_colour
from flow_grpo.rewards.registry import Metadata

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow makes an image grey


class TargetColour:
    """Minus the Euclidean distance, in RGB of 0 to 1, of the mean of all pixels to a colour."""

    name = "target_colour"
    differentiable = True

    def __init__(self, target: str) -> None:
        """A colour as `config.targets.colour` has it; "": of each prompt, the first that it names."""
        self.target = target

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,), from -sqrt(3) to 0.

        Raises ValueError for a prompt without a colour, if there is no other target.
        """
        check_images(images)
        wanted = [rgb(self.target or named_colour(prompt)) for prompt in prompts]
        distance = images.mean((2, 3)) - torch.tensor(wanted).to(images)  # (B, 3)
        return -torch.linalg.vector_norm(distance, dim=1)


class TargetBrightness:
    """Minus the distance of the mean brightness (luma, 0 black to 1 white) to a target."""

    name = "target_brightness"
    differentiable = True

    def __init__(self, target: float) -> None:
        """Between 0 and 1: `config.targets.brightness`."""
        self.target = target

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B,), from -1 to 0; the prompts are not read."""
        check_images(images)
        brightness = images.mean((2, 3)) @ torch.tensor(LUMA).to(images)  # (B,)
        return -(brightness - self.target).abs()


def rgb(colour: str) -> tuple[float, ...]:
    """A name or #rrggbb -> red, green and blue of 0 to 1."""
    return tuple(value / 255 for value in ImageColor.getrgb(colour))
