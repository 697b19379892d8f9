"""The models of a run folder, base and checkpoints, as the diversity commands take them: one load of the base model.

A command that reads a run takes its configuration from the folder; nothing repeats it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from config.base import get_config
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.settings import TRAINING_STATE, checkpoint_state, finished_checkpoints, leaves, weights_mismatch

if TYPE_CHECKING:
    from torch import Tensor

    from flow_grpo.policy import Policy


@dataclass(frozen=True)
class Model:
    """The base model, or a checkpoint."""

    name: str
    step: int  # epochs of training; 0: base
    folder: Path | None  # None: base


def read_config(folder: Path, overrides: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a run folder, for one process, with some of its keys replaced.

    Raises:
        ConfigError: config.json is missing, or is not a configuration of this project.
    """
    from flow_grpo.tracking import CONFIG_FILE

    path, config, values = folder / CONFIG_FILE, get_config(), flat_config(folder)
    unknown = sorted(values.keys() - dict(leaves(config)).keys())
    missing = sorted(dict(leaves(config)).keys() - values.keys())
    if unknown or "pretrained.model" in missing:  # a key that came later has its default
        wrong = f"has {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ConfigError(f"{path} {wrong}: it is not a configuration of this project.")
    values |= {"resume_from": "", "num_processes": 1, **overrides}
    for key, value in values.items():
        try:
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError, OverflowError):
            shown = str(value)[:60]
            raise ConfigError(f"{path}: config.{key} = {shown!r} is of another kind than config/base.py's.") from None
    return config


def flat_config(folder: Path) -> dict[str, Any]:
    """What a run folder's config.json holds, "sample.num_steps" -> 10; ConfigError if it cannot be read."""
    from flow_grpo.tracking import CONFIG_FILE, flatten

    path = folder / CONFIG_FILE
    try:
        return flatten(read_object(path))
    except RecursionError:
        raise ConfigError(f"{path} is JSON nested too deep to be read.") from None


def choose_models(run: Path, chosen: str, config: ConfigDict, ema: bool) -> list[Model]:
    """The models that --checkpoints names, by step: "base", "all", "latest" or epochs, with commas between.

    Raises:
        ConfigError: there is no such checkpoint, or its weights do not fit the run's configuration.
    """
    found = finished_checkpoints(run / "checkpoints")
    steps: set[int] = set()
    for word in (part.strip() for part in chosen.split(",")):
        steps |= {0} if word == "base" else _steps_of(word, found, run)
    if ema and not config.train.ema and steps != {0}:
        raise ConfigError(f"--ema: {run} was trained with config.train.ema = False and has no averaged weights.")
    models = [
        Model(found[step].name if step else "base", step, found[step] if step else None) for step in sorted(steps)
    ]
    for model in models:
        _check_weights(model, config)
    return models


def _steps_of(word: str, found: Mapping[int, Path], run: Path) -> set[int]:
    if word in ("all", "latest") and not found:
        raise ConfigError(f"--checkpoints {word}: {run} holds no checkpoint; --checkpoints base needs none.")
    if word in ("all", "latest"):
        return set(found) if word == "all" else {max(found)}
    if not word.isdecimal() or int(word) not in found:
        there = ", ".join(map(str, sorted(found))) or "no epoch"
        raise ConfigError(
            f"--checkpoints {word!r} is not allowed; it takes base, all, latest or epochs with a checkpoint "
            f"in {run} ({there}), with commas between."
        )
    return {int(word)}


def _check_weights(model: Model, config: ConfigDict) -> None:
    """The checkpoint is whole, and of the weights that the configuration describes."""
    if model.folder is None:
        return
    if mismatch := weights_mismatch(config, checkpoint_state(model.folder)):
        key, value, made_with = mismatch
        raise ConfigError(
            f"config.{key} of the run is {value!r}, but the checkpoint {model.folder} was made with {made_with!r}."
        )


class Bars:
    """The one thing that `prompt_log_densities` asks of a run: `progress`."""

    def progress(self, iterable: Iterable[Any], description: str) -> Iterable[Any]:
        """A progress bar that leaves nothing behind."""
        from tqdm import tqdm

        return tqdm(iterable, desc=description, leave=False, delay=1.0)


def load_weights(policy: Policy, model: Model, base: Sequence[Tensor], ema: bool) -> None:
    """Set the trained weights to those of a model; `base` are those of the pretrained one."""
    import torch

    values = base
    if model.folder is not None:
        path = model.folder / TRAINING_STATE
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
        try:
            values = saved["ema"]["shadow_params"] if ema else saved["trainable"]
        except (KeyError, TypeError):
            raise ConfigError(f"{path} is damaged: it lacks {'averaged' if ema else 'trained'} weights.") from None
        if [value.shape for value in values] != [parameter.shape for parameter in base]:
            raise ConfigError(f"{path} holds weights of other shapes than the run's model: of another base model?")
    with torch.no_grad():
        for parameter, value in zip(policy.trainable, values, strict=True):
            parameter.copy_(value)


def output_folder(out: str | Path) -> Path:
    """ConfigError unless it is, or can become, a folder."""
    folder = Path(out)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--out {out}: {there} is a file; it takes a folder.")
    return folder
