"""From the run folders of the study to what is committed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.runs.folder import HISTORY_FILE
from flow_grpo.runs.history import read_history
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI, RunRecord, load_runs
from scripts.study.run import State, state_of
from scripts.study.study_records import NATS, SPENT, SPREAD, Study, StudyRecord, rounded

METRICS = (
    REWARD, ACCURACY, "judge/similarity", ENTROPY, VENDI, f"{VENDI}_low", f"{VENDI}_high", RKE, f"{RKE}_low",
    f"{RKE}_high", "diversity/distance", NATS, "entropy/standard_error", "entropy/half_width_95", SPREAD,
    f"{SPREAD}_corrected", "ode_log_prob/mean",
)  # fmt: skip
TRAINING = (
    "train/ratio_std", "train/clip_fraction", "train/ratio_error", "train/log_ratio_mean", "train/approx_kl",
    "train/grad_norm", "train/zero_std_fraction",
)  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flow-matching-entropy")


def collect(runs: Sequence[StudyRun], logs: Path) -> Study:
    """The results of those of the planned runs that are finished, and the names of the others.

    Raises:
        ConfigError: a finished run's folder is damaged, or was evaluated otherwise than the rest.
    """
    states = {run.name: state_of(run, logs) for run in runs}
    reasons = {State.NEW: "not run", State.BEGUN: "not finished"}
    done = [run for run in runs if states[run.name] is State.DONE]
    read = load_runs([logs / run.name for run in done]) if done else []
    environments: list[dict[str, Any]] = []
    records = [_record(run, found, environments) for run, found in zip(done, read, strict=True)]
    missing = {name: reasons[state] for name, state in states.items() if state is not State.DONE}
    return Study(tuple(environments), missing, tuple(records))


def _record(run: StudyRun, found: RunRecord, environments: list[dict[str, Any]]) -> StudyRecord:
    environment = _environment(found.environment)
    if environment not in environments:
        environments.append(environment)
    return StudyRecord(
        name=run.name,
        group=run.group,
        label=run.label,
        seed=run.seed,
        method="DRTune" if found.config["use_reward_gradient"] else "GRPO",
        recipe=run.recipe,
        overrides=dict(run.overrides),
        budget=run.seconds,
        environment=environments.index(environment),
        dropped=found.dropped,
        skipped_epochs=found.skipped_epochs,
        evaluations=_columns(found),
        training=_training(read_history(found.folder / HISTORY_FILE)),
    )


def _columns(found: RunRecord) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {
        name: [getattr(evaluation, name) for evaluation in found.evaluations] for name in SPENT
    }
    for name in METRICS:
        values = [{**evaluation.metrics, **evaluation.occasional}.get(name) for evaluation in found.evaluations]
        if any(value is not None for value in values):
            columns[name] = values
    return {name: [rounded(value) for value in values] for name, values in columns.items()}


def _training(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {name: [line[name] for line in history if line.get(name) is not None] for name in TRAINING}
    return {
        name: {"first": rounded(values[0]), "mean": rounded(float(np.mean(values)))}
        for name, values in found.items()
        if values
    }


def _environment(full: Mapping[str, Any]) -> dict[str, Any]:
    git = full.get("git") or {}
    return {
        "device": full.get("device"),
        "threads": full.get("threads"),
        "python": full.get("python"),
        "packages": {name: full.get("packages", {}).get(name) for name in PACKAGES},
        "revision": git.get("revision"),
        "uncommitted_changes": git.get("dirty"),
    }
