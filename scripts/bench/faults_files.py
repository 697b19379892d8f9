"""Damaged files, two writers and full disks of scripts/bench/faults.py."""

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

from flow_grpo import checkpoint
from flow_grpo.runs.folder import CONFIG_FILE, HISTORY_FILE
from flow_grpo.runs.lock import LOCK_FILE, OWNER_FILE
from flow_grpo.runs.saved import CHECKPOINTS, finished_checkpoints
from scripts.bench.faults_runs import (
    EPOCHS,
    LOADED,
    LOST,
    OTHER,
    Kind,
    Lab,
    Reference,
    Result,
    Session,
    damaged,
    differences,
    finish,
    history,
    last_tensors,
    litter,
    newest_whole,
    resuming,
    trial_folder,
)

# --- damage ---------------------------------------------------------------------------------------------

WAYS = ("flip", "truncate", "delete", "empty", "zero")
DAMAGED_KINDS = (Kind(records=True, more=True), Kind(lora=False, records=True, more=True))


@dataclass(frozen=True)
class Damage:
    """One file of a run that had ended is damaged; then the run goes on for an epoch."""

    kind: Kind
    what: int  # the kinds of file take turns
    way: str
    seed: int


def plan_damage(random: Random, quick: bool) -> list[Damage]:
    """Two hundred of them, one in four in full fine-tuning."""
    kinds = [DAMAGED_KINDS[n % 4 == 3] for n in range(100 if quick else 200)]
    ways = random.choices(WAYS, weights=(3, 3, 3, 1, 1), k=len(kinds))
    return [
        Damage(kind, kinds[:n].count(kind), way, random.randrange(1 << 30))
        for n, (kind, way) in enumerate(zip(kinds, ways, strict=True))
    ]


def run_damage(lab: Lab, number: int, damage: Damage) -> Result:
    """The run says that it is damaged and goes on, or refuses in one sentence; or nothing depends on that file."""
    result, random = Result("damage", number, str(damage)), Random(damage.seed)
    before, after = unbroken_continuation(lab, damage.kind)
    with trial_folder(lab, result) as folder:
        run = folder / "run"
        shutil.copytree(before, run)
        (run / OWNER_FILE).write_text('{"host": "elsewhere", "process": 1, "since": "yesterday"}\n', encoding="utf-8")
        kinds = files_by_kind(run)
        what = sorted(kinds)[damage.what % len(kinds)]
        file = random.choice(kinds[what])
        spoil(file, damage.way, random)
        result.done, result.plan = 1, f"{damage.way} {file.relative_to(run)} ({damage})"
        session = Session(resuming(run, f"--config.num_epochs={EPOCHS}"), folder / "last.log")
        judge(session.ends(result)[0], what, file.name, run, after, session.said(), result)
    return result


def unbroken_continuation(lab: Lab, kind: Kind) -> tuple[Path, Path]:
    """The run that is damaged, and what becomes of it undamaged."""
    before = lab.references[kind].folder
    return before, before.with_name(f"{before.name}-continued")


def make_continuation(lab: Lab, kind: Kind) -> None:
    """Go on with a copy of the unbroken run, for an epoch."""
    before, after = unbroken_continuation(lab, kind)
    shutil.copytree(before, after)
    result = Result("unbroken", 0, str(kind))
    session = Session(resuming(after, f"--config.num_epochs={EPOCHS}"), after.with_suffix(".log"))
    if any(session.ends(result)) or result.faults:
        raise RuntimeError(f"the unbroken run of {kind} does not go on:\n{result.log}")


def files_by_kind(run: Path) -> dict[str, list[Path]]:
    """Every file of a run, by what it is; those of checkpoints that are not the newest begin with "older/"."""
    found = list(finished_checkpoints(run / CHECKPOINTS).values())
    kinds: dict[str, list[Path]] = {}
    for file in (file for file in sorted(run.rglob("*")) if file.is_file()):
        inside = next((folder for folder in found if file.is_relative_to(folder)), None)
        name = file.relative_to(inside or run).as_posix()
        if inside is None and "/" in name and not name.endswith("bandwidth.json"):
            name = f"{name.split('/')[0]}/*"
        if inside is not None:
            name = f"{'newest' if inside == found[-1] else 'older'}/{name}"
        kinds.setdefault(name, []).append(file)
    return kinds


def spoil(file: Path, way: str, random: Random) -> None:
    """Damage a file; an empty one, which can only grow, gets a byte."""
    content = bytearray(file.read_bytes())
    if way == "delete":
        file.unlink()
    elif not content:
        file.write_bytes(b"\0")
    elif way == "flip":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
    elif way == "zero":
        file.write_bytes(bytes(len(content)))
    else:
        os.truncate(file, 0 if way == "empty" else random.randrange(len(content)))


def judge(code: int, what: str, name: str, run: Path, unbroken: Path, said: str, result: Result) -> None:
    """Count what is not allowed."""
    if code == 2:
        if sentences(said) != 1:
            result.add(OTHER, f"{sentences(said)} sentences with exit code 2")
        return
    if code:
        result.add(OTHER, f"exit code {code}")
        return
    told = "damaged" in said or "is not what it was" in said or "missing" in said
    must_tell = what.startswith("newest/") or what in (CONFIG_FILE, HISTORY_FILE)
    if must_tell and not told:
        result.add(LOADED, f"{what}: not a word")
    different = differences(run, unbroken, without=name if what.endswith("*") else "")
    if last_tensors(run) != last_tensors(unbroken):
        result.add(LOST if told else LOADED, f"{what}: {'; '.join(different)}")
    elif different and not told:
        result.add(LOADED, f"{what}: {'; '.join(different)}, and not a word")


def sentences(said: str) -> int:
    """How many errors a process has told."""
    return len(re.findall(r"^error: ", said, flags=re.MULTILINE))


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
        result.done = race.writers
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
    result.done += 1
    check_end(code, session.said(), run, result)
    mend()
    if not result.faults and code:
        _whole_again(lab, disk, run, folder, reference, result)


def check_end(code: int, said: str, run: Path, result: Result) -> None:
    """One sentence, whole checkpoints, no litter."""
    if code not in (0, 1, 2):
        result.add(OTHER, f"exit code {code}")
    if code and sentences(said) != 1:
        result.add(OTHER, f"{sentences(said)} sentences with exit code {code}")
    if broken := damaged(run):
        result.add(LOST, f"{broken}")
    if left := litter(run):
        result.add(OTHER, f"left {left}")


def _whole_again(lab: Lab, disk: Disk, run: Path, folder: Path, reference: Reference, result: Result) -> None:
    go_on = resuming(run, f"--config.num_epochs={EPOCHS}") if newest_whole(run) >= 0 else lab.beginning(disk.kind, run)
    if newest_whole(run) < EPOCHS:
        finish(Session(go_on, folder / "last.log"), run, reference.folder, result)
    elif history(run) != history(reference.folder):
        result.add(LOST, "other metrics")


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
    result.done += 1
    if run.exists():
        result.add(OTHER, f"it made the folder again: {sorted(path.name for path in run.iterdir())}")
        return
    away.rename(run)
    for half in run.rglob("*.tmp"):  # that no process could find any more
        half.unlink()
    check_end(code, session.said(), run, result)
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
    result.done += bool(code)
    _check_refusal(run, folder, user, result)
    _set_modes(run, 0o777)
    check_end(code, session.said(), run, result)
    if not result.faults and code:
        _whole_again(lab, disk, run, folder, reference, result)


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
