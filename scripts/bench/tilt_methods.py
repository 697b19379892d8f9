"""What is trained on the problems of tilt.py: a method is one entry, what its configuration changes and how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flow_grpo.methods.registry import METHODS

COMMON: Mapping[str, Any] = {
    "use_lora": False,
    "reward_fn.pickscore": 1.0,  # some reward must be named: the problem's own takes its place
    "trackers": (),
    "eval_diversity": False,
    "sample.num_steps": 20,
    "sample.groups_per_epoch": 4,
    "sample.num_image_per_prompt": 64,
    "sample.batch_size": 256,
    "train.batch_size": 256,
    "train.updates_per_epoch": 1,
    "train.adam_weight_decay": 0.0,
    "train.ema": False,
}


BASE, EXACT, DISCRETE = REFERENCES = (
    "base model",
    "exact sample",
    "exact velocity",
)  # rows of what nothing is trained for
AT_LEVEL, AT_END = "level", "end"  # the two comparisons: at equal reward, and with the law of the method's own lambda
STRENGTH = 1.0  # lambda of the law that methods with a lambda are meant to reach


@dataclass(frozen=True)
class Entry:
    """How a method is trained.

    `strength` is the lambda of the law that it is meant to reach; None: it maximises the reward, and training ends at
    the level.
    """

    method: str  # as config.train.method has it
    epochs: int  # at most
    changes: Mapping[str, Any] = field(default_factory=dict)
    strength: float | None = None


GRPO = {"train.learning_rate": 3e-4, "train.clip_range": 0.01}
FORWARD = {"sample.sde_type": "ode", "train.learning_rate": 3e-4}
TILTED = {**FORWARD, "train.advantage_std": "none", "forward.weight": "adaptive"}  # anew in every epoch, not the base
GRADIENT = {"sample.sde_type": "ode", "train.learning_rate": 3e-4}
TARGET = {  # of methods with a lambda: every step is trained, and averaged weights are measured
    "train.learning_rate": 3e-3, "train.ema": True, "train.ema_decay": 0.99, "drtune.num_train_steps": 20,
}  # fmt: skip
ANCHORED = {**TARGET, "sample.sde_type": "ode", "anchored.strength": STRENGTH, "anchored.base_images": 1000}
ADJOINT = {
    **TARGET, "sample.sde_type": "memoryless", "adjoint.strength": STRENGTH,
    "adjoint.largest_term": 0.0,  # of a lambda of 1, the terms near the noise are above any such bound at first
}  # fmt: skip

ENTRIES: Mapping[str, Entry] = {
    "GRPO": Entry("grpo", 200, GRPO),
    "GRPO, KL": Entry("grpo", 200, {**GRPO, "train.beta": 0.1}),
    "GRPO, positive": Entry("grpo", 200, {**GRPO, "train.advantage_mode": "positive"}),
    "GRPO, negative": Entry("grpo", 200, {**GRPO, "train.advantage_mode": "negative"}),
    "DiffusionNFT": Entry(
        "nft",
        300,
        {**FORWARD, "train.advantage_std": "batch", "forward.old": "ema", "forward.weight": "adaptive"},
    ),
    "AWM": Entry("awm", 300, FORWARD),
    "PEPG": Entry("pepg", 300, TILTED),
    "PAR": Entry("par", 300, TILTED),
    "FDFO": Entry("fdfo", 300, {"sample.sde_type": "cps", "sample.noise_level": 0.5, "train.learning_rate": 3e-4}),
    "DRTune": Entry("drtune", 200, GRADIENT),
    "DRTune, KL": Entry("drtune", 200, {**GRADIENT, "train.beta": 0.1}),
    "FlowBP-Sparse": Entry("flowbp", 200, GRADIENT),
    "FlowBP-Lagrange": Entry("flowbp_lagrange", 200, {**GRADIENT, "drtune.num_train_steps": 2}),
    "ReFL": Entry("refl", 200, {**GRADIENT, "drtune.early_stop": 5}),
    "DRaFT-K": Entry("draft_k", 200, {**GRADIENT, "drtune.num_train_steps": 2}),
    "DRaFT-LV": Entry("draft_lv", 200, GRADIENT),
    "AlignProp": Entry("alignprop", 200, GRADIENT),
    "LeapAlign": Entry("leapalign", 200, GRADIENT),
    "anchored, kappa": Entry("anchored", 400, {**ANCHORED, "anchored.weight": "kappa"}, STRENGTH),
    "anchored, 1": Entry("anchored", 400, {**ANCHORED, "anchored.weight": "1"}, STRENGTH),
    "anchored, 1 - sigma": Entry("anchored", 400, {**ANCHORED, "anchored.weight": "1-sigma"}, STRENGTH),
    "anchored, (1 - sigma)^2": Entry("anchored", 400, {**ANCHORED, "anchored.weight": "(1-sigma)^2"}, STRENGTH),
    "Adjoint Matching": Entry("adjoint_matching", 600, ADJOINT, STRENGTH),
}


def changes_of(entry: Entry, seed: int) -> dict[str, Any]:
    """Everything that differs from the defaults, by the names of the keys."""
    own = {
        "train.method": entry.method,
        "use_reward_gradient": METHODS[entry.method].reward_gradient,
        "seed": seed,
        "num_epochs": entry.epochs,
    }
    return {**COMMON, **own, **entry.changes}
