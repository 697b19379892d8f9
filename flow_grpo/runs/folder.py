"""The folder of a run: what is in it, which one a configuration means, and who may write it.

logs/<run_name>/config.json        the resolved configuration
                environment.json   versions, revision, device and command line; one entry per resumption
                metrics.jsonl      one strict JSON object a line; NaN and infinities are written as null
                images/            <name>_<step>.png
                steps/ diversity/  <label>_<step>.json: what evaluators keep of one evaluation
                evaluations/       flow_grpo/runs/evaluations.py: what is known of every image of one evaluation
                page.html          all that in one page, written again after every evaluation
                checkpoints/       flow_grpo/runs/saved.py
                tensorboard/ wandb/
                run.lock run.lock.json   who writes it now
                earlier-1/         what a start left that was killed before its first checkpoint
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import TEMPORARY, read_object
from flow_grpo.messages import say
from flow_grpo.runs.lock import LOCK_FILE, OWNER_FILE, RunLock
from flow_grpo.runs.saved import (
    CHECKPOINTS,
    checkpoint_state,
    choose_checkpoint,
    finished_checkpoints,
    free_name,
    is_checked,
    set_aside,
    tidy,
)

CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, IMAGE_FOLDER = "config.json", "environment.json", "metrics.jsonl", "images"
PAGE_FILE = "page.html"
EVALUATIONS, BASE_FEATURES = "evaluations", "base_features.safetensors"
CURVE_FILE = "curve.json"  # the exact curve that the run is held against
RECORD_FOLDERS = ("steps", "diversity", EVALUATIONS)  # <label>_<step>.json, and .webp
TRACKERS = ("wandb", "tensorboard")  # wandb first: the one that may have to be started twice
OURS = frozenset(
    {CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, PAGE_FILE, CURVE_FILE, IMAGE_FOLDER, CHECKPOINTS}
    | {*RECORD_FOLDERS, *TRACKERS}
)
RECORDS = frozenset({CONFIG_FILE, ENVIRONMENT_FILE})  # by which a run is known
LOCK_FILES = frozenset({LOCK_FILE, OWNER_FILE})
EARLIER = "earlier"  # earlier-1/, earlier-2/, ...
TORN = frozenset(
    f"{name}{TEMPORARY}" for name in (*RECORDS, HISTORY_FILE, PAGE_FILE, *LOCK_FILES)
)  # a kill while one was written
# what a run writes before it has done anything: a folder that holds no more than this may be used again
EMPTY_RUN = RECORDS | LOCK_FILES | TORN | frozenset(TRACKERS)


@dataclass(frozen=True)
class OpenFolder:
    """A run folder that this process may write."""

    path: Path
    resumed: bool  # whether it is an earlier run's that goes on
    checkpoint: Path | None  # to go on from
    lock: RunLock


def open_folder(config: Any) -> OpenFolder:
    """Choose, create and lock the folder that a configuration means, and the checkpoint to go on from.

    With `config.resume_from` inside a run folder and no other `config.run_name`, that folder is appended to; damaged
    checkpoints in it are moved to checkpoints/damaged/ and named.

    Raises:
        ConfigError: the folder holds another run, is being written, or cannot be; there is no whole checkpoint.
    """
    folder, resumed = _choose(config)
    lock = RunLock(folder)
    try:
        if resumed:
            _sweep(folder)
            tidy(folder / CHECKPOINTS)
        else:
            _make_room(folder, config)
        checkpoint = _checkpoint_of(config, resumed) if config.resume_from else None
    except (ConfigError, OSError) as error:
        lock.release(unused=not resumed)
        raise _as_config_error(error, folder) from None
    return OpenFolder(folder, resumed, checkpoint, lock)


def _as_config_error(error: Exception, folder: Path) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    return ConfigError(f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}).")


def _checkpoint_of(config: Any, resumed: bool) -> Path:
    """The newest whole one, every byte compared; damaged ones of the run that goes on are set aside."""
    found = choose_checkpoint(config.resume_from, deep=True)
    for path, problem in found.damaged.items():
        where = f"moved to {set_aside(path, 'damaged')}" if resumed else "passed over"
        say(f"the checkpoint {path} is damaged ({problem}): {where}; going on from {found.folder}.")
    if not is_checked(found.folder):
        say(f"the checkpoint {found.folder} is of before checkpoints had a manifest: its files cannot be checked.")
    return found.folder


# --- choosing -------------------------------------------------------------------------------------------


def _choose(config: Any) -> tuple[Path, bool]:
    """The run's folder, created, and whether it is an earlier run's that goes on."""
    logdir, name = Path(config.logdir), config.run_name
    if (resumed := resumed_folder(config)) is not None:
        return resumed, True
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ConfigError(f"config.run_name = {name!r} must name a folder under logdir={config.logdir!r}.")
    try:
        if not name:
            now = datetime.now(UTC)
            return fresh_folder(logdir / f"{config.recipe or 'run'}-{now:%Y%m%d-%H%M%S}"), False
        (logdir / name).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"config.run_name = {name!r}: no folder can be made in logdir={config.logdir!r} ({reason})."
        ) from None
    return logdir / name, False


def _sweep(folder: Path) -> None:
    """Remove what a kill left of writing one of a run's own files."""
    ours = [folder / name for name in (*TORN, f"{EVALUATIONS}/{BASE_FEATURES}{TEMPORARY}")]
    kinds = ((IMAGE_FOLDER, "png"), (EVALUATIONS, "webp"), *((name, "json") for name in RECORD_FOLDERS))
    for part, kind in kinds:
        ours += (folder / part).glob(f"*_[0-9]*.{kind}{TEMPORARY}")
    for path in ours:
        if path.is_file():
            path.unlink()


