"""Processes for scripts/bench/faults.py: training is forked, looked after, and killed at one of its calls."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flow_grpo import launch, policy, rewards
from flow_grpo.commands import cli
from flow_grpo.evaluators import evaluation
from flow_grpo.evaluators import film_strip as step_visualizer
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.loops import reward_gradient as drtune
from flow_grpo.runs.run import Run
from flow_grpo.training import checkpoint, trainer
from scripts.diversity_metrics import diversity_evaluator
from scripts.train import train_sd3

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "scripts/train/train_sd3.py"
LIMIT = 120.0  # seconds after which a start hangs
BY_ITSELF, AFTER_TERM = 3.0, 3.0  # of a process that has lost another; torchrun gives it 0 and 30 seconds
LOST, LOADED, TRACEBACK, HANG, OTHER = FAULTS = ("lost", "loaded damaged", "tracebacks", "hangs", "other")
# what training imports late: the children have it already
PRELOADED = (diversity_evaluator, drtune, evaluation, grpo, launch, policy, rewards, step_visualizer, trainer)
PR_SET_PDEATHSIG = 1


@dataclass
class Result:
    """What became of one trial."""

    part: str
    number: int
    plan: str
    done: Counter[str] = field(default_factory=Counter)  # what took place: kills, damages, signals, ...
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log: str = ""

    def add(self, fault: str, note: str) -> None:
        """Count a fault of this trial."""
        self.faults.append(fault)
        self.notes.append(f"{fault}: {note}")


# --- starting -------------------------------------------------------------------------------------------


def nothing() -> None:
    """Before training."""


class Session:
    """One start of training: its processes, forked from this one, and what they say."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] = nothing,
        program: Sequence[str] = (),
    ) -> None:
        """`before`: called in each process; `program`: executed instead of what this process has loaded already."""
        self.log, self.codes = log, dict[int, int]()
        shared = dict(environment or {})
        if processes > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(processes)}
        self.pids = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pid = os.fork()
            if pid == 0:
                become_training(arguments, log, shared | ranks, before, program)
            self.pids.append(pid)

    def running(self) -> list[int]:
        """The processes that have not ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, seconds: float = LIMIT) -> bool:
        """Whether all have ended, within so many seconds."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() >= end:
                return False
            time.sleep(0.003)
        return True

    def _launched(self) -> bool:
        """Wait as torchrun does: once one of several has failed, SIGTERM to the others, and SIGKILL after a while."""
        end = time.monotonic() + LIMIT
        while self.running() and not any(self.codes.values()) and time.monotonic() < end:
            self.wait(0.05)
        if not any(self.codes.values()) or self.wait(BY_ITSELF):
            return not self.running()
        self.send(signal.SIGTERM)
        if not self.wait(AFTER_TERM):
            self.send(signal.SIGKILL)
        return self.wait()

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to the processes that have not ended, or to some of them."""
        chosen = self.pids if ranks is None else [self.pids[rank] for rank in ranks if rank < len(self.pids)]
        for pid in set(chosen) & set(self.running()):
            os.kill(pid, number)

    def ends(self, result: Result) -> list[int]:
        """The exit codes, once all have ended; what hangs is counted and killed. What they said is looked through."""
        if not self._launched():
            result.add(HANG, f"a process had not ended after {LIMIT:g} s")
            self.send(signal.SIGKILL)
            self.wait()
        if "Traceback" in self.said():
            result.add(TRACEBACK, "see the log")
        result.log = self.said()[-6000:]
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """What the processes have written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def become_training(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    before: Callable[[], None],
    program: Sequence[str],
) -> None:
    """Of a forked process: train, and end."""
    end_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    os.environ.update(environment)
    os.chdir(ROOT)
    code = 1
    try:
        before()
        if program:
            os.execv(program[0], [*program, *arguments])
        sys.argv = [SCRIPT, *arguments]
        cli.run(train_sd3.main, train_sd3.__doc__ or "")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with_parent() -> None:
    """Nothing outlives an interrupted benchmark; of its processes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- calls on the file system ---------------------------------------------------------------------------

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
SAVING = ((checkpoint.Saver, "_attempt"),)
OPENING = ((Run, "__init__"), (checkpoint, "resume"))
Scope = tuple[tuple[Any, str], ...]


class Calls:
    """Counts the calls of a process that change files while it is inside some functions; may end it at one."""

    def __init__(self, scope: Scope, act: Callable[[int], None], done: Callable[[int], None] = lambda count: None):
        """`act` is called before each with its number, `done` with how many there were each time a function ends."""
        self.count, self.inside, self.act, self.done = 0, False, act, done
        for owner, name in scope:
            setattr(owner, name, self._scoped(getattr(owner, name)))
        for owner, name in ((os, "fsync"), (checkpoint, "save_file")):  # neither is audited
            setattr(owner, name, self._counted(getattr(owner, name)))
        sys.addaudithook(self._audit)

    def _scoped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def scoped(*args: Any, **kwargs: Any) -> Any:
            self.inside, before = True, self.count
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.done(self.count - before)

        return scoped

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._seen()
            return function(*args, **kwargs)

        return counted

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            self._seen()

    def _seen(self) -> None:
        if self.inside:
            self.count += 1
            self.act(self.count)


def kill_at(scope: Scope, call: int) -> Callable[[], None]:
    """For `Session`: SIGKILL just before so manieth call inside the scope."""

    def act(number: int) -> None:
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        Calls(scope, act)

    return before
