"""Break runs off in every way, hundreds of times, and count what was lost.

    python scripts/bench/faults.py --quick [--out logs/bench/faults] [--only kills,damage] [--seed 0]

Runs of seconds on a random tiny SD3 are started by forking a process that has loaded everything already (some are
started anew), two at a time. Each ends like an unbroken run of the same kind, or is counted. It writes `faults.json`
and `table.md`; the exit code is 1 if anything was counted. `--quick` does a part of it in less than ten minutes.
`--only PART --trials NUMBER` repeats a trial: calls on the file system are the same, moments vary with the machine.

- kills: a run of GRPO or DRTune, of one process or two, is killed (SIGKILL) up to four times and goes on each time. Two
  of the four kills come just before a call on the file system, drawn from all calls that write a checkpoint; the others
  at a moment, or at a call while the run opens. Of two processes one or both are killed.
- signals: SIGTERM, SIGINT and SIGHUP at a moment, to one process or all; a second signal to a run that does not look
  at the first; FLOW_GRPO_DEADLINE; torchrun killed, whose processes have to end by themselves.
- damage: in a run that had ended, LoRA or full fine-tuning, one file of one kind (every file of a checkpoint, and of
  the run, is a kind) has a bit flipped, is cut, emptied, filled with zeros or deleted; then it goes on for an epoch.
- races: two to four processes begin, or go on with, one run at the same moment, or while it runs.
- disks: a tmpfs that is too small for the run (as root), a limit on the size of files, a run folder that is moved away,
  one that can no longer be written; then there is room again.

What is counted:

- lost: a checkpoint that had been written whole is neither there nor a newer one; or a run that was broken off and
  went on does not end with the bytes of training_state.safetensors, the lines of metrics.jsonl (less `seconds`) and the
  evaluators' records of the unbroken run.
- loaded damaged: a run went on from a checkpoint, a history or settings in which something was changed, or measured
  something else because of it, without a word that it is damaged.
- tracebacks: starts that wrote one. Hangs: processes that had not ended in time.
- other: an exit code or a sentence that is not the promised one, or files left behind.

A power cut is not tried: after SIGKILL the kernel still writes what it was given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from flow_grpo.files import read_object

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench import faults_damage, faults_stops, faults_writing
from scripts.bench.faults_processes import FAULTS, ROOT, Result, end_with_parent
from scripts.bench.faults_runs import Kind, Lab
from scripts.bench.machine import cpu_model

TOGETHER = 2  # trials at a time


@dataclass(frozen=True)
class Part:
    """One row of the table."""

    plan: Callable[[Random, bool], Sequence[Any]]
    run: Callable[[Lab, int, Any], Result]
    done: str  # what is counted as done


PARTS = {
    "kills": Part(faults_stops.plan_kills, faults_stops.run_kills, "SIGKILLs"),
    "signals": Part(faults_stops.plan_stops, faults_stops.run_stops, "stops"),
    "damage": Part(faults_damage.plan_damage, faults_damage.run_damage, "damaged files"),
    "races": Part(faults_writing.plan_races, faults_writing.run_races, "starts"),
    "disks": Part(faults_writing.plan_disks, faults_writing.run_disks, "broken disks"),
}


def prepare(lab: Lab, kinds: set[Kind]) -> None:
    """The models and the unbroken runs."""
    lab.build()
    for kind in sorted(kinds, key=str):
        lab.refer(kind)
        if kind.more:
            faults_damage.make_continuation(lab, kind)


def run_trial(lab: Lab, part: str, numbered: tuple[int, Any]) -> Result:
    """One trial of a part, in a process of the pool."""
    return PARTS[part].run(lab, *numbered)


def run_part(lab: Lab, part: str, plan: Sequence[tuple[int, Any]]) -> list[Result]:
    """All trials of a part; those that found something are told at once."""
    results = []
    with multiprocessing.get_context("fork").Pool(TOGETHER, end_with_parent) as pool:
        for result in tqdm(pool.imap_unordered(partial(run_trial, lab, part), plan), desc=part, total=len(plan)):
            results.append(result)
            if result.faults:
                tqdm.write(describe(result), file=sys.stderr)
    return sorted(results, key=lambda result: result.number)


def describe(result: Result) -> str:
    """A trial that found something: which, what, and the end of the log."""
    lines = "\n    ".join(line for line in result.log.splitlines()[-12:] if line.strip())
    return f"{result.part} {result.number}: {'; '.join(result.notes)}\n  {result.plan}\n    {lines}"


# --- output ---------------------------------------------------------------------------------------------


def count(results: Sequence[Result]) -> dict[str, Any]:
    """Trials, what was done in them, and how many showed each fault."""
    done = sum((result.done for result in results), Counter[str]())
    faults = {fault: sum(fault in result.faults for result in results) for fault in FAULTS}
    return {"trials": len(results), "done": dict(sorted(done.items())), **faults}


def table(report: dict[str, Any]) -> str:
    """A row for each part, with the code that it was run on."""
    lines = [f"| part | trials | done | {' | '.join(FAULTS)} | revision |", "|" + "---|" * (4 + len(FAULTS))]
    for part, row in report["parts"].items():
        kinds = ", ".join(f"{number} {name}" for name, number in row["done"].items())
        numbers = " | ".join(str(row[fault]) for fault in FAULTS)
        lines.append(
            f"| {part} | {row['trials']} | {sum(row['done'].values())} {PARTS[part].done}: {kinds} | {numbers} "
            f"| {row['revision']}{', quick' if row['quick'] else ''} |"
        )
    return "\n".join([*lines, "", f"Two trials at once on {report['cpu']}."]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="logs/bench/faults", help="folder to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a part of it, in less than ten minutes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: %(default)s)")
    parser.add_argument("--trials", default="", help="numbers of trials, with commas, to repeat those of one part")
    parser.add_argument("--seed", type=int, default=0, help="of the plan (default: %(default)s)")
    return parser.parse_args(arguments)


def plans(args: argparse.Namespace) -> dict[str, list[tuple[int, Any]]]:
    """The numbered trials of each part that is asked for."""
    chosen = {int(number) for number in args.trials.split(",") if number}
    found = {}
    for part in args.only.split(","):
        numbered = list(enumerate(PARTS[part].plan(Random(f"{part} {args.seed}"), args.quick)))
        found[part] = [(number, trial) for number, trial in numbered if not chosen or number in chosen]
    return found


def unmount(folder: Path) -> None:
    """What an interrupted trial has left mounted."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", line.split()[1]], check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write; 1 if anything was counted, 2 after one sentence about bad input."""
    args = parse(arguments)
    if unknown := set(args.only.split(",")) - PARTS.keys():
        print(f"--only is {args.only!r}: {sorted(unknown)[0]!r} is no part; {', '.join(PARTS)} are.", file=sys.stderr)
        return 2
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up on its way
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forked processes, which may be killed holding it
    planned = plans(args)
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        lab = Lab(Path(name))
        try:
            prepare(lab, {trial.kind for plan in planned.values() for _, trial in plan})
            for part, plan in planned.items():
                results[part] = run_part(lab, part, plan)
        finally:
            unmount(lab.folder)
    return write(results, args)


def revision() -> str:
    """Of this code, where there is a git checkout of it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git checkout"


def write(results: dict[str, list[Result]], args: argparse.Namespace) -> int:
    """Faults.json and table.md, in which the parts that were run now replace those of before; the exit code."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "faults.json"
    before = read_object(file)["parts"] if file.is_file() else {}
    now = {part: entry(found, args) for part, found in results.items()}
    parts = {part: (before | now)[part] for part in PARTS if part in before | now}
    report = {"cpu": cpu_model(), "parts": parts}
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    return int(any(found["failed"] for found in now.values()))


def entry(results: Sequence[Result], args: argparse.Namespace) -> dict[str, Any]:
    """What faults.json keeps of a part."""
    failed = [vars(result) for result in results if result.faults]
    return {"quick": args.quick, "seed": args.seed, "revision": revision(), **count(results), "failed": failed}


if __name__ == "__main__":
    sys.exit(main())
