"""FLUX.2-klein: three layers of a Qwen3 as the text, one token a latent, latents normalised channel by channel."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.errors import ConfigError
from flow_grpo.models.diffusers_model import DiffusersModel
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

SIDE = 2  # of the square of the VAE's latents that is one of ours


def positions(device: torch.device, *, rows: int = 1, columns: int = 1, words: int = 1) -> Tensor:
    """(0, row, column, word) of each token: (N, 4). Images have one word, prompts one row and one column."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, rows, columns, words)))


class Flux2Klein(DiffusersModel):
    """A `ModelFamily`; see there what the methods are.

    Latents are (B, 4 C, h / 2, w / 2) of the VAE's (B, C, h, w): squares of 2 x 2 as channels, then normalised.
    """

    pipeline_class, transformer_class = Flux2KleinPipeline, Flux2Transformer2DModel

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """Three hidden layers of the Qwen3, joined: (1, L, 3 E), with the chat template's tokens and padding."""
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt, device=self.pipeline.text_encoder.device, max_sequence_length=max_sequence_length
        )
        return PromptEmbeds(prompt_embeds)

    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """Latents (B, C, h, w) -> (B, C, h, w); the input takes the embeddings' dtype, the output at least float32."""
        (_, _, height, width), device = latents.shape, latents.device
        text = embeds.prompt_embeds
        velocity = transformer(
            hidden_states=latents.to(text.dtype).flatten(2).mT,
            # rounded as the stock pipeline does
            timestep=torch.full((len(latents),), sigma * 1000, device=device) / 1000,
            encoder_hidden_states=text,
            txt_ids=positions(device, words=text.shape[1]),
            img_ids=positions(device, rows=height, columns=width),
            return_dict=False,
        )[0]
        return velocity.mT.unflatten(2, (height, width)).to(torch.promote_types(velocity.dtype, torch.float32))

    def guide(self, v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        """Linear.

        Raises:
            ConfigError: the pipeline is distilled, and the stock one ignores the scale.
        """
        if self.pipeline.config.is_distilled:
            raise ConfigError(
                f"config.*.guidance_scale = {scale} has no effect on a FLUX.2-klein that is distilled; it takes 1.0."
            )
        return linear_guidance(v_uncond, v_cond, scale)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Even levels, shifted by the number of tokens and of steps."""
        _, rows, columns = self.latent_shape(height, width)
        tokens, even = rows * columns, np.linspace(1, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, tokens, even, compute_empirical_mu(tokens, num_steps))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w), C four times the VAE's."""
        factor = self.pipeline.vae_scale_factor * SIDE
        return self.transformer.config.in_channels, height // factor, width // factor

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel: (C, 1, 1)."""
        mean, variance = (value.float()[:, None, None] for value in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        mean, deviation = self._statistics()
        squares = pixel_shuffle(latents * deviation + mean, SIDE)
        return (self.vae.decode(squares.to(self.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w)."""
        mean, deviation = self._statistics()
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
        return (pixel_unshuffle(posterior.mode().float(), SIDE) - mean) / deviation
