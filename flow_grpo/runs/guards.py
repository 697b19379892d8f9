"""Guards: when a run ends early, because a held-out metric, or the diversity of its images, says so.

A verdict follows from the run's folder and settings alone: from what its history has of the evaluations so far, and
from the base model's record. So a run that goes on decides as an unbroken one does, and its page can say why it ended.
A run that branches off begins its guards anew, but for the base's diversity, which it takes along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.runs.evaluations import read_record, record_path
from flow_grpo.runs.folder import HISTORY_FILE, flatten
from flow_grpo.runs.history import deciding_metric, salvage_history

PATIENCE, DROP, FLOOR = "guard.patience", "guard.max_drop", "guard.diversity_floor"
WHY = {
    PATIENCE: "{metric} {value:.4f} is no better than {best:.4f} of epoch {epoch} (evaluations since then: "
    "{count}; {guard} = {setting})",
    DROP: "{metric} {value:.4f} is below {limit:.4f}, its best, {best:.4f} of epoch {epoch}, less {guard} = {setting}",
    FLOOR: "{metric} {value:.4f} is below {limit:.4f}, the base's {best:.4f} times {guard} = {setting}",
}


@dataclass(frozen=True)
class Stop:
    """Why a run ends early."""

    guard: str  # the key that says so
    why: str  # metric, value and limit, in words


def check_guards(config: ConfigDict) -> None:
    """ConfigError for a guard of something that is never measured."""
    settings = flatten(config.to_dict())
    for guard in (PATIENCE, DROP):
        if settings[guard] > 0 and config.eval_freq == 0:
            raise ConfigError(
                f"config.{guard} = {settings[guard]} watches evaluations, and config.eval_freq = 0 makes none; it "
                "takes 0, or config.eval_freq at least 1."
            )
        if settings[guard] > 0 and deciding_metric(settings, "eval") is None:
            raise ConfigError(
                f"config.{guard} = {settings[guard]} watches a judge or a held-out reward, and there is neither with "
                f"config.eval.judge = {config.eval.judge!r} and config.eval.rewards = {tuple(config.eval.rewards)}; it "
                "takes 0, or one of them whose model is none that is trained on."
            )
    if settings[FLOOR] > 0 and not (config.eval_diversity and (config.eval_diversity_freq or config.eval_freq)):
        key = "eval_diversity" if not config.eval_diversity else "eval_freq"
        raise ConfigError(
            f"config.{FLOOR} = {settings[FLOOR]} watches the diversity, which config.{key} = {config[key]} leaves "
            f"unmeasured; it takes 0, or config.{key} {'= True' if key == 'eval_diversity' else 'at least 1'}."
        )


def early_stop(folder: Path, settings: Mapping[str, Any], epoch: int) -> Stop | None:
    """Why a run ends by its newest evaluation up to this epoch; None: it goes on. Settings by their full names.

    Raises:
        ConfigError: as `salvage_history` does.
    """
    if not any(settings.get(guard) for guard in WHY) or not (folder / HISTORY_FILE).is_file():
        return None
    lines = [line for line in salvage_history(folder / HISTORY_FILE)[0] if line["step"] <= epoch]
    return _of_held_out(lines, settings) or _of_diversity(folder, lines, settings)


def is_new_best(folder: Path, settings: Mapping[str, Any], epoch: int) -> bool:
    """Whether a guard is on, and the held-out metric has just been higher than ever, the base model's included.

    A run that may end early keeps these weights, however rarely it saves.

    Raises:
        ConfigError: as `salvage_history` does.
    """
    if epoch == 0 or not any(settings.get(guard) for guard in WHY):
        return False
    values = held_out(folder, settings, epoch)
    return bool(values) and values[-1][0] == epoch and all(values[-1][1] > value for _, value in values[:-1])


def held_out(folder: Path, settings: Mapping[str, Any], epoch: int) -> list[tuple[int, float]]:
    """(epoch, value) of the held-out metric at each evaluation up to this epoch where it is finite; [] without one."""
    metric = deciding_metric(settings, _label(settings))
    if metric is None or not (folder / HISTORY_FILE).is_file():
        return []
    lines = [line for line in salvage_history(folder / HISTORY_FILE)[0] if line["step"] <= epoch]
    return [(at, value) for at, value in _values(lines, metric) if math.isfinite(value)]


def base_diversity(folder: Path, settings: Mapping[str, Any]) -> float | None:
    """What a floor is a share of: the diversity of the base model's images; None: it was not measured, or is lost."""
    try:
        return read_record(record_path(folder, "eval", 0)).extra.get(f"diversity/{settings['guard.diversity']}")
    except ConfigError:
        return None


def _of_held_out(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Stop | None:
    metric = deciding_metric(settings, _label(settings))
    values = [] if metric is None else _values(lines, metric)
    finite = {epoch: value for epoch, value in values if math.isfinite(value)}
    if not finite:
        return None
    at = max(finite, key=lambda epoch: (finite[epoch], -epoch))  # of equals the earliest: the later are no better
    best, value, count = finite[at], values[-1][1], sum(epoch > at for epoch, _ in values)
    found = {"metric": metric, "value": value, "best": best, "epoch": at, "count": count}
    drop, patience = settings[DROP], settings[PATIENCE]
    if drop > 0 and value < best - drop:
        return _stop(DROP, settings, limit=best - drop, **found)
    return _stop(PATIENCE, settings, **found) if 0 < patience <= count else None


def _of_diversity(folder: Path, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Stop | None:
    metric = f"{_label(settings)}/diversity/{settings['guard.diversity']}"
    values = _values(lines, metric)
    base = base_diversity(folder, settings) if settings[FLOOR] > 0 and values else None
    if base is None or not values[-1][1] < settings[FLOOR] * base:
        return None
    return _stop(FLOOR, settings, metric=metric, value=values[-1][1], best=base, limit=settings[FLOOR] * base)


def _stop(guard: str, settings: Mapping[str, Any], **found: Any) -> Stop:
    return Stop(guard, WHY[guard].format(guard=guard, setting=settings[guard], **found))


def _label(settings: Mapping[str, Any]) -> str:
    """Of the weights that checkpoints are chosen by: the averaged ones where they are evaluated."""
    return "eval_ema" if settings["train.ema"] and settings["eval.ema"] else "eval"


def _values(lines: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of each evaluation of it, in order; nan where it is not finite."""
    found = {line["step"]: line[metric] for line in lines if metric in line}
    return [(epoch, math.nan if value is None else float(value)) for epoch, value in sorted(found.items())]
