"""How a run is asked to stop: a signal, a deadline in the environment, or a launcher that has gone.

Until training begins a signal ends the process at once. From then on it is only noted: the loops ask `Run.check_stop`
after every minibatch, all processes of the run agree, and what the last finished epoch left is saved. A second signal,
a second later or more, ends the process at once. (Launchers may pass on a signal that the process has already had.)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from flow_grpo.errors import ConfigError, Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds within which a further signal is the same request
DEADLINE, SLURM_DEADLINE = "FLOW_GRPO_DEADLINE", "SLURM_JOB_END_TIME"  # seconds since 1970
MARGIN = "FLOW_GRPO_DEADLINE_MARGIN"  # seconds before the deadline at which to stop
DEFAULT_MARGIN = 120.0
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # torchrun and accelerate launch set one of these


class StopWatch:
    """Whether this process should stop, and why; without `watching` it looks at no signal."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """ConfigError for a deadline or margin that is no number."""
        self.armed = False  # whether a signal is noted, instead of ending the process
        self._signal = 0
        self._signalled_at = 0.0
        self._deadline = _deadline(environment)
        self._parent = os.getppid() if any(name in environment for name in LAUNCHED) else None

    def reason(self) -> int:
        """The signal to stop by; SIGTERM for a deadline that is near or a launcher that has gone; 0: go on."""
        if self._signal:
            return self._signal
        over = self._deadline is not None and time.time() >= self._deadline
        orphaned = self._parent is not None and os.getppid() != self._parent
        return int(signal.SIGTERM) if over or orphaned else 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Of a signal."""
        now = time.monotonic()
        if self._signal and now - self._signalled_at >= SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._signal:
            self._signal, self._signalled_at = number, now
            if not self.armed:
                raise Interrupted(number, "before training began; nothing was lost")


@contextmanager
def watching() -> Iterator[StopWatch]:
    """Handle the signals inside the block. One that the process was started to ignore (nohup, &) stays ignored."""
    watch = StopWatch()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, watch.handle)
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _deadline(environment: Mapping[str, str]) -> float | None:
    """When to stop, in seconds since 1970; ours goes before Slurm's."""
    name = DEADLINE if DEADLINE in environment else SLURM_DEADLINE
    if name not in environment:
        return None
    return _number(environment, name, 0.0) - _number(environment, MARGIN, DEFAULT_MARGIN)


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(environment.get(name, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={environment[name]} is not allowed; it takes seconds, a number of at least 0.")
    return value
