"""What run folders say, read back and compared: the data under a report. Pure functions of the folders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.page.data import each_once
from flow_grpo.page.seeds import MEASURE, NOT_MEASURE
from flow_grpo.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, run_config
from flow_grpo.runs.history import read_history

REWARD, ACCURACY, ENTROPY = "reward/total", "judge/accuracy", "modes/entropy"
VENDI, RKE = "diversity/vendi", "diversity/rke"
OCCASIONAL = ("entropy/", "ode_log_prob/", "diversity/", "exact_curve/")  # may be measured less often than the rest
LARGEST = 2**63  # from here on a whole number is no count of a run, and may be too large for a float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out noise, and what training had spent before it."""

    step: int  # epochs completed
    seconds: float
    network_evaluations: int
    images: int
    updates: int
    metrics: Mapping[str, float]  # of the current weights, without "eval/"; nan: not finite
    ema_metrics: Mapping[str, float]  # of the averaged weights; {} if they were not evaluated
    occasional: Mapping[str, float] = field(default_factory=dict)  # names that begin with one of OCCASIONAL

    @property
    def reward(self) -> float:
        """The weighted sum that was trained on, mean over the evaluation's images."""
        return self.metrics[REWARD]

    @property
    def modes(self) -> dict[str, float]:
        """Share of the images in each known mode; {} if modes were not counted."""
        shares = {name: value for name, value in self.metrics.items() if name.startswith("modes/") and name != ENTROPY}
        return {name.removeprefix("modes/"): value for name, value in shares.items()}


@dataclass(frozen=True)
class RunRecord:
    """What one run folder holds."""

    label: str  # method, and where that is not enough as much of the folder's path as tells the runs apart
    folder: Path
    config: Mapping[str, Any]  # flat: "sample.num_steps" -> 10
    environment: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]  # by step: the first before training, at least one after
    dropped: int  # evaluations left out because their reward was not finite
    skipped_epochs: int  # epochs in which an update was skipped because its loss or gradient was not finite

    @property
    def base(self) -> Evaluation:
        """The evaluation before training."""
        return self.evaluations[0]

    @property
    def final(self) -> Evaluation:
        """The last evaluation."""
        return self.evaluations[-1]

    def spent(self, quantity: str) -> np.ndarray:
        """What training had spent ("seconds" or "network_evaluations") before each evaluation, (evaluations,)."""
        return np.array([getattr(evaluation, quantity) for evaluation in self.evaluations], dtype=float)

    def curve(self, metric: str) -> np.ndarray:
        """A metric at each evaluation, (evaluations,); nan where it was not finite."""
        return np.array([evaluation.metrics[metric] for evaluation in self.evaluations], dtype=float)


# --- reading --------------------------------------------------------------------------------------------


def load_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Read run folders and give each a label of its own.

    Raises:
        ConfigError: one sentence on what is missing, or why they cannot be compared.
    """
    folders = each_once(folders)
    configs = {folder: run_config(folder) for folder in folders}
    _check_comparable(configs)
    labels = _labels({folder: _method(config, folder) for folder, config in configs.items()})
    return [_load_run(folder, labels[folder], config) for folder, config in configs.items()]


def _labels(methods: Mapping[Path, str]) -> dict[Path, str]:
    """The method; where runs share one, also their folders' names, with as many parents as tell all of them apart."""
    labels: dict[Path, str] = {}
    for method in dict.fromkeys(methods.values()):
        sharing = [folder for folder, other in methods.items() if other == method]
        for depth in itertools.count():
            ends = ["/".join(folder.resolve().parts[-depth:]) if depth else "" for folder in sharing]
            if len(set(ends)) == len(sharing):
                break
        labels |= {folder: f"{method} {end}".rstrip() for folder, end in zip(sharing, ends, strict=True)}
    return labels


