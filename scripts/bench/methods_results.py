"""What the runs of scripts/bench/methods.py show: results.json, table.md and frontier.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.crossing import first_crossing, rising
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.methods.registry import METHODS
from flow_grpo.statistics import mean_interval
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI, RunRecord, load_runs

if TYPE_CHECKING:
    from scripts.study.plan import StudyRun

TEMPLATE = "methods.md.j2"
GAINS = (0.005, 0.01, 0.02)  # of reward
NATS = "entropy/nats"
VARIANTS = {"anchored_kl": "anchored, 0.3 nats", "drtune_kl": "DRTune, KL 0.1"}


@dataclass(frozen=True)
class Outcome:
    """One run."""

    method: str
    seed: int
    reward: list[float]  # at each evaluation, the base's first
    vendi: list[float]
    judge: list[float]
    epochs: list[int]
    final: Mapping[str, float]  # reward, judge, vendi, rke, colours, nats, exact: the law's Vendi at this gain
    seconds_to: Mapping[str, float]  # gain -> seconds; nan: never
    excess_at: Mapping[str, float]  # gain -> Vendi there minus the exact law's; nan: never


def write(runs: Sequence[StudyRun], logs: Path, out: Path) -> None:
    """Read the runs' folders and write the three files; ConfigError where one is missing."""
    missing = [run.name for run in runs if not (logs / run.name / "metrics.jsonl").is_file()]
    if missing:
        raise ConfigError(f"{logs} lacks {missing[0]} and {len(missing) - 1} more; `train` makes them.")
    cost, law = read_object(out / "cost.json"), read_object(out / "curve.json")
    outcomes = [outcome(load_runs([logs / run.name])[0], run, cost["seconds"][run.label], law["rows"]) for run in runs]
    found = {"outcomes": [asdict(o) for o in outcomes], "summary": summarise(outcomes, cost)}
    write_atomically(out / "results.json", strict_json(found, indent=1) + "\n")
    write_atomically(out / "table.md", table(found["summary"], law))
    with optional_figure(out / "frontier.png"):
        draw(outcomes, law["rows"], out / "frontier.png")


def outcome(record: RunRecord, run: StudyRun, seconds: float, law: Sequence[Mapping[str, float]]) -> Outcome:
    """What one run came to; seconds are epochs times the method's seconds an epoch."""
    reward = record.curve(REWARD)
    vendi, judge = _occasional(record, VENDI), record.curve(ACCURACY)
    epochs = np.array([evaluation.step for evaluation in record.evaluations], dtype=float)
    last = record.final
    final = {
        "reward": last.reward,
        "judge": last.metrics[ACCURACY],
        "vendi": vendi[-1],
        "rke": last.occasional.get(RKE, math.nan),
        "colours": math.exp(last.metrics[ENTROPY]),
        "nats": last.occasional.get(NATS, math.nan),
        "exact": vendi[0] * exact_share(last.reward - reward[0], law),
    }
    seconds_to, excess_at = {}, {}
    for gain in GAINS:
        reached = first_crossing(epochs, rising(reward), reward[0] + gain)
        seconds_to[f"{gain:g}"] = math.nan if reached is None else reached * seconds
        there = math.nan if reached is None else float(np.interp(reached, epochs, vendi))
        excess_at[f"{gain:g}"] = there - vendi[0] * exact_share(gain, law)
    curves = reward.tolist(), vendi.tolist(), judge.tolist(), epochs.astype(int).tolist()
    return Outcome(run.label, run.seed, *curves, final, seconds_to, excess_at)


def _occasional(record: RunRecord, name: str) -> np.ndarray:
    return np.array([evaluation.occasional.get(name, math.nan) for evaluation in record.evaluations])


def exact_share(gain: float, law: Sequence[Mapping[str, float]]) -> float:
    """The share of the base's Vendi score that the exact law keeps at a gain; 1 below 0, nan beyond the curve.

    Both are taken over the base: the 16 images of a run's evaluation are not the 1,000 of the curve.
    """
    gains = [row["reward"] - law[0]["reward"] for row in law]
    shares = [row["vendi"] / law[0]["vendi"] for row in law]
    return float(np.interp(gain, gains, shares)) if gain <= gains[-1] else math.nan


def summarise(outcomes: Sequence[Outcome], cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each method, means over seeds with 95 % t-intervals, by the final reward."""
    rows = []
    for name in dict.fromkeys(o.method for o in outcomes):
        mine = [o for o in outcomes if o.method == name]
        row: dict[str, Any] = {
            "method": name,
            "title": title_of(name),
            "seeds": len(mine),
            "epochs": mine[0].epochs[-1],
        }
        row |= {"seconds": cost["seconds"][name], "peak_mib": cost["peak_mib"][name]}
        row |= {figure: interval_of([o.final[figure] for o in mine]) for figure in mine[0].final}
        row["gain"] = interval_of([o.reward[-1] - o.reward[0] for o in mine])
        row["kept"] = interval_of([o.final["vendi"] / o.final["exact"] for o in mine])
        row["seconds_to"] = {gain: interval_of([o.seconds_to[gain] for o in mine]) for gain in mine[0].seconds_to}
        row["excess_at"] = {gain: interval_of([o.excess_at[gain] for o in mine]) for gain in mine[0].excess_at}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["reward"]["mean"])


def title_of(name: str) -> str:
    """What people call an entry of the bench."""
    return METHODS[name].title if name in METHODS else VARIANTS[name]


def interval_of(values: Sequence[float | None]) -> dict[str, float]:
    """Mean and half width over the seeds that have the figure, and how many have; None, as JSON has it, is nan."""
    found = mean_interval([math.nan if value is None else value for value in values])
    return {"mean": found.estimate, "half": (found.high - found.low) / 2, "count": found.count}


def table(summary: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> str:
    """The page's text."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["shown"] = shown
    return environment.get_template(TEMPLATE).render(rows=summary, law=law, gains=[f"{gain:g}" for gain in GAINS])


def shown(value: Mapping[str, float], digits: int = 2) -> str:
    """Mean +- half width; a dash where no seed has the figure."""
    if not value["count"]:
        return "-"
    half = "" if math.isnan(value["half"]) else f" ± {value['half']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def draw(outcomes: Sequence[Outcome], law: Sequence[Mapping[str, float]], path: Path) -> None:
    """Diversity against reward, a line for each method (mean over seeds at each evaluation), beside the exact law."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    gains = np.array([row["reward"] - law[0]["reward"] for row in law])
    axes.plot(gains, [100 * exact_share(gain, law) for gain in gains], "k-", lw=2.5, label="exact law")
    names, markers = list(dict.fromkeys(o.method for o in outcomes)), "osDv^<>PX*hpd8sH"
    for number, name in enumerate(names):
        mine = [o for o in outcomes if o.method == name]
        x = np.mean([np.array(o.reward) - o.reward[0] for o in mine], axis=0)
        y = np.mean([100 * np.array(o.vendi) / o.vendi[0] for o in mine], axis=0)
        colour = colormaps["tab20"](number / 20)
        axes.plot(x, y, marker=markers[number % len(markers)], ms=4, lw=1, color=colour, label=title_of(name))
    axes.set_xlabel("gain in reward over the base model, 160 images on held-out noise")
    axes.set_ylabel("Vendi score of 16 images of a prompt, % of the base model's")
    axes.legend(fontsize="small", ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130, metadata={"Software": None})
