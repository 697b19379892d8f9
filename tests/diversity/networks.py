"""What the random networks are, and how far apart features are."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from tests import pictures

SIDE = 32  # pixels of the input of CLIP and open_clip
PREPROCESS: dict[str, Any] = {"size": SIDE, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
PARITY = 5e-4  # the most by which a feature may, as a distance; its length is 1


make_images = partial(pictures.make_images, count=6)


def unit(features: Tensor) -> np.ndarray:
    return F.normalize(features, dim=-1).numpy()


def distance(features: np.ndarray, others: np.ndarray) -> float:
    """The largest over the images."""
    return float(np.linalg.norm(features - others, axis=1).max())


def spread(features: np.ndarray) -> float:
    """The smallest distance between two images."""
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(distances[~np.eye(len(features), dtype=bool)].min())


def open_clip_config(**vision: Any) -> dict[str, Any]:
    """The text tower is never run. An image of 32 x 32 pixels in 16 patches, unless said otherwise."""
    return {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
