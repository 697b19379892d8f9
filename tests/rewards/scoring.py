"""Settings of rewards, and the image path by Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

from config.base import get_config

SIDE = 32  # pixels of the tiny CLIP's input
NO_METADATA: list[dict[str, Any]] = [{}]


def make_config(checkpoint: str, **weights: float) -> ConfigDict:
    config = get_config()
    config.reward_fn.update(weights)
    config.reward_model.pickscore = config.reward_model.clipscore = config.eval.judge = checkpoint
    return config


def pillow_path(image: Tensor, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    """The image path by Pillow on float channels: (3, H, W) -> (3, SIDE, SIDE), float64."""
    height, width = image.shape[1:]
    short = min(height, width)
    target = (SIDE * width // short, SIDE * height // short)
    left, top = (target[0] - SIDE) // 2, (target[1] - SIDE) // 2
    channels = [Image.fromarray(channel.numpy()).resize(target, Image.Resampling.BICUBIC) for channel in image]
    cropped = [channel.crop((left, top, left + SIDE, top + SIDE)) for channel in channels]
    return (np.stack([np.asarray(channel, dtype=np.float64) for channel in cropped]) - mean) / std
