"""The ways a run ends early with one sentence instead of a traceback."""

from __future__ import annotations

import signal
from enum import IntEnum


class ConfigError(ValueError):
    """Bad input, found before any model loads: names the key, its value and what is allowed (exit code 2)."""

    exit_code = 2


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved is intact (exit code 1)."""

    exit_code = 1


class RewardFailed(TrainingStopped):
    """A reward has no scores for some images. A run saves its last finished epoch."""

    def __init__(self, name: str, what: str, when: str = "") -> None:
        """`what`: on which prompts' images, where in whose code, or what a server did; `when`: in which batch."""
        super().__init__(f"the reward {name} failed{when and ' '}{when} {what}; what was saved is intact")
        self.name, self.what, self.when = name, what, when
        self.agreed = False  # whether every process of the run raises it

    def __reduce__(self) -> tuple[type[RewardFailed], tuple[str, str, str]]:
        """Another process may be told."""
        return type(self), (self.name, self.what, self.when)


class Interrupted(Exception):
    """Somebody asked the process to stop, and it has saved what there was (exit code 128 + signal)."""

    def __init__(self, reason: IntEnum, what: str) -> None:
        """`reason`: a `stopping.Reason`; `what` completes "stopped by SIGTERM ..." (of Ctrl-C, "stopped ...")."""
        cause = "" if reason == signal.SIGINT else f"by {CAUSES.get(reason.name, reason.name)} "
        super().__init__(f"stopped {cause}{what}.")
        self.reason = reason
        self.exit_code = 128 + (reason if reason < 128 else signal.SIGTERM)


CAUSES = {"DEADLINE": "its deadline", "ORPHANED": "the end of its launcher"}  # others are signals
