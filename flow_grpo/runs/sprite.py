"""The images of an evaluation, small, in one picture.

Small ones are kept as they are, without loss, up to so many pixels; of larger ones a few, reduced.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from flow_grpo.runs.record import Record, Sprite

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 64  # pixels of the long side: images up to here are kept as they are, without loss
LONG_SIDE = 192  # pixels, to which larger ones are reduced
LOSSY = {"quality": 80}  # the WebP of larger ones
LOSSLESS = {"lossless": True, "quality": 50, "method": 2}  # of small ones; here `quality` is effort
MOST_PROMPTS, MOST_NOISES = 10, 8  # of larger ones
MOST_PIXELS = 2**20  # of small ones: 1024 images of 32 x 32, whose WebP is about 1 MB
COLUMNS = 16
WEBP_SIDE = 16383  # pixels, at most


def draw_sprite(record: Record, images: Tensor | np.ndarray, file: str) -> tuple[Sprite, bytes]:
    """The grid of the images that are kept, as WebP."""
    height, width = images.shape[2:]
    small = max(height, width) <= SMALL
    kept = _kept(record, min(COLUMNS * (WEBP_SIDE // height), MOST_PIXELS // (height * width)) if small else None)
    factor = 1.0 if small else LONG_SIDE / max(height, width)
    cell = (max(1, round(width * factor)), max(1, round(height * factor)))
    columns = min(COLUMNS, len(kept))
    grid = Image.new("RGB", (columns * cell[0], -(-len(kept) // columns) * cell[1]))
    for place, i in enumerate(kept):
        tile = Image.fromarray(_eight_bit(np.asarray(images[i])))
        row, column = divmod(place, columns)
        grid.paste(tile if small else tile.resize(cell, Image.Resampling.LANCZOS), (column * cell[0], row * cell[1]))
    buffer = io.BytesIO()
    grid.save(buffer, "WEBP", **(LOSSLESS if small else LOSSY))
    return Sprite(file, cell, columns, kept), buffer.getvalue()


def _kept(record: Record, room: int | None) -> list[int]:
    """Which images are in the sprite: of small ones all that there is room for, of large ones (None) the first of each
    of the first prompts.
    """
    order = range(len(record.prompt))
    if room is None:
        return [i for i in order if record.prompt[i] < MOST_PROMPTS and record.noise[i] < MOST_NOISES]
    return sorted(sorted(order, key=lambda i: (record.noise[i], record.prompt[i]))[:room])


def _eight_bit(image: np.ndarray) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (np.nan_to_num(image, posinf=0.0, neginf=0.0).clip(0, 1).transpose(1, 2, 0) * 255).round().astype(np.uint8)
