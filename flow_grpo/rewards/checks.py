"""What is wrong with the rewards of a configuration, told before anything loads. Torch is not imported."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

from flow_grpo import places
from flow_grpo.errors import ConfigError
from flow_grpo.paths import find
from flow_grpo.places import check_packages
from flow_grpo.rewards.chosen import (
    checkpoints_of,
    constraint_rates,
    is_own,
    known_rewards,
    reward_names,
    reward_weights,
    trained_rewards,
)
from flow_grpo.rewards.own_files import NAME, RESERVED, announced, check_place, is_server
from flow_grpo.rewards.registry import CHAT, READ_CAPTION, REWARDS, RewardSpec
from flow_grpo.scenes.files import RESOLUTION, is_detector


def validate_rewards(config: Any) -> None:
    """Raise ConfigError for rewards that cannot be built or trained on. Reads the file system, loads nothing."""
    _check_own_names(config.reward_files)
    _check_weights(config.reward_fn, known_rewards(config))
    _check_names(config)
    if config.use_reward_gradient:
        _check_differentiable(config)
    for name in reward_names(config):
        _check_source(config, name)
    _check_ensemble(config)
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


def _check_names(config: Any) -> None:
    """Of the rewards in use that have no weight."""
    known = known_rewards(config)
    for name in constraint_rates(config):
        _check_name(f"config.reward_constraint.{name}", name, known)
    for name, bounds in config.reward_range.items():
        subject = f"config.reward_range.{name} = {tuple(bounds)}"
        _check_name(subject, name, known)
        if not is_own(config, name) and name != CHAT:
            raise ConfigError(f"{subject} is not read; it takes rewards of your own, served ones and {CHAT}.")
        if tuple(bounds) != tuple(sorted(bounds)):
            raise ConfigError(f"{subject} is no range; it takes the lowest score, then the highest.")
    measured = {"eval.rewards": config.eval.rewards, "shaping.gate_rewards": config.shaping.gate_rewards}
    for key, names in measured.items():
        for name in names:
            _check_name(f"config.{key} = {tuple(names)}: {name!r}", name, known)


def _check_source(config: Any, name: str) -> None:
    """The code of one's own reward, or the packages and checkpoints of a registered one."""
    if is_own(config, name) and is_server(config.reward_files[name]):
        check_address(f"config.reward_files.{name}", config.reward_files[name])
        check_packages(f"config.reward_files.{name}", REWARDS[CHAT].packages, REWARDS[CHAT].extra)  # asked likewise
        return
    if is_own(config, name):
        check_place(name, config.reward_files[name])
        return
    check_packages(f"config.reward_fn.{name}", REWARDS[name].packages, REWARDS[name].extra)
    if name == CHAT:
        check_address("config.chat.url", config.chat.url)
        check_question(config.chat.question)
    for model in checkpoints_of(config, name):
        check_checkpoint(f"config.reward_model.{name}", model)


def check_readable(config: Any, group: str, prompts: Iterable[str]) -> None:
    """ConfigError unless every reward in use, and the judge of those of "test", can read the prompts of a group."""
    readers = {n: REWARDS[n].reads for n in reward_names(config) if not is_own(config, n) and REWARDS[n].reads}
    if is_detector(config.eval.judge) and group == "test":
        readers["eval.judge"] = READ_CAPTION
    for name, place in readers.items():
        read = places.load(place)
        for number, prompt in enumerate(prompts, start=1):
            try:
                read(prompt, config)
            except (ConfigError, ValueError) as error:
                given = f"config.prompts.{group} = {config.prompts[group]!r}, prompt {number}, is not for {name}"
                raise ConfigError(f"{given}: {str(error).rstrip('.')}.") from None


