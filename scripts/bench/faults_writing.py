"""Two writers and bad disks of scripts/bench/faults.py."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from flow_grpo.runs.folder import CONFIG_FILE, HISTORY_FILE
from flow_grpo.runs.lock import LOCK_FILE
from flow_grpo.runs.saved import CHECKPOINTS
from flow_grpo.training import checkpoint
from scripts.bench.faults_processes import LOST, OTHER, Result, Session
from scripts.bench.faults_runs import (
    EPOCHS,
    Kind,
    Lab,
    Reference,
    damaged,
    differences,
    finish,
    is_evaluated,
    litter,
    newest_whole,
    other_metrics,
    resuming,
    sentences,
    trial_folder,
)

# --- races ----------------------------------------------------------------------------------------------

HOLDER = re.compile(r"is being written by process (\d+) on (\S+) since (\S+);")
OVER = re.compile(r"already holds a run|config\.num_epochs = \d+")


@dataclass(frozen=True)
class Race:
    """Several starts for one run folder."""

    how: str  # "begin" or "go on", all at once; "late": one begins, the others go on with it
    kind: Kind
    writers: int
    at: float


def plan_races(random: Random, quick: bool) -> list[Race]:
    """Two to four writers."""
    hows = ("begin", "go on", "late")
    kinds = (Kind(), Kind("drtune"))
    return [Race(hows[n % 3], kinds[n % 2], random.randint(2, 4), random.random()) for n in range(18 if quick else 60)]


def run_races(lab: Lab, number: int, race: Race) -> Result:
    """One goes on; the others end with 2, and name it."""
    result, reference = Result("races", number, str(race)), lab.references[race.kind]
    with trial_folder(lab, result) as folder:
        run = folder / "run"
        if race.how == "go on":
            shutil.copytree(reference.folder, run)
            shutil.rmtree(max((run / CHECKPOINTS).glob("checkpoint-*")))
        begin, go_on = lab.beginning(race.kind, run), resuming(run)
        gate = time.time() + 0.2
        sessions = []
        for n in range(race.writers):
            if race.how == "late" and n == 1:
                _await_file(run / CONFIG_FILE)
                time.sleep(0.7 * race.at * reference.seconds)
            arguments = go_on if race.how == "go on" or (race.how == "late" and n) else begin
            at = gate if race.how != "late" else 0.0
            sessions.append(Session(arguments, folder / f"{n}.log", before=lambda at=at: _wait_until(at)))  # type: ignore[misc]
        _judge_race(sessions, result)
        result.done[race.how] += race.writers
        if not result.faults and (different := differences(run, reference.folder)):
            result.add(LOST, "; ".join(different))
    return result


def _wait_until(at: float) -> None:
    while time.time() < at:
        time.sleep(0.001)


def _await_file(file: Path) -> None:
    end = time.monotonic() + 30
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.005)


def _judge_race(sessions: list[Session], result: Result) -> None:
    codes = [session.ends(result)[0] for session in sessions]
    winners = [session.pids[0] for session, code in zip(sessions, codes, strict=True) if code == 0]
    result.log = "".join(f"--- {session.log.name}\n{session.said()[-1500:]}" for session in sessions)
    if len(winners) != 1 or set(codes) - {0, 2}:
        result.add(LOST, f"exit codes {codes}")
        return
    for session in sessions:
        if session.pids[0] in winners:
            continue
        held = HOLDER.search(session.said())
        if held is None and not OVER.search(session.said()):
            result.add(OTHER, f"{session.log.name} does not say who writes")
        elif held and (int(held[1]) not in winners or held[2] != socket.gethostname()):
            result.add(OTHER, f"{session.log.name} names process {held[1]} on {held[2]} instead of {winners}")


# --- disks ----------------------------------------------------------------------------------------------

NOBODY = 65534


@dataclass(frozen=True)
class Disk:
    """A run whose disk lets it down."""

    how: str  # "full": a small tmpfs; "limit": RLIMIT_FSIZE; "vanish": the folder is moved away; "read-only"
    kind: Kind
    at: float


def plan_disks(random: Random, quick: bool) -> list[Disk]:
    """Both loops."""
    hows = ("full", "full", "limit", "vanish", "read-only")
    kinds = (Kind(records=True), Kind("drtune"))
    return [Disk(hows[n % 5], kinds[n // 5 % 2], random.random()) for n in range(20 if quick else 60)]


def run_disks(lab: Lab, number: int, disk: Disk) -> Result:
    """It ends or goes on in words, keeps what was saved, leaves no litter; with room again it comes to the same end."""
    result, reference = Result("disks", number, str(disk)), lab.references[disk.kind]
    how = disk.how if disk.how != "full" or os.geteuid() == 0 else "limit"
    with trial_folder(lab, result) as folder:
        BREAK[how](lab, replace(disk, how=how), folder, reference, result)
    return result


def _full(lab: Lab, disk: Disk, folder: Path, reference: Reference, result: Result) -> None:
    place = folder / "disk"
    place.mkdir()
    size = int((0.15 + 0.8 * disk.at) * size_of(reference.folder))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        return _limit(lab, disk, folder, reference, result)
    try:
        _broken_then_whole(
            lab, disk, place / "run", folder, reference, result,
            mend=lambda: subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True),
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    return None


def size_of(folder: Path) -> int:
    """What a folder takes on a tmpfs."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


