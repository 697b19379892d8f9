"""What is committed of the study's runs, results.json of a testbed: their evaluations, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.crossing import first_crossing, rising
from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.prompts import PromptDataset
from flow_grpo.scenes.captions import KINDS, parse
from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.paths import ROOT
from scripts.study.records import load_runs
from scripts.study.testbeds import CURVE, HARD_PROMPTS, SEARCH_SEED, StudyRun, Testbed

RESULTS = "results.json"
DIGITS = 6  # significant, of what is committed
COLUMNS = {  # of every testbed: figure -> metric
    "judge": "judge/accuracy",
    "vendi": "diversity/vendi",
    "rke": "diversity/rke",
    "modes": "modes/entropy",
    "nats": "entropy/nats",
    "spread": "ode_log_prob/std",
    "exact_reward": "exact_curve/reward",  # on the curve's prompts
    "exact_vendi": "exact_curve/vendi",
    "exact_modes": "exact_curve/modes",
}
Outcome = Mapping[str, Any]  # label, seed, and of each evaluation, the base's first: epoch and columns


# --- the file ---------------------------------------------------------------------------------------------


def merged(testbed: Testbed, runs: Sequence[StudyRun], logs: Path, out: Path) -> list[Outcome]:
    """What runs' folders hold, and what is committed of others as long as the exact law is of the same prompts.

    In the order of the testbed's entries, by seed. ConfigError where there is no run of an entry.
    """
    outcomes = [outcome(testbed, run, logs) for run in runs]
    path = out / RESULTS
    committed = read_object(path) if path.exists() else {}
    order = [*testbed.entries, *testbed.tried]
    if committed.get("prompts") == prompts(out):
        new = [(o["label"], o["seed"]) for o in outcomes]
        outcomes += [o for o in committed["outcomes"] if o["label"] in order and (o["label"], o["seed"]) not in new]
    if all(o["seed"] == SEARCH_SEED for o in outcomes):
        raise ConfigError(f"{logs} has no run of {testbed.name} that is done; scripts/study/run.py trains them.")
    return sorted(outcomes, key=lambda o: (order.index(o["label"]), o["seed"]))


def commit(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write results.json."""
    content = {"prompts": prompts(out), "outcomes": list(outcomes)}
    write_atomically(out / RESULTS, strict_json(content, indent=1) + "\n")


def committed(out: Path) -> list[Outcome]:
    """Read results.json."""
    found: list[Outcome] = read_object(out / RESULTS)["outcomes"]
    return found


def prompts(out: Path) -> list[str]:
    """Those of the exact law."""
    return list(Curve.read(out / CURVE).prompts)


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


def rounded(value: float) -> float | None:
    """To so many digits as are committed; None where there is no number."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a list of objects: strict JSON, a line for each, numbers rounded."""
    lines = [strict_json({k: rounded(v) if isinstance(v, float) else v for k, v in row.items()}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


# --- what is read off one run -----------------------------------------------------------------------------


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


def gains(found: Outcome) -> np.ndarray:
    """In reward over the base model, at each evaluation, on the exact law's prompts."""
    reward = column(found, "exact_reward")
    return reward - reward[0]


def kept(found: Outcome, figure: str, curve: Curve) -> np.ndarray:
    """Share of the exact law's at the same gain, each over its own base images; nan beyond the curve, or unmeasured."""
    values = column(found, f"exact_{figure}")
    if figure not in curve.law:
        return np.full(len(values), math.nan)
    return values / values[0] / [curve.share(figure, gain) for gain in gains(found)]


def epochs_to(found: Outcome, gain: float) -> float:
    """Epochs until the smoothed reward has risen by so much; nan: it never has."""
    reward = column(found, "exact_reward")
    reached = first_crossing(column(found, "epoch"), rising(reward), reward[0] + gain)
    return math.nan if reached is None else reached


def kept_at(found: Outcome, gain: float, figure: str, curve: Curve) -> float:
    """What is kept of the law where the smoothed reward has risen by so much; nan: it never has, or unmeasured."""
    values, reached = column(found, f"exact_{figure}"), epochs_to(found, gain)
    if math.isnan(reached) or figure not in curve.law or gain > curve.law["reward"][-1] - curve.law["reward"][0]:
        return math.nan
    return float(np.interp(reached, column(found, "epoch"), values)) / values[0] / curve.share(figure, gain)


# --- means over seeds -------------------------------------------------------------------------------------


def of_all(values: Sequence[float]) -> CountedInterval:
    """Mean with 95 % t-interval over seeds; none where a seed lacks the figure: the others may be the better ones."""
    return mean_interval(values if np.isfinite(values).all() else [])
