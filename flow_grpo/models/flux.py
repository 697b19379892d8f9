"""FLUX.1: a CLIP and a T5, a transformer on tokens of 2 x 2 latents that takes a guidance scale, a 16-channel VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

SIDE = 2  # of the square of latents that is one token


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens (B, (h / 2) (w / 2), 4 C), row by row."""
    return pixel_unshuffle(latents, SIDE).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens -> latents (B, C, height, width): `pack` undone."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height // SIDE, width // SIDE)), SIDE)


def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Of the tokens of latents of this size: (0, row, column) each, (N, 3)."""
    rows, columns = (torch.arange(side // SIDE, device=device) for side in (height, width))
    return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)


class Flux:
    """A `ModelFamily`; see there what the methods are.

    `guide` is true classifier-free guidance, with a negative prompt (`true_cfg_scale` of the stock pipeline). The
    distilled guidance (its `guidance_scale`) is an input of the network, the same in both halves.
    """

    def __init__(self, pipeline: FluxPipeline, distilled_guidance: float = 3.5) -> None:
        self.pipeline: Any = pipeline
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae
        self.distilled_guidance = distilled_guidance

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The T5's tokens, (1, L, E) with padding, and the CLIP's pooled output, (1, P)."""
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.pipeline.text_encoder.device, max_sequence_length=max_sequence_length
        )
        return PromptEmbeds(prompt_embeds, pooled)

    def velocity(self, transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """Latents (B, C, h, w) -> (B, C, h, w); the input takes the embeddings' dtype, the output at least float32."""
        (_, _, height, width), device = latents.shape, latents.device
        levels = torch.full((len(latents),), sigma * 1000, device=device) / 1000  # rounded as the stock pipeline does
        distilled = self.transformer.config.guidance_embeds
        guidance = torch.full_like(levels, self.distilled_guidance) if distilled else None
        text = embeds.prompt_embeds
        velocity = transformer(
            hidden_states=pack(latents.to(text.dtype)),
            timestep=levels,
            guidance=guidance,
            pooled_projections=embeds.pooled_prompt_embeds,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=image_positions(height, width, device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width).to(torch.promote_types(velocity.dtype, torch.float32))

    guide = staticmethod(linear_guidance)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Even levels, shifted by the number of tokens."""
        pixels = self.pipeline.vae_scale_factor * SIDE
        tokens, even = (height // pixels) * (width // pixels), np.linspace(1, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, tokens, even)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels // SIDE**2, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
        return (posterior.mode().float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def modules_without_effect(self) -> Sequence[str]:
        """None: the prompt's stream ends in the single blocks, whose weights the image's tokens share."""
        return ()

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):  # shapes and names alone
            return FluxTransformer2DModel.from_config(settings)

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """Safe tensors alone."""
        found: Any = FluxTransformer2DModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        transformer, info = found
        return transformer.to(torch.float32), sorted(info["missing_keys"])

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """pytorch_lora_weights.safetensors."""
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
