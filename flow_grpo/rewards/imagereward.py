"""ImageReward (arXiv 2304.05977): BLIP's text encoder reads the prompt while it looks at the image; a head marks it.

The networks are transformers' own; the names of the published file are put into theirs, and all sizes are read off its
tensors, so no configuration is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from flow_grpo.models.files import TOKENIZER
from flow_grpo.paths import find
from flow_grpo.rewards.frozen import FrozenNetwork, fill, loading, read_weights, weights_file
from flow_grpo.rewards.heads import LinearHead
from flow_grpo.rewards.image_path import ImagePath, check_images
from flow_grpo.rewards.registry import IMAGE_REWARD_FILES, Metadata

TOKENS = "google-bert/bert-base-uncased"  # unless a tokenizer lies beside the weights
LENGTH = 35  # tokens of a prompt that are read
HEAD_SIZE = 64  # of one attention head, in both networks
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's answers, by which the published score is normalised
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")  # of BLIP's pretraining; a constant
NAMES = (  # of the published file, and here
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)


class BlipReward(nn.Module):
    """BLIP's two encoders, and a head on the first token of the text."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, sizes: Sequence[int]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearHead(sizes)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), token ids and mask (B, L) -> (B,), the head's answers."""
        image = self.vision(pixel_values=pixels).last_hidden_state  # (B, patches + 1, width)
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False)
        first = read.last_hidden_state[:, 0]  # (B, text width)
        return self.head(first.to(self.head.dtype))[:, 0]


class ImageRewardScorer(FrozenNetwork):
    """A frozen BlipReward with its tokenizer and image path."""

    def __init__(
        self, model: str, device: torch.device | str = "cpu", *, dtype: str = "fp32", offload: bool = False
    ) -> None:
        """Load the published file from a folder or hub id; `dtype` and `offload` as FrozenNetwork has them.

        The tokenizer is that of the folder, or else BERT's. Raises ConfigError for a file of another network.
        """
        with loading(model, "an ImageReward"):
            weights = renamed(read_weights(weights_file(model, IMAGE_REWARD_FILES)))
            network: Any = sized(weights)
            fill(network, weights, model)
            folder = Path(find(model))
            own = any((folder / name).is_file() for name in (*TOKENIZER, "vocab.txt"))
            self.tokenizer = AutoTokenizer.from_pretrained(find(model) if own else TOKENS)
        size = network.vision.config.image_size
        self.image_path = ImagePath(size, (size, size), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, round_margin=True)
        head = [f"head.{name}" for name, _ in network.head.named_parameters()]
        super().__init__(network, device, dtype=dtype, offload=offload, exact=head)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] and B prompts -> (B,), about normal over people's images."""
        check_images(images)
        if len(images) != len(prompts):
            raise ValueError(f"each image needs its text, got {len(images)} images and {len(prompts)} texts")
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        with self.weights_here() as (dtype, precise):
            pixels = self.image_path(images.to(self.device, precise))  # (B, 3, S, S)
            return (self.model(pixels.to(dtype), ids, mask) - MEAN) / STD


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of BlipReward."""
    found = {}
    for name, tensor in weights.items():
        if not UNUSED.match(name):
            for pattern, own in NAMES:
                name, hits = re.subn(pattern, own, name)
                if hits:
                    break
            found[name] = tensor
    return found


def sized(weights: Mapping[str, Tensor]) -> BlipReward:
    """A network of the sizes that renamed weights have. Raises KeyError for those of another one."""
    _, positions, width = weights["vision.embeddings.position_embedding"].shape
    patch = weights["vision.embeddings.patch_embedding.weight"].shape[-1]
    vocabulary, text_width = weights["text.embeddings.word_embeddings.weight"].shape
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_count(weights, "vision.encoder.layers."),
        num_attention_heads=width // HEAD_SIZE,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=_count(weights, "text.encoder.layer."),
        num_attention_heads=text_width // HEAD_SIZE,
        max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
    )
    return BlipReward(vision, text, LinearHead.sizes(weights, "head."))


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers have tensors under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


class ImageReward:
    """The published score: 0 is the mean and 1 the std of the images that people compared."""

    name = "imagereward"
    differentiable = True

    def __init__(self, scorer: ImageRewardScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32."""
        return self.scorer.scores(images, prompts)
