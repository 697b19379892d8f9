"""NFT, AWM, PEPG and PAR: losses at noised images. Their loop is flow_grpo/loops/forward_process.py."""

from __future__ import annotations

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import REWARD_GRADIENT_ONLY, Method, takes_only
from flow_grpo.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Key, choice, whole

LOOP = "flow_grpo.loops.forward_process:train_epoch"
KEYS = (
    Key("forward.draws", 4, whole(1, 1000), "points (noise, time) of each image in each pass; times are stratified"),
    Key(
        "forward.weight",
        "1",
        choice("1", "t", "adaptive"),
        'w(t) of |v - (e - x_0)|^2: "1", "t", or "adaptive": the error of x_0_hat over its detached size',
    ),
    Key(
        "forward.old",
        "snapshot",
        choice("snapshot", "ema"),
        'the old weights: those of the epoch\'s start, or their "ema" over epochs, which then samples the images',
    ),
    Key("forward.old_decay", 0.5, BELOW_ONE, 'of "ema": after each epoch, old <- decay old + (1 - decay) current'),
    Key(
        "forward.old_decay_ramp",
        0.0,
        NOT_NEGATIVE,
        'of "ema": the decay of epoch e is min(this * e, old_decay), e from 0; 0: always old_decay',
    ),
    Key(
        "forward.rollout",
        "",
        choice("", "bf16"),
        '"bf16": autocast of the network while it samples, steps in float32; empty: as mixed_precision has it',
    ),
    Key("forward.eta", 0.0, NOT_NEGATIVE, "weight of |v - v_old|^2, which holds to the old weights"),
    Key("forward.beta", 1.0, POSITIVE, "NFT: v_plus/minus = v_old +- beta (v - v_old)"),
    Key("forward.strength", 1.0, POSITIVE, "PEPG, PAR: lambda of the target p_old exp(lambda A)"),
)


def check(config: ConfigDict) -> None:
    """ConfigError for single images, windows without stochastic steps, decays of nothing."""
    sample, forward = config.sample, config.forward
    if sample.num_image_per_prompt < 2:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {sample.num_image_per_prompt} leaves nothing to compare within a "
            "group; it takes at least 2."
        )
    if sample.sde_type == "ode" and sample.sde_window_size:
        raise ConfigError(
            f"config.sample.sde_window_size = {sample.sde_window_size} has no stochastic steps to choose from with "
            'config.sample.sde_type = "ode"; it takes 0.'
        )
    if forward.old == "snapshot":
        for key in ("old_decay", "old_decay_ramp"):
            because = 'is of averaged old weights, not of config.forward.old = "snapshot"'
            takes_only(config, f"forward.{key}", default(f"forward.{key}"), because)


def keeps_old(config: ConfigDict | FrozenConfigDict) -> bool:
    """Whether old weights go on from one epoch to the next, and into checkpoints: as an average of these methods."""
    return config.train.method in [method.name for method in METHODS] and config.forward.old == "ema"


def default(key: str) -> object:
    """Of one of the keys here."""
    return next(k.default for k in KEYS if k.name == key)


def _on_tiny(config: ConfigDict) -> None:
    """Images of the ODE; a regression bears a larger step than GRPO's ratio does."""
    config.sample.sde_type = "ode"
    config.train.learning_rate = 3e-3


def _on_sd35(config: ConfigDict) -> None:
    """Images of the ODE without guidance: the velocity that is regressed is the conditional one."""
    config.sample.sde_type = "ode"
    config.sample.guidance_scale = config.eval.guidance_scale = 1.0
    config.train.beta = 0.0


def tiny_nft(config: ConfigDict) -> None:
    """DiffusionNFT on the embedded tiny SD3: each image draws the velocity to itself or pushes it away, by its reward.

    arXiv 2509.16117, with averaged old weights that make the images.
    Cost of an epoch, on 1 process: 80 images; 800 sampling, 320 training, 0 reference, 320 old.
    Expect, after 40 epochs: reward .510 -> .522, judge .86 -> .97, Vendi of 16 images 3.3 -> 2.7 (seed 42).
    """
    _on_tiny(config)
    config.train.advantage_std = "batch"
    config.forward.old = "ema"
    config.forward.weight = "adaptive"


def sd35_nft(config: ConfigDict) -> None:
    """DiffusionNFT on SD3.5-medium without guidance (arXiv 2509.16117): old weights that follow less and less closely.

    Cost of an epoch, on 32 processes: 1,152 images; 11,520 sampling, 4,608 training, 4,608 reference, 4,608 old.
    Expect nothing in particular: not run by us.
    """
    _on_sd35(config)
    config.train.advantage_std = "batch"
    config.train.beta = 1e-4
    config.forward.old = "ema"
    config.forward.old_decay_ramp = 1e-3
    config.forward.weight = "adaptive"


