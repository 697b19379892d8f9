"""What training has spent so far, and bars that show how far it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tqdm import tqdm


@dataclass
class Counters:
    """What training has spent so far, over all processes; evaluation is not counted.

    Seconds and evaluations include what a method, or the forward KL, draws of the base model: once a run.
    """

    epoch: int = 0  # epochs completed
    seconds: float = 0.0
    network_evaluations: int = 0  # transformer forwards x images
    images: int = 0  # images sampled to train on; base images are not among them
    updates: int = 0  # optimizer steps taken
    nonfinite_updates: int = 0  # updates skipped for a non-finite loss or gradient
    groups: int = 0  # prompts drawn: the position in the stream of prompts

    def state_dict(self) -> dict[str, int | float]:
        """The counters by name, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every counter in place. One that is missing, as in the state of an older version, is left as it is."""
        for field in fields(self):
            kind = type(getattr(self, field.name))
            setattr(self, field.name, kind(state.get(field.name, getattr(self, field.name))))


def bar(
    iterable_or_total: Iterable[Any] | int, description: str, leave: bool = False, silent: bool = False
) -> tqdm[Any]:
    """A progress bar over an iterable, or over range(total).

    `leave` keeps the finished bar on the screen: for the outermost loop. Where the output is a file, bars are
    redrawn rarely and short ones not drawn at all.
    """
    iterable = range(iterable_or_total) if isinstance(iterable_or_total, int) else iterable_or_total
    interactive = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=description,
        leave=leave,
        disable=silent,
        dynamic_ncols=True,
        mininterval=0.1 if interactive else 5.0,
        delay=0.0 if interactive or leave else 5.0,
    )


class Bars:
    """What sampling and `prompt_log_densities` ask of a run."""

    def progress(self, iterable: Iterable[Any], description: str) -> Iterable[Any]:
        """A progress bar that leaves nothing behind."""
        return tqdm(iterable, desc=description, leave=False, delay=1.0)

    def check_stop(self, ended: bool = False) -> None:
        """Nothing is lost when a command that only measures is ended at once."""
