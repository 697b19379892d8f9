"""What run folders say: evaluations with their figures, settings, environment. Pure functions of the folders.

An evaluation comes from its record where it has one, else from the run's history, as runs of before records have it:
means without intervals, and the picture of the first images.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flow_grpo.diversity.paired import Change
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.messages import say
from flow_grpo.page.words import model_name
from flow_grpo.runs.evaluations import read_record, record_path, records_of
from flow_grpo.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, IMAGE_FOLDER, run_config
from flow_grpo.runs.guards import Stop, early_stop
from flow_grpo.runs.history import deciding_metric, salvage_history
from flow_grpo.runs.record import Record

METRICS = {"reward": "reward/total", "vendi": "diversity/vendi", "judge": "judge/accuracy"}  # figure -> in the history
EXTRA = (
    "entropy/",
    "ode_log_prob/",
    "diversity/",
    "modes/",
    "forward_kl/",
)  # beginnings of other metrics worth a chart
MOST_CHECKPOINTS = 12  # of a run whose images are shown


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one run."""

    epoch: int  # 0: the base
    name: str  # "base model", "epoch 10", or the model's own
    seconds: float  # of training before it
    network_evaluations: int
    figures: Mapping[str, float]  # of FIGURES, those that were measured and are finite
    changes: Mapping[str, Change] = field(default_factory=dict)  # against the run's base
    extra: Mapping[str, float] = field(default_factory=dict)
    record: Record | None = None
    picture: Path | None = None  # of the first images, where there is no record

    @property
    def picture_path(self) -> Path | None:
        """The file of its images, if there is anything to look at."""
        return self.picture if self.record is None else self.record.sprite_path


@dataclass(frozen=True)
class PageRun:
    """One run folder."""

    name: str  # the folder's, with as many parents as tell runs apart
    folder: Path
    config: Mapping[str, Any]  # flat; {}: none, as of a folder that `fme check` writes
    environment: Mapping[str, Any]  # {}: none
    epoch: int  # trained so far
    evaluations: tuple[Evaluation, ...]  # by epoch, at least one
    best: int | None  # index of the best evaluation
    stop: Stop | None = None  # why a guard ended it

    @property
    def compares(self) -> bool:
        """Whether something is compared with the base, or will be: not where one thing alone is looked at."""
        return bool(self.config) or len(self.evaluations) > 1

    @property
    def last(self) -> Evaluation:
        """The newest evaluation."""
        return self.evaluations[-1]

    def last_record(self) -> Record | None:
        """That of the newest evaluation, whole; None if it has none."""
        record = self.last.record
        return None if record is None else read_record(record_path(record.folder.parent, record.label, record.epoch))

    def shown(self, most: int = MOST_CHECKPOINTS) -> list[int]:
        """Which evaluations are checkpoints of the page: of those with images (else of all) the first, best, last and
        others evenly between.
        """
        found = [i for i, evaluation in enumerate(self.evaluations) if evaluation.picture_path is not None]
        return evenly(found or range(len(self.evaluations)), most, self.best)


def evenly(items: Sequence[int], most: int, wanted: int | None = None) -> list[int]:
    """At most so many (from 2 on) of ascending items: the first, the last, the wanted one, others at even distances."""
    if len(items) <= most:
        return list(items)
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    if wanted in items and most > 2:
        place = items.index(wanted)
        if place not in places:
            places[min(range(1, most - 1), key=lambda i: abs(places[i] - place))] = place
    return [items[place] for place in places]


# --- reading --------------------------------------------------------------------------------------------


def read_runs(folders: Iterable[Path], label: str = "eval", names: Sequence[str] = ()) -> list[PageRun]:
    """The runs in these folders, in their order, under these names or else their folders'.

    Raises:
        ConfigError: no folder, one twice, or one without an evaluation.
    """
    folders = each_once(folders)
    names = names or run_names(folders)
    return [read_run(folder, name, label) for folder, name in zip(folders, names, strict=True)]


