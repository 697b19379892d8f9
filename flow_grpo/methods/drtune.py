"""DRTune (arXiv 2405.00760), and what its kin has in common: the settings they take.

Its loop is flow_grpo/loops/drtune.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method, takes_only


def check_reward_gradient(config: ConfigDict) -> None:
    """ConfigError for GRPO's own settings, and for a stop or a half of guidance that there is not."""
    takes_only(config, "train.ratio", "sde", "is for GRPO, not for config.use_reward_gradient = True")
    takes_only(config, "sample.sde_window_size", 0, "is for GRPO, not for config.use_reward_gradient = True")
    steps, early_stop = config.sample.num_steps, config.drtune.early_stop
    if early_stop > steps:
        raise ConfigError(
            f"config.drtune.early_stop = {early_stop} is more than config.sample.num_steps = {steps}; it takes 0 to "
            f"{steps}."
        )
    if config.sample.guidance_scale == 1:
        because = "has no such half to detach with config.sample.guidance_scale = 1"
        takes_only(config, "drtune.detach_unconditional", False, because)


def check_trained_steps(config: ConfigDict) -> None:
    """ConfigError for more trained steps than are sure to be executed."""
    steps, trained, early_stop = config.sample.num_steps, config.drtune.num_train_steps, config.drtune.early_stop
    certain = steps - max(early_stop - 1, 0)
    if trained > certain:
        raise ConfigError(
            f"config.drtune.num_train_steps = {trained} is more than the {certain} steps that are always executed "
            f"(num_steps = {steps}, early_stop = {early_stop}); it takes 1 to {certain}."
        )


def check_runs_to_the_end(config: ConfigDict, method: str) -> None:
    """ConfigError for a stop before the image."""
    takes_only(config, "drtune.early_stop", 0, f'is for DRTune, FlowBP-Sparse, ReFL and "anchored", not for "{method}"')


def check_attached(config: ConfigDict, method: str) -> None:
    """ConfigError for what only a detached chain can do."""
    check_reward_gradient(config)
    check_runs_to_the_end(config, method)
    because = f'needs steps whose input is detached, which config.train.method = "{method}" has not'
    takes_only(config, "drtune.two_pass", False, because)


def check(config: ConfigDict) -> None:
    """ConfigError for settings of other methods, and for more trained steps than are sure to be executed."""
    check_reward_gradient(config)
    check_trained_steps(config)


METHOD = Method("drtune", "DRTune", True, check, "flow_grpo.loops.drtune:train_epoch", unread=BLACK_BOX_ONLY)
