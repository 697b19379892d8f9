"""The models of a run folder, base and checkpoints, as the diversity commands take them: one load of the base model.

A command that reads a run takes its configuration from the folder; nothing repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.runs.digest import base_digest, base_mismatch, base_words
from flow_grpo.runs.resuming import weights_mismatch
from flow_grpo.runs.saved import checkpoint_damage, checkpoint_state, finished_checkpoints

if TYPE_CHECKING:
    from torch import Tensor

    from flow_grpo.policy import Policy


@dataclass(frozen=True)
class Model:
    """The base model, or a checkpoint."""

    name: str
    step: int  # epochs of training; 0: base
    folder: Path | None  # None: base


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
    digest = base_digest(config.pretrained)
    for model in models:
        _check_weights(model, config, digest)
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


def _check_weights(model: Model, config: ConfigDict, digest: str | None) -> None:
    """The checkpoint is whole, every byte, and of the weights that the configuration describes."""
    if model.folder is None:
        return
    if problem := checkpoint_damage(model.folder, deep=True):
        raise ConfigError(f"the checkpoint {model.folder} is damaged: {problem}.")
    if mismatch := weights_mismatch(config, checkpoint_state(model.folder)):
        key, value, made_with = mismatch
        raise ConfigError(
            f"config.{key} of the run is {value!r}, but the checkpoint {model.folder} was made with {made_with!r}."
        )
    if problem := base_mismatch(model.folder, digest):
        raise ConfigError(f"{base_words(config.pretrained)} of the run {problem}")


def load_weights(policy: Policy, model: Model, base: Sequence[Tensor], ema: bool) -> None:
    """Set the trained weights to those of a model; `base` are those of the pretrained one."""
    import torch

    from flow_grpo.training import state as training_state

    values = base
    if model.folder is not None:
        tensors = training_state.named_as(policy, training_state.read_tensors(model.folder))
        kind = training_state.AVERAGE if ema else training_state.WEIGHTS
        values = training_state.matching_weights(policy, tensors, kind, str(model.folder))
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
