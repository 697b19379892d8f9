"""What the runs of scripts/bench/methods.py show: results.json, table.md and frontier.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.crossing import first_crossing, rising
from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.methods.registry import METHODS
from flow_grpo.prompts import PromptDataset
from flow_grpo.scenes.captions import KINDS, parse
from flow_grpo.statistics import mean_interval
from scripts.bench.testbeds import COST, CURVE, HARD_PROMPTS, ROOT, SEARCH_SEED, Testbed
from scripts.study.records import load_runs
from scripts.study.study_records import rounded

if TYPE_CHECKING:
    from scripts.study.plan import StudyRun

RESULTS = "results.json"
COLUMNS = {  # of every testbed: figure -> metric
    "judge": "judge/accuracy",
    "vendi": "diversity/vendi",
    "rke": "diversity/rke",
    "modes": "modes/entropy",
    "exact_reward": "exact_curve/reward",  # on the curve's prompts
    "exact_vendi": "exact_curve/vendi",
    "exact_modes": "exact_curve/modes",
}
Outcome = Mapping[str, Any]  # label, seed, and of each evaluation, the base's first: epoch and columns


def write(testbed: Testbed, runs: Sequence[StudyRun], logs: Path, out: Path) -> None:
    """Read the runs' folders, add what is kept of others, write the three files; ConfigError where there is none."""
    prompts = list(Curve.read(out / CURVE).prompts)
    outcomes = [outcome(testbed, run, logs) for run in runs]
    path = out / RESULTS
    committed = read_object(path) if path.exists() else {}
    order = [*testbed.entries, *testbed.tried]
    if committed.get("prompts") == prompts:
        new = [(o["label"], o["seed"]) for o in outcomes]
        outcomes += [o for o in committed["outcomes"] if o["label"] in order and (o["label"], o["seed"]) not in new]
    if all(o["seed"] == SEARCH_SEED for o in outcomes):
        raise ConfigError(f"{logs} has no run of a method that is done; `train` makes them.")
    outcomes.sort(key=lambda o: (order.index(o["label"]), o["seed"]))
    write_atomically(path, strict_json({"prompts": prompts, "outcomes": outcomes}, indent=1) + "\n")
    write_atomically(out / "table.md", table(testbed, outcomes, out))
    with optional_figure(out / "frontier.png"):
        draw(testbed, outcomes, out)


def outcome(testbed: Testbed, run: StudyRun, logs: Path) -> dict[str, Any]:
    """What is committed of one run."""
    evaluations = load_runs([logs / run.name])[0].evaluations
    found: dict[str, Any] = {"label": run.label, "seed": run.seed, "epoch": [e.step for e in evaluations]}
    measured = [{**e.metrics, **e.occasional} for e in evaluations]
    for name, metric in {"reward": testbed.reward, **COLUMNS, **testbed.columns}.items():
        values = [metrics.get(metric, math.nan) for metrics in measured]
        if not np.isnan(values).all():
            found[name] = [rounded(value) for value in values]
    return found


def column(found: Outcome, name: str) -> np.ndarray:
    """A figure at each evaluation; nan where there is none."""
    missing = [None] * len(found["epoch"])
    return np.array([math.nan if value is None else value for value in found.get(name, missing)], dtype=float)


@cache
def trained_kinds() -> dict[str, float]:
    """Shares of the held-out captions of scenes that are of each kind that is trained."""
    kinds = [parse(prompt).kind for prompt in PromptDataset.load(str(ROOT / HARD_PROMPTS)).prompts]
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS if kind in kinds}


def right(found: Outcome) -> np.ndarray:
    """The share of right images at each evaluation, of the kinds of scenes that are trained, by the judge."""
    return sum((share * column(found, f"judge_{kind}") for kind, share in trained_kinds().items()), np.zeros(1))


# --- means over seeds -------------------------------------------------------------------------------------


