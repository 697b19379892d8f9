"""Train the study's runs: those that are done are skipped, those that were cut short go on from their last checkpoint.

    python scripts/study/run.py [--quick] [--only claims,grpo-negative] [--jobs 2] [--out logs/study]

Every run has one thread, and --jobs of them train at once; their seconds are comparable only with each other's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from scripts.study import plan
from scripts.study.demo import RECIPES, ROOT, TRAIN_SCRIPT
from scripts.study.plan import StudyRun


class State(Enum):
    """How far a run is."""

    NEW = "to train"
    BEGUN = "to go on"
    DONE = "done"


def state_of(run: StudyRun, out: Path) -> State:
    """By the latest checkpoint in the run's folder; one that was trained with other settings does not count."""
    from flow_grpo.settings import checkpoint_state, finished_checkpoints, is_over, leaves
    from scripts.diversity_metrics.checkpoints import read_config

    folder = out / run.name
    finished = finished_checkpoints(folder / "checkpoints")
    if not finished:
        return State.NEW
    config, counters = read_config(folder, {}), checkpoint_state(finished[max(finished)])["counters"]
    values = dict(leaves(config))
    if config.recipe != run.recipe or any(values[key] != value for key, value in run.settings.items()):
        return State.NEW
    return State.DONE if is_over(config, counters["epoch"], counters["seconds"]) else State.BEGUN


def command(run: StudyRun, out: Path, state: State) -> list[str]:
    """The command that trains a run, or goes on with it."""
    settings = run.settings | {"logdir": out, "run_name": run.name, "trackers": ()}
    if state is State.BEGUN:
        settings["resume_from"] = out / run.name
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, str(TRAIN_SCRIPT), f"--config={RECIPES}:{run.recipe}", *flags]


def train(run: StudyRun, out: Path) -> int:
    """Train one run to its end, its output in <name>.log beside its folder; the exit code."""
    state = state_of(run, out)
    if state is State.NEW:
        shutil.rmtree(out / run.name, ignore_errors=True)
    with (out / f"{run.name}.log").open("a") as log:
        return subprocess.run(command(run, out, state), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode


def train_all(runs: Sequence[StudyRun], out: Path, jobs: int) -> list[str]:
    """Train those that are not done; the names of those that failed."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if state_of(run, out) is not State.DONE]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done; {len(waiting)} to train, {jobs} at once")
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(tqdm(pool.map(lambda run: train(run, out), waiting), total=len(waiting), desc="runs"))
    return [run.name for run, code in zip(waiting, codes, strict=True) if code != 0]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the runs of `make study-quick`")
    parser.add_argument("--only", default="", help="runs whose names hold one of these words, commas between")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("logs/study"), help="folder (default: logs/study)")
    args = parser.parse_args(arguments)
    plan_runs = plan.quick() if args.quick else plan.whole()
    words = [word.strip() for word in args.only.split(",") if word.strip()]
    args.runs = [run for run in plan_runs if not words or any(word in run.name for word in words)]
    if not args.runs:
        parser.error(f"--only {args.only}: no run has such a name; {plan_runs[0].name} is one")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0, or 1 after naming the runs that failed."""
    args = parse(arguments)
    failed = train_all(args.runs, args.out.resolve(), args.jobs)
    if failed:
        print(f"error: {', '.join(failed)} failed; their logs are in {args.out}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
