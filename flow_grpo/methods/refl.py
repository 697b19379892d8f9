"""ReFL (arXiv 2304.05977): the reward of x0_hat at one late step. Its loop is flow_grpo/loops/drtune.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method
from flow_grpo.methods.drtune import check_reward_gradient


def check(config: ConfigDict) -> None:
    """ConfigError unless sampling stops early, at a step that is executed."""
    check_reward_gradient(config)
    if config.drtune.early_stop == 0:
        raise ConfigError(
            'config.drtune.early_stop = 0 leaves config.train.method = "refl" no late step to stop at; it takes 1 to '
            f"config.sample.num_steps = {config.sample.num_steps}."
        )


def tiny(config: ConfigDict) -> None:
    """ReFL on the embedded tiny SD3: sampling stops at one of the last 4 of 10 steps, and only that one is trained.

    arXiv 2304.05977.
    Cost of an epoch, on 1 process: 40 images; 360 sampling, 40 training, 0 reference. A stop before the end saves
    what comes after it.
    """
    config.drtune.early_stop = 4


def sd35(config: ConfigDict) -> None:
    """ReFL on SD3.5-medium at 256 pixels, on one GPU: one of the last 4 of 10 steps is trained.

    arXiv 2304.05977.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 96 training, 96 reference. A stop before the end saves
    what comes after it.
    """
    config.drtune.early_stop = 4


METHOD = Method(
    "refl",
    "ReFL",
    True,
    check,
    "flow_grpo.loops.drtune:train_epoch_refl",
    tiny=tiny,
    sd35=sd35,
    unread=(*BLACK_BOX_ONLY, "drtune.num_train_steps"),
)
