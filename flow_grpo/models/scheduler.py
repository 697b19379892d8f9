"""Noise levels, from a pipeline's own scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from flow_grpo.errors import ConfigError


def noise_levels(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_steps: int,
    tokens: int,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Tensor:
    """What a scheduler gives a sampler of `num_steps` steps, for images of so many tokens: (num_steps + 1,).

    Args:
        sigmas: the `num_steps` noise levels that the family's pipeline hands it, to be shifted; None: its own.
        mu: the shift, where the scheduler says that it depends on the image; None: linear in the number of tokens.

    Raises:
        ConfigError: they do not fall from at most 1 to 0.
    """
    settings, shift = scheduler.config, {}
    if settings.get("use_dynamic_shifting"):
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift["mu"] = calculate_shift(tokens, *(settings[key] for key in keys)) if mu is None else mu
    with np.errstate(all="ignore"):  # what is no number is refused below
        scheduler.set_timesteps(num_steps, sigmas=sigmas, **shift)
    levels = scheduler.sigmas.clone()
    if not (levels[0] <= 1 and (levels.diff() < 0).all() and levels[-1] == 0):
        raise ConfigError(
            f"config.pretrained.model: the noise levels of its scheduler do not fall from 1 to 0 in {num_steps} steps: "
            f"{', '.join(f'{sigma:.3g}' for sigma in levels[:8].tolist())} ...; it takes another scheduler_config.json."
        )
    return levels
