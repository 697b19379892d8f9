"""Qwen-Image: a Qwen2.5-VL that reads the prompt, a transformer on tokens of 2 x 2 latents, a video VAE of one frame.

Conventions are those of diffusers' QwenImagePipeline; docs/models.md lists them beside other families'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.models.diffusers_model import DiffusersModel
from flow_grpo.models.packing import SIDE, pack, unpack
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

LAST_BLOCK = (
    "attn.add_q_proj",
    "attn.to_add_out",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)  # what its text stream ends in


class QwenImage(DiffusersModel):
    """A `ModelFamily`; see there what the methods are."""

    pipeline_class, transformer_class = QwenImagePipeline, QwenImageTransformer2DModel

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The last hidden states after the template's own words: (1, L, E), with L the prompt's own length."""
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt, device=self.pipeline.text_encoder.device, max_sequence_length=max_sequence_length
        )
        mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.bool, device=prompt_embeds.device)
        return PromptEmbeds(prompt_embeds, mask=mask)

    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """Latents (B, C, h, w) -> (B, C, h, w); the input takes the embeddings' dtype, the output at least float32."""
        height, width = latents.shape[-2:]
        timestep = torch.full((len(latents),), 1000 * sigma, device=latents.device, dtype=torch.float32)
        tokens = transformer(
            hidden_states=pack(latents.to(embeds.prompt_embeds.dtype)),
            timestep=timestep / 1000,  # sigma, rounded as the pipeline does
            encoder_hidden_states=embeds.prompt_embeds,
            encoder_hidden_states_mask=embeds.mask,
            img_shapes=[[(1, height // SIDE, width // SIDE)]] * len(latents),
            return_dict=False,
        )[0]
        velocity = unpack(tokens, height, width)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    @staticmethod
    def guide(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        """Linear guidance, then each token brought to the length it has in `v_cond`."""
        guided, conditional = pack(linear_guidance(v_uncond, v_cond, scale)), pack(v_cond)
        length = conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * length, *v_cond.shape[-2:])

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """1, ..., 1 / num_steps in even steps, shifted by the scheduler."""
        pixels = self.pipeline.vae_scale_factor * SIDE
        even = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, (height // pixels) * (width // pixels), even)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.vae.config.z_dim, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        mean, std = self._channels(latents)
        frames = (latents * std + mean).unsqueeze(2).to(self.vae.dtype)  # (B, C, 1, h, w)
        images = self.vae.decode(frames, return_dict=False)[0][:, :, 0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        frames = (images.to(self.vae.device, self.vae.dtype) * 2 - 1).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        mean, std = self._channels(latents)
        return (latents - mean) / std

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's latents: (C, 1, 1) each."""
        config = self.vae.config
        return like.new_tensor(config.latents_mean).view(-1, 1, 1), like.new_tensor(config.latents_std).view(-1, 1, 1)

    def modules_without_effect(self) -> Sequence[str]:
        """Of the last block, what only its text stream, which is dropped, comes from."""
        last = len(self.transformer.transformer_blocks) - 1
        return [f"transformer_blocks.{last}.{name}" for name in LAST_BLOCK]
