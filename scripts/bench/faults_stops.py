"""Kills and signals of scripts/bench/faults.py: a run is broken off, goes on, and must end like the unbroken one."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from flow_grpo.runs.folder import HISTORY_FILE
from flow_grpo.runs.run import Run
from flow_grpo.runs.stopping import DEADLINE, MARGIN, SAME_REQUEST
from scripts.bench.faults_processes import (
    HANG,
    LOST,
    OPENING,
    OTHER,
    SAVING,
    SCRIPT,
    Result,
    Session,
    kill_at,
    nothing,
)
from scripts.bench.faults_runs import (
    EPOCHS,
    Kind,
    Lab,
    Reference,
    damaged,
    finish,
    is_evaluated,
    newest_whole,
    other_metrics,
    resuming,
    trial_folder,
)

KINDS = tuple(Kind(loop, processes) for loop in ("grpo", "drtune") for processes in (1, 2))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OPENING_CALLS = 12  # about as many as there are when a run goes on
WHERE = {"saving": "while saving", "opening": "while opening", "moment": "at a moment"}  # for the table
SOON = 2  # epochs within which a kill comes, so that there is something left to be killed again
STARTING = 0.3  # of an unbroken run's time, before its first epoch
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT)
REAL = (sys.executable, SCRIPT)


# --- kills ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blow:
    """One SIGKILL: at a moment, or at a call on the file system while saving or opening."""

    where: str  # "moment", "saving", "opening", or "stopped": a SIGTERM at a moment, which is saved
    at: float  # in [0, 1): of what is left of the run, or of the calls
    ranks: tuple[int, ...]
    real: bool = False  # a new Python, not a fork


@dataclass(frozen=True)
class Kill:
    """A run that is killed several times and goes on each time."""

    kind: Kind
    blows: tuple[Blow, ...]


def plan_kills(random: Random, quick: bool) -> list[Kill]:
    """Over both loops, one process and two; two of every four kills while a checkpoint is written."""
    trials = []
    for number in range(32 if quick else 64):
        kind = KINDS[number % len(KINDS)]
        wheres = ["saving", "saving", "moment", "moment" if random.random() < 0.6 else "opening"]
        random.shuffle(wheres)
        if number % 8 >= 4:  # what a stop has saved is saved again once it is evaluated
            wheres.insert(wheres.index("saving"), "stopped")
        blows = [Blow(where, random.random(), _ranks(random, kind)) for where in wheres]
        if number % 16 == 0:
            at = wheres.index("moment")
            blows[at] = Blow("moment", random.random(), (0,), real=True)
        trials.append(Kill(kind, tuple(blows)))
    return trials


def _ranks(random: Random, kind: Kind) -> tuple[int, ...]:
    """One process or all."""
    return random.choice([(0,), (1,), (0, 1)]) if kind.processes == 2 else (0,)


def run_kills(lab: Lab, number: int, kill: Kill) -> Result:
    """Every checkpoint that was whole is there after each kill, or a newer one is; and the end is the same."""
    result = Result("kills", number, str(kill))
    reference = lab.references[kill.kind]
    with trial_folder(lab, result) as folder:
        run, newest = folder / "run", -1
        for count, blow in enumerate(kill.blows):
            session = _start(lab, kill.kind, run, folder / f"{count}.log", reference, blow, newest)
            _strike(session, blow, reference, newest)
            codes = session.ends(result)
            if blow.where != "stopped":
                result.done[WHERE[blow.where]] += -signal.SIGKILL in codes
            newest = _still_there(run, newest, result)
            if result.faults or newest == EPOCHS:
                break
        if not result.faults:
            _go_on(lab, kill.kind, run, folder / "last.log", reference, result)
    return result


def _start(
    lab: Lab,
    kind: Kind,
    run: Path,
    log: Path,
    reference: Reference,
    blow: Blow,
    newest: int,
) -> Session:
    """Begin or go on."""
    arguments = lab.beginning(kind, run) if newest_whole(run) < 0 else resuming(run)
    before: Callable[[], None] = nothing
    if blow.where == "saving":
        saves = min(SOON, EPOCHS - max(newest, 0))
        before = kill_at(SAVING, 1 + int(blow.at * reference.calls * saves))
    elif blow.where == "opening":
        before = kill_at(OPENING, 1 + int(blow.at * OPENING_CALLS))
    return Session(arguments, log, kind.processes, before=before, program=REAL if blow.real else ())


def _strike(session: Session, blow: Blow, reference: Reference, newest: int) -> None:
    """At the moment; a call that ends the process comes by itself."""
    if blow.where in ("saving", "opening"):
        return
    session.wait(moment(blow.at, reference, newest, SOON) + (7.0 if blow.real else 0.0))
    session.send(signal.SIGTERM if blow.where == "stopped" else signal.SIGKILL, blow.ranks)


def moment(at: float, reference: Reference, newest: int, within: int = EPOCHS) -> float:
    """Seconds after the start of a run that goes on from an epoch; one of the next epochs within so many."""
    left = min(within, EPOCHS - max(newest, 0)) / EPOCHS
    return at * reference.seconds * (STARTING + (1 - STARTING) * left)


def _still_there(run: Path, before: int, result: Result) -> int:
    """The newest whole checkpoint's epoch; lost, if it was later before, or there is a damaged one."""
    after = newest_whole(run)
    if after < before:
        result.add(LOST, f"the checkpoint of epoch {before} was whole; now the newest is {after}")
    if broken := damaged(run):
        result.add(LOST, f"a kill left {broken}")
    return after


# --- signals --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """A run that is asked to stop."""

    how: str  # "signal", "twice", "deadline" or "launcher"
    kind: Kind
    number: signal.Signals
    at: float
    ranks: tuple[int, ...]
    real: bool = False


