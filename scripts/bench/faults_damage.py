"""Damaged files of scripts/bench/faults.py: one file of a run that had ended is spoilt, and the run goes on."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from flow_grpo.runs.folder import CONFIG_FILE, HISTORY_FILE
from flow_grpo.runs.lock import OWNER_FILE
from flow_grpo.runs.saved import CHECKPOINTS, finished_checkpoints
from scripts.bench.faults_processes import LOADED, LOST, OTHER, Result, Session
from scripts.bench.faults_runs import EPOCHS, Kind, Lab, differences, resuming, sentences, trial_folder

WORDS = re.compile(r"damaged|is not what it was|missing|cannot be read")
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
        result.done[damage.way] += 1
        result.plan = f"{damage.way} {file.relative_to(run)} ({damage})"
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
    newest = f"checkpoint-{EPOCHS - 1:06d}"
    told = is_told(said, newest if what.startswith("newest/") else name)
    if not told and (what.startswith("newest/") or what in (CONFIG_FILE, HISTORY_FILE)):
        result.add(LOADED, f"{what}: not a word")
    different = differences(run, unbroken, without=name if what.endswith("*") else "")
    if "other tensors" in different:
        result.add(LOST if told else LOADED, f"{what}: {'; '.join(different)}")
    elif different and not told:
        result.add(LOADED, f"{what}: {'; '.join(different)}, and not a word")


def is_told(said: str, name: str) -> bool:
    """Whether a line that names a file or checkpoint says that something is wrong with it."""
    return any(name in line and WORDS.search(line) for line in said.splitlines())
