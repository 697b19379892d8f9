"""A report of one or more runs: one HTML file that needs nothing else, and its figures as PNGs.

    python scripts/study/report.py logs/demo/drtune logs/demo/grpo --out logs/demo/report

It is a pure function of the run folders: it can be rebuilt from them at any time, offline.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.study.figures import State
    from scripts.study.records import Crossing, Evaluation, RunRecord

REPORT_FILE, SUMMARY_FILE, TEMPLATE = "report.html", "summary.json", "report.html.j2"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flow-matching-entropy")
ENTROPY_NATS, NOT_MEASURED = "entropy/nats", "not measured"
NOT_SETTINGS = ("run_name", "recipe", "logdir", "project", "trackers", "resume_from")  # of no effect on the numbers


@dataclass(frozen=True)
class Picture:
    """One figure of the report."""

    file: str
    title: str
    caption: str
    data: str  # base64 of the PNG


@dataclass(frozen=True)
class Report:
    """What was built, and from what."""

    path: Path  # the HTML file
    runs: tuple[RunRecord, ...]
    crossings: tuple[Crossing, ...]


def build_report(folders: Sequence[Path], out: Path) -> Report:
    """Read run folders; write summary.json, then the figures that can be drawn and report.html, to `out`.

    Raises:
        ConfigError: one sentence on what a folder lacks, or why the runs cannot be compared.
    """
    from scripts.study.figures import states
    from scripts.study.records import compare, load_runs

    runs = load_runs(folders)
    crossings = compare(runs)
    shown = states(runs, crossings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}.") from None
    write_atomically(out / SUMMARY_FILE, strict_json(summarise(runs, crossings), indent=2) + "\n")
    pictures = _pictures(runs, crossings, shown, out)
    html = _render(runs, crossings, shown, pictures)
    write_atomically(out / REPORT_FILE, html.encode("utf-8", "backslashreplace"))  # folders of undecodable names
    return Report(out / REPORT_FILE, tuple(runs), tuple(crossings))


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


def _pictures(
    runs: Sequence[RunRecord], crossings: Sequence[Crossing], shown: Sequence[State], out: Path
) -> list[Picture]:
    """Draw and save every figure that the runs have the data for; one that cannot be drawn is a warning."""
    from scripts.study import figures
    from scripts.study.records import ACCURACY, QUANTITIES, VENDI

    mark = " The star is where one run reaches the other's final reward." if len(runs) > 1 else ""
    counted = {"seconds": "", "network_evaluations": " Forward passes are counted, backward passes are not."}
    drawn: list[tuple[str, str, str, Callable[[], Figure]]] = [
        (
            f"reward_vs_{quantity}",
            f"Reward against {quantity.replace('_', ' ')}",
            "Evaluated on fixed prompts and on noise that is never trained on; what that costs is not counted."
            f"{counted[quantity]}{mark}",
            partial(figures.reward_figure, runs, crossings, quantity),
        )
        for quantity in QUANTITIES
    ]
    drawn.append(
        (
            "samples",
            "Samples",
            "Each row is a test prompt, each column a noise: the same in every panel.",
            partial(figures.samples_figure, shown),
        )
    )
    if _all_have(runs, ACCURACY):
        drawn.append(
            (
                "judge_accuracy",
                "What an independent judge sees",
                "The share of images whose prompt is recognised by a model that was trained apart from the reward. A "
                "reward that rises while this falls is being exploited, not satisfied.",
                partial(figures.accuracy_figure, runs),
            )
        )
    if all(run.base.modes for run in runs):
        drawn.append(
            (
                "modes",
                "Modes before and after",
                "Modes are what a prompt leaves open, such as the colour. The share of images in each, over all "
                "prompts, according to the judge.",
                partial(figures.modes_figure, shown),
            )
        )
        drawn.append(
            (
                "diversity_vs_reward",
                "Diversity at equal reward",
                "Methods that move at different speeds are compared at the same reward, not at the same time: each "
                "point is an evaluation, the large markers are the last.",
                partial(figures.diversity_figure, runs),
            )
        )
    if all(VENDI in run.base.occasional for run in runs):
        drawn.append(
            (
                "vendi_rke",
                "Vendi score and RKE",
                "Means over prompts of the scores of one prompt's images, with 95 % intervals over the images. "
                "The features are those of a model that was trained apart from the reward; RKE's bandwidth was chosen "
                "on the base model. On the right, diversity at equal reward.",
                partial(figures.vendi_rke_figure, runs),
            )
        )
    if all(ENTROPY_NATS in run.base.occasional for run in runs):
        drawn.append(
            (
                "entropy",
                "Differential entropy and the spread of the log-density",
                "Of what the guided ODE makes of the noise, over the VAE-scaled latents, given the prompt; the "
                "same noise and probes at every evaluation. Bars are 95 % intervals from samples and probes together.",
                partial(figures.entropy_figure, runs),
            )
        )
    found = (_save(draw, f"{name}.png", title, caption, out) for name, title, caption, draw in drawn)
    return [picture for picture in found if picture]


def _save(draw: Callable[[], Figure], file: str, title: str, caption: str, out: Path) -> Picture | None:
    with optional_figure(out / file):
        draw().savefig(out / file, dpi=150)
        return Picture(file, title, caption, base64.b64encode((out / file).read_bytes()).decode())
    return None


def _all_have(runs: Sequence[RunRecord], metric: str) -> bool:
    return all(metric in run.base.metrics for run in runs)


# --- tables ---------------------------------------------------------------------------------------------


def _render(
    runs: Sequence[RunRecord], crossings: Sequence[Crossing], shown: Sequence[State], pictures: Sequence[Picture]
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        TEMPLATE
    )
    differing, shared = _settings(runs)
    return template.render(
        title=" and ".join(run.label for run in runs),
        sentences=[crossing.sentence() for crossing in crossings],
        notes=notes(runs),
        figures_header=[state.label for state in shown],
        figures_rows=_figures(shown),
        averaged=_averaged(runs),
        pictures=pictures,
        labels=[run.label for run in runs],
        differing=differing,
        shared=shared,
        environments=_environments(runs),
        command=f"python scripts/study/report.py {' '.join(str(run.folder) for run in runs)} --out DIR",
    )


def _figures(shown: Sequence[State]) -> list[tuple[str, list[str]]]:
    """Rows of the table of final figures, a column for each state."""
    from scripts.study.records import ENTROPY, RKE, VENDI

    evaluations = [state.evaluation for state in shown]
    names = [name for name in evaluations[0].metrics if not name.startswith("modes/")]
    rows = [(_title(name), [f"{evaluation.metrics[name]:.4f}" for evaluation in evaluations]) for name in names]
    if evaluations[0].modes:
        most = math.log(len(evaluations[0].modes))
        entropies = [f"{evaluation.metrics[ENTROPY]:.3f}" for evaluation in evaluations]
        rows.append((f"entropy of the mode shares (nats; at most {most:.3f})", entropies))
        rows.append(("most frequent mode", [_most_frequent(evaluation) for evaluation in evaluations]))
    if VENDI in evaluations[0].occasional:
        for name, title in ((VENDI, "Vendi score"), (RKE, "RKE")):
            rows.append((f"{title} within a prompt (95 % interval)", [with_interval(e, name) for e in evaluations]))
    if ENTROPY_NATS in evaluations[0].occasional:
        rows.append(("differential entropy, given the prompt (nats)", [_entropy(e) for e in evaluations]))
        stds = [_occasional(evaluation, "ode_log_prob/std") for evaluation in evaluations]
        rows.append(("ode_log_prob std within a prompt (nats)", stds))
    rows.append(("training time (s)", [f"{evaluation.seconds:.1f}" for evaluation in evaluations]))
    for name in ("network_evaluations", "images", "updates", "step"):
        title = "epochs" if name == "step" else name.replace("_", " ")
        rows.append((title, [f"{getattr(evaluation, name):,}" for evaluation in evaluations]))
    return rows


def _entropy(evaluation: Evaluation) -> str:
    """The entropy with its standard error."""
    value, error = (_occasional(evaluation, f"entropy/{name}") for name in ("nats", "standard_error"))
    return f"{value} ± {error}" if ENTROPY_NATS in evaluation.occasional else value


def with_interval(evaluation: Evaluation, name: str) -> str:
    """A score with its 95 % interval."""
    value, low, high = (evaluation.occasional.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high"))
    return NOT_MEASURED if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _occasional(evaluation: Evaluation, name: str) -> str:
    return f"{evaluation.occasional[name]:.1f}" if name in evaluation.occasional else NOT_MEASURED


def _title(metric: str) -> str:
    kind, _, name = metric.partition("/")
    if kind == "reward":
        return "reward (what is trained on)" if name == "total" else f"reward: {name}"
    return f"{kind} {name}".replace("_", " ")


def _most_frequent(evaluation: Evaluation) -> str:
    name, share = max(evaluation.modes.items(), key=lambda item: item[1])
    return f"{name}, {share:.0%}"


def _averaged(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The final reward of each run's averaged weights, where they were evaluated."""
    from scripts.study.records import REWARD

    return [(run.label, f"{run.final.ema_metrics[REWARD]:.4f}") for run in runs if REWARD in run.final.ema_metrics]


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


