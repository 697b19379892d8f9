"""The study's results as they are committed, one file of plain numbers (runs.json), and small means to read them.

Pages, tables and figures come from that file alone, so that they can be made again without a run folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.crossing import first_crossing, rising
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from scripts.study.records import ENTROPY, REWARD, RKE, VENDI

RUNS_FILE, NOISE_FILE, SCALES_FILE = "runs.json", "gradient_noise.json", "lora_scales.json"
NATS, SPREAD = "entropy/nats", "ode_log_prob/std"
DIVERSITY = (VENDI, RKE, ENTROPY, NATS, SPREAD)
SPENT = ("step", "seconds", "network_evaluations", "images")  # step: epochs completed
DIGITS = 6  # significant


@dataclass(frozen=True)
class StudyRecord:
    """One finished run, as it is committed."""

    name: str
    group: str
    label: str
    seed: int
    method: str  # "DRTune" or "GRPO"
    recipe: str
    overrides: Mapping[str, Any]
    budget: float  # seconds of training
    environment: int  # position among the study's environments
    dropped: int  # evaluations left out because their reward was not finite
    skipped_epochs: int  # epochs with an update skipped because it was not finite
    evaluations: Mapping[str, Sequence[float | None]]  # a column each of SPENT and METRICS; None: not measured, nan
    training: Mapping[str, Mapping[str, float | None]]  # TRAINING -> {"first": of the first epoch, "mean": of all}

    def curve(self, name: str) -> np.ndarray:
        """A column, (evaluations,); nan where there is no number."""
        missing = [None] * len(self.evaluations["step"])
        return np.array([math.nan if v is None else v for v in self.evaluations.get(name, missing)], dtype=float)

    def base(self, name: str) -> float:
        """Before training."""
        return float(self.curve(name)[0])

    def final(self, name: str) -> float:
        """At the last evaluation."""
        return float(self.curve(name)[-1])

    def gain(self, name: str) -> float:
        """Final minus base."""
        return self.final(name) - self.base(name)

    def at(self, quantity: str, value: float, name: str) -> float:
        """A column where `quantity`, one of SPENT, had come to `value`, by linear interpolation; nan: never."""
        x = self.curve(quantity)
        return _interpolate(value, x, self.curve(name)) if x[0] <= value <= x[-1] else math.nan

    @property
    def rising_reward(self) -> np.ndarray:
        """The reward smoothed to rise from the base model on, so that no upward fluctuation reaches a level."""
        return rising(self.curve(REWARD))

    def where_reward_is(self, level: float, name: str) -> float:
        """A column where the rising reward reached `level`, by linear interpolation; nan: never."""
        positions = np.arange(len(self.curve(REWARD)), dtype=float)
        reached = first_crossing(positions, self.rising_reward, level)
        return math.nan if reached is None else _interpolate(reached, positions, self.curve(name))


@dataclass(frozen=True)
class Study:
    """Everything that is committed of the runs."""

    environments: tuple[Mapping[str, Any], ...]  # distinct ones: device, packages, revision
    missing: Mapping[str, str]  # planned runs without results: name -> why
    records: tuple[StudyRecord, ...]

    def of(self, *groups: str) -> list[StudyRecord]:
        """The records of some groups."""
        return [record for record in self.records if record.group in groups]

    def pairs(self, group: str = "claims") -> list[tuple[StudyRecord, StudyRecord]]:
        """DRTune and GRPO of the same seed."""
        found = {(record.label, record.seed): record for record in self.of(group)}
        seeds = sorted(seed for label, seed in found if label == "DRTune" and ("GRPO", seed) in found)
        return [(found["DRTune", seed], found["GRPO", seed]) for seed in seeds]


def by_label(records: Iterable[StudyRecord]) -> dict[str, list[StudyRecord]]:
    """The seeds of each label, labels in the order of their first run."""
    found: dict[str, list[StudyRecord]] = {}
    for record in records:
        found.setdefault(record.label, []).append(record)
    return found


def paired(first: Sequence[StudyRecord], second: Sequence[StudyRecord]) -> list[tuple[StudyRecord, StudyRecord]]:
    """Records of the same seed."""
    others = {record.seed: record for record in second}
    return [(record, others[record.seed]) for record in first if record.seed in others]


def _interpolate(value: float, x: np.ndarray, y: np.ndarray) -> float:
    known = np.isfinite(y)
    return float(np.interp(value, x[known], y[known])) if known.any() else math.nan


# --- the file ---------------------------------------------------------------------------------------------


def rounded(value: float | None) -> float | None:
    """To so many digits as are committed; None where there is no number."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a list of objects: strict JSON, a line for each, numbers rounded."""
    lines = [strict_json({k: rounded(v) if isinstance(v, float) else v for k, v in row.items()}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_study(study: Study, path: Path) -> None:
    """Write runs.json: strict JSON, a line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n".join(strict_json(asdict(record)) for record in study.records)
    head = f'"environments": {strict_json(list(study.environments))},\n"missing": {strict_json(dict(study.missing))}'
    write_atomically(path, f'{{\n{head},\n"runs": [\n{runs}\n]\n}}\n')


def read_study(path: Path) -> Study:
    """Read runs.json.

    Raises:
        ConfigError: it is not there, or is not what `write_study` writes.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing: --logs makes it from the folders of the study's runs.")
    content = read_object(path)
    try:
        records = tuple(StudyRecord(**run) for run in content["runs"])
        for record in records:
            for name in ("step", *record.evaluations):
                record.base(name)  # a column of numbers
        return Study(tuple(content["environments"]), content["missing"], records)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path} does not hold a study's results: {error}.") from None