def check_sides(config: Any, height: int, width: int) -> None:
    """ConfigError where a reward, the judge or the features take scenes, whose size is one, and images have another."""
    sides = {f"reward_fn.{n}": REWARDS[n].side for n in reward_names(config) if not is_own(config, n)}
    sides["eval.judge"] = RESOLUTION if is_detector(config.eval.judge) else 0
    sides["diversity.extractor"] = RESOLUTION if config.diversity.extractor == "scenes" else 0
    for key, side in sides.items():
        if side and (height, width) != (side, side):
            raise ConfigError(
                f"config.resolution = {config.resolution} makes images of {height} x {width} pixels, but config.{key} "
                f"takes {side} x {side}."
            )


def check_address(key: str, url: str) -> None:
    """ConfigError unless `url` is that of an HTTP server."""
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # it would be in the run's folder and in every message
            hidden = url.replace(parts.netloc, "***@" + parts.netloc.rpartition("@")[2])
            raise ConfigError(
                f"{key} = {hidden!r} has a name or password; it takes http://HOST:PORT, and the server's token is read "
                "from the environment."
            )
        fine = (
            not (parts.query or parts.fragment)
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ConfigError:
        raise
    except ValueError:  # of a port that is none
        fine = False
    if not fine:
        raise ConfigError(f"{key} = {url!r} is no address; it takes http://HOST:PORT, or https, and a path.")


def check_question(question: str) -> None:
    """ConfigError unless the question is a template whose only blank is {prompt}."""
    try:
        blanks = {name for _, name, _, _ in Formatter().parse(question) if name is not None}
        if blanks == {"prompt"}:
            question.format(prompt="a prompt")
    except ValueError as error:
        raise ConfigError(f"config.chat.question = {question!r:.200} is no template: {error}.") from None
    if blanks - {"prompt"}:
        raise ConfigError(
            f"config.chat.question = {question!r:.200} has {{{min(blanks - {'prompt'})}}}; it takes {{prompt}} alone."
        )


def _check_own_names(files: Mapping[str, str]) -> None:
    for name in files:
        subject = f"config.reward_files.{name} = {files[name]!r}"
        if name in REWARDS:
            raise ConfigError(f"{subject}: {name} is a reward already; give yours another name.")
        if not NAME.fullmatch(name) or name in RESERVED:
            raise ConfigError(
                f"{subject}: {name!r} is no name for a reward; it takes letters, digits and _, and not total."
            )


def _check_ensemble(config: Any) -> None:
    if config.reward_ensemble != "mean" and all(len(checkpoints_of(config, n)) < 2 for n in reward_names(config)):
        raise ConfigError(
            f'config.reward_ensemble = "{config.reward_ensemble}" has no several checkpoints of one reward to join; it '
            'takes "mean", or config.reward_model.NAME two or more, as in "A, B".'
        )


def _check_weights(weights: Mapping[str, float], known: Mapping[str, RewardSpec]) -> None:
    for name, weight in weights.items():
        _check_name(f"config.reward_fn.{name}", name, known)
        if not math.isfinite(weight):
            raise ConfigError(f"config.reward_fn.{name} = {weight} is not a weight; it takes a finite number.")
    if not any(weights.values()):
        raise ConfigError(
            f"config.reward_fn has no weight other than 0; give one to any of {_listed(known)}, "
            "as in --config.reward_fn.pickscore=1."
        )


def _check_name(subject: str, name: str, known: Mapping[str, RewardSpec]) -> None:
    if name not in known:
        names = {**known, **announced()}
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{subject} is not a reward; the nearest is {nearest} (there are {_listed(names)}).")


def _check_differentiable(config: Any) -> None:
    """One's own are tried when they have loaded."""
    known, weights, rates = known_rewards(config), reward_weights(config), constraint_rates(config)
    for name in trained_rewards(config):
        if not known[name].differentiable:
            key = (
                f"reward_fn.{name} = {weights[name]}"
                if name in weights
                else f"reward_constraint.{name} = {rates[name]}"
            )
            differentiable = _listed([other for other, spec in known.items() if spec.differentiable])
            raise ConfigError(
                f"config.{key} has no gradient, which config.use_reward_gradient = True needs; "
                f"the differentiable rewards are {differentiable}."
            )


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
