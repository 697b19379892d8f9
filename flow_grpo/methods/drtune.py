"""DRTune (arXiv 2405.00760): the settings it takes. Its loop is flow_grpo/loops/reward_gradient.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import Method


def check(config: ConfigDict) -> None:
    """ConfigError for GRPO's own settings, and for more trained steps than are sure to be executed."""
    if config.train.ratio != "sde":
        raise ConfigError(
            f'config.train.ratio = "{config.train.ratio}" is for GRPO; with config.use_reward_gradient = True it takes '
            '"sde".'
        )
    steps, trained, early_stop = config.sample.num_steps, config.drtune.num_train_steps, config.drtune.early_stop
    if early_stop > steps:
        raise ConfigError(
            f"config.drtune.early_stop = {early_stop} is more than config.sample.num_steps = {steps}; it takes 0 to "
            f"{steps}."
        )
    if config.sample.sde_window_size:
        raise ConfigError(
            f"config.sample.sde_window_size = {config.sample.sde_window_size} is for GRPO; with "
            "config.use_reward_gradient = True it takes 0."
        )
    certain = steps - max(early_stop - 1, 0)
    if trained > certain:
        raise ConfigError(
            f"config.drtune.num_train_steps = {trained} is more than the {certain} steps that are always executed "
            f"(num_steps = {steps}, early_stop = {early_stop}); it takes 1 to {certain}."
        )


METHOD = Method("drtune", "DRTune", True, check, "flow_grpo.loops.reward_gradient:train_epoch")
