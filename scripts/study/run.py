"""Train the study's runs: those that are done are skipped, those that were cut short go on from their last checkpoint.

    python scripts/study/run.py [--quick] [--only scenes-nft,seed3] [--jobs 2] [--logs logs/study]

What there is to train is in testbeds.py. Every run has one thread, and --jobs of them train at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.commands.cli import create_folder, one_sentence_errors
from flow_grpo.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.study.paths import ROOT
from scripts.study.testbeds import TESTBEDS, StudyRun

TRAIN_SCRIPT, RECIPES = ROOT / "scripts/train/train_sd3.py", ROOT / "config/grpo.py"

# settings that say where a run goes, how it is reported and how it is started: none changes what is trained
NOT_TRAINED = ("logdir", "run_name", "trackers", "project", "resume_from", "num_processes")


class State(Enum):
    """How far a run is."""

    NEW = "to train"
    BEGUN = "to go on"
    DONE = "done"


def state_of(run: StudyRun, out: Path) -> State:
    """By the latest checkpoint in the run's folder; one that was trained with any other setting does not count.

    Raises ConfigError where the folder is damaged.
    """
    from flow_grpo.model_checks import choose_lora_targets
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.runs.config import read_config
    from flow_grpo.runs.folder import flatten
    from flow_grpo.runs.guards import early_stop
    from flow_grpo.runs.resuming import is_over
    from flow_grpo.runs.saved import CHECKPOINTS, checkpoint_state, find_checkpoint, finished_checkpoints

    folder = out / run.name
    if not finished_checkpoints(folder / CHECKPOINTS):
        return State.NEW
    try:
        config, state = read_config(folder, {}), checkpoint_state(find_checkpoint(str(folder), subject=str(folder)))
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}; move {folder} away to train this run again.") from None
    expected = get_config(run.recipe)
    expected.update_from_flattened_dict(run.settings)
    for settings in (config, expected):  # as a run notes them
        choose_lora_targets(settings)
    if _trained(config) != _trained(expected):
        return State.NEW
    epoch, seconds = state["counters"]["epoch"], state["counters"]["seconds"]
    over = is_over(config, epoch, seconds) or early_stop(folder, flatten(config.to_dict()), epoch)
    return State.DONE if over and state.get("evaluated", True) else State.BEGUN


def _trained(config: ConfigDict) -> dict[str, Any]:
    """The settings that decide what is trained, and what is measured of it."""
    from flow_grpo.recipes.base import leaves

    return {key: value for key, value in leaves(config) if key not in NOT_TRAINED}


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
        set_aside(out / run.name)
    with (out / f"{run.name}.log").open("a", encoding="utf-8") as log:
        return subprocess.run(command(run, out, state), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode


def set_aside(folder: Path) -> None:
    """Move a run that was trained with other settings out of the way; ConfigError if it is being written."""
    from flow_grpo.runs.lock import in_use, is_locked
    from flow_grpo.runs.saved import free_name

    if not folder.exists():
        return
    if is_locked(folder):
        raise ConfigError(in_use(folder))
    folder.rename(free_name(folder.with_name(f"{folder.name}.earlier")))


def train_all(runs: Sequence[StudyRun], out: Path, jobs: int) -> list[str]:
    """Train those that are not done; the names of those that failed."""
    from tqdm import tqdm

    create_folder(out)
    waiting = [run for run in runs if state_of(run, out) is not State.DONE]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done; {len(waiting)} to train, {jobs} at once")
    with ThreadPoolExecutor(jobs) as pool:
        codes = list(tqdm(pool.map(lambda run: train(run, out), waiting), total=len(waiting), desc="runs"))
    return [run.name for run, code in zip(waiting, codes, strict=True) if code != 0]


def planned(quick: bool) -> list[StudyRun]:
    """All runs of the study, or those of `make study-quick`."""
    return [run for testbed in TESTBEDS.values() for run in (testbed.quick() if quick else testbed.plan())]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the runs of `make study-quick`")
    parser.add_argument("--only", default="", help="runs whose names hold one of these words, commas between")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--logs", type=Path, default=Path("logs/study"), help="folder (default: logs/study)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not allowed; it takes a whole number from 1 on")
    args.words = [word.strip() for word in args.only.split(",") if word.strip()]
    return args


def chosen(args: argparse.Namespace) -> list[StudyRun]:
    """The planned runs that --only names; ConfigError where a word names none."""
    runs = planned(args.quick)
    for word in args.words:
        if not any(word in run.name for run in runs):
            raise ConfigError(f"--only {word}: no run has such a name; {runs[0].name} is one.")
    return [run for run in runs if not args.words or any(word in run.name for word in args.words)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0, or 1 after naming the runs that failed. A mistake ends the process with 2, and a sentence."""
    args = parse(arguments)
    with one_sentence_errors():
        failed = train_all(chosen(args), args.logs.resolve(), args.jobs)
    if failed:
        print(f"error: {', '.join(failed)} failed; their logs are in {args.logs}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
