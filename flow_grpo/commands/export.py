"""Send a run to a dashboard, from its folder alone: a fresh run of wandb, or events of tensorboard.

    fme export logs/RUN
    fme export logs/RUN --tracker tensorboard --out boards

A run that was stopped and went on is one run there, and what it did again is shown once. Without a key for wandb, or
with WANDB_MODE=offline, the run is written to --out, and the last line says how it is sent. RUN is only read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flow_grpo.errors import ConfigError
from flow_grpo.runs.folder import TRACKERS, fresh_folder

if TYPE_CHECKING:
    from flow_grpo.runs.dashboard import Description
    from flow_grpo.runs.trackers import Board


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `fme export`."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--tracker", choices=TRACKERS, default=TRACKERS[0], help="where to (default: %(default)s)")
    parser.add_argument("--project", default="", help="wandb's project (default: that of the run's settings)")
    parser.add_argument("--name", default="", help="the name it gets there (default: the folder's)")
    parser.add_argument("--out", default="exports", help="a new folder in it is written (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Replay the run. ConfigError where it cannot be read, or the tracker cannot be started or written."""
    from flow_grpo.runs.replay import describe, replay  # torch comes with it, once the arguments are known
    from flow_grpo.runs.trackers import choose_trackers, finish_trackers

    folder = Path(arguments.run)
    if Path(arguments.name).name != arguments.name:
        raise ConfigError(f"--name {arguments.name!r} is not allowed; it takes a name without a folder.")
    description = describe(folder, arguments.name, arguments.project)
    if not choose_trackers((arguments.tracker,)):
        raise ConfigError(f"--tracker {arguments.tracker} is not installed; pip install {arguments.tracker}.")
    try:
        out = fresh_folder(Path(arguments.out) / description.name)
        board = _start(arguments.tracker, description, out)
        try:
            sent = replay(folder, [board])
        except BaseException:
            finish_trackers([board], exit_code=1)
            raise
        finish_trackers([board])
    except OSError as error:
        raise ConfigError(f"--out {arguments.out} cannot be written ({error.strerror or error}).") from None
    print(", ".join(f"{number} {kind}" for kind, number in sent.items()) or "nothing", f"to {_where(out)}")
    return 0


def _start(tracker: str, description: Description, out: Path) -> Board:
    from flow_grpo.runs.trackers import start_trackers

    boards = start_trackers((tracker,), description, out)
    if not boards:
        raise ConfigError(f"--tracker {tracker} could not be started, as the warning above says.")
    return boards[0]


def _where(out: Path) -> str:
    """What was written, and how it is looked at."""
    for offline in (out / "wandb").glob("offline-run-*"):
        return f"{offline}; send it with: wandb sync {offline}"
    if (out / "tensorboard").is_dir():
        return f"{out}; look at it with: tensorboard --logdir {out.parent}"
    return f"wandb; what it keeps of it here is in {out}"
