"""The page of one or more runs, as `fme view` makes it, with figures as PNGs and their numbers in summary.json.

    python scripts/study/report.py logs/demo/drtune logs/demo/grpo --out logs/demo/report

All of it can be rebuilt from the run folders at any time, offline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.page.build import build_page
from flow_grpo.runs.folder import PAGE_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.study.records import Crossing, Evaluation, RunRecord

SUMMARY_FILE = "summary.json"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flow-matching-entropy")
ENTROPY_NATS = "entropy/nats"


@dataclass(frozen=True)
class Report:
    """What was built, and from what."""

    path: Path  # the page
    runs: tuple[RunRecord, ...]
    crossings: tuple[Crossing, ...]


def build_report(folders: Sequence[Path], out: Path) -> Report:
    """Read run folders; write summary.json, the figures that can be drawn, and the page, to `out`.

    Raises:
        ConfigError: one sentence on what a folder lacks, or why the runs cannot be compared.
    """
    from scripts.study.records import compare, load_runs

    runs = load_runs(folders)
    crossings = compare(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}.") from None
    write_atomically(out / SUMMARY_FILE, strict_json(summarise(runs, crossings), indent=2) + "\n")
    for name, draw in _figures(runs, crossings):
        with optional_figure(out / f"{name}.png"):
            draw().savefig(out / f"{name}.png", dpi=150)
    command = f"python scripts/study/report.py {' '.join(str(run.folder) for run in runs)} --out DIR"
    return Report(build_page(list(folders), out / PAGE_FILE, command), tuple(runs), tuple(crossings))


def summarise(runs: Sequence[RunRecord], crossings: Sequence[Crossing]) -> dict[str, Any]:
    """The figures of the report as plain data, nan included."""
    return {
        "base": _plain(runs[0].base),
        "runs": {run.label: _plain(run.final) for run in runs},
        "crossings": [
            {
                "runner": crossing.runner.label,
                "target": crossing.target.label,
                "level": crossing.level,
                "meaningful": crossing.meaningful,
                "evaluation": _plain(crossing.evaluation) if crossing.reached and crossing.evaluation else None,
                "seconds": crossing.seconds,
                "network_evaluations": crossing.network_evaluations,
                "fraction_of_seconds": crossing.fraction("seconds"),
                "fraction_of_network_evaluations": crossing.fraction("network_evaluations"),
            }
            for crossing in crossings
        ],
    }


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    metrics = dict(sorted({**evaluation.metrics, **evaluation.occasional}.items()))
    return {
        "step": evaluation.step,
        "seconds": evaluation.seconds,
        "network_evaluations": evaluation.network_evaluations,
        **metrics,
    }


# --- figures --------------------------------------------------------------------------------------------


def _figures(runs: Sequence[RunRecord], crossings: Sequence[Crossing]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and drawing of every figure that the runs have the data for."""
    from scripts.study import figures
    from scripts.study.records import ACCURACY, QUANTITIES, VENDI

    shown = figures.states(runs, crossings)
    for quantity in QUANTITIES:
        yield f"reward_vs_{quantity}", partial(figures.reward_figure, runs, crossings, quantity)
    yield "samples", partial(figures.samples_figure, shown)
    if all(ACCURACY in run.base.metrics for run in runs):
        yield "judge_accuracy", partial(figures.accuracy_figure, runs)
    if all(run.base.modes for run in runs):
        yield "modes", partial(figures.modes_figure, shown)
        yield "diversity_vs_reward", partial(figures.diversity_figure, runs)
    if all(VENDI in run.base.occasional for run in runs):
        yield "vendi_rke", partial(figures.vendi_rke_figure, runs)
    if all(ENTROPY_NATS in run.base.occasional for run in runs):
        yield "entropy", partial(figures.entropy_figure, runs)


def notes(runs: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before believing the comparison."""
    from scripts.study.records import SAME_START

    found = []
    starts = [run.base.reward for run in runs]
    if max(starts) - min(starts) > SAME_START:
        listed = ", ".join(f"{run.label} {run.base.reward:.4f}" for run in runs)
        found.append(f"The runs did not start from the same model: their rewards before training differ ({listed}).")
    for run in runs:
        if run.dropped:
            found.append(f"{run.label}: {run.dropped} evaluations are left out because their reward was not finite.")
        if run.skipped_epochs:
            found.append(
                f"{run.label}: updates were skipped in {run.skipped_epochs} epochs (loss or gradient not finite)."
            )
        if run.environment.get("earlier_sessions"):
            found.append(f"{run.label} was resumed {len(run.environment['earlier_sessions'])} times.")
    devices = {run.environment.get("device") for run in runs}
    if len(devices) > 1:
        found.append("The runs used different devices, so their seconds are not comparable.")
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="e.g. logs/demo/grpo")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Build the report; exit code 2 after one sentence about bad input."""
    arguments = parse_arguments(argv)
    with cli.one_sentence_errors():
        report = build_report(arguments.folders, arguments.out)
        for line in [*(crossing.sentence() for crossing in report.crossings), *notes(report.runs)]:
            print(line)
        print(f"page: {report.path.resolve()}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    main()
