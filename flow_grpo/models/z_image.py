"""Z-Image: a Qwen3 that reads the prompt, one transformer on the tokens of image and prompt, a 16-channel VAE.

Conventions are those of diffusers' ZImagePipeline; docs/models.md lists them beside other families'. Its guidance scale
g adds g times the difference to the conditional velocity: ours, w, is g + 1.
"""

from __future__ import annotations

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from flow_grpo.models.diffusers_model import DiffusersModel
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds

SIDE = 2  # of a token, in latents


class ZImage(DiffusersModel):
    """A `ModelFamily`; see there what the methods are."""

    pipeline_class, transformer_class = ZImagePipeline, ZImageTransformer2DModel

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The hidden states before the last layer, template included: (1, L, E), with L the prompt's own length."""
        (caption,), _ = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        mask = torch.ones(1, len(caption), dtype=torch.bool, device=caption.device)
        return PromptEmbeds(caption[None], mask=mask)

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

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """1, ..., 1 / num_steps in even steps, shifted by the scheduler."""
        pixels = self.pipeline.vae_scale_factor * SIDE
        even = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        return noise_levels(self.pipeline.scheduler, num_steps, (height // pixels) * (width // pixels), even)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor
