"""GRPO (Flow-GRPO, arXiv 2505.05470): the settings it takes. Its loop is flow_grpo/loops/policy_gradient.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import REWARD_GRADIENT_ONLY, Method


def check(config: ConfigDict) -> None:
    """ConfigError for settings that leave nothing to compare, no log-probability, or a ratio that is not defined."""
    sample, train = config.sample, config.train
    if sample.sde_type == "ode":
        raise ConfigError(
            'config.sample.sde_type = "ode" has no log-probability, which GRPO needs; it takes "sde", "dance", '
            '"cps" or "memoryless", unless config.use_reward_gradient = True.'
        )
    if sample.noise_level == 0:
        raise ConfigError(
            f"config.sample.noise_level = {sample.noise_level} has no log-probability, which GRPO needs; it takes a "
            "number above 0."
        )
    if sample.num_image_per_prompt < 2:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {sample.num_image_per_prompt} leaves GRPO nothing to compare within "
            "a group; it takes at least 2."
        )
    _check_cps_window(config)
    if train.ratio_normalization and sample.sde_type == "cps":
        raise ConfigError(
            "config.train.ratio_normalization = True undoes a variance that the log-probability of "
            'config.sample.sde_type = "cps" leaves out; it takes "sde" or "dance".'
        )
    if train.ratio != "sde":
        _check_ratio(config)


def _check_ratio(config: ConfigDict) -> None:
    """What the likelihoods that are no Gaussian step cannot be combined with."""
    train, form = config.train, f'config.train.ratio = "{config.train.ratio}"'
    if train.beta > 0:
        raise ConfigError(
            f"config.train.beta = {train.beta} weighs a KL divergence of Gaussian steps, which {form} has not; it "
            "takes 0."
        )
    if train.ratio_normalization:
        raise ConfigError(
            f"config.train.ratio_normalization = True normalises the ratio of Gaussian steps, which {form} has not; "
            "it takes False."
        )
    if train.ratio == "cfm":
        if train.ratio_probes == 0:
            raise ConfigError(
                f"config.train.ratio_probes = 0 asks for an exact trace, which {form} has not; it takes at least 1 "
                "draw of noise and time."
            )
    elif config.gradient_checkpointing:
        raise ConfigError(
            f"config.gradient_checkpointing = True saves nothing with {form}, whose second derivatives keep every "
            "activation; it takes False, and config.train.batch_size = 1 needs the least memory."
        )
    if train.ratio != "ode_step" and train.timestep_fraction != 1:
        raise ConfigError(
            f"config.train.timestep_fraction = {train.timestep_fraction} chooses among steps, but {form} has one "
            "likelihood of the whole image; it takes 1."
        )


def _check_cps_window(config: ConfigDict) -> None:
    """The last step of `cps` and `memoryless` draws no noise: every window must hold another step."""
    sample = config.sample
    size = sample.sde_window_size or sample.num_steps
    end = sample.sde_window_range[1] or sample.num_steps
    if sample.sde_type in ("cps", "memoryless") and size == 1 and end == sample.num_steps:
        key = "sde_window_size" if sample.num_steps > 1 else "num_steps"
        raise ConfigError(
            f'config.sample.{key} = 1 may leave no step to train, as the last step of sde_type = "{sample.sde_type}" '
            "draws no noise; it takes at least 2."
        )


METHOD = Method(
    "grpo", "GRPO", False, check, "flow_grpo.loops.policy_gradient:train_epoch", unread=REWARD_GRADIENT_ONLY
)