def _settings(runs: Sequence[RunRecord]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Settings in which the runs differ, with each run's value, and those they share."""
    keys = sorted({key for run in runs for key in run.config} - set(NOT_SETTINGS))
    values = {key: [json.dumps(run.config.get(key)) for run in runs] for key in keys}
    differing = [(key, row) for key, row in values.items() if len(set(row)) > 1]
    shared = [(key, row[0]) for key, row in values.items() if len(set(row)) == 1]
    return differing, shared


def _environments(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Rows of the table of environments, a column for each run."""
    rows = [("run", [run.folder.resolve().name for run in runs]), ("recipe", [run.config["recipe"] for run in runs])]
    for key in ("command", "started", "device", "processes", "threads", "platform", "python"):
        rows.append((key, [str(run.environment.get(key, "")) for run in runs]))
    rows.append(("code", [_revision(run) for run in runs]))
    for name in PACKAGES:
        rows.append((name, [(run.environment.get("packages") or {}).get(name, "") for run in runs]))
    return rows


def _revision(run: RunRecord) -> str:
    git = run.environment.get("git")
    if not git:
        return "not a git checkout"
    return f"{git.get('revision') or 'no commit yet'}{', with uncommitted changes' if git.get('dirty') else ''}"


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
        for crossing in report.crossings:
            print(crossing.sentence())
        print(f"Report: {report.path.resolve()}")


if __name__ == "__main__":
    main()
