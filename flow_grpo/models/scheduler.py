"""Noise levels, from a pipeline's own scheduler."""

from __future__ import annotations

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from flow_grpo.errors import ConfigError


def noise_levels(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    tokens: int,
    *,
    mu: float | None = None,
    evenly: bool = False,
) -> Tensor:
    """What a scheduler gives a sampler of `num_steps` steps, for images of so many tokens: (num_steps + 1,).

    Args:
        scheduler: a pipeline's.
        num_steps: n.
        tokens: of one image.
        mu: the shift, where the scheduler's settings say that it depends on the image; None: linear in the tokens.
        evenly: what is shifted are the levels 1, (n - 1) / n, ..., 1 / n, not those of the scheduler.

    Raises:
        ConfigError: they do not fall from at most 1 to 0.
    """
    settings, given = scheduler.config, {}
    if settings.get("use_dynamic_shifting"):
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        given["mu"] = calculate_shift(tokens, *(settings[key] for key in keys)) if mu is None else mu
    if evenly:
        given["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    with np.errstate(all="ignore"):  # what is no number is refused below
        scheduler.set_timesteps(num_steps, **given)
    sigmas = scheduler.sigmas.clone()
    if not (sigmas[0] <= 1 and (sigmas.diff() < 0).all() and sigmas[-1] == 0):
        raise ConfigError(
            f"config.pretrained.model: the noise levels of its scheduler do not fall from 1 to 0 in {num_steps} steps: "
            f"{', '.join(f'{sigma:.3g}' for sigma in sigmas[:8].tolist())} ...; it takes another scheduler_config.json."
        )
    return sigmas
