"""Runs that differ in their seed alone, as one group; and how each group differs from the first one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flow_grpo.diversity.paired import Change
from flow_grpo.page.data import PageRun
from flow_grpo.page.words import FIGURES, range_of
from flow_grpo.runs.changes import with_changes
from flow_grpo.statistics import Interval, difference_interval, mean_interval

NOT_SETTINGS = ("run_name", "logdir", "project", "trackers", "resume_from")  # of no effect on the numbers
SEED = "seed"
# settings that decide what an evaluation measures: numbers of runs that differ in one cannot be compared
MEASURE = ("reward_fn.", "reward_model.", "reward_files.", "prompts.test", "prompts.eval_diversity", "resolution",
           "height", "width", "eval.", "diversity.", "num_seeds", "targets.", "chat.")  # fmt: skip
NOT_MEASURE = (
    "eval.ema", "eval.batch_size", "eval.rewards", "eval.num_grid_prompts", "eval.num_grid_images",
    "diversity.batch_size", "diversity.num_draws",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs of the same settings but the seed."""

    name: str
    runs: tuple[int, ...]  # indices into the runs of the page


@dataclass(frozen=True)
class Difference:
    """How a group differs from the first in one figure, at the last evaluations."""

    estimate: Interval
    how: str  # "seeds": t over the seeds both have; "runs": t (Welch) over runs; "images": paired; "none": no interval


def groups_of(runs: Sequence[PageRun]) -> list[Group]:
    """In the order of their first runs; a run without settings, or of a seed that is there already, is alone.

    The same seed again, as of a run that branched off, is no other draw: a mean over both would look too certain.
    """
    found: dict[Any, list[int]] = {}
    for number, run in enumerate(runs):
        settings = _settings(run)
        again = any(_seed(runs[i]) == _seed(run) for i in found.get(settings, ()))
        found.setdefault(settings if settings and not again else number, []).append(number)
    return [Group(_name([runs[i] for i in members]), tuple(members)) for members in found.values()]


def _settings(run: PageRun) -> tuple[tuple[str, str], ...]:
    left_out = (*NOT_SETTINGS, SEED)
    return tuple(sorted((key, repr(value)) for key, value in run.config.items() if key not in left_out))


def _name(runs: Sequence[PageRun]) -> str:
    """The run's name; of several what their names begin with, else the first one's."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    common = "".join(letters[0] for letters in _while_equal(names)).rstrip("-_ /.0123456789")
    return common.removesuffix("seed").rstrip("-_ /.") or names[0]


def _while_equal(names: Sequence[str]) -> list[tuple[str, ...]]:
    columns = list(zip(*names, strict=False))
    length = next((i for i, letters in enumerate(columns) if len(set(letters)) > 1), len(columns))
    return columns[:length]


# --- along training -------------------------------------------------------------------------------------


def curves(group: Group, runs: Sequence[PageRun]) -> dict[str, list[dict[str, float | None]]]:
    """Figure -> points of the group's mean over its runs at each epoch that all of them evaluated.

    A point has epoch, seconds and network_evaluations (means), value, and low and high, of t over the runs.
    """
    members = [{e.epoch: e for e in runs[i].evaluations} for i in group.runs]
    epochs = sorted(set.intersection(*(set(member) for member in members)))
    found: dict[str, list[dict[str, float | None]]] = {}
    for figure in FIGURES:
        for epoch in epochs:
            at = [member[epoch] for member in members]
            if all(figure in evaluation.figures for evaluation in at):
                estimate = mean_of([evaluation.figures[figure] for evaluation in at], *range_of(figure))
                found.setdefault(figure, []).append(
                    {
                        "epoch": epoch,
                        "seconds": float(np.mean([evaluation.seconds for evaluation in at])),
                        "network_evaluations": float(np.mean([evaluation.network_evaluations for evaluation in at])),
                        "value": estimate.estimate,
                        "low": estimate.low if estimate.known else None,
                        "high": estimate.high if estimate.known else None,
                    }
                )
    return found


def mean_of(values: Sequence[float], least: float | None = None, most: float | None = None) -> Interval:
    """Mean over runs with its t interval, cut to what the figure can be; one run has none."""
    found = mean_interval(values)
    if not found.known:
        return Interval(found.estimate)
    low = found.low if least is None else max(found.low, least)
    return Interval(found.estimate, low, found.high if most is None else min(found.high, most))


# --- against the first group ----------------------------------------------------------------------------


def differing_measures(runs: Sequence[PageRun]) -> list[str]:
    """Settings that decide what is measured in which the runs differ; where there are any, runs are not compared."""
    keys = {key for run in runs for key in run.config if key.startswith(MEASURE) and key not in NOT_MEASURE}
    known = [run for run in runs if run.config]
    return [key for key in sorted(keys) if len({repr(run.config.get(key)) for run in known}) > 1]


def differences(group: Group, first: Group, runs: Sequence[PageRun]) -> dict[str, Difference]:
    """Figure -> the group's last value minus the first group's."""
    if len(group.runs) == len(first.runs) == 1:
        return _of_images(runs[group.runs[0]], runs[first.runs[0]])
    found = {}
    for figure in FIGURES:
        new, old = ({_seed(runs[i]): runs[i].last.figures.get(figure) for i in g.runs} for g in (group, first))
        values = _of_runs(_measured(new), _measured(old))
        if values is not None:
            found[figure] = values
    return found


def _measured(values: Mapping[Any, float | None]) -> dict[Any, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _seed(run: PageRun) -> Any:
    return run.config.get(SEED, run.name)


def _of_runs(new: Mapping[Any, float], old: Mapping[Any, float]) -> Difference | None:
    """Over the seeds that both have, if there are two of them; else over the runs; None: nothing to compare."""
    both = [seed for seed in new if seed in old]
    if len(both) > 1:
        a, b = [new[seed] for seed in both], [old[seed] for seed in both]
        return _unless_exact(mean_of(np.subtract(a, b).tolist()), "seeds")
    if not new or not old:
        return None
    a, b = list(new.values()), list(old.values())
    centre = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return Difference(Interval(centre), "none")
    return _unless_exact(difference_interval(a, b), "runs")


def _unless_exact(estimate: Interval, how: str) -> Difference:
    """Few seeds often lose the same number of images: a difference without a spread is not known without an error."""
    if estimate.estimate != 0 and estimate.known and math.isclose(estimate.low, estimate.high, rel_tol=1e-9):
        return Difference(Interval(estimate.estimate), "none")
    return Difference(estimate, how)


def _of_images(run: PageRun, first: PageRun) -> dict[str, Difference]:
    """Of two single runs, paired image by image where both kept records of the same prompts and noises.

    What they reach of the base's images has no such interval: that would take distances between the two runs.
    """
    new, old = run.last, first.last
    changes: Mapping[str, Change] = {}
    records = run.last_record(), first.last_record()
    if records[0] is not None and records[1] is not None:
        changes = with_changes(replace(records[0], changes={}), records[1]).changes
    found = {}
    for figure in (figure for figure in FIGURES if figure in new.figures and figure in old.figures):
        if figure in changes and figure != "reached":  # whose distances are to the run's own base, not to the other run
            change = changes[figure]
            found[figure] = Difference(Interval(change.difference, change.low, change.high), "images")
        else:
            found[figure] = Difference(Interval(new.figures[figure] - old.figures[figure]), "none")
    return found
