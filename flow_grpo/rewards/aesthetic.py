"""LAION's aesthetic predictor, the one DDPO trained on: five linear maps of CLIP's image features, no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flow_grpo.paths import find
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.frozen import fill, loading, read_weights, weights_file
from flow_grpo.rewards.heads import LinearHead
from flow_grpo.rewards.registry import AESTHETIC_FILES, Metadata

CLIP = "openai/clip-vit-large-patch14"  # whose features the head reads, unless a CLIP lies beside it


class AestheticScorer(ClipScorer):
    """A CLIP with the head on its unit image features. The head is small, and stays float32 on the device."""

    def __init__(
        self, model: str, device: torch.device | str = "cpu", *, dtype: str = "fp32", offload: bool = False
    ) -> None:
        """Load the head from a folder or hub id; the CLIP of the same folder, or else OpenAI's ViT-L/14.

        `dtype` and `offload` are of the CLIP, as FrozenNetwork has them. Raises ConfigError for other files.
        """
        own = Path(find(model), "config.json").is_file()
        super().__init__(model if own else CLIP, device, dtype=dtype, offload=offload)
        with loading(model, "an aesthetic predictor"):
            weights = read_weights(weights_file(model, AESTHETIC_FILES))
            head = LinearHead(LinearHead.sizes(weights))
            fill(head, weights, model)
        self.head = head.float().to(self.device).eval().requires_grad_(False)

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B,)."""
        features = self.image_features(images)
        with torch.autocast(self.device.type, enabled=False):
            return self.head(features)[:, 0]


class Aesthetic:
    """A mark from about 1 to 10, as people gave them to pictures."""

    name = "aesthetic"
    differentiable = True

    def __init__(self, scorer: AestheticScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B,) float32; the prompts are not read."""
        return self.scorer.scores(images)
