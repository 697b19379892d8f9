"""The anchored gradient: the settings it takes. Its loop is flow_grpo/loops/anchored.py."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import BLACK_BOX_ONLY, Method, takes_only
from flow_grpo.methods.drtune import check_reward_gradient, check_trained_steps
from flow_grpo.rules import NOT_NEGATIVE, POSITIVE, Key, choice, number, whole

LEAST_EFFECTIVE = 5  # of a prompt's base images, on which an automatic strength may rest

KEYS = (
    Key("anchored.strength", 100.0, POSITIVE, "lambda: the target is the base model's law times exp(lambda R)"),
    Key(
        "anchored.weight",
        "kappa",
        choice("kappa", "1", "1-sigma", "(1-sigma)^2"),
        'w(sigma) of the shift lambda w G; "kappa" is exact for Gaussian data and a linear reward',
    ),
    Key("anchored.gradient_at", "image", choice("image", "step"), "where G is taken: the final image, or x0_hat"),
    Key("anchored.ramp_epochs", 0, whole(0), "lambda rises over so many epochs; 0: it is whole at once"),
    Key("anchored.largest_shift", 0.0, NOT_NEGATIVE, "root mean square to which an image's shift is cut; 0: never"),
    Key("anchored.variance", 0.0, NOT_NEGATIVE, 's2 of "kappa"; 0: measured once, on base images, and kept'),
    Key("anchored.target_kl", 0.0, NOT_NEGATIVE, "nats: lambda is that of the exact law with this KL; 0: strength"),
    Key(
        "anchored.target_diversity",
        0.0,
        number("a number from 0 to below 1", lambda x: 0 <= x < 1),
        "lambda is that of the exact law with this share of the base's Vendi score; 0: strength",
    ),
    Key("anchored.base_prompts", 16, whole(1), "prompts on whose base images all this is measured"),
    Key("anchored.base_images", 64, whole(2), "base images of each of them"),
)


def check(config: ConfigDict) -> None:
    """ConfigError for a second anchor, two ways to a strength, and a target beyond what base images can tell."""
    check_reward_gradient(config)
    check_trained_steps(config)
    anchored = config.anchored
    because = 'would be a second anchor beside that of config.train.method = "anchored"'
    takes_only(config, "train.beta", 0.0, because)
    if anchored.weight != "kappa":
        because = f'is of config.anchored.weight = "kappa", not "{anchored.weight}"'
        takes_only(config, "anchored.variance", 0.0, because)
    if anchored.target_kl and anchored.target_diversity:
        raise ConfigError(
            f"config.anchored.target_kl = {anchored.target_kl} and config.anchored.target_diversity = "
            f"{anchored.target_diversity} both choose the strength; one of them takes 0."
        )
    most = math.log(max(anchored.base_images / LEAST_EFFECTIVE, 1))
    if anchored.target_kl > most:
        raise ConfigError(
            f"config.anchored.target_kl = {anchored.target_kl} is more than config.anchored.base_images = "
            f"{anchored.base_images} can tell, log({anchored.base_images} / {LEAST_EFFECTIVE}) = {most:.2f} nats; "
            f"{math.ceil(LEAST_EFFECTIVE * math.exp(anchored.target_kl))} images would."
        )


def tiny(config: ConfigDict) -> None:
    """The anchored gradient on the embedded tiny SD3: lambda = 1,000, w = kappa, 5 of 10 steps.

    After VGG-Flow (arXiv 2512.05116). Aims at the base model's law times exp(lambda R): DRTune's speed, and more
    diversity left at each reward.
    Cost of an epoch, on 1 process: 40 images; 200 sampling, 200 training, 200 reference. Before the first one, 64
    base images of each prompt.
    """
    config.anchored.strength = 1000.0
    config.train.learning_rate = 3e-3
    config.num_epochs = 100


def sd35(config: ConfigDict) -> None:
    """The anchored gradient on SD3.5-medium at 256 pixels, on one GPU: the strength that spends half a nat, w = kappa.

    After VGG-Flow (arXiv 2512.05116).
    Cost of an epoch, on 1 process: 48 images; 960 sampling, 480 training, 480 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    config.train.beta = 0.0
    config.anchored.target_kl = 0.5
    config.train.learning_rate = 3e-4


METHOD = Method(
    "anchored", "anchored gradient", True, check, "flow_grpo.loops.anchored:train_epoch",
    needs_base=True, keys=KEYS, tiny=tiny, sd35=sd35, unread=BLACK_BOX_ONLY,
)  # fmt: skip
