"""Any CLIP checkpoint as a scorer of images against texts, and the two rewards that read it.

The embedded checkpoints, OpenAI's CLIP and PickScore go through the same class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.paths import find
from flow_grpo.rewards.image_path import ImagePath, check_images
from flow_grpo.rewards.registry import Metadata

# Checkpoints to be used with another repository's processor, as their model cards say.
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REASON_LENGTH = 200  # characters quoted of a library's complaint
TEXT_CACHE_SIZE = 4096  # texts whose features are kept, d floats each


class ClipScorer:
    """A frozen CLIP in eval mode; gradient flows to the images, never to the weights.

    Autocast is switched off inside, so a score does not depend on the precision of the code around it. Texts are
    encoded one by one, so a text's features do not depend on the texts beside it: a resumed run sees the same bits.
    """

    def __init__(
        self,
        model: str,
        device: torch.device | str = "cpu",
        *,
        dtype: str = "fp32",
        offload: bool = False,
    ) -> None:
        """Load a directory or hub id. Raises ConfigError if it is not a whole CLIP, or has an unknown image path.

        Args:
            device: where it works.
            dtype: "fp32" or "bf16", of its two networks; pixels, unit features and scores are float32 at least.
            offload: its weights stay in main memory, and are on the device only while they are used.
        """
        self.device, self.offload = torch.device(device), offload
        source = PROCESSORS.get(model, find(model))
        try:
            self.image_path = ImagePath.load(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model: Any = _load_frozen(
                find(model), self.device if not offload else "cpu", DTYPES[dtype]
            )  # a CLIPModel
        except ConfigError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = one_line(str(error), REASON_LENGTH) or type(error).__name__
            raise ConfigError(f"{model!r} cannot be loaded as a CLIP with its processor: {reason}") from error
        self._text_feature = lru_cache(maxsize=TEXT_CACHE_SIZE)(self._encode_text)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor on the cosine, a scalar tensor."""
        return self.model.logit_scale

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B, d) of unit length; ValueError for other images."""
        check_images(images)
        with torch.autocast(self.device.type, enabled=False), self._weights_here() as (dtype, precise):
            pixels = self.image_path(images.to(self.device, precise))  # (B, 3, *crop)
            pooled = self.model.vision_model(pixel_values=pixels.to(dtype)).pooler_output
            return F.normalize(self.model.visual_projection(pooled).to(precise), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, d) of unit length, without gradient; cut to the longest text the model takes."""
        return torch.stack([self._text_feature(text) for text in texts])

    def logits(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """exp(logit_scale) cos(image, text) of each pair: (B, 3, H, W) and B texts -> (B,) float32."""
        if len(images) != len(texts):
            raise ValueError(f"each image needs its text, got {len(images)} images and {len(texts)} texts")
        cosine = (self.image_features(images) * self.text_features(texts)).sum(-1)
        return self.logit_scale.exp().to(cosine.device) * cosine

    @torch.no_grad()
    def _encode_text(self, text: str) -> Tensor:
        """(d,). Padding does not matter: the text tower is causal and read at the end-of-text token."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False), self._weights_here() as (_, precise):
            pooled = self.model.text_model(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            ).pooler_output
            return F.normalize(self.model.text_projection(pooled).to(precise), dim=-1)[0]

    @contextmanager
    def _weights_here(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The weights on the device; yields their dtype, and that of what goes in and comes out, float32 at least."""
        dtype = self.model.visual_projection.weight.dtype
        with copied_to(self.model, self.device) if self.offload else nullcontext():
            yield dtype, torch.promote_types(dtype, torch.float32)


@contextmanager
def copied_to(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module has copies of its weights, on a device; after it, those it had.

    A graph that was made inside keeps the copies it needs until its backward pass.
    """
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    places: list[tuple[Any, dict[str, Tensor | None]]] = [(table, dict(table)) for table in tables]
    held = {tensor for _, own in places for tensor in own.values() if tensor is not None}
    copies = {tensor: tensor.detach().to(device, copy=True) for tensor in held}
    for values, own in places:
        values.update({name: copies[tensor] for name, tensor in own.items() if tensor is not None})
    try:
        yield
    finally:
        for values, own in places:
            values.update(own)


def _load_frozen(model: str, device: torch.device | str, dtype: torch.dtype) -> CLIPModel:
    """Refuses weights that lack a part: the library would fill it with random numbers and only warn."""
    loaded: Any = CLIPModel.from_pretrained(model, output_loading_info=True)
    clip, info = loaded
    if info["missing_keys"]:
        raise ConfigError(
            f"{model!r} is not a whole CLIP checkpoint; it lacks {', '.join(sorted(info['missing_keys']))}."
        )
    scale = clip.logit_scale.detach().float()
    clip.to(dtype)
    clip.logit_scale.data = scale  # one number, to whose exponential every score is proportional
    return clip.to(device).eval().requires_grad_(False)


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
