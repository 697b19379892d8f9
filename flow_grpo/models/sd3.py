"""Stable Diffusion 3 and 3.5: three text encoders, a transformer conditioned on 1000 sigma, a 16-channel VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

NUM_TRAIN_TIMESTEPS = 1000  # the transformer is conditioned on 1000 sigma


class SD3:
    """A `ModelFamily`; see there what the methods are."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, distilled_guidance: float = 1.0) -> None:
        self.pipeline: Any = pipeline
        self.transformer, self.vae = self.pipeline.transformer, self.pipeline.vae

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """Two CLIPs and the T5, as the pipeline joins them: (1, L, E) and (1, P)."""
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return PromptEmbeds(prompt_embeds, pooled)

    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """Latents (B, C, h, w) -> (B, C, h, w); the input takes the embeddings' dtype, the output at least float32."""
        timestep = torch.full((len(latents),), sigma * NUM_TRAIN_TIMESTEPS, device=latents.device, dtype=torch.float32)
        velocity = transformer(
            hidden_states=latents.to(embeds.prompt_embeds.dtype),
            timestep=timestep,
            encoder_hidden_states=embeds.prompt_embeds,
            pooled_projections=embeds.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    guide = staticmethod(linear_guidance)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Of the scheduler, whose shift may depend on the number of tokens."""
        pixels = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        return noise_levels(self.pipeline.scheduler, num_steps, tokens=(height // pixels) * (width // pixels))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
        return (posterior.mode().float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def modules_without_effect(self) -> Sequence[str]:
        """The prompt's queries in blocks that drop the prompt's stream, which is the last block."""
        blocks = enumerate(self.transformer.transformer_blocks)
        return [f"transformer_blocks.{i}.attn.add_q_proj" for i, block in blocks if block.context_pre_only]

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):  # shapes and names alone
            return SD3Transformer2DModel.from_config(settings)

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """Safe tensors alone."""
        found: Any = SD3Transformer2DModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        transformer, info = found
        return transformer.to(torch.float32), sorted(info["missing_keys"])

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """pytorch_lora_weights.safetensors."""
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
