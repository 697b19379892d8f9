"""Stable Diffusion 3 and 3.5: three text encoders, a transformer conditioned on 1000 sigma, a 16-channel VAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from flow_grpo.models.diffusers_model import DiffusersModel
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

NUM_TRAIN_TIMESTEPS = 1000  # the transformer is conditioned on 1000 sigma


class SD3(DiffusersModel):
    """A `ModelFamily`; see there what the methods are."""

    pipeline_class, transformer_class = StableDiffusion3Pipeline, SD3Transformer2DModel

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

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Of the scheduler, whose shift may depend on the number of tokens."""
        pixels = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        return noise_levels(self.pipeline.scheduler, num_steps, tokens=(height // pixels) * (width // pixels))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def modules_without_effect(self) -> Sequence[str]:
        """The prompt's queries in blocks that drop the prompt's stream, which is the last block."""
        blocks = enumerate(self.transformer.transformer_blocks)
        return [f"transformer_blocks.{i}.attn.add_q_proj" for i, block in blocks if block.context_pre_only]