def summarise(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> list[dict[str, Any]]:
    """A row for each entry: at the end of its runs, and at some gains, means over seeds with 95 % t-intervals."""
    cost, curve = read_object(out / COST), Curve.read(out / CURVE)
    rows = []
    for label in dict.fromkeys(o["label"] for o in outcomes):
        mine = [o for o in outcomes if o["label"] == label]
        entry, seconds = testbed.entry(label), testbed.seconds_an_epoch(label, cost)
        row: dict[str, Any] = {"label": label, "title": entry.title, "seeds": len(mine), "epochs": mine[0]["epoch"][-1]}
        row |= {"seconds": seconds, "peak_mib": cost.get("peak_mib", {}).get(label, math.nan)}
        names = {"reward", *COLUMNS, *testbed.columns}
        row |= {name: interval_of([column(o, name)[-1] for o in mine]) for name in names}
        row["base"] = {name: column(mine[0], name)[0] for name in names}
        for name, figure in {"kept": "vendi", "kept_modes": "modes"}.items():
            row[name] = of_all([kept(o, figure, curve)[-1] for o in mine])
        row["gain"] = interval_of([np.diff(column(o, "exact_reward")[[0, -1]])[0] for o in mine])
        if "judge_two" in testbed.columns:
            row["right"], row["base"]["right"] = interval_of([right(o)[-1] for o in mine]), right(mine[0])[0]
            row["of_base"] = interval_of([right(o)[-1] / right(o)[0] for o in mine])
        reached = [{f"{gain:g}": at_gain(o, gain, curve) for gain in testbed.gains} for o in mine]
        for place, name in enumerate(("seconds_to", "kept_at")):
            scale = seconds if name == "seconds_to" else 1.0
            row[name] = {gain: of_all([scale * r[gain][place] for r in reached]) for gain in reached[0]}
        rows.append(row)
    return rows


def kept(found: Outcome, figure: str, curve: Curve) -> np.ndarray:
    """Share of the exact law's at the same gain, each over its own base images; nan beyond the curve, or unmeasured."""
    reward, values = column(found, "exact_reward"), column(found, f"exact_{figure}")
    if figure not in curve.law:
        return np.full(len(reward), math.nan)
    return values / values[0] / [curve.share(figure, gain) for gain in reward - reward[0]]


def at_gain(found: Outcome, gain: float, curve: Curve) -> tuple[float, float]:
    """Epochs until the smoothed reward has risen by so much, and what is kept there of the law; nan: it never has."""
    epochs, reward, vendi = (column(found, name) for name in ("epoch", "exact_reward", "exact_vendi"))
    reached = first_crossing(epochs, rising(reward), reward[0] + gain)
    if reached is None:
        return math.nan, math.nan
    return reached, float(np.interp(reached, epochs, vendi)) / vendi[0] / curve.share("vendi", gain)


def interval_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and half width over the seeds that have the figure, and how many have."""
    found = mean_interval(values)
    return {"mean": found.estimate, "half": (found.high - found.low) / 2, "count": found.count}


def of_all(values: Sequence[float]) -> dict[str, float]:
    """The same; none where a seed lacks the figure, since the others would be the better ones, or the worse."""
    return interval_of(values if np.isfinite(values).all() else [])


# --- table and figure -------------------------------------------------------------------------------------


def table(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> str:
    """The page's text."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["shown"] = shown
    tried = [o for o in outcomes if o["seed"] == SEARCH_SEED]
    rows = summarise(testbed, [o for o in outcomes if o["seed"] != SEARCH_SEED], out)
    return environment.get_template(f"methods_{testbed.name}.md.j2").render(
        rows=sorted(rows, key=lambda row: -row["reward"]["mean"]) if testbed.name == "tiny" else rows,
        tried=summarise(testbed, tried, out),
        curve=read_object(out / CURVE),
        cost=read_object(out / COST),
        gains=[f"{gain:g}" for gain in testbed.gains],
        testbed=testbed,
        kinds=KINDS,
    )


def shown(value: Mapping[str, float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean +- half width; a dash where no seed has the figure."""
    if not value["count"]:
        return "-"
    half = "" if math.isnan(value["half"]) else f" ± {scale * value['half']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{half}"


def draw(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> None:
    """Diversity against reward beside the exact law, a line for each method: means over seeds, seconds as colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cost, curve = read_object(out / COST), Curve.read(out / CURVE)
    most = max(testbed.seconds.values())
    law = np.array(curve.law["reward"]) - curve.law["reward"][0], 100 * np.array(curve.law["vendi"])
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {True: "by the reward's gradient", False: "by rewards alone"}
    for axes, (gradient, title) in zip(panels, titles.items(), strict=True):
        axes.plot(law[0], law[1] / curve.law["vendi"][0], "k-", lw=2.5, label="exact law")
        labels = [n for n, entry in testbed.entries.items() if METHODS[entry.method].reward_gradient == gradient]
        for marker, label in zip("osDv^<>PX*hpd8H", labels, strict=False):
            mine = [o for o in outcomes if o["label"] == label and o["seed"] != SEARCH_SEED]
            if not mine:
                continue
            reward, vendi = ([column(o, name) for o in mine] for name in ("exact_reward", "exact_vendi"))
            gain = np.mean([values - values[0] for values in reward], axis=0)
            kept = np.mean([100 * values / values[0] for values in vendi], axis=0)
            seconds = testbed.seconds_an_epoch(label, cost) * column(mine[0], "epoch")
            axes.plot(gain, kept, "-", lw=0.8, color="0.7", zorder=1)
            axes.plot([], [], marker, color="0.4", label=testbed.entry(label).title)
            dots = axes.scatter(
                gain, kept, c=seconds, vmin=0, vmax=most, cmap="viridis_r", marker=marker, s=34, zorder=2
            )
        axes.set_title(title)
        axes.set_xlabel("gain in mean reward over the base model")
        axes.legend(fontsize="small", loc="upper right")
    panels[0].set_ylabel("Vendi score within a prompt, % of the base's")
    figure.colorbar(dots, ax=panels, label="seconds of training", pad=0.01)
    figure.savefig(out / "frontier.png", dpi=130, metadata={"Software": None})