def _limit(lab: Lab, disk: Disk, folder: Path, reference: Reference, result: Result) -> None:
    """From the second checkpoint on no file may be larger than so many bytes."""
    whole = checkpoint.Saver._attempt
    largest = max(file.stat().st_size for file in reference.folder.rglob("*") if file.is_file())
    limit = int(disk.at * largest)

    def limited(saver: checkpoint.Saver, *args: object) -> str | None:
        if saver.run.counters.epoch > 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return whole(saver, *args)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def before() -> None:
        checkpoint.Saver._attempt = limited  # type: ignore[method-assign, assignment]

    _broken_then_whole(lab, disk, folder / "run", folder, reference, result, before=before)


def _broken_then_whole(
    lab: Lab,
    disk: Disk,
    run: Path,
    folder: Path,
    reference: Reference,
    result: Result,
    before: Callable[[], None] = lambda: None,
    mend: Callable[[], object] = lambda: None,
) -> None:
    """A run without room, and then with it."""
    session = Session(lab.beginning(disk.kind, run), folder / "first.log", before=before)
    code = session.ends(result)[0]
    result.done[disk.how] += 1
    check_end(code, session.said(), run, result)
    mend()
    if not result.faults and code:
        _whole_again(lab, disk, run, folder, reference, result)


def check_end(code: int, said: str, run: Path, result: Result, tidy: bool = True) -> None:
    """One sentence, whole checkpoints, no litter; `tidy`: whether the process could still remove it."""
    if code not in (0, 1, 2):
        result.add(OTHER, f"exit code {code}")
    if code and sentences(said) != 1:
        result.add(OTHER, f"{sentences(said)} sentences with exit code {code}")
    if broken := damaged(run):
        result.add(LOST, f"{broken}")
    if tidy and (left := litter(run)):
        result.add(OTHER, f"left {left}")


def _whole_again(lab: Lab, disk: Disk, run: Path, folder: Path, reference: Reference, result: Result) -> None:
    go_on = resuming(run, f"--config.num_epochs={EPOCHS}") if newest_whole(run) >= 0 else lab.beginning(disk.kind, run)
    if newest_whole(run) < EPOCHS or not is_evaluated(run, EPOCHS):
        finish(Session(go_on, folder / "last.log"), run, reference.folder, result)
    elif different := other_metrics(run, reference.folder):
        result.add(LOST, different[0])


def _vanish(lab: Lab, disk: Disk, folder: Path, reference: Reference, result: Result) -> None:
    """The folder is moved away while the run writes it, and back after the run has ended."""
    run, away = folder / "run", folder / "away"
    session = Session(lab.beginning(disk.kind, run), folder / "first.log")
    _await_file(run / CONFIG_FILE)
    time.sleep(0.8 * disk.at * reference.seconds)
    if session.running():
        run.rename(away)
    code = session.ends(result)[0]
    if not away.exists():
        return
    result.done[disk.how] += 1
    if run.exists():
        result.add(OTHER, f"it made the folder again: {sorted(path.name for path in run.iterdir())}")
        return
    away.rename(run)
    _remove_halves(run)
    check_end(code, session.said(), run, result, tidy=False)
    if not result.faults:
        _whole_again(lab, disk, run, folder, reference, result)


def _read_only(lab: Lab, disk: Disk, folder: Path, reference: Reference, result: Result) -> None:
    """Its folders lose the right to be written, for a user who is not root."""
    run = folder / "logs" / "run"
    run.parent.mkdir()
    run.parent.chmod(0o777)
    user = (lambda: os.setuid(NOBODY)) if os.geteuid() == 0 else (lambda: None)
    session = Session(lab.beginning(disk.kind, run), folder / "first.log", before=user)
    _await_file(run / CONFIG_FILE)
    time.sleep(0.8 * disk.at * reference.seconds)
    _set_modes(run, 0o555)
    code = session.ends(result)[0]
    result.done[disk.how] += bool(code)
    _check_refusal(run, folder, user, result)
    _set_modes(run, 0o777)
    _remove_halves(run)
    check_end(code, session.said(), run, result, tidy=False)
    if not result.faults and code:
        _whole_again(lab, disk, run, folder, reference, result)


def _remove_halves(run: Path) -> None:
    """Files that were being written when their folder could no longer be reached."""
    for half in run.rglob("*.tmp"):
        half.unlink()


def _check_refusal(run: Path, folder: Path, user: Callable[[], None], result: Result) -> None:
    """Nobody can go on with it meanwhile."""
    if newest_whole(run) < 0:
        return
    session = Session(resuming(run), folder / "refused.log", before=user)
    code = session.ends(result)[0]
    if code != 2 or sentences(session.said()) != 1:
        result.add(OTHER, f"going on in a read-only folder ended with {code}")


def _set_modes(run: Path, mode: int) -> None:
    """Of all folders, and the files that are appended to."""
    for path in [run, *run.rglob("*")]:
        if path.is_dir() or path.name in (HISTORY_FILE, LOCK_FILE):
            try:
                path.chmod(mode & 0o666 if path.is_file() else mode)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise


BREAK = {"full": _full, "limit": _limit, "vanish": _vanish, "read-only": _read_only}
