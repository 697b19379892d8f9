"""FDFO (arXiv 2603.12893): the settings it takes. Its loop is flow_grpo/loops/fdfo.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import REWARD_GRADIENT_ONLY, Method, takes_only
from flow_grpo.rules import NOT_NEGATIVE, POSITIVE, Key

KEYS = (
    Key("fdfo.epsilon", 0.03, POSITIVE, "the ratio is drawn to 1 +- this, by the better and the worse of a pair"),
    Key(
        "fdfo.floor", 1e-4, NOT_NEGATIVE, "pairs are skipped whose half difference of latents has no larger mean square"
    ),
)
ONLY = {  # pairs are compared at every step, reward by reward
    "train.ratio": "sde", "train.ratio_normalization": False, "train.timestep_fraction": 1.0,
    "train.kl_space": "gaussian", "train.advantage_mode": "all", "train.advantage_std": "group",
    "sample.sde_window_size": 0,
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """ConfigError for weights of advantages, another sampler than cps, and images without a pair."""
    if config.shaping.kind == "distance":
        raise ConfigError(
            "config.shaping.kind = \"distance\" weighs advantages, which train.method = 'fdfo' has none of; it takes "
            '"cluster", "entropy", "vendi" or "density".'
        )
    sample = config.sample
    takes_only(config, "sample.sde_type", "cps", "does not branch images off one noise as train.method = 'fdfo' needs")
    if sample.noise_level == 0:
        raise ConfigError(
            f"config.sample.noise_level = {sample.noise_level} makes the two images of a pair the same, which leaves "
            "train.method = 'fdfo' nothing to compare; it takes a number above 0, at most 1."
        )
    if sample.num_steps < 2:
        raise ConfigError(
            f"config.sample.num_steps = {sample.num_steps} makes the two images of a pair the same, as the last step "
            'of cps draws no noise, which leaves train.method = "fdfo" nothing to compare; it takes at least 2.'
        )
    if sample.num_image_per_prompt % 2:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {sample.num_image_per_prompt} does not divide into pairs, which "
            f"train.method = 'fdfo' compares; it takes an even number."
        )


def tiny(config: ConfigDict) -> None:
    """FDFO on the embedded tiny SD3: pairs of images from one noise, whose difference stands in for the gradient.

    arXiv 2603.12893, on `cps` steps, every one of them trained.
    Cost of an epoch, on 1 process: 80 images; 800 sampling, 800 training, 0 reference.
    Expect, after 40 epochs: reward .510 -> .522, judge .86 -> .97, Vendi of 16 images 3.3 -> 2.6 (seed 42); the first
    ten epochs change next to nothing.
    """
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.5
    config.train.learning_rate = 3e-3


def sd35(config: ConfigDict) -> None:
    """FDFO on SD3.5-medium (arXiv 2603.12893): pairs of images from one noise, on `cps` steps of small noise.

    Cost of an epoch, on 32 processes: 1,152 images; 23,040 sampling, 23,040 training, 0 reference.
    Expect nothing in particular: not run by us.
    """
    config.sample.sde_type = "cps"
    config.sample.noise_level = 0.5
    config.train.beta = 0.0


UNREAD = (*REWARD_GRADIENT_ONLY, "train.ratio_probes", "train.clip_range", "train.adv_clip_max")
METHOD = Method("fdfo", "FDFO", False, check, "flow_grpo.loops.fdfo:train_epoch", KEYS, tiny, sd35, UNREAD, ONLY)
