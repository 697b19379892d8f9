"""Z-Image: a Qwen3 that reads the prompt, one transformer on the tokens of image and prompt, a 16-channel VAE.

Conventions are those of diffusers' ZImagePipeline; docs/models.md lists them beside other families'. Its guidance scale
g adds g times the difference to the conditional velocity: ours, w, is g + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

SIDE = 2  # of a token, in latents


class ZImage:
    """A `ModelFamily`; see there what the methods are."""

    def __init__(self, pipeline: ZImagePipeline, distilled_guidance: float = 1.0) -> None:
        self.pipeline: Any = pipeline
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The hidden states before the last layer, template included: (1, L, E), with L the prompt's own length."""
        (caption,), _ = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        mask = torch.ones(1, len(caption), dtype=torch.bool, device=caption.device)
        return PromptEmbeds(caption[None].to(self.transformer.dtype), mask=mask)

    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """Latents (B, C, h, w) -> (B, C, h, w); the input takes the embeddings' dtype, the output at least float32.

        The network takes lists, one entry per image, and pads prompts by itself; its time is 1 at the image, and what
        it predicts is x_0 - e.
        """
        assert embeds.mask is not None, "prompts of this family have a mask"
        timestep = torch.full((len(latents),), 1000 * sigma, device=latents.device, dtype=torch.float32)
        frames = latents.to(embeds.prompt_embeds.dtype).unsqueeze(2)  # (B, C, 1, h, w)
        lengths = embeds.mask.sum(1).tolist()
        predicted = transformer(
            list(frames.unbind()),
            (1000 - timestep) / 1000,  # 1 - sigma, rounded as the pipeline does
            [caption[:length] for caption, length in zip(embeds.prompt_embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        velocity = -torch.stack(predicted).squeeze(2)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    guide = staticmethod(linear_guidance)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """1, ..., 1 / num_steps in even steps, shifted by the scheduler."""
        pixels = self.pipeline.vae_scale_factor * SIDE
        even = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, (height // pixels) * (width // pixels), even)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(scaled, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).float()

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
        return (posterior.mode().float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def modules_without_effect(self) -> Sequence[str]:
        """None: image and prompt are one stream, and have their weights in common."""
        return ()

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):  # shapes and names alone
            return ZImageTransformer2DModel.from_config(settings)

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """Safe tensors alone."""
        found: Any = ZImageTransformer2DModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        transformer, info = found
        return transformer.to(torch.float32), sorted(info["missing_keys"])

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """pytorch_lora_weights.safetensors."""
        ZImagePipeline.save_lora_weights(folder, transformer_lora_layers=layers)
