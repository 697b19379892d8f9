"""Recipes on scenes: GenEval in small, on the embedded `assets/tiny_scenes` (docs/scenes.md).

Methods by rewards alone are given 0 or 1, by rule, and train on the kinds of captions of which the base model gets
about one in five right: where nearly all images of a group are right, or wrong, there is nothing to compare. Methods by
gradient are given the log-probability of being right. A method's own settings are those of its recipe on the tiny SD3,
unless it says otherwise. What to expect of each: docs/scenes.md, "How far they get".

Costs are counted as in sd3.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from flow_grpo.methods.registry import METHODS

DETECTOR, JUDGE = "assets/tiny_scenes_detector", "assets/tiny_scenes_judge"
PROMPTS = "assets/prompts/scenes"


def scenes_grpo(config: ConfigDict) -> None:
    """GRPO on scenes: `sde` steps with little noise, as more of it halves the share of right images.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 1,280 training, 0 reference.
    """
    _by_rewards(config, "grpo")
    config.sample.noise_level = 0.5
    config.train.learning_rate = 2e-3
    config.train.clip_range = 3e-4


def scenes_nft(config: ConfigDict) -> None:
    """DiffusionNFT on scenes: right images draw the velocity to themselves with full weight.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 640 training, 0 reference, 640 old.
    """
    _by_rewards(config, "nft")
    config.train.adv_clip_max = 1.0
    config.train.learning_rate = 5e-3
    config.num_epochs = 60


def scenes_awm(config: ConfigDict) -> None:
    """Advantage-weighted matching on scenes.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 640 training, 0 reference, 640 old.
    """
    _by_rewards(config, "awm")


def scenes_pepg(config: ConfigDict) -> None:
    """PEPG on scenes.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 640 training, 0 reference, 640 old.
    """
    _by_rewards(config, "pepg")


def scenes_par(config: ConfigDict) -> None:
    """PAR on scenes.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 640 training, 0 reference, 640 old.
    """
    _by_rewards(config, "par")


def scenes_fdfo(config: ConfigDict) -> None:
    """FDFO on scenes: of a reward of 0 or 1, only pairs that differ in it teach.

    Cost of an epoch, on 1 process: 160 images; 1,280 sampling, 1,280 training, 0 reference.
    """
    _by_rewards(config, "fdfo")


def scenes_drtune(config: ConfigDict) -> None:
    """DRTune on scenes: the gradient through 4 of 8 steps.

    Cost of an epoch, on 1 process: 40 images; 160 sampling, 160 training, 0 reference.
    """
    _by_gradient(config, "drtune")
    config.train.learning_rate = 2e-3


def scenes_flowbp(config: ConfigDict) -> None:
    """FlowBP-Sparse on scenes.

    Cost of an epoch, on 1 process: 40 images; 160 sampling, 160 training, 0 reference.
    """
    _by_gradient(config, "flowbp")


def scenes_flowbp_lagrange(config: ConfigDict) -> None:
    """FlowBP-Lagrange on scenes: 2 of 3 velocities trained.

    Cost of an epoch, on 1 process: 40 images; 240 sampling, 80 training, 0 reference.
    """
    _by_gradient(config, "flowbp_lagrange")


def scenes_refl(config: ConfigDict) -> None:
    """ReFL on scenes: one of the last 4 of 8 steps.

    Cost of an epoch, on 1 process: 40 images; 280 sampling, 40 training, 0 reference. A stop before the end saves what
    comes after it.
    """
    _by_gradient(config, "refl")


def scenes_draft_k(config: ConfigDict) -> None:
    """DRaFT-K on scenes: the last 2 of 8 steps, each run again in the backward pass.

    Cost of an epoch, on 1 process: 40 images; 240 sampling, 160 training, 0 reference.
    """
    _by_gradient(config, "draft_k")


def scenes_draft_lv(config: ConfigDict) -> None:
    """DRaFT-LV on scenes: the last of 8 steps, over 2 copies noised again.

    Cost of an epoch, on 1 process: 40 images; 320 sampling, 80 training, 0 reference.
    """
    _by_gradient(config, "draft_lv")


def scenes_alignprop(config: ConfigDict) -> None:
    """AlignProp on scenes: from a step on that is drawn among all 8, each run again in the backward pass.

    Cost of an epoch, on 1 process: 40 images; 140 sampling, 360 training, 0 reference.
    """
    _by_gradient(config, "alignprop")


def scenes_leapalign(config: ConfigDict) -> None:
    """LeapAlign on scenes: two leaps, each run again in the backward pass.

    Cost of an epoch, on 1 process: 40 images; 320 sampling, 160 training, 0 reference.
    """
    _by_gradient(config, "leapalign")


def scenes_anchored(config: ConfigDict) -> None:
    """The anchored gradient on scenes: lambda = 20, through 4 of 8 steps.

    Cost of an epoch, on 1 process: 40 images; 160 sampling, 160 training, 160 reference. Before the first one, 64
    base images of each of 16 prompts.
    """
    _by_gradient(config, "anchored")
    config.anchored.strength = 20.0


def scenes_adjoint_matching(config: ConfigDict) -> None:
    """Adjoint Matching on scenes: lambda = 20, 4 of 8 memoryless steps.

    Cost of an epoch, on 1 process: 40 images; 320 sampling, 160 training, at most 320 reference, each with a
    backward pass.
    """
    _by_gradient(config, "adjoint_matching")
    config.adjoint.strength = 20.0


def _by_rewards(config: ConfigDict, method: str) -> None:
    """10 groups of 16 images an epoch, four updates."""
    _scenes(config, method)
    config.reward_fn.scenes = 1.0
    config.num_epochs = 100
    config.prompts.train = f"{PROMPTS}/train_hard.jsonl"
    config.sample.groups_per_epoch = 10
    config.sample.num_image_per_prompt = 16
    config.train.updates_per_epoch = 4
    _as_tiny(config, method)


def _by_gradient(config: ConfigDict, method: str) -> None:
    """20 groups of 2 images an epoch, one update."""
    _scenes(config, method)
    config.use_reward_gradient = True
    config.reward_fn.scenes_soft = 1.0
    config.sample.sde_type = "ode"
    config.sample.groups_per_epoch = 20
    config.sample.num_image_per_prompt = 2
    config.train.updates_per_epoch = 1
    config.drtune.num_train_steps = 4
    _as_tiny(config, method)
    config.num_epochs = 120


def _as_tiny(config: ConfigDict, method: str) -> None:
    """What a method changes on the tiny SD3; the first of each family changes nothing."""
    if (changes := METHODS[method].tiny) is not None:
        config.train.method = method
        changes(config)


def _scenes(config: ConfigDict, method: str) -> None:
    """The model, its prompts, the judge, and what is measured."""
    config.pretrained.model = "assets/tiny_scenes"
    config.resolution = 64
    config.max_sequence_length = 12
    config.prompts.train = f"{PROMPTS}/train.jsonl"
    config.prompts.test = f"{PROMPTS}/test.jsonl"
    config.prompts.eval_diversity = f"{PROMPTS}/eval_diversity.jsonl"
    config.sample.prompt_sampling = "balanced"
    config.sample.prompt_category = "kind"
    config.sample.num_steps = 8
    config.eval.judge = JUDGE
    config.eval.modes = ""
    config.eval.num_steps = 8
    config.eval.num_image_per_prompt = 4
    config.eval.batch_size = 64
    config.diversity.extractor = "scenes"
    config.diversity.model = JUDGE


RECIPES = tuple(recipe for name, recipe in tuple(globals().items()) if name.startswith("scenes_"))
