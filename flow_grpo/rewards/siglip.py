"""SigLIP and SigLIP2 of one resolution (arXiv 2303.15343, 2502.14786): does the text fit the image?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, SiglipModel

from flow_grpo.paths import find
from flow_grpo.rewards.frozen import load_whole, loading
from flow_grpo.rewards.image_path import ImagePath
from flow_grpo.rewards.registry import Metadata
from flow_grpo.rewards.towers import TwoTowers

EXACT = ("logit_scale", "logit_bias")


class SiglipScorer(TwoTowers):
    """A frozen SigLIP. Its image path squashes: an image of any shape is seen whole."""

    def __init__(
        self, model: str, device: torch.device | str = "cpu", *, dtype: str = "fp32", offload: bool = False
    ) -> None:
        """Load a directory or hub id; `dtype` and `offload` as FrozenNetwork has them.

        Raises ConfigError if it is not a whole SigLIP, or has an unknown image path.
        """
        with loading(model, "a SigLIP with its processor"):
            path = ImagePath.load(find(model))
            self.tokenizer = AutoTokenizer.from_pretrained(find(model))
            siglip = load_whole(SiglipModel, model, "SigLIP")
        super().__init__(siglip, path, device, dtype=dtype, offload=offload, exact=EXACT)

    def logits(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """exp(logit_scale) cos(image, text) + logit_bias of each pair -> (B,) float32."""
        cosines = self.cosines(images, texts)
        scale, bias = (getattr(self.model, name).to(cosines.device) for name in EXACT)
        return scale.exp() * cosines + bias

    def _image_tower(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def _text_tower(self, text: str) -> Tensor:
        """In small letters and padded to the full length, without a mask: as it was trained."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            text.lower(), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output


class SiglipScore:
    """The logit; its sigmoid is the model's probability that text and image belong together, and has hardly a slope."""

    name = "siglip"
    differentiable = True

    def __init__(self, scorer: SiglipScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32."""
        return self.scorer.logits(images, prompts)
