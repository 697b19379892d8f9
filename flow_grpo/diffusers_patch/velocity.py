"""The velocity of a guided SD3 transformer: the only classifier-free-guidance forward of the code base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flow_grpo.types import PromptEmbeds

# v(x, sigma): latents (B, C, h, w) and a noise level in (0, 1] -> velocity (B, C, h, w), at least float32
VelocityFn = Callable[[Tensor, float], Tensor]

NUM_TRAIN_TIMESTEPS = 1000  # an SD3 transformer is conditioned on 1000 sigma


def guided_velocity(
    transformer: torch.nn.Module,
    latents: Tensor,
    sigma: float,
    embeds: PromptEmbeds,
    negative_embeds: PromptEmbeds | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """v = v_uncond + w (v_cond - v_uncond), with v = dx/dsigma = e - x_0 (arXiv 2207.12598 in velocity form).

    Args:
        transformer: an `SD3Transformer2DModel`, or anything called like one.
        latents: (B, C, h, w), at noise level `sigma`.
        sigma: in (0, 1].
        embeds: conditioning of the B prompts.
        negative_embeds: conditioning of B negative prompts; not read when `guidance_scale` is 1.
        guidance_scale: w. At 1 the transformer runs once on B latents, otherwise once on 2 B.

    Returns:
        (B, C, h, w), float32, or float64 if the latents are.

    Raises:
        ValueError: guidance without negative embeddings.
    """
    if guidance_scale == 1.0:
        return _velocity(transformer, latents, sigma, embeds)
    if negative_embeds is None:
        raise ValueError(f"guidance_scale is {guidance_scale}; without negative_embeds it must be 1")
    both = PromptEmbeds.cat([negative_embeds, embeds])
    v_uncond, v_cond = _velocity(transformer, torch.cat([latents, latents]), sigma, both).chunk(2)
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def _velocity(transformer: torch.nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
    """One forward; the input takes the embeddings' dtype, the output at least float32."""
    velocity = transformer(
        hidden_states=latents.to(embeds.prompt_embeds.dtype),
        timestep=torch.full((len(latents),), sigma * NUM_TRAIN_TIMESTEPS, device=latents.device, dtype=torch.float32),
        encoder_hidden_states=embeds.prompt_embeds,
        pooled_projections=embeds.pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))
