"""DRTune and GRPO on the embedded tiny SD3, for the same training time from the same start, and a report of both.

    python scripts/study/demo.py [--seconds 180] [--out logs/demo] [--seed 42]

Each run trains for --seconds; evaluations come on top. The base model is the evaluation before training. Settings are
the recipes' own, except how often they evaluate and that they stop by the clock.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flow_grpo.commands.cli import one_sentence_errors

if TYPE_CHECKING:
    from scripts.study.records import Evaluation
    from scripts.study.report import Report

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT = ROOT / "scripts/train/train_sd3.py"
RECIPES = ROOT / "config/grpo.py"
NO_LIMIT = 1_000_000  # epochs: the clock stops the run
NUM_SEEDS = 16  # images of a prompt whose diversity is measured: those of the other evaluators
NEXT = """\
Next, on GPUs (README.md, "On GPUs"): GRPO on SD3.5-medium, rewarded by PickScore:
  accelerate launch --config_file scripts/accelerate_configs/multi_gpu.yaml --num_processes 4 \\
    scripts/train/train_sd3.py --config config/grpo.py:pickscore_sd3_4gpu"""


@dataclass(frozen=True)
class Method:
    """One of the two runs."""

    label: str
    run_name: str
    recipe: str
    eval_freq: int  # epochs
    entropy_freq: int  # epochs; a multiple of eval_freq
    save_freq: int  # epochs; of the checkpoints that visualize_from_checkpoints.py can show


# An epoch takes about 0.5 s for DRTune and 1.6 s for GRPO: DRTune is evaluated every 3 s to see when it overtakes.
METHODS = (
    Method("DRTune", "drtune", "tiny_sd3_use_gradient", eval_freq=6, entropy_freq=24, save_freq=48),
    Method("GRPO", "grpo", "tiny_sd3", eval_freq=10, entropy_freq=20, save_freq=20),
)


def train_command(method: Method, out: Path, seconds: float, seed: int, train_script: Path = TRAIN_SCRIPT) -> list[str]:
    """The command that trains one method into out/<run_name>."""
    overrides = {
        "logdir": out,
        "run_name": method.run_name,
        "seed": seed,
        "max_seconds": float(seconds),
        "num_epochs": NO_LIMIT,
        "eval_freq": method.eval_freq,
        "eval_diversity": "true",
        "eval_diversity_freq": method.eval_freq,
        "num_seeds": NUM_SEEDS,
        "eval_ode_log_prob": "true",
        "eval_ode_log_prob_freq": method.entropy_freq,
        "eval.ema": "false",
        "save_freq": method.save_freq,
        "num_checkpoint_limit": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, str(train_script), f"--config={RECIPES}:{method.recipe}", *flags]


def run_demo(out: Path, seconds: float, seed: int, train_script: Path = TRAIN_SCRIPT) -> int:
    """Train both, build the report, print the outcome; the exit code is that of the first command that fails."""
    from flow_grpo.runs.folder import fresh_folder
    from scripts.study.report import build_report

    start = time.monotonic()
    out = fresh_folder(out.resolve())
    for number, method in enumerate(METHODS, start=1):
        print(f"[{number}/{len(METHODS)}] {method.label}: {seconds:g} s of training, and evaluations", flush=True)
        code = subprocess.run(train_command(method, out, seconds, seed, train_script), cwd=ROOT).returncode
        if code != 0:
            return _give_up(method, code, out)
    report = build_report([out / method.run_name for method in METHODS], out / "report")
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.\n{outcome(report)}")
    return 0


def _give_up(method: Method, code: int, out: Path) -> int:
    """Say which command failed; leave no empty folder behind."""
    if not any(out.iterdir()):
        out.rmdir()
    print(f"error: training with {method.label} ended with exit code {code}; its message is above.", file=sys.stderr)
    return code if code > 0 else 1


def outcome(report: Report) -> str:
    """The demo's last lines: the numbers, where the report is, what to run next."""
    runs = {run.label: run for run in report.runs}
    rows = {"base": report.runs[0].base} | {label: run.final for label, run in runs.items()}
    table = [
        "held-out noise   reward   judge accuracy   Vendi, 95 % interval   RKE, 95 % interval",
        *(_row(label, evaluation) for label, evaluation in rows.items()),
    ]
    sentence = next(c.sentence() for c in report.crossings if c.runner.label == METHODS[0].label)
    return "\n".join([*table, sentence, f"Report: {report.path}", NEXT])


def _row(label: str, evaluation: Evaluation) -> str:
    from scripts.study.records import ACCURACY, RKE, VENDI
    from scripts.study.report import with_interval

    scores = f"{with_interval(evaluation, VENDI):>20}   {with_interval(evaluation, RKE):>19}"
    return f"{label:<16} {evaluation.reward:>6.4f}   {evaluation.metrics[ACCURACY]:>14.1%}   {scores}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="training time of each run (default: 180)")
    parser.add_argument("--out", type=Path, default=Path("logs/demo"), help="folder; logs/demo-2, ... if it exists")
    parser.add_argument("--seed", type=int, default=42, help="keys every random number (default: 42)")
    arguments = parser.parse_args(argv)
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be positive, and is {arguments.seconds}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    arguments = parse_arguments(argv)
    try:
        with one_sentence_errors():
            return run_demo(arguments.out, arguments.seconds, arguments.seed)
    except KeyboardInterrupt:
        print("\nerror: interrupted; run folders that were begun are kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
