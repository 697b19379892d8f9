"""Which rewards a configuration uses, registered and one's own, and what they load. Torch is not imported."""

from __future__ import annotations

import os
from operator import attrgetter
from typing import Any

from flow_grpo.paths import find, identity
from flow_grpo.rewards import own_files
from flow_grpo.rewards.registry import CHAT, REWARDS, RewardSpec


def reward_weights(config: Any) -> dict[str, float]:
    """The non-zero weights of `config.reward_fn`, in its order."""
    return {name: float(weight) for name, weight in config.reward_fn.items() if weight != 0}


def constraint_rates(config: Any) -> dict[str, float]:
    """The rates of `config.reward_constraint` that are not 0: rewards that are held at the base model's level."""
    return {name: float(rate) for name, rate in config.reward_constraint.items() if rate != 0}


def trained_rewards(config: Any) -> tuple[str, ...]:
    """The rewards that the objective is made of, each once: those with a weight, then those that are constraints."""
    return tuple(dict.fromkeys([*reward_weights(config), *constraint_rates(config)]))


def reward_names(config: Any) -> tuple[str, ...]:
    """The rewards in use, each once: those trained on, then those of the gate and of `config.eval.rewards`."""
    return tuple(dict.fromkeys([*trained_rewards(config), *config.shaping.gate_rewards, *config.eval.rewards]))


# --- one's own, and the checkpoints of those that have some ----------------------------------------------


def known_rewards(config: Any) -> dict[str, RewardSpec]:
    """The registered rewards, and those of `config.reward_files`, whose gradient is not known before they load."""
    return REWARDS | {name: OWN for name in config.reward_files if name not in REWARDS}


OWN = RewardSpec("", True, "somebody's own", "")  # of whose code nothing is known; a gradient is looked for


def is_own(config: Any, name: str) -> bool:
    """Whether a reward is one of `config.reward_files`."""
    return name not in REWARDS and name in config.reward_files


def find_announced(config: Any) -> None:
    """Add to `config.reward_files` those rewards in use that nothing else knows, and an installed package announces."""
    for name in reward_names(config):
        if name not in known_rewards(config) and name in own_files.announced():
            config.reward_files[name] = own_files.announced()[name]


def split_models(text: str) -> tuple[str, ...]:
    """The checkpoints that a `config.reward_model.NAME` names, "A" or "A, B": (A,) or (A, B)."""
    if "," not in text or os.path.lexists(find(text)):
        return (text,)
    return tuple(part.strip() for part in text.split(","))


def checkpoints_of(config: Any, name: str) -> tuple[str, ...]:
    """The checkpoints of one reward; none of a reward that has none."""
    if is_own(config, name) or known_rewards(config)[name].scorer is None:
        return ()
    return split_models(config.reward_model[name])


def checkpoints_in_use(config: Any) -> list[tuple[str, str]]:
    """(key, checkpoint) of every checkpoint that the rewards in use load."""
    return [(f"reward_model.{n}", model) for n in reward_names(config) for model in checkpoints_of(config, n)]


def trained_models(config: Any) -> set[str]:
    """The checkpoints of the rewards that training sees, as `identity` has them: those trained on, and of the gate."""
    names = (*trained_rewards(config), *config.shaping.gate_rewards)
    return {identity(model) for name in names for model in checkpoints_of(config, name)}


# Of a reward with groups of settings, those that decide its scores.
SETTLING = {CHAT: ("chat.model", "chat.question", "chat.answer", "chat.scale")}


def version_of(config: Any, name: str) -> str | None:
    """What decides a reward's scores beside its name: checkpoints, settings or a digest of its code; None: nothing."""
    if is_own(config, name):
        return own_files.digest(config.reward_files[name])
    if options := SETTLING.get(name, REWARDS[name].options if name in REWARDS else ()):
        return " ".join(str(attrgetter(option)(config)) for option in options)
    models = config.reward_model.get(name)
    return f"{config.reward_ensemble} of {models}" if models and len(split_models(models)) > 1 else models
