"""What is wrong with the rewards of a configuration, told before anything loads. Torch is not imported."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.paths import find
from flow_grpo.rewards.registry import REWARDS, RewardSpec, reward_names, reward_weights


def validate_rewards(config: Any) -> None:
    """Raise ConfigError for rewards that cannot be built or trained on. Reads the file system, loads nothing."""
    _check_weights(config.reward_fn)
    measured = {"eval.rewards": config.eval.rewards, "shaping.gate_rewards": config.shaping.gate_rewards}
    for key, names in measured.items():
        for name in names:
            _check_name(f"config.{key} = {tuple(names)}: {name!r}", name)
    if config.use_reward_gradient:
        _check_differentiable(reward_weights(config))
    for name in reward_names(config):
        _check_packages(REWARDS[name])
        if REWARDS[name].scorer is not None:
            check_checkpoint(f"config.reward_model.{name}", config.reward_model.get(name, ""))
    if config.eval.judge:
        check_checkpoint("config.eval.judge", config.eval.judge)


def check_checkpoint(key: str, checkpoint: str) -> None:
    """Raise ConfigError unless `checkpoint` is a directory or may be a hub id, which has the form "org/name".

    It is taken for a directory if it has another form, or if its first component is "assets" or exists.
    """
    if not checkpoint:
        raise ConfigError(f"{key} is empty; it takes the directory or hub id (org/name) of a checkpoint.")
    first = checkpoint.split("/")[0]
    local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1
    local = local or first == "assets" or os.path.exists(first)
    if local and not os.path.isdir(find(checkpoint)):
        raise ConfigError(
            f"{key} = {checkpoint!r} is not a directory; it takes the directory or hub id (org/name) of a checkpoint."
        )


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        _check_name(f"config.reward_fn.{name}", name)
        if not math.isfinite(weight):
            raise ConfigError(f"config.reward_fn.{name} = {weight} is not a weight; it takes a finite number.")
    if not any(weights.values()):
        raise ConfigError(
            f"config.reward_fn has no weight other than 0; give one to any of {_listed(REWARDS)}, "
            "as in --config.reward_fn.pickscore=1."
        )


def _check_name(subject: str, name: str) -> None:
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{subject} is not a reward; the nearest is {nearest} (there are {_listed(REWARDS)}).")


def _check_packages(spec: RewardSpec) -> None:
    missing = [package for package in spec.packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"config.reward_fn.{spec.name} needs {' and '.join(missing)}, which is not installed; "
            f"pip install 'flow-matching-entropy[{spec.extra}]' installs it."
        )


def _check_differentiable(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not REWARDS[name].differentiable:
            differentiable = _listed([spec.name for spec in REWARDS.values() if spec.differentiable])
            raise ConfigError(
                f"config.reward_fn.{name} = {weight} has no gradient, which config.use_reward_gradient = True needs; "
                f"the differentiable rewards are {differentiable}."
            )


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