def check_name(config: Any) -> None:
    """ConfigError, before anything is made, for the name of a run that is there, and is not the one that goes on."""
    if config.run_name and not config.resume_from:
        _refuse_a_run(Path(config.logdir).expanduser() / config.run_name, config)


def _refuse_a_run(folder: Path, config: Any) -> None:
    if _has_saved(folder / CHECKPOINTS):
        raise ConfigError(
            f"config.run_name = {config.run_name!r}: {folder} already holds a run, which is not overwritten; choose "
            f"another name, or go on with it by --config.resume_from={shlex.quote(str(folder))}."
        )


def _make_room(folder: Path, config: Any) -> None:
    """Leave a folder to a new run in which no run is; what a start left that saved nothing is set aside in earlier-1/.

    Files that are no run's stay where they are.

    Raises:
        ConfigError: a run with a checkpoint is in it, or something that a run would write and no run has written.
    """
    held = {entry.name for entry in folder.iterdir()} & (OURS | TORN)
    _refuse_a_run(folder, config)
    if not held - EMPTY_RUN:
        return
    if not {name.removesuffix(TEMPORARY) for name in held} & RECORDS:
        raise ConfigError(
            f"config.run_name = {config.run_name!r}: {folder} is no run's, but holds {min(held)!r}, which a run would "
            "write; choose another name."
        )
    number = next(n for n in itertools.count(1) if not (folder / f"{EARLIER}-{n}").exists())
    aside = folder / f"{EARLIER}-{number}"
    aside.mkdir()
    for name in sorted(held, key=lambda name: name in RECORDS):  # these last: a kill in between is begun again
        os.replace(folder / name, aside / name)
    say(f"{folder} was begun before and saved no checkpoint: it starts afresh; what was there is now in {aside}.")


def _has_saved(checkpoints: Path) -> bool:
    """Whether there is anything in a checkpoints folder but what a kill left of writing the first."""
    return checkpoints.is_dir() and any(not entry.name.startswith(".partial-") for entry in checkpoints.iterdir())


def fresh_folder(folder: Path) -> Path:
    """Create and return `folder`, or `folder-2`, `folder-3`, ...: the first that does not exist."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


def run_folder_of(resume_from: str) -> Path | None:
    """The run folder that `resume_from` (itself, its checkpoints or one of them) lies in; None: no run's."""
    if not resume_from:
        return None
    path = Path(resume_from).expanduser()
    candidates = [path]
    for folder in (path.resolve(), path.resolve().parent):
        if folder.name == CHECKPOINTS:
            candidates.append(folder.parent)
    return next((folder for folder in candidates if _is_run(folder)), None)


def resumed_folder(config: Any) -> Path | None:
    """The folder of the run that goes on in it; None: a run begins in a folder of its own."""
    folder, name = run_folder_of(config.resume_from), config.run_name
    goes_on = folder is not None and (not name or folder.resolve() == Path(config.logdir, name).resolve())
    return folder if goes_on else None


def _is_run(folder: Path) -> bool:
    """Whether a run was written here, which may have lost one of its records."""
    return any((folder / name).is_file() for name in (ENVIRONMENT_FILE, CONFIG_FILE, HISTORY_FILE))


# --- records --------------------------------------------------------------------------------------------


def config_digest(text: bytes) -> str:
    """What environment.json keeps of the config.json beside it."""
    return hashlib.sha256(text).hexdigest()


def run_config(folder: Path) -> dict[str, Any]:
    """A run's settings, by their full names: those of config.json, or of the newest checkpoint where that is damaged.

    Raises:
        ConfigError: neither can be read.
    """
    path = folder / CONFIG_FILE
    try:
        config = flatten(read_object(path))
        if _is_as_written(path):
            return config
        problem = f"{path} is damaged, or was edited, since it was written"
    except ConfigError as error:
        problem = str(error).rstrip(".")
    except RecursionError:
        problem = f"{path} is JSON nested too deep to be read"
    kept = _config_in_checkpoints(folder)
    if kept is None:
        raise ConfigError(f"{problem}, and no checkpoint in {folder} has a copy of it.")
    say(f"{problem}: the settings are taken from the newest checkpoint.")
    return flatten(kept)


def _is_as_written(path: Path) -> bool:
    """Whether a config.json is what environment.json, or else the newest checkpoint, says that it was.

    True where neither says anything, as of an older version.
    """
    try:
        expected = read_object(path.parent / ENVIRONMENT_FILE).get("config_sha256")
        return expected in (None, config_digest(path.read_bytes()))
    except ConfigError:
        kept = _config_in_checkpoints(path.parent)
        return kept is None or kept == read_object(path)


def _config_in_checkpoints(folder: Path) -> dict[str, Any] | None:
    for checkpoint in reversed(finished_checkpoints(folder / CHECKPOINTS).values()):
        try:
            config = checkpoint_state(checkpoint).get("config")
        except ConfigError:
            continue
        if isinstance(config, dict):
            return config
    return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sample": {"num_steps": 10}} -> {"sample.num_steps": 10}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def keep_damaged(path: Path) -> Path:
    """Move a file that cannot be read out of the way, beside itself; where it is now."""
    target = free_name(path.with_name(f"{path.name}.damaged"))
    shutil.move(path, target)
    return target
