"""The velocity under classifier-free guidance, the only such forward of the code base; and two velocities blended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flow_grpo.types import PromptEmbeds

# v(x, sigma): latents (B, C, h, w) and a noise level in (0, 1] -> velocity (B, C, h, w), at least float32
VelocityFn = Callable[[Tensor, float], Tensor]
# one forward of a network: latents, noise level, conditioning of as many prompts -> velocity, at least float32
Network = Callable[[Tensor, float, PromptEmbeds], Tensor]
# how a family combines the two velocities of a guided forward: unconditional, conditional, scale -> velocity
Guide = Callable[[Tensor, Tensor, float], Tensor]


def linear_guidance(v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
    """v = v_uncond + w (v_cond - v_uncond), with v = dx/dsigma = e - x_0 (arXiv 2207.12598 in velocity form)."""
    return v_uncond + scale * (v_cond - v_uncond)


def guided_velocity(
    network: Network,
    latents: Tensor,
    sigma: float,
    embeds: PromptEmbeds,
    negative_embeds: PromptEmbeds | None = None,
    guidance_scale: float = 1.0,
    detach_unconditional: bool = False,
    guide: Guide = linear_guidance,
) -> Tensor:
    """The velocity of a network under classifier-free guidance.

    Args:
        network: a `ModelFamily.velocity` with its transformer.
        latents: (B, C, h, w), at noise level `sigma`.
        sigma: in (0, 1].
        embeds: conditioning of the B prompts.
        negative_embeds: conditioning of B negative prompts; not read when `guidance_scale` is 1.
        guidance_scale: w. At 1 the network runs once on B latents, otherwise once on 2 B.
        detach_unconditional: v_uncond carries no gradient; the network runs twice on B latents then.
        guide: how the two velocities become one; families differ in it.

    Returns:
        (B, C, h, w), float32, or float64 if the latents are.

    Raises:
        ValueError: guidance without negative embeddings.
    """
    if guidance_scale == 1.0:
        return network(latents, sigma, embeds)
    if negative_embeds is None:
        raise ValueError(f"guidance_scale is {guidance_scale}; without negative_embeds it must be 1")
    if detach_unconditional:
        with torch.no_grad():
            v_uncond = network(latents, sigma, negative_embeds)
        return guide(v_uncond, network(latents, sigma, embeds), guidance_scale)
    both = PromptEmbeds.cat([negative_embeds, embeds])
    v_uncond, v_cond = network(torch.cat([latents, latents]), sigma, both).chunk(2)
    return guide(v_uncond, v_cond, guidance_scale)


def blended_velocity(tuned: VelocityFn, base: VelocityFn, noisy: float, clean: float) -> VelocityFn:
    """v = gamma v_tuned + (1 - gamma) v_base, gamma = noisy at sigma = 1, clean at sigma = 0, and linear between.

    Where gamma is 1 or 0, the other of the two is not evaluated; always 1: what is returned is `tuned` itself.
    """
    if noisy == clean == 1:
        return tuned

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        gamma = sigma * noisy + (1 - sigma) * clean
        if gamma in (0, 1):
            return (tuned if gamma else base)(latents, sigma)
        return gamma * tuned(latents, sigma) + (1 - gamma) * base(latents, sigma)

    return velocity