def each_once(folders: Iterable[Path]) -> list[Path]:
    """The folders; ConfigError for none, and for one given twice."""
    folders = list(folders)
    if not folders:
        raise ConfigError("no run folder was given.")
    twice = [folder for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError(f"the run folder {twice[0]} was given twice.")
    return folders


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in itertools.count(1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("unreachable")


def read_run(folder: Path, name: str, label: str = "eval") -> PageRun:
    """One run; ConfigError if there is no evaluation of that label in the folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; a run's folder is needed.")
    history = _history(folder)
    records = {record.epoch: record for record in records_of(folder, label, _without_distances)}
    lines = {line["step"]: line for line in history if any(f"{label}/{metric}" in line for metric in METRICS.values())}
    found = [_evaluation(folder, label, epoch, records, lines) for epoch in sorted(records | lines)]
    if not found:
        raise ConfigError(
            f"{folder} holds no evaluation called {label!r}: neither evaluations/{label}_*.json nor {label}/... in "
            f"{HISTORY_FILE}; a run's folder is needed."
        )
    config = run_config(folder) if (folder / CONFIG_FILE).exists() else {}
    environment = read_object(folder / ENVIRONMENT_FILE) if (folder / ENVIRONMENT_FILE).exists() else {}
    evaluations = _with_reached_base(found)
    epoch = max([line["step"] for line in history] + [evaluations[-1].epoch])
    best = best_evaluation(evaluations, config, history)
    stop = early_stop(folder, config, epoch) if config else None
    return PageRun(name, folder, config, environment, epoch, evaluations, best, stop)


def _without_distances(path: Path) -> Record:
    """A record as far as charts and grids need it. A run writes its page again and again: what has not changed since
    is not read again, and distances, most of a record, are kept of no evaluation (see `PageRun.last_record`).
    """
    try:
        found = path.stat()
    except OSError:
        return read_record(path)  # says it
    return _kept(path, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1024)
def _kept(path: Path, *stamp: int) -> Record:
    """Of a file as it is at this stamp."""
    record = read_record(path)
    if record.diversity is None:
        return record
    count = len(record.diversity.prompts)
    return replace(record, diversity=replace(record.diversity, within=[()] * count, to_base=None, noise=[()] * count))


def _history(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read; none where there is no such file."""
    path = folder / HISTORY_FILE
    if not path.exists():
        return []
    lines, lost = salvage_history(path)
    if lost:
        say(f"{path} has {lost} damaged lines: left out.")
    return lines


def _evaluation(
    folder: Path, label: str, epoch: int, records: Mapping[int, Record], lines: Mapping[int, Mapping[str, Any]]
) -> Evaluation:
    if epoch in records:
        return evaluation_of(records[epoch])
    line = lines[epoch]
    metrics = {key.removeprefix(f"{label}/"): value for key, value in line.items() if key.startswith(f"{label}/")}
    picture = folder / IMAGE_FOLDER / f"{label}_{epoch:06d}.png"
    return Evaluation(
        epoch=epoch,
        name=model_name(epoch),
        seconds=_finite(line.get("seconds")) or 0.0,
        network_evaluations=int(_finite(line.get("network_evaluations")) or 0),
        figures=_known({figure: metrics.get(metric) for figure, metric in METRICS.items()}),
        extra=_known({key: value for key, value in metrics.items() if key.startswith(EXTRA)}),
        picture=picture if picture.is_file() else None,
    )


def evaluation_of(record: Record) -> Evaluation:
    """The figures that a record gives."""
    judge, diversity = record.judge, record.diversity
    figures = {
        "reward": _mean(record.rewards.get("total", ())),
        "vendi": None if diversity is None else _mean(diversity.vendi),
        "judge": None if judge is None else _share_right(judge.guess, record.prompt),
    }
    terms = {name: _mean(values) for name, values in record.rewards.items() if name != "total"}
    extra = {f"reward/{name}": mean for name, mean in terms.items()} if len(terms) > 1 else {}
    changes = {name: change for name, change in record.changes.items() if _is_finite(change)}
    return Evaluation(
        epoch=record.epoch,
        name=model_name(record.epoch, record.name),
        seconds=record.seconds,
        network_evaluations=record.network_evaluations,
        figures=_known(figures | {name: change.new for name, change in changes.items()}),
        changes=changes,
        extra=_known(extra | dict(record.extra)),
        record=record,
    )


def _with_reached_base(found: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The base reaches of its own images what later evaluations say that it does."""
    base, old = found[0], next((e.changes["reached"].old for e in found if "reached" in e.changes), None)
    if base.epoch != 0 or old is None:
        return tuple(found)
    return (replace(base, figures={**base.figures, "reached": old}), *found[1:])


def best_evaluation(
    evaluations: Sequence[Evaluation], config: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
) -> int | None:
    """Index of the best after the base, by what `trainer.score_of` chooses checkpoints by: judge, else a held-out
    reward; of the averaged weights where the history has them; the last of equals. None where nothing of it was
    measured. Of what was not trained here, and has no settings, by the judge.
    """
    metric = deciding_metric(config, "eval_ema") if config else "eval_ema/judge/accuracy"
    if metric is None:
        return None
    averaged = {line["step"]: _finite(line.get(metric)) for line in history}
    name = metric.removeprefix("eval_ema/")

    def score(evaluation: Evaluation) -> float | None:
        if any(value is not None for value in averaged.values()):
            return averaged.get(evaluation.epoch)
        if name == METRICS["judge"]:
            return evaluation.figures.get("judge")
        rewards = evaluation.record.rewards if evaluation.record is not None else {}
        return _mean(rewards.get(name.removeprefix("reward/"), ()))

    scores = [(value, i) for i, e in enumerate(evaluations) if e.epoch and (value := score(e)) is not None]
    return max(scores)[1] if scores else None


# --- numbers --------------------------------------------------------------------------------------------


def _finite(value: Any) -> float | None:
    """A number as a float; None for whatever is none, or not finite."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        return None
    return float(value)


def _known(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are finite numbers."""
    finite = {name: _finite(value) for name, value in values.items()}
    return {name: value for name, value in finite.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of the numbers among them; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _share_right(guess: Sequence[int | None], prompt: Sequence[int]) -> float | None:
    return _mean([None if g is None else float(g == p) for g, p in zip(guess, prompt, strict=True)])


def _is_finite(change: Change) -> bool:
    return all(math.isfinite(value) for value in (change.old, change.new, change.difference, change.low, change.high))
