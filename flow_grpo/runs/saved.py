"""The checkpoints of a run: which there are, which are whole, and which one to go on from. Loads no tensor.

    checkpoints/checkpoint-000010/    see flow_grpo/training/checkpoint.py
                damaged/              checkpoints that were found damaged when the run went on
                abandoned/            checkpoints of a history that was written anew
                .partial-* .stale-* .dropped-*    what a kill left of writing and deleting; tidied when a run goes on

A checkpoint is whole if its manifest, written last, agrees with its files. Those of before the manifest (no `format` in
state.json) are taken as they are, with a word.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, sync
from flow_grpo.runs.manifest import MANIFEST, damage

CHECKPOINTS = "checkpoints"
CHECKPOINT_STATE = "state.json"
TENSORS = "training_state.safetensors"
OLD_TENSORS = "training_state.pt"  # of checkpoints without a manifest
FORMAT = 2  # what state.json calls checkpoints that have one


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, and the newer ones that were passed over."""

    folder: Path
    damaged: Mapping[Path, str]  # checkpoint -> what is wrong with it


# --- which there are ------------------------------------------------------------------------------------


def finished_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, whole or damaged: epoch -> folder, oldest first."""
    paths = folder.glob("checkpoint-*") if folder.is_dir() else iter(())
    named = ((path.name.removeprefix("checkpoint-"), path) for path in paths)
    return dict(sorted((int(epoch), path) for epoch, path in named if _is_epoch(epoch) and _is_checkpoint(path)))


def _is_epoch(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder was ever a checkpoint; one that has lost its state.json is a damaged one."""
    return (path / CHECKPOINT_STATE).exists() or (path / MANIFEST).exists()


def find_checkpoint(resume_from: str, subject: str = "") -> Path:
    """The checkpoint to continue, by the sizes of its files: see `choose_checkpoint`."""
    return choose_checkpoint(resume_from, deep=False, subject=subject).folder


def choose_checkpoint(resume_from: str, deep: bool, subject: str = "") -> Found:
    """The given checkpoint, or the newest whole one of a run folder or of its checkpoints folder.

    Args:
        deep: read every file, which a manifest names, and compare; otherwise their sizes alone.
        subject: what the sentence of an error begins with, where it is not config.resume_from that names the folder.

    Raises:
        ConfigError: there is none; all are damaged; or the one that is given is.
    """
    given, subject = Path(resume_from).expanduser(), subject or f"config.resume_from = {resume_from!r}"
    try:
        single = _is_checkpoint(given)
        found = {} if single else finished_checkpoints(given) | finished_checkpoints(given / CHECKPOINTS)
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        raise ConfigError(f"{subject} is no folder ({error}).") from None
    if single:
        if problem := checkpoint_damage(given, deep):
            raise ConfigError(f"{subject} is damaged: {problem}; the run folder leads to the newest whole one.")
        return Found(given, {})
    damaged: dict[Path, str] = {}
    for path in reversed(found.values()):
        problem = checkpoint_damage(path, deep)
        if problem is None:
            return Found(path, damaged)
        damaged[path] = problem
    if damaged:
        path, problem = next(iter(damaged.items()))
        raise ConfigError(f"{subject} holds only damaged checkpoints (the newest, {path}: {problem}).")
    raise ConfigError(f"{subject} holds no checkpoint; it takes {_what_it_takes(given)}")


def _what_it_takes(given: Path) -> str:
    folders = f"a run folder, its checkpoints folder, or one checkpoint-XXXXXX folder with a {CHECKPOINT_STATE}."
    if not (given / "environment.json").is_file():
        return folders
    return f"{folders} That run has saved none: start it again under its name, and its history is set aside."


# --- which are whole ------------------------------------------------------------------------------------


def checkpoint_damage(checkpoint: Path, deep: bool) -> str | None:
    """What is wrong with a checkpoint, in words; None: it is whole, or of before the manifest and looks whole."""
    try:
        state = checkpoint_state(checkpoint)
    except ConfigError as error:
        return str(error).rstrip(".")
    if "format" not in state:
        return None if (checkpoint / OLD_TENSORS).is_file() else f"{OLD_TENSORS} is missing"
    return damage(checkpoint, deep, needed=(CHECKPOINT_STATE, TENSORS))


def is_checked(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest to be checked against."""
    return (checkpoint / MANIFEST).is_file()


def checkpoint_state(checkpoint: Path, subject: str = "") -> dict[str, Any]:
    """What a checkpoint's state.json says, the kinds of its values checked.

    Raises:
        ConfigError: beginning with `subject`, if it cannot be read or says something else.
    """
    path = checkpoint / CHECKPOINT_STATE
    state = read_object(path, subject)
    counters, weights = state.get("counters"), state.get("weights")
    if not isinstance(weights, dict) or not isinstance(counters, dict):
        raise ConfigError(f"{subject}{path} is damaged: it has no counters and weights.")
    for name, value in ({"epoch": None, "seconds": None} | counters).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
            raise ConfigError(f"{subject}{path} is damaged: its counter {name} is {str(value)[:40]!r}, not a number.")
    if state.get("format", FORMAT) != FORMAT:
        raise ConfigError(f"{subject}{path} has format {str(state['format'])[:40]!r}; this version reads {FORMAT}.")
    return state


# --- moving and tidying ---------------------------------------------------------------------------------


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a complete folder in its place; one that was there before goes only once the new one stands."""
    stale = folder.with_name(f".stale-{folder.name}")
    remove(stale)
    if folder.exists():
        os.replace(folder, stale)
    os.replace(partial, folder)
    sync(folder.parent)
    remove(stale)


def drop(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill in between never leaves half of one under its name."""
    dropped = checkpoint.with_name(f".dropped-{checkpoint.name}")
    remove(dropped)
    os.replace(checkpoint, dropped)
    remove(dropped)


def set_aside(checkpoint: Path, place: str) -> Path:
    """Move a checkpoint to a folder `place` beside it, under its name or that with a number; where it is now.

    Raises:
        ConfigError: it cannot be moved.
    """
    target = free_name(checkpoint.parent / place / checkpoint.name)
    try:
        target.parent.mkdir(exist_ok=True)
        os.replace(checkpoint, target)
    except OSError as error:
        raise ConfigError(f"{checkpoint} cannot be moved to {target} ({error.strerror}).") from None
    return target


def remove(path: Path) -> None:
    """Delete what this project wrote under a name of its own, a folder or a file in its place; never an error."""
    with suppress(OSError):
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)


def free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def tidy(checkpoints: Path) -> None:
    """Finish what a kill interrupted: an old checkpoint that was about to be replaced comes back; the rest goes."""
    for stale in checkpoints.glob(".stale-checkpoint-*"):
        folder = stale.with_name(stale.name.removeprefix(".stale-"))
        if not folder.exists():
            os.replace(stale, folder)
    for pattern in (".stale-checkpoint-*", ".partial-checkpoint-*", ".dropped-checkpoint-*"):
        for litter in checkpoints.glob(pattern):
            remove(litter)
