"""What the runs of scripts/bench/scenes.py show: results.json, table.md and frontier.png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.methods.registry import METHODS
from flow_grpo.runs.evaluations import records_of
from flow_grpo.scenes.captions import KINDS, parse
from scripts.bench.methods_results import interval_of, shown
from scripts.scenes.data import HARD

if TYPE_CHECKING:
    from flow_grpo.runs.record import Record
    from scripts.study.plan import StudyRun

TEMPLATE, CURVE = "scenes.md.j2", "curve.json"


def write(runs: Sequence[StudyRun], logs: Path, out: Path) -> None:
    """Read the runs' folders, add what is kept of others, write the three files; ConfigError where there is none."""
    curve, cost = Curve.read(out / CURVE), read_object(out / "cost.json")
    outcomes = [outcome(records_of(logs / run.name), run, cost["seconds"][run.label], curve) for run in runs]
    path = out / "results.json"
    kept = read_object(path) if path.exists() else {}
    if kept.get("law") == _law(curve):
        new = [(o["method"], o["seed"]) for o in outcomes]
        outcomes += [o for o in kept["outcomes"] if (o["method"], o["seed"]) not in new]
    if not outcomes:
        raise ConfigError(f"{logs} has no run that is done; `train` makes them.")
    outcomes.sort(key=lambda o: (list(METHODS).index(o["method"]), o["seed"]))
    found = {"outcomes": outcomes, "summary": summarise(outcomes), "law": _law(curve)}
    write_atomically(path, strict_json(found, indent=1) + "\n")
    write_atomically(out / "table.md", table(found, cost))
    with optional_figure(out / "frontier.png"):
        draw(outcomes, curve, out / "frontier.png")


def _law(curve: Curve) -> dict[str, Any]:
    """The curve as plain data."""
    points = [{name: values[i] for name, values in curve.law.items()} for i in range(len(curve.law["reward"]))]
    return {"prompts": len(curve.prompts), "points": points}


def outcome(records: Sequence[Record], run: StudyRun, seconds: float, curve: Curve) -> dict[str, Any]:
    """One run, at each of its evaluations, the base's first."""
    found: list[dict[str, Any]] = []
    for record in records:
        right = _right(record)
        found.append(
            {
                "epoch": record.epoch,
                "seconds": record.epoch * seconds,
                "judge": {kind: float(np.mean(values)) if values else math.nan for kind, values in right.items()},
                "reward": float(np.mean([x for x in record.rewards["scenes"] if x is not None])),
                "vendi": float(np.mean(record.diversity.vendi)) if record.diversity else None,
                "modes": record.extra.get("modes/entropy"),
                "exact": _on_curve(record, curve.prompts),
            }
        )
    return {"method": run.label, "seed": run.seed, "evaluations": found}


def _right(record: Record) -> dict[str, list[bool]]:
    """Of each image that was judged whether it is right: by kind, of all, and of the kinds that are trained."""
    assert record.judge is not None
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for guess, prompt in zip(record.judge.guess, record.prompt, strict=True):
        if guess is not None:
            found[parse(record.prompts[prompt]).kind].append(guess == prompt)
    everything = [fits for values in found.values() for fits in values]
    return found | {"all": everything, "trained": [fits for kind in HARD for fits in found[kind]]}


def _on_curve(record: Record, prompts: Sequence[str]) -> dict[str, float | None]:
    """Reward and Vendi score on these prompts, and what is kept of the exact law's Vendi score and mode entropy."""
    assert record.diversity is not None
    places = [record.prompts.index(prompt) for prompt in prompts]
    rewards = [x for x, p in zip(record.rewards["scenes"], record.prompt, strict=True) if p in places and x is not None]
    vendi = dict(zip(record.diversity.prompts, record.diversity.vendi, strict=True))
    return {
        "reward": float(np.mean(rewards)),
        "vendi": float(np.mean([vendi[place] for place in places])),
        "kept": record.extra["diversity/kept_of_exact"],
        "kept_modes": record.extra["diversity/kept_of_exact_modes"],
    }


def summarise(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method: means over seeds with 95 % t-intervals, at the end."""
    rows = []
    for name in dict.fromkeys(o["method"] for o in outcomes):
        mine = [o["evaluations"] for o in outcomes if o["method"] == name]
        last, base = [e[-1] for e in mine], mine[0][0]
        row: dict[str, Any] = {"method": name, "title": METHODS[name].title, "seeds": len(mine)}
        row |= {"epochs": last[0]["epoch"], "seconds": last[0]["seconds"], "base": base["judge"]}
        row["judge"] = {kind: interval_of([e["judge"][kind] for e in last]) for kind in base["judge"]}
        row["ratio"] = interval_of([e["judge"]["trained"] / base["judge"]["trained"] for e in last])
        row |= {name: interval_of([e[name] for e in last]) for name in ("reward", "vendi", "modes")}
        row |= {name: interval_of([e["exact"][name] for e in last]) for name in ("kept", "kept_modes")}
        row["base_vendi"], row["base_modes"] = base["vendi"], base["modes"]
        rows.append(row)
    return rows


def table(found: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """The page's text."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["shown"] = shown
    return environment.get_template(TEMPLATE).render(rows=found["summary"], law=found["law"], kinds=KINDS, cost=cost)


def draw(outcomes: Sequence[Mapping[str, Any]], curve: Curve, path: Path) -> None:
    """Diversity against the share that is right, a line for each method (mean over seeds), beside the exact law."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rewards = np.asarray(curve.law["reward"])
    shares = 100 * np.asarray(curve.law["vendi"]) / curve.law["vendi"][0]
    axes.plot(100 * (rewards - rewards[0]), shares, "k-", lw=2.5, label="exact law")
    for marker, name in zip("osD^vP", dict.fromkeys(o["method"] for o in outcomes), strict=False):
        mine = [[e["exact"] for e in o["evaluations"]] for o in outcomes if o["method"] == name]
        gain = np.mean([[100 * (e["reward"] - run[0]["reward"]) for e in run] for run in mine], axis=0)
        vendi = np.mean([[100 * e["vendi"] / run[0]["vendi"] for e in run] for run in mine], axis=0)
        axes.plot(gain, vendi, marker=marker, ms=5, lw=1.2, label=METHODS[name].title)
    axes.set_xlabel("more right images of 100 than the base model's, held-out captions")
    axes.set_ylabel("Vendi score, % of the base model's")
    axes.legend()
    figure.savefig(path, dpi=130, metadata={"Software": None})
