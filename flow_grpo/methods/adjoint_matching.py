"""Adjoint Matching (arXiv 2409.08861): the settings it takes. Its loop is flow_grpo/loops/adjoint_matching.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method, takes_only
from flow_grpo.methods.drtune import check_reward_gradient, check_runs_to_the_end, check_trained_steps
from flow_grpo.rules import NOT_NEGATIVE, POSITIVE, Key

KEYS = (
    Key("adjoint.strength", 100.0, POSITIVE, "lambda: the target is the base model's law times exp(lambda R)"),
    Key("adjoint.largest_term", 1.6, NOT_NEGATIVE, "terms above this times lambda^2 teach nothing; 0: all teach"),
)


def check(config: ConfigDict) -> None:
    """ConfigError for another sampler, guidance, a second anchor, and what only DRTune's own chain can do."""
    check_reward_gradient(config)
    check_runs_to_the_end(config, "adjoint_matching")
    check_trained_steps(config)
    because = 'is not read by config.train.method = "adjoint_matching", which always holds one step at a time'
    takes_only(config, "drtune.two_pass", False, because)
    if config.sample.num_steps < 2:
        raise ConfigError(
            f"config.sample.num_steps = {config.sample.num_steps} draws no noise at all, which "
            'config.train.method = "adjoint_matching" needs; it takes at least 2.'
        )
    because = 'is not the sampler for which config.train.method = "adjoint_matching" holds'
    takes_only(config, "sample.sde_type", "memoryless", because)
    because = 'is not for config.train.method = "adjoint_matching", whose adjoint is that of the velocity itself'
    takes_only(config, "sample.guidance_scale", 1.0, because)
    because = 'would be a second anchor beside that of config.train.method = "adjoint_matching"'
    takes_only(config, "train.beta", 0.0, because)


def tiny(config: ConfigDict) -> None:
    """Adjoint Matching on the embedded tiny SD3: lambda = 1,000, 5 of 10 memoryless steps.

    arXiv 2409.08861. Aims at the base model's law times exp(lambda R), and noise in every step makes the way longer.
    Cost of an epoch, on 1 process: 40 images; 400 sampling, 200 training, at most 400 reference, each with a
    backward pass.
    """
    config.sample.sde_type = "memoryless"
    config.adjoint.strength = 1000.0
    config.train.learning_rate = 1e-2


def sd35(config: ConfigDict) -> None:
    """Adjoint Matching on SD3.5-medium at 256 pixels, on one GPU, without guidance: 10 of 20 memoryless steps.

    arXiv 2409.08861.
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, at most 960 reference, each with a
    backward pass.
    """
    config.sample.sde_type = "memoryless"
    config.sample.guidance_scale = config.eval.guidance_scale = 1.0
    config.drtune.two_pass = False
    config.sample.num_steps = 20
    config.drtune.num_train_steps = 10
    config.train.beta = 0.0
    config.adjoint.strength = 1000.0


METHOD = Method(
    "adjoint_matching", "Adjoint Matching", True, check, "flow_grpo.loops.adjoint_matching:train_epoch",
    needs_base=True, keys=KEYS, tiny=tiny, sd35=sd35, unread=BLACK_BOX_ONLY,
)  # fmt: skip
