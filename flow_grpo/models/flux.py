"""FLUX.1: a CLIP and a T5, a transformer on tokens of 2 x 2 latents that takes a guidance scale, a 16-channel VAE."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from flow_grpo.models.diffusers_model import DiffusersModel
from flow_grpo.models.packing import SIDE, pack, unpack
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds


def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Of the tokens of latents of this size: (0, row, column) each, (N, 3)."""
    rows, columns = (torch.arange(side // SIDE, device=device) for side in (height, width))
    return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)


class Flux(DiffusersModel):
    """A `ModelFamily`; see there what the methods are.

    `guide` is true classifier-free guidance, with a negative prompt (`true_cfg_scale` of the stock pipeline). The
    distilled guidance (its `guidance_scale`) is an input of the network, the same in both halves.
    """

    pipeline_class, transformer_class = FluxPipeline, FluxTransformer2DModel

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

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Even levels, shifted by the number of tokens."""
        pixels = self.pipeline.vae_scale_factor * SIDE
        tokens, even = (height // pixels) * (width // pixels), np.linspace(1, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, tokens, even)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels // SIDE**2, height // factor, width // factor
