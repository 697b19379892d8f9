"""HPSv2.1 (arXiv 2306.09341): open_clip's ViT-H-14, trained on what people preferred; the score is a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from flow_grpo.files import read_object
from flow_grpo.paths import find
from flow_grpo.rewards.frozen import fill, loading, read_weights, weights_file
from flow_grpo.rewards.image_path import ImagePath
from flow_grpo.rewards.registry import HPS_FILES, Metadata
from flow_grpo.rewards.towers import TwoTowers

ARCHITECTURE = "ViT-H-14"
CONFIG = "open_clip_config.json"  # beside weights of another architecture, under "model_cfg"


class HpsScorer(TwoTowers):
    """The network of HPSv2 or HPSv2.1."""

    def __init__(
        self, model: str, device: torch.device | str = "cpu", *, dtype: str = "fp32", offload: bool = False
    ) -> None:
        """Load the published file from a folder or hub id, or open_clip's own file from a folder.

        `dtype` and `offload` are as FrozenNetwork has them. Raises ConfigError for a file of another network.
        """
        with loading(model, "an HPSv2"):
            config = _architecture(model)
            network: Any = open_clip.CLIP(**config)
            fill(network, read_weights(weights_file(model, HPS_FILES)), model)
            self.tokenizer = open_clip.SimpleTokenizer(context_length=network.context_length)
        super().__init__(network, image_path(config["vision_cfg"]["image_size"]), device, dtype=dtype, offload=offload)

    def _image_tower(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_tower(self, text: str) -> Tensor:
        return self.model.encode_text(self.tokenizer([text]).to(self.device))


def image_path(size: int) -> ImagePath:
    """As HPSv2 was trained: the longest edge to `size`, black bars, OpenAI's mean and std."""
    numbers = {
        "size": size, "resize_mode": "longest", "interpolation": "bicubic",
        "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
    }  # fmt: skip
    return ImagePath.from_open_clip(numbers, "HPSv2")


def _architecture(model: str) -> dict[str, Any]:
    """What open_clip.CLIP is called with: ViT-H-14, unless the folder says another one."""
    path = Path(find(model), CONFIG)
    if path.is_file():
        return read_object(path, f"{model!r}: ")["model_cfg"]
    return open_clip.get_model_config(ARCHITECTURE)


class HPSv2:
    """cos(image, prompt); images of models of today get some 0.25 to 0.35."""

    name = "hpsv2"
    differentiable = True

    def __init__(self, scorer: HpsScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32."""
        return self.scorer.cosines(images, prompts)
