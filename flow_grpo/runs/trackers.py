"""A run's trackers, wandb and tensorboard: chosen, started and ended together."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator, PartialState
from ml_collections import ConfigDict
from PIL import Image

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.runs.dashboard import Description, pixels_of
from flow_grpo.runs.folder import ENVIRONMENT_FILE, TRACKERS, flatten
from flow_grpo.runs.tensorboard_board import TensorBoard, start_tensorboard
from flow_grpo.runs.wandb_board import WandB, start_wandb, wandb_mode

Board = WandB | TensorBoard


def choose_trackers(wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted ones that are installed.

    Raises:
        ConfigError: WANDB_MODE is none that wandb knows.
    """
    names = tuple(name for name in TRACKERS if name in wanted and _is_installed(name))
    if "wandb" in names:
        wandb_mode()
    return names


def start_trackers(
    names: Sequence[str], description: Description, folder: Path, run_id: str = "", purge_step: int | None = None
) -> list[Board]:
    """Start trackers that write into `folder`. A wandb that cannot be reached leaves the run offline.

    Args:
        run_id: under which wandb knows the run; empty: a new one.
        purge_step: of a run that goes on, the first step that is done again: tensorboard forgets it and later ones.

    Raises:
        OSError: something cannot be written; none is left running.
    """
    PartialState(cpu=True)  # accelerate's trackers ask for it; in a training it is there already
    boards: list[Board] = []
    try:
        for name in names:
            board = (
                start_wandb(description, folder, run_id) if name == "wandb" else start_tensorboard(folder, purge_step)
            )
            if board is not None:
                boards.append(board)
                board.store_init_configuration(description.hyperparameters)
    except OSError:
        finish_trackers(boards, exit_code=1)
        raise
    return boards


def finish_trackers(boards: Sequence[Board], exit_code: int = 0) -> None:
    """End them; one that can no longer write is left as it is."""
    for board in boards:
        board.exit_code = exit_code
        with suppress(OSError):
            board.finish()


def _is_installed(tracker: str) -> bool:
    if importlib.util.find_spec(tracker) is not None:
        return True
    warnings.warn(
        f"tracker {tracker!r} is not installed (pip install {tracker}): the run goes on without it", stacklevel=2
    )
    return False


def log_checkpoints(
    accelerator: Accelerator,
    config: ConfigDict,
    folder: Path,
    prefix: str,
    metrics: Mapping[int, Mapping[str, float]],
    images: Mapping[str, Image.Image] | None = None,
) -> None:
    """Send what was measured of a run's checkpoints, after the run has ended, to the trackers of its folder.

    Args:
        prefix: metrics and images are named `prefix/<name>`, so that they are told from those of the training.
        metrics: epoch -> metrics. wandb, which takes no earlier step of a run that went on, gets `prefix/epoch` as
            their horizontal axis.
        images: of the last of these epochs.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    try:
        environment = read_object(folder / ENVIRONMENT_FILE)
        run_id = str(environment["run_id"])
    except (ConfigError, KeyError):
        raise ConfigError(f"{folder / ENVIRONMENT_FILE} does not name a run: {folder} is no run folder.") from None
    description = Description(folder.name, flatten(config.to_dict()), environment)
    pictures = {name: pixels_of(image)[None] for name, image in (images or {}).items()}
    boards = start_trackers(choose_trackers(config.trackers), description, folder, run_id)
    for board in boards:
        board.log_checkpoints(prefix, metrics, pictures)
    finish_trackers(boards)
    accelerator.end_training()
