"""Whether a run can go on from a checkpoint, told before anything loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.runs.folder import flatten, resumed_folder, run_folder_of
from flow_grpo.runs.guards import early_stop
from flow_grpo.runs.lock import in_use, is_locked
from flow_grpo.runs.saved import checkpoint_state, find_checkpoint


def is_over(config: ConfigDict | FrozenConfigDict, epochs: int, seconds: float) -> bool:
    """Whether a run has come to its configured number of epochs, or of seconds of training."""
    return epochs >= config.num_epochs or 0 < config.max_seconds <= seconds


def weights_record(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """The keys that decide whether a checkpoint's weights fit a run, with their values; plain data for state.json."""
    record: dict[str, Any] = {
        "pretrained.model": Path(config.pretrained.model).name,  # the folder may have moved
        "pretrained.lora": Path(config.pretrained.lora).name,
        "pretrained.skip": list(config.pretrained.skip),
        "mixed_precision": config.mixed_precision,
        "train.ema": config.train.ema,
        "use_lora": config.use_lora,
    }
    if config.use_lora:
        record |= {"lora.rank": config.lora.rank, "lora.alpha": config.lora.alpha}
        record["lora.target_modules"] = list(config.lora.target_modules)
    return record


def weights_mismatch(config: ConfigDict | FrozenConfigDict, state: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key whose value, and the value that a checkpoint was made with, differ; None: its weights fit."""
    made_with = {"pretrained.lora": "", "pretrained.skip": [], **state["weights"]}  # of before there were these two
    differing = ((k, v, made_with.get(k)) for k, v in weights_record(config).items() if made_with.get(k) != v)
    return next(differing, None)


def checkpoint_to_resume(resume_from: str) -> Path:
    """The checkpoint; where there is none because the run has only begun, the sentence says who is writing it."""
    try:
        return find_checkpoint(resume_from)
    except ConfigError:
        folder = run_folder_of(resume_from)
        if folder is not None and is_locked(folder):
            raise ConfigError(in_use(folder)) from None
        raise


def check_resume(config: ConfigDict, checkpoint: Path) -> None:
    """The checkpoint is whole, of the same weights, and neither at the configured end nor stopped by a guard."""
    state = checkpoint_state(checkpoint, "config.resume_from: ")
    if mismatch := weights_mismatch(config, state):
        key, value, made_with = mismatch
        raise ConfigError(
            f"config.{key} = {value!r}, but the checkpoint {checkpoint} of config.resume_from was made with "
            f"{made_with!r}; resume with the same."
        )
    optimizer = state.get("config", {}).get("train", {}).get("optimizer", "adamw")  # of before there was a choice
    if optimizer != config.train.optimizer:
        raise ConfigError(
            f"config.train.optimizer = {config.train.optimizer!r} cannot go on with the moments of the checkpoint "
            f"{checkpoint} of config.resume_from, which are those of {optimizer!r}; resume with the same."
        )
    counters = state["counters"]
    epochs, seconds = counters["epoch"], counters["seconds"]
    if epochs > config.num_epochs or (is_over(config, epochs, seconds) and state.get("evaluated", True)):
        limit = "num_epochs" if epochs >= config.num_epochs else "max_seconds"
        raise ConfigError(
            f"config.resume_from: {checkpoint} has {epochs} epochs and {seconds:.0f} s of training behind it; to go "
            f"on, raise config.{limit} = {config[limit]} above {epochs if limit == 'num_epochs' else round(seconds)}."
        )
    folder = resumed_folder(config)
    stop = None if folder is None else early_stop(folder, flatten(config.to_dict()), epochs)
    if stop is not None and state.get("evaluated", True):
        raise ConfigError(
            f"config.resume_from: {checkpoint} was ended early: {stop.why}; to go on, change config.{stop.guard}."
        )
