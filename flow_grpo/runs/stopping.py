"""How a run is asked to stop: a signal, a deadline in the environment, or a launcher that has gone.

Until training begins a signal ends the process at once. From then on it is only noted: the loops ask `Run.check_stop`
after every minibatch, all processes of the run agree, and what the last finished epoch left is saved. A second signal,
a second later or more, ends the process at once. (Launchers may pass on a signal that the process has already had.)

Signals are read by a thread of their own, since Python's handlers wait while the main thread is in a library's code,
which may itself be waiting for another process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

from flow_grpo.errors import ConfigError, Interrupted
from flow_grpo.messages import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds within which a further signal is the same request
DEADLINE, SLURM_DEADLINE = "FLOW_GRPO_DEADLINE", "SLURM_JOB_END_TIME"  # seconds since 1970
MARGIN = "FLOW_GRPO_DEADLINE_MARGIN"  # seconds before the deadline at which to stop
DEFAULT_MARGIN = 120.0
# in the command line of a parent without which a run is not wanted; not those of a shell or of nohup, which hold no \0
LAUNCHERS = ("torchrun", "torch.distributed", "accelerate", "scripts/study/", "fme\0", "flow_grpo.commands.main\0")


class Reason(IntEnum):
    """Why to stop; signals have their own numbers."""

    SIGHUP = signal.SIGHUP
    SIGINT = signal.SIGINT
    SIGTERM = signal.SIGTERM
    DEADLINE = 1001
    ORPHANED = 1002


class StopWatch:
    """Whether this process should stop, and why; without `watching` it looks at no signal."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """ConfigError for a deadline or margin that is no number."""
        self.armed = False  # whether a signal is noted, instead of ending the process
        self._signal: Reason | None = None
        self._signalled_at = 0.0
        self._deadline = _deadline(environment)
        self._parent = os.getppid() if _was_launched(environment) else None

    def reason(self) -> Reason | None:
        """Why to stop; None: go on."""
        if self._signal:
            return self._signal
        if self._deadline is not None and time.time() >= self._deadline:
            return Reason.DEADLINE
        return Reason.ORPHANED if self._parent is not None and os.getppid() != self._parent else None

    def handle(self, number: int) -> None:
        """Of a signal, in any thread."""
        now = time.monotonic()
        if not self.armed:
            say(str(Interrupted(Reason(number), "before training began; nothing was lost")))
        if not self.armed or (self._signal and now - self._signalled_at >= SAME_REQUEST):
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._signalled_at = Reason(number), now
            say(f"{self._signal.name}: stopping after this minibatch; once more ends at once.")


@contextmanager
def watching() -> Iterator[StopWatch]:
    """Handle the signals inside the block. One that the process was started to ignore (nohup, &) stays ignored."""
    watch = StopWatch()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=_read_signals, args=(receiver, watch), name="signals", daemon=True)
    thread.start()
    earlier = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _noted)
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(earlier)
        sender.close()  # ends the thread
        thread.join()
        receiver.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """The number has been written to the wakeup descriptor by the time that Python calls this."""


def _read_signals(receiver: socket.socket, watch: StopWatch) -> None:
    while numbers := receiver.recv(64):
        for number in numbers:
            if number in SIGNALS:
                watch.handle(number)


def _was_launched(environment: Mapping[str, str]) -> bool:
    """Whether the parent process is a launcher, by its command line; by the environment where that cannot be read."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "LOCAL_RANK" in environment
    return any(word in command for word in LAUNCHERS)


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
