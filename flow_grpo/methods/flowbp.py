"""FlowBP (arXiv 2606.11075): the settings of its two forms. Their loop is flow_grpo/loops/drtune.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method, takes_only
from flow_grpo.methods.drtune import check, check_reward_gradient, check_runs_to_the_end
from flow_grpo.rules import Key, number, whole

KEYS = (
    Key(
        "flowbp.bias",
        1.0,
        number("a number from 0 to 50", lambda x: 0 <= x <= 50),
        "step i is drawn with a weight of (i + 1)^bias; 0: all alike",
    ),
    Key(
        "flowbp.gain",
        0.5,
        number("a number from 0 to 1", lambda x: 0 <= x <= 1),
        "FlowBP-Sparse: how far the trained steps stand for those that are not; 1: for all",
    ),
    Key("flowbp.num_supports", 3, whole(1), "FlowBP-Lagrange: steps through whose velocities the leap is drawn"),
)


def check_lagrange(config: ConfigDict) -> None:
    """ConfigError for supports that are not there, more trained than there are, and steps that are no leap's."""
    check_reward_gradient(config)
    check_runs_to_the_end(config, "flowbp_lagrange")
    because = 'has no leap along the velocity, which config.train.method = "flowbp_lagrange" takes'
    takes_only(config, "sample.sde_type", "ode", because)
    steps, supports, trained = config.sample.num_steps, config.flowbp.num_supports, config.drtune.num_train_steps
    if supports > steps:
        raise ConfigError(
            f"config.flowbp.num_supports = {supports} is more than config.sample.num_steps = {steps}; it takes 1 to "
            f"{steps}."
        )
    if trained > supports:
        raise ConfigError(
            f"config.drtune.num_train_steps = {trained} is more than config.flowbp.num_supports = {supports}; it takes "
            f"1 to {supports}."
        )


def tiny(config: ConfigDict) -> None:
    """FlowBP-Sparse on the embedded tiny SD3: 5 of 10 steps, late ones more often, stand for half of the others too.

    arXiv 2606.11075. DRTune with steps drawn freely and a larger gradient, which AdamW levels: expect DRTune's course.
    Cost of an epoch, on 1 process: 40 images; 200 sampling, 200 training, 0 reference.
    """


def sd35(config: ConfigDict) -> None:
    """FlowBP-Sparse on SD3.5-medium at 256 pixels, on one GPU: 5 of 10 steps, guided without its unconditional half.

    arXiv 2606.11075.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference.
    """
    config.drtune.detach_unconditional = True


def tiny_lagrange(config: ConfigDict) -> None:
    """FlowBP-Lagrange on the embedded tiny SD3: a leap through 3 of 10 velocities, of which 2 are trained.

    arXiv 2606.11075.
    Cost of an epoch, on 1 process: 40 images; 320 sampling, 80 training, 0 reference.
    """
    config.drtune.num_train_steps = 2


def sd35_lagrange(config: ConfigDict) -> None:
    """FlowBP-Lagrange on SD3.5-medium at 256 pixels, on one GPU: a leap through 3 velocities, of which 2 are trained.

    arXiv 2606.11075.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 192 training, 192 reference.
    """
    config.drtune.num_train_steps = 2
    config.drtune.detach_unconditional = True


SPARSE = Method(
    "flowbp", "FlowBP-Sparse", True, check, "flow_grpo.loops.drtune:train_epoch_flowbp",
    keys=KEYS, tiny=tiny, sd35=sd35, unread=(*BLACK_BOX_ONLY, "flowbp.num_supports"),
)  # fmt: skip
LAGRANGE = Method(
    "flowbp_lagrange", "FlowBP-Lagrange", True, check_lagrange, "flow_grpo.loops.drtune:train_epoch_flowbp_lagrange",
    keys=KEYS, tiny=tiny_lagrange, sd35=sd35_lagrange, unread=(*BLACK_BOX_ONLY, "flowbp.gain"),
)  # fmt: skip