def _load_run(folder: Path, label: str, config: Mapping[str, Any]) -> RunRecord:
    path = folder / HISTORY_FILE
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {folder} is not the folder of a run, or nothing was logged in it.")
    history = read_history(path)
    found = {line["step"]: _evaluation(line, path) for line in history if f"eval/{REWARD}" in line}
    finite = [found[step] for step in sorted(found) if math.isfinite(found[step].reward)]
    if len(finite) < 2 or finite[0].step != 0:
        steps = ", ".join(str(evaluation.step) for evaluation in finite) or "none"
        raise ConfigError(
            f"{path} needs a finite eval/{REWARD} at step 0 and at a later step, and has it at: {steps}; "
            "was the run started with eval_freq > 0 and did it end?"
        )
    _check_metrics(finite, config, path)
    return RunRecord(
        label=label,
        folder=folder,
        config=config,
        environment=_read_environment(folder / ENVIRONMENT_FILE),
        evaluations=tuple(finite),
        dropped=len(found) - len(finite),
        skipped_epochs=sum(_number(line, "train/skipped_updates", path) > 0 for line in history),
    )


def _evaluation(line: Mapping[str, Any], path: Path) -> Evaluation:
    metrics, averaged = (
        {name.removeprefix(prefix): _number(line, name, path) for name in line if name.startswith(prefix)}
        for prefix in ("eval/", "eval_ema/")
    )
    return Evaluation(
        step=_spent(line, "step", path),
        seconds=_spent(line, "seconds", path),
        network_evaluations=_spent(line, "network_evaluations", path),
        images=_spent(line, "images", path),
        updates=_spent(line, "updates", path),
        metrics={name: value for name, value in metrics.items() if not name.startswith(OCCASIONAL)},
        ema_metrics={name: value for name, value in averaged.items() if not name.startswith(OCCASIONAL)},
        occasional={name: value for name, value in metrics.items() if name.startswith(OCCASIONAL)},
    )


def _spent(line: Mapping[str, Any], name: str, path: Path) -> Any:
    """What training had spent, as it was written; ConfigError unless it is a finite number."""
    if not math.isfinite(_number(line, name, path)):
        raise ConfigError(f"{path}, step {line['step']}: {name!r} is {line.get(name)!r}, a number is needed.")
    return line[name]


def _number(line: Mapping[str, Any], name: str, path: Path) -> float:
    """A metric of one line of the history; nan if it is null or absent, ConfigError if it is something else."""
    value = line.get(name)
    if value is None:
        return math.nan
    if type(value) is not float and (type(value) is not int or abs(value) >= LARGEST):
        raise ConfigError(f"{path}, step {line['step']}: {name!r} is {str(value)[:60]!r}, a number or null is needed.")
    return float(value)


def _check_metrics(evaluations: Sequence[Evaluation], config: Mapping[str, Any], path: Path) -> None:
    """Every evaluation of a run measures the same, and what the configuration asked for."""
    expected = set(evaluations[0].metrics) | ({ACCURACY} if config["eval.judge"] else set())
    for evaluation in evaluations:
        if evaluation.metrics.keys() != expected:
            names = ", ".join(f"eval/{name}" for name in sorted(expected ^ evaluation.metrics.keys()))
            raise ConfigError(f"{path}, step {evaluation.step}: {names} should be in every evaluation or in none.")


def _check_comparable(configs: Mapping[Path, Mapping[str, Any]]) -> None:
    first_folder, first = next(iter(configs.items()))
    for folder, config in configs.items():
        for key in sorted(first.keys() | config.keys()):
            if key.startswith(MEASURE) and key not in NOT_MEASURE and first.get(key) != config.get(key):
                values = f"{first.get(key)!r} and {config.get(key)!r}"
                raise ConfigError(f"{first_folder} and {folder} cannot be compared: their {key} is {values}.")


def _method(config: Mapping[str, Any], folder: Path) -> str:
    for key, kind in {"use_reward_gradient": bool, "eval.judge": str, "recipe": str}.items():
        if not isinstance(config.get(key), kind):
            found = f"has {key} = {config[key]!r}" if key in config else f"has no {key!r}"
            raise ConfigError(f"{folder / CONFIG_FILE} {found}: it is not a configuration of this project.")
    return "DRTune" if config["use_reward_gradient"] else "GRPO"


def _read_environment(path: Path) -> dict[str, Any]:
    """ConfigError where what the report shows of it is of another kind than a run writes."""
    environment = read_object(path)
    for name, kind in {"packages": dict, "git": dict, "device": str, "earlier_sessions": list}.items():
        if not isinstance(environment.get(name), (kind, type(None))):
            raise ConfigError(f"{path}: {name!r} is {str(environment[name])[:60]!r}, which is not what a run writes.")
    return environment
