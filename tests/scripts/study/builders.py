"""Runs and records of the study, made up: for the tests of what is computed from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.grpo import get_config
from flow_grpo.recipes.base import leaves
from flow_grpo.statistics import CountedInterval
from scripts.study.committed import Results
from scripts.study.paths import VALIDATION
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.study_records import NATS, SPREAD, Study, StudyRecord
from tests.synthetic_runs import write_run

EVALS_EVERY, POINTS = 6, 9


def write_study_run(
    run: StudyRun, logs: Path, reward: float, seconds: float | None = None, collapse: float = 0.5, wobble: float = 0.0
) -> Path:
    """A finished run of the study: reward rises by `reward`, diversity falls by `collapse`, from one base model."""
    gradient = "use_gradient" in run.recipe
    t, spent = np.linspace(0, 1, POINTS), seconds or (run.seconds or 40.0) + 0.5
    generator = np.random.default_rng([run.seed, len(run.label), int(1000 * abs(reward))])
    noise = wobble * generator.standard_normal(POINTS) * (t > 0)
    folder = write_run(
        logs / run.name,
        rewards=list(0.5 + reward * t**0.5 + 0.01 * noise),
        seconds=list(t * spent),
        gradient=gradient,
        accuracy=list(0.8 + 0.4 * t - (0.9 if gradient else 0.3) * t**2 + 0.02 * noise),
        collapse=list(np.clip(collapse * t + 0.05 * noise, 0, 1)),
        evals_every=EVALS_EVERY,
        overrides=dict(leaves(get_config(run.recipe))) | run.settings,
        density=True,
        diversity=True,
    )
    add_training(folder, clip=0.1 + 0.01 * run.seed)
    checkpoint = folder / f"checkpoints/checkpoint-{EVALS_EVERY * (POINTS - 1):06d}"
    checkpoint.mkdir(parents=True)
    counters = {"epoch": EVALS_EVERY * (POINTS - 1), "seconds": spent}
    (checkpoint / "state.json").write_text(json.dumps({"weights": {}, "counters": counters}))
    (checkpoint / "training_state.pt").write_bytes(b"")
    return folder


def add_training(folder: Path, clip: float) -> None:
    path, lines = folder / "metrics.jsonl", []
    for index, line in enumerate(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())):
        if "train/reward" in line:
            line |= {"train/clip_fraction": clip * index, "train/ratio_std": 1e-3 * (index + 1)}
            line |= {"train/ratio_error": 0.0, "train/grad_norm": 0.1, "train/loss": 0.2}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def record(
    label: str = "DRTune",
    seed: int = 0,
    reward: Sequence[float | None] = (0.5, 0.6, 0.9),
    seconds: Sequence[float] = (0, 10, 20),
    group: str = "claims",
    forwards: float = 100,
    overrides: Mapping[str, Any] | None = None,
    **columns: Sequence[float | None],
) -> StudyRecord:
    """A record by hand; columns by their last word: vendi=..., accuracy=..."""
    names = {"vendi": VENDI, "rke": RKE, "accuracy": ACCURACY, "spread": SPREAD, "nats": NATS}
    spent = {"step": [10 * i for i in range(len(seconds))], "seconds": seconds, "images": seconds}
    evaluations = spent | {"network_evaluations": [forwards * s for s in seconds], REWARD: reward}
    evaluations |= {names[name]: values for name, values in columns.items()}
    return StudyRecord(
        name=f"{group}-{label}-seed{seed}",
        group=group,
        label=label,
        seed=seed,
        method=label.split()[0],
        recipe="tiny_sd3",
        overrides=overrides or {},
        budget=20.0,
        environment=0,
        dropped=0,
        skipped_epochs=0,
        evaluations=evaluations,
        training={},
    )


def study_of(records: Iterable[StudyRecord]) -> Study:
    return Study((), {}, tuple(records))


def results_of(study: Study) -> Results:
    """Runs and nothing else."""
    return Results(study, [], [], [], [])


def validation_rows() -> list[dict[str, Any]]:
    """The committed ones of the entropy validation."""
    return json.loads(VALIDATION.read_text())["rows"]


LOWER, HIGHER, UNCLEAR, ONE = (
    CountedInterval(-1, -2, -0.5, count=5),
    CountedInterval(1, 0.5, 2, count=5),
    CountedInterval(0, -1, 1, count=5),
    CountedInterval(1, count=1),
)
