"""Whether the keys of config.shaping agree: the objective's kind, its gate, its encoder, and groups that are whole.

Every mistake is a ConfigError of one sentence. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from flow_grpo.batching import BatchPlan
from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import takes_only
from flow_grpo.paths import identity
from flow_grpo.recipes.base import KEYS
from flow_grpo.rewards.checks import check_checkpoint
from flow_grpo.rewards.chosen import checkpoints_in_use, checkpoints_of, trained_rewards

BONUSES, DIFFERENTIABLE = ("cluster", "entropy", "vendi", "density"), ("log_vendi", "log_rke")  # of shaping.kind
PAIRS_ARE_ALIKE = ("distance", "cluster", "entropy", "vendi")  # of two images, either is as far from the other

FEATURES = ("distance", "cluster", "entropy", "vendi", *DIFFERENTIABLE)  # compare features of images
READ_BY_KINDS = {
    "shaping.bandwidth": ("entropy", "log_rke"), "shaping.cluster_distance": ("cluster",),
    "shaping.probes": ("density",), "shaping.extractor": FEATURES, "shaping.model": FEATURES,
    "shaping.pretrained": FEATURES,
}  # fmt: skip


def check_shaping(config: ConfigDict) -> None:
    """Diversity in the objective is of the family that the run trains by, and its encoder measures nothing else."""
    shaping, kind = config.shaping, f'config.shaping.kind = "{config.shaping.kind}"'
    if shaping.kind and config.use_reward_gradient != (shaping.kind in DIFFERENTIABLE):
        kinds = DIFFERENTIABLE if config.use_reward_gradient else (*BONUSES, "distance")
        raise ConfigError(
            f"{kind} is not for config.use_reward_gradient = {config.use_reward_gradient}; it takes "
            f"{' or '.join(map(repr, kinds))}."
        )
    if bool(shaping.weight) != (shaping.kind in BONUSES + DIFFERENTIABLE):
        takes = "a number above 0" if shaping.kind in BONUSES + DIFFERENTIABLE else "0"
        raise ConfigError(f"config.shaping.weight = {shaping.weight} weighs the bonus of {kind}; it takes {takes}.")
    if shaping.kind in PAIRS_ARE_ALIKE and config.sample.num_image_per_prompt < 3:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {config.sample.num_image_per_prompt} gives the images of a group "
            f"the same bonus, by which {kind} changes nothing; it takes at least 3."
        )
    for key, readers in READ_BY_KINDS.items():
        if shaping.kind not in readers:
            takes_only(config, key, KEYS[key].default, f"is for {_either(readers)}, not for {kind}")
    if shaping.kind in FEATURES:
        _check_encoder(config)


def _either(names: Iterable[str]) -> str:
    """Such as "entropy" or "log_rke"."""
    return " or ".join(f'"{name}"' for name in names)


def check_gate(config: ConfigDict) -> None:
    """A gate has a KL divergence to gate, and rewards to go by, none of which is trained on under another name."""
    shaping, rewards = config.shaping, tuple(config.shaping.gate_rewards)
    share = f"config.shaping.gate_share = {shaping.gate_share}"
    if bool(shaping.gate_share) != bool(rewards):
        takes = "0" if shaping.gate_share else "a share above 0"
        raise ConfigError(
            f"{share} with config.shaping.gate_rewards = {rewards} is no gate; the share takes {takes}, or the rewards "
            f"{'one that is not trained on' if shaping.gate_share else '()'}."
        )
    if not rewards:
        return
    takes_only(config, "use_reward_gradient", False, f"has no rewards of whole groups to compare, as {share} does")
    if config.train.beta == 0:
        raise ConfigError(
            f"{share} chooses images for a KL divergence, which config.train.beta = 0.0 leaves out; it takes 0, or "
            "config.train.beta a number above 0."
        )
    trained = trained_rewards(config)
    models = {identity(model) for name in trained for model in checkpoints_of(config, name)}
    for name in rewards:
        if name in trained or models & set(map(identity, checkpoints_of(config, name))):
            raise ConfigError(
                f"config.shaping.gate_rewards = {rewards}: {name!r} is trained on, by config.reward_fn; it takes "
                "rewards of other models."
            )


def check_whole_groups(config: ConfigDict, plan: BatchPlan) -> None:
    """A set objective sees whole groups: every microbatch holds as many images of each as an update has."""
    size, share = plan.group_size, plan.group_size // plan.updates
    whole = size % plan.updates == 0 and share > 1 and plan.images_per_process % size == 0
    if whole and config.train.batch_size % share == 0:
        return
    if size < 2 * plan.updates:
        raise ConfigError(
            f'config.shaping.kind = "{config.shaping.kind}" needs two images of a group in every update, but '
            f"config.sample.num_image_per_prompt = {size} in {plan.updates} updates an epoch are fewer; it takes at "
            f"least {2 * plan.updates}."
        )
    takes = (
        f"config.train.batch_size = {share}, or a multiple"
        if whole
        else (
            f"config.train.updates_per_epoch = 1, with a number of groups that divides among the processes and "
            f"config.train.batch_size = {size}, or a multiple"
        )
    )
    raise ConfigError(
        f'config.shaping.kind = "{config.shaping.kind}" needs whole groups in a microbatch, but '
        f"config.train.batch_size = {config.train.batch_size} does not hold them, of groups of {size} in "
        f"{plan.updates} updates an epoch; it takes {takes}."
    )


def _check_encoder(config: ConfigDict) -> None:
    """It is given where it takes a model, whole, and none by which the run is rewarded, judged or measured."""
    extractor, model = config.shaping.extractor, config.shaping.model
    if bool(model) == (extractor == "pixels"):
        raise ConfigError(
            f'config.shaping.model = {model!r} is not for config.shaping.extractor = "{extractor}"; it takes '
            f"{'a directory or hub id' if extractor != 'pixels' else 'no model'}."
        )
    if extractor != "open_clip":
        because = f'is for "open_clip", not for config.shaping.extractor = "{extractor}"'
        takes_only(config, "shaping.pretrained", "", because)
    if extractor == "pixels":
        return
    if extractor != "open_clip":
        check_checkpoint("config.shaping.model", model)
    others = [*checkpoints_in_use(config), ("eval.judge", config.eval.judge)]
    others += [("diversity.model", config.diversity.model)] if config.eval_diversity else []
    for key, other in others:
        if other and identity(other) == identity(model):
            raise ConfigError(
                f"config.shaping.model = {model!r} is also config.{key}, by which the run is rewarded or measured; it "
                'takes another encoder, or "" with config.shaping.extractor = "pixels".'
            )
