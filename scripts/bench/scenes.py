"""Methods on scenes, with a reward of 0 or 1 and with the log-probability of being right, beside the exact law.

    python scripts/bench/scenes.py cost              seconds of an epoch of each method, on two free cores
    python scripts/bench/scenes.py curve             the exact law, from 400 base images of each prompt
    python scripts/bench/scenes.py train --jobs 2    three seeds of each; done runs are skipped
    python scripts/bench/scenes.py write             results.json, table.md and frontier.png

Cost and curve are committed, in assets/figures/scenes. The epochs of a method are its seconds in BUDGETS over its seconds an
epoch there: fixed before any run, so that a busy machine changes nothing. `write` keeps the committed outcomes of runs
that are not in the logs, as long as the exact law is the same.

- Recipes are `scenes_<method>`. All train on the captions of train_hard.jsonl: two objects, counting, position.
- Evaluation: 8 images of each of the 100 held-out captions, of all six kinds, and 16 of the 50 of the trained kinds for
  diversity, on the same noises for all.
- Right is what the judge finds right, a detector that no reward comes from.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.files import read_object, strict_json, write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.machine import cpu_model
from scripts.bench.scenes_results import CURVE, write
from scripts.study import curve as study_curve
from scripts.study.plan import StudyRun
from scripts.study.run import State, state_of, train_all

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOGS = ROOT / "assets/figures/scenes", Path("logs/bench/scenes")
SEEDS, EVALUATIONS, THREADS = (0, 1, 2), 3, 2
IMAGES = 400  # of the base model, of each prompt, for the curve
BUDGETS = {"nft": 420.0, "grpo": 420.0, "drtune": 210.0, "anchored": 210.0}  # seconds of training on two free cores
SETTINGS: Mapping[str, Any] = {
    "prompts.train": "assets/prompts/scenes/train_hard.jsonl",
    "prompts.eval_diversity": "assets/prompts/scenes/test_hard.jsonl",
    "eval.num_image_per_prompt": 8,
    "diversity.num_draws": 50,
    "eval.rewards": ("scenes",),
    "eval_ode_log_prob": False,
}
ROUNDS = 3  # epochs of each method that are timed


def cost(out: Path) -> None:
    """Measure every method in turn, so that what else the machine does meets all of them alike; write cost.json."""
    import torch
    from accelerate import Accelerator

    from scripts.bench.methods import epochs_of, seconds_of

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder, epochs_of(_recipes(), folder, Accelerator(cpu=True)) as epochs:
        seconds = seconds_of(epochs, ROUNDS)
    found = {"machine": cpu_model(), "threads": THREADS, "rounds": ROUNDS, "seconds": seconds}
    write_atomically(out / "cost.json", strict_json(found, indent=1) + "\n")


def curve(out: Path, logs: Path) -> None:
    """Draw the base model's images, and write curve.json and curve.png."""
    test = f"prompts.test={SETTINGS['prompts.eval_diversity']}"
    study_curve.main(["scenes_nft", test, f"num_threads={THREADS}", "--images", str(IMAGES), "--out", str(logs)])
    for name in (CURVE, "curve.png"):
        write_atomically(out / name, (logs / "scenes_nft" / name).read_bytes())


def _recipes() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Name -> recipe, and what differs from it."""
    return {name: (f"scenes_{name}", SETTINGS) for name in BUDGETS}


def plan(out: Path = RESULTS) -> list[StudyRun]:
    """Three seeds of each method, with epochs for its budget by the committed seconds an epoch."""
    seconds = read_object(out / "cost.json")["seconds"]
    runs = []
    for seed in SEEDS:
        for name, budget in BUDGETS.items():
            epochs = max(1, round(budget / seconds[name]))
            every = -(-epochs // EVALUATIONS)
            once = {"num_epochs": epochs, "save_freq": every, "eval.curve": str((out / CURVE).resolve()), **SETTINGS}
            runs.append(StudyRun("scenes", name, f"scenes_{name}", seed, 0.0, every, once))
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one of the four; 0, or 1 after naming the runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve", "train", "write"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--only", default="", help="train and write: methods, commas between (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="train and write: of these (default: all)")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the runs and of base images")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    only = [word for word in args.only.split(",") if word]
    with one_sentence_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "cost":
            cost(args.out)
            return 0
        if args.what == "curve":
            curve(args.out, args.logs.resolve())
            return 0
        runs = [run for run in plan(args.out) if not only or run.label in only]
        runs = [run for run in runs if run.seed in args.seeds]
        if args.what == "write":
            write([run for run in runs if state_of(run, args.logs) is State.DONE], args.logs, args.out)
            return 0
        failed = train_all(runs, args.logs.resolve(), args.jobs)
        if failed:
            print(f"error: {', '.join(failed)} failed; their logs are in {args.logs}.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
