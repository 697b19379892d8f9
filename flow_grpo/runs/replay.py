"""Tell trackers of a run from its folder alone, as if it had been told while it ran."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flow_grpo.diversity.images import read_rgb
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.messages import say
from flow_grpo.runs.dashboard import Description
from flow_grpo.runs.evaluations import records_of
from flow_grpo.runs.folder import ENVIRONMENT_FILE, HISTORY_FILE, IMAGE_FOLDER, PAGE_FILE, run_config
from flow_grpo.runs.history import salvage_history
from flow_grpo.runs.record import Record
from flow_grpo.runs.trackers import Board

LABELS = ("eval", "eval_ema")
IMAGE = re.compile(r"(?P<name>.+)_(?P<step>\d{6,15})\.png")
Event = tuple[int, str, Callable[[Board], None]]  # epoch, kind, what a tracker is told


def describe(folder: Path, name: str = "", project: str = "") -> Description:
    """A run's description from its folder, under another name or in another project where these are given.

    Raises:
        ConfigError: the folder holds no settings of a run.
    """
    config = run_config(folder)
    try:
        environment = read_object(folder / ENVIRONMENT_FILE)
    except ConfigError as error:
        say(f"{str(error).rstrip('.')}: device, batch plan and state of the code are left out.")
        environment = {}
    return Description(name or folder.resolve().name, config | ({"project": project} if project else {}), environment)


def replay(folder: Path, boards: Sequence[Board]) -> Counter[str]:
    """Send metrics, images, records and page, by epoch, to trackers that have just been started.

    What is damaged is said and left out.

    Returns:
        how many there were of each kind.

    Raises:
        ConfigError: there is no history to be read.
    """
    lines, lost = salvage_history(folder / HISTORY_FILE)
    if lost:
        say(f"{folder / HISTORY_FILE} has {lost} damaged lines: they are left out.")
    events: list[Event] = [(line["step"], "metrics", partial(_send_line, line)) for line in lines]
    events += _images(folder)
    events += [(record.epoch, "evaluations", partial(_send_record, record)) for record in _records(folder)]
    if (folder / PAGE_FILE).is_file():
        last = max((step for step, _, _ in events), default=0)
        events.append((last, "page", lambda board: board.log_page(folder / PAGE_FILE)))
    sent: Counter[str] = Counter()
    for _, kind, tell in sorted(events, key=lambda event: event[0]):  # stable: of one epoch, in the order above
        try:
            for board in boards:
                tell(board)
        except ConfigError as error:
            say(f"{str(error).rstrip('.')}: left out.")
            continue
        sent[kind] += 1
    return sent


def _send_line(line: Mapping[str, Any], board: Board) -> None:
    """A line of the history; null is what was not finite, and what is no number is not ours."""
    numbers = {name: math.nan if value is None else value for name, value in line.items() if name != "step"}
    board.log({name: value for name, value in numbers.items() if isinstance(value, int | float)}, step=line["step"])


def _send_record(record: Record, board: Board) -> None:
    board.log_record(record)


def _records(folder: Path) -> Iterator[Record]:
    for label in LABELS:
        yield from records_of(folder, label)


def _images(folder: Path) -> Iterator[Event]:
    for path in sorted((folder / IMAGE_FOLDER).glob("*.png")):
        match = IMAGE.fullmatch(path.name)
        if match is not None:
            yield int(match["step"]), "images", partial(_send_image, path, match["name"], int(match["step"]))


def _send_image(path: Path, name: str, step: int, board: Board) -> None:
    """ConfigError if the file is none or damaged."""
    board.log_images({name: read_rgb(path)[None]}, step=step)  # (1, H, W, 3)
