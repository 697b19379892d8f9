"""Any CLIP checkpoint as a scorer of images against texts, and the two rewards that read it.

The embedded checkpoints, OpenAI's CLIP and PickScore go through the same class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from flow_grpo.paths import find
from flow_grpo.rewards.frozen import load_whole, loading
from flow_grpo.rewards.image_path import ImagePath
from flow_grpo.rewards.registry import Metadata
from flow_grpo.rewards.towers import TwoTowers

# Checkpoints to be used with another repository's processor, as their model cards say.
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


class ClipScorer(TwoTowers):
    """A frozen CLIP."""

    def __init__(
        self,
        model: str,
        device: torch.device | str = "cpu",
        *,
        dtype: str = "fp32",
        offload: bool = False,
    ) -> None:
        """Load a directory or hub id; `dtype` and `offload` as FrozenNetwork has them.

        Raises ConfigError if it is not a whole CLIP, or has an unknown image path.
        """
        source = PROCESSORS.get(model, find(model))
        with loading(model, "a CLIP with its processor"):
            path = ImagePath.load(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            clip = load_whole(CLIPModel, model, "CLIP")
        super().__init__(clip, path, device, dtype=dtype, offload=offload, exact=("logit_scale",))

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor on the cosine, a scalar tensor."""
        return self.model.logit_scale

    def logits(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """exp(logit_scale) cos(image, text) of each pair: (B, 3, H, W) and B texts -> (B,) float32."""
        cosines = self.cosines(images, texts)
        return self.logit_scale.exp().to(cosines.device) * cosines

    def _image_tower(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def _text_tower(self, text: str) -> Tensor:
        """Padding does not matter: the text tower is causal and read at the end-of-text token."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        return self.model.text_projection(self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output)


class _ClipReward:
    """exp(logit_scale) cos(image, prompt) / divisor."""

    name: str
    divisor: float
    differentiable = True

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32."""
        return self.scorer.logits(images, prompts) / self.divisor


class PickScore(_ClipReward):
    """exp(logit_scale) cos / 26 (arXiv 2305.01569); the divisor is Flow-GRPO's and brings it near 1."""

    name = "pickscore"
    divisor = 26.0


class ClipScore(_ClipReward):
    """exp(logit_scale) cos / 30, as Flow-GRPO has it: 100 cos / 30 for OpenAI's CLIP, whose factor is 100.

    Not the CLIPScore of arXiv 2104.08718, which is 2.5 max(cos, 0).
    """

    name = "clipscore"
    divisor = 30.0
