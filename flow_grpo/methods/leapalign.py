"""LeapAlign (arXiv 2604.15311): the settings it takes. Its loop is flow_grpo/loops/leapalign.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method, takes_only
from flow_grpo.methods.drtune import check_attached
from flow_grpo.rules import POSITIVE, Key, number

KEYS = (
    Key(
        "leapalign.alpha",
        0.3,
        number("a number from 0 to 1", lambda x: 0 <= x <= 1),
        "share of the gradient that goes through the second leap's input",
    ),
    Key("leapalign.tau", 0.1, POSITIVE, "the leaps' errors, which weigh an image down, count as at least this"),
)


def check(config: ConfigDict) -> None:
    """ConfigError for what only detached steps can do, for fewer than two steps, and for steps that are no leap's."""
    check_attached(config, "leapalign")
    because = 'has no leap along the velocity, which config.train.method = "leapalign" takes'
    takes_only(config, "sample.sde_type", "ode", because)
    if config.sample.num_steps < 2:
        raise ConfigError(
            f"config.sample.num_steps = {config.sample.num_steps} has no two steps to leap from, which "
            'config.train.method = "leapalign" needs; it takes at least 2.'
        )


def tiny(config: ConfigDict) -> None:
    """LeapAlign on the embedded tiny SD3: the gradient through two leaps from two of 10 steps, drawn each time.

    arXiv 2604.15311. Each leap runs again in the backward pass, and is counted as training twice.
    Cost of an epoch, on 1 process: 40 images; 400 sampling, 160 training, 0 reference.
    """
    config.train.learning_rate = 3e-3


def sd35(config: ConfigDict) -> None:
    """LeapAlign on SD3.5-medium at 256 pixels, on one GPU: the gradient through two leaps from two of 10 steps.

    arXiv 2604.15311. Each leap runs again in the backward pass, and is counted as training twice.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 384 training, 192 reference.
    """
    config.drtune.two_pass = False


METHOD = Method(
    "leapalign",
    "LeapAlign",
    True,
    check,
    "flow_grpo.loops.leapalign:train_epoch",
    keys=KEYS,
    tiny=tiny,
    sd35=sd35,
    unread=(*BLACK_BOX_ONLY, "drtune.num_train_steps"),
)
