"""The ways a run ends early with one sentence instead of a traceback."""

import signal


class ConfigError(ValueError):
    """Bad input, found before any model loads: names the key, its value and what is allowed (exit code 2)."""

    exit_code = 2


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved is intact (exit code 1)."""

    exit_code = 1


class Interrupted(Exception):
    """Somebody asked the process to stop, and it has saved what there was (exit code 128 + signal)."""

    def __init__(self, number: int, what: str) -> None:
        """`number` is that of the signal, `what` completes "stopped by SIGTERM ..."."""
        super().__init__(f"stopped by {signal.Signals(number).name} {what}.")
        self.number, self.exit_code = number, 128 + number