def tiny_awm(config: ConfigDict) -> None:
    """Advantage-weighted matching on the embedded tiny SD3: flow matching on the images, weighted by their advantage.

    arXiv 2509.25050, under PPO's clip, which ends the pull of negative weights.
    Cost of an epoch, on 1 process: 80 images; 800 sampling, 320 training, 0 reference, 320 old.
    Expect, after 40 epochs: reward .510 -> .523, judge .86 -> .96, Vendi of 16 images 3.3 -> 2.1 (seed 42).
    """
    _on_tiny(config)


def sd35_awm(config: ConfigDict) -> None:
    """Advantage-weighted matching on SD3.5-medium without guidance (arXiv 2509.25050), held to averaged old weights.

    Cost of an epoch, on 32 processes: 1,152 images; 11,520 sampling, 4,608 training, 0 reference, 4,608 old.
    Expect nothing in particular: not run by us.
    """
    _on_sd35(config)
    config.train.clip_range = 1e-3
    config.forward.old = "ema"
    config.forward.eta = 0.1


def tiny_pepg(config: ConfigDict) -> None:
    """PEPG on the embedded tiny SD3: a policy gradient at noised images that comes to rest at the tilted law.

    arXiv 2602.04663. The law is that of -w |v - (e - x_0)|^2 per latent dimension, tilted anew in every epoch.
    Cost of an epoch, on 1 process: 80 images; 800 sampling, 320 training, 0 reference, 320 old.
    Expect, after 40 epochs: reward .510 -> .527, judge .86 -> .99, Vendi of 16 images 3.3 -> 1.5 (seed 42).
    """
    _on_tiny(config)
    _tilted(config)


def sd35_pepg(config: ConfigDict) -> None:
    """PEPG on SD3.5-medium without guidance (arXiv 2602.04663).

    Cost of an epoch, on 32 processes: 1,152 images; 11,520 sampling, 4,608 training, 0 reference, 4,608 old.
    Expect nothing in particular: not run by us.
    """
    _on_sd35(config)
    _tilted(config)


def tiny_par(config: ConfigDict) -> None:
    """PAR on the embedded tiny SD3: PEPG by regression of the log-ratio on the advantage (arXiv 2602.04663).

    Cost of an epoch, on 1 process: 80 images; 800 sampling, 320 training, 0 reference, 320 old.
    Expect what `tiny_pepg` gives: the two losses have the same gradient, and PAR's says how far the target is.
    """
    tiny_pepg(config)


def sd35_par(config: ConfigDict) -> None:
    """PAR on SD3.5-medium without guidance (arXiv 2602.04663): PEPG by regression of the log-ratio on the advantage.

    Cost of an epoch, on 32 processes: 1,152 images; 11,520 sampling, 4,608 training, 0 reference, 4,608 old.
    Expect nothing in particular: not run by us.
    """
    sd35_pepg(config)


def _tilted(config: ConfigDict) -> None:
    """Rewards as they are, for the tilt is of them; the strength is per latent dimension."""
    config.train.advantage_std = "none"
    config.forward.weight = "adaptive"
    config.forward.strength = 10.0


UNREAD = (*REWARD_GRADIENT_ONLY, "train.ratio_probes", "train.max_ratio_error")
NO_RATIO = (*UNREAD, "train.clip_range")  # AWM's is clipped
NO_STEPS = {  # there is no likelihood of the sampler's steps
    "train.ratio": "sde", "train.ratio_normalization": False, "train.timestep_fraction": 1.0,
    "train.kl_space": "gaussian",
}  # fmt: skip
NO_BETA, NO_STRENGTH = ({key: default(key)} for key in ("forward.beta", "forward.strength"))
NFT = Method("nft", "DiffusionNFT", False, check, LOOP, KEYS, tiny_nft, sd35_nft, NO_RATIO, NO_STEPS | NO_STRENGTH)
AWM = Method("awm", "AWM", False, check, LOOP, KEYS, tiny_awm, sd35_awm, UNREAD, NO_STEPS | NO_STRENGTH | NO_BETA)
PEPG = Method("pepg", "PEPG", False, check, LOOP, KEYS, tiny_pepg, sd35_pepg, NO_RATIO, NO_STEPS | NO_BETA)
PAR = Method("par", "PAR", False, check, LOOP, KEYS, tiny_par, sd35_par, NO_RATIO, NO_STEPS | NO_BETA)
METHODS = (NFT, AWM, PEPG, PAR)
