"""The configuration of a run, from its folder.

Paths in it may be relative to where the run was started: those that are not found from here are looked for there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.paths import find_from, in_full
from flow_grpo.recipes.base import by_present_names, declare, get_config, leaves
from flow_grpo.rewards.chosen import split_models
from flow_grpo.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, flatten, run_config

# Keys, and groups of them, whose values may be paths.
PATHS = ("pretrained.model", "pretrained.lora", "prompts.", "reward_model.", "eval.judge", "eval.modes", "eval.curve",
         "diversity.model", "diversity.pretrained", "shaping.model", "shaping.pretrained")  # fmt: skip
# Those whose values records repeat, to tell later what they are of: the run's own say the same from every folder.
RECORDED = ("pretrained.model", "pretrained.lora", "reward_model.", "eval.judge", "diversity.", "shaping.")


def read_config(folder: Path, overrides: Mapping[str, Any], num_processes: int | None = 1) -> ConfigDict:
    """The configuration of a run folder, for so many processes (None: the run's), with some of its keys replaced.

    Raises:
        ConfigError: config.json is missing, or is not a configuration of this project.
    """
    if num_processes is not None:
        overrides = {"num_processes": num_processes, **overrides}
    return config_from(settings_of(folder), folder / CONFIG_FILE, {"resume_from": "", **overrides})


def settings_of(folder: Path) -> dict[str, Any]:
    """A run's settings by their full names, unchecked; ConfigError if they cannot be read."""
    return _found(run_config(folder), folder)


def config_of_file(path: Path, overrides: Mapping[str, Any]) -> ConfigDict:
    """The configuration in a run's config.json, or a copy of one, as it stands; some of its keys replaced.

    Raises:
        ConfigError: the file cannot be read, or is not a configuration of this project.
    """
    return config_from(_found(flatten(read_object(path)), path.parent), path, overrides)


def _found(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run's folder with the paths that are found only from where it was started."""
    started_in = _working_folder(folder)
    return {
        key: _found_from(key, value, started_in) if key.startswith(PATHS) and isinstance(value, str) else value
        for key, value in values.items()
    }


def _found_from(key: str, value: str, started_in: str) -> str:
    """The path, or each of several checkpoints of a reward."""
    return ", ".join(find_from(part, started_in) for part in _parts(key, value))


def _parts(key: str, value: str) -> tuple[str, ...]:
    return split_models(value) if key.startswith("reward_model.") else (value,)


def write_out_models(config: ConfigDict) -> None:
    """Give the models of a run that begins, so far as they lie in the working folder, their whole paths."""
    for key, value in list(leaves(config)):
        group = key.partition(".")[0]
        is_name = group in ("diversity", "shaping") and config[group].extractor == "open_clip"  # or a file's
        if key.startswith(PATHS) and key.startswith(RECORDED) and isinstance(value, str):
            parts = (part if is_name and not os.path.isfile(part) else in_full(part) for part in _parts(key, value))
            config.update_from_flattened_dict({key: ", ".join(parts)})


def _working_folder(folder: Path) -> str:
    """Where a run was started; empty where its records do not say."""
    try:
        kept = read_object(folder / ENVIRONMENT_FILE).get("working_folder", "")
    except ConfigError:
        return ""
    return kept if isinstance(kept, str) else ""


def config_from(values: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]) -> ConfigDict:
    """A configuration of values by their full names, some of them replaced; a key that came later has its default.

    Raises:
        ConfigError: naming `path`, where they are from, if they are no configuration of this project.
    """
    config, values = get_config(), by_present_names(values)
    declare(config, values)
    unknown = sorted(values.keys() - dict(leaves(config)).keys())
    missing = sorted(dict(leaves(config)).keys() - values.keys())
    if unknown or "pretrained.model" in missing:
        wrong = f"has {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ConfigError(f"{path} {wrong}: it is not a configuration of this project.")
    for key, value in {**values, **overrides}.items():
        try:
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError, OverflowError):
            shown = str(value)[:60]
            raise ConfigError(f"{path}: config.{key} = {shown!r} is of another kind than config/base.py's.") from None
    return config