def plan_stops(random: Random, quick: bool) -> list[Stop]:
    """Signals at random moments; a second signal; deadlines; launchers that are killed."""
    hows = ["signal"] * (28 if quick else 80) + ["deadline"] * (8 if quick else 20) + ["twice"] * (4 if quick else 12)
    stops = []
    for count, how in enumerate(hows):
        kind = KINDS[count % len(KINDS)] if how != "twice" else Kind()
        number = SIGNALS[count % len(SIGNALS)]
        real = how == "signal" and kind.processes == 1 and count % 12 == 0
        stops.append(Stop(how, kind, number, random.random(), _ranks(random, kind), real))
    launchers = [Stop("launcher", Kind(processes=2), signal.SIGKILL, random.random(), (0,)) for _ in range(2)]
    return stops + launchers * (1 if quick else 2)


def run_stops(lab: Lab, number: int, stop: Stop) -> Result:
    """It ends with 128 + the signal's number, or was over before; then it goes on to the same end."""
    result = Result("signals", number, str(stop))
    reference = lab.references[stop.kind]
    with trial_folder(lab, result) as folder:
        run, log = folder / "run", folder / "first.log"
        arguments = lab.beginning(stop.kind, run)
        {"signal": _signalled, "twice": _twice, "deadline": _deadline, "launcher": _launcher}[stop.how](
            stop, arguments, log, run, reference, result
        )
        _still_there(run, -1, result)
        if not result.faults:
            _go_on(lab, stop.kind, run, folder / "last.log", reference, result)
    return result


def _go_on(lab: Lab, kind: Kind, run: Path, log: Path, reference: Reference, result: Result) -> None:
    """To the end of the unbroken run, or compare what there is with it where the run has come further."""
    newest = newest_whole(run)
    if newest > EPOCHS or (newest == EPOCHS and is_evaluated(run, newest)):
        if different := other_metrics(run, reference.folder, prefix=True):
            result.add(LOST, different[0])
        return
    arguments = lab.beginning(kind, run) if newest < 0 else resuming(run, f"--config.num_epochs={EPOCHS}")
    finish(Session(arguments, log, kind.processes), run, reference.folder, result)


def _signalled(stop: Stop, arguments: list[str], log: Path, run: Path, reference: Reference, result: Result) -> None:
    program = REAL if stop.real else ()
    session = Session(arguments, log, stop.kind.processes, program=program)
    session.wait(moment(stop.at, reference, -1) + (7.0 if stop.real else 0.0))
    result.done[stop.number.name] += bool(session.running())
    session.send(stop.number, stop.ranks)
    _expect(session.ends(result), stop.number, stop.ranks, result)


def _expect(codes: list[int], number: int, ranks: tuple[int, ...], result: Result) -> None:
    """All ended by the signal, or were over before; the others, where some had none, as they do without those."""
    allowed = {0, 128 + number, -number}
    if len(set(ranks)) < len(codes):
        allowed |= {1, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
    if not set(codes) <= allowed:
        result.add(OTHER, f"exit codes {codes} instead of {128 + number}")


def _twice(stop: Stop, arguments: list[str], log: Path, run: Path, reference: Reference, result: Result) -> None:
    """A run that never comes to look at the first signal."""

    def deaf() -> None:
        Run.check_stop = lambda self, ended=False: None  # type: ignore[method-assign, assignment]

    session = Session([*arguments, "--config.num_epochs=1000"], log, before=deaf)
    _await_history(session, run)
    session.send(stop.number)
    if session.wait(1.5 * SAME_REQUEST):
        result.add(OTHER, f"it ended by the first signal, {session.codes}")
    session.send(stop.number)
    result.done["second signals"] += 1
    if not session.wait(2.0):
        result.add(HANG, "two seconds after the second signal it still runs")
    codes = session.ends(result)
    if codes != [128 + stop.number]:
        result.add(OTHER, f"exit codes {codes} instead of {-stop.number}")


def _deadline(stop: Stop, arguments: list[str], log: Path, run: Path, reference: Reference, result: Result) -> None:
    at = time.time() + moment(stop.at, reference, -1)
    environment = {DEADLINE: f"{at + 5:.3f}", MARGIN: "5"}
    session = Session(arguments, log, stop.kind.processes, environment)
    codes = session.ends(result)
    result.done["deadlines"] += any(codes)
    _expect(codes, signal.SIGTERM, (0, 1), result)


def _launcher(stop: Stop, arguments: list[str], log: Path, run: Path, reference: Reference, result: Result) -> None:
    """Torchrun is killed: its processes stop by themselves, soon."""
    session = Session([*arguments, "--config.num_epochs=1000"], log, program=TORCHRUN)
    _await_history(session, run)
    time.sleep(2 * stop.at)
    ranks = children_of(session.pids[0])
    session.send(signal.SIGKILL)
    result.done["launchers killed"] += len(ranks) == 2
    end = time.monotonic() + 60
    while any(map(is_alive, ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    if left := [pid for pid in ranks if is_alive(pid)]:
        result.add(HANG, f"processes {left} live on without their launcher")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    session.ends(result)


def _await_history(session: Session, run: Path) -> None:
    """Until the run has logged its first epoch."""
    file, end = run / HISTORY_FILE, time.monotonic() + 60
    while not (file.is_file() and b'"train/' in file.read_bytes()) and time.monotonic() < end and session.running():
        time.sleep(0.02)


def children_of(parent: int) -> list[int]:
    """The processes that a process has started."""
    pattern = re.compile(r"^\d+ \(.*\) \S (\d+) ", flags=re.DOTALL)
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            match = pattern.match(stat.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if match and int(match[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")
