"""What the page is given: `data`, which its scripts read, and tables, which its template writes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from flow_grpo.curve import Curve
from flow_grpo.diversity.images import read_rgb
from flow_grpo.diversity.paired import NEIGHBOURS
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_bytes
from flow_grpo.messages import say
from flow_grpo.page.data import MOST_CHECKPOINTS, Evaluation, PageRun, evenly
from flow_grpo.page.seeds import (
    NOT_SETTINGS,
    Difference,
    Group,
    curves,
    differences,
    differing_measures,
    groups_of,
    mean_of,
)
from flow_grpo.page.verdicts import direction, diversity_verdict, exploitation_verdict
from flow_grpo.page.words import FIGURES, load, range_of
from flow_grpo.runs.folder import CURVE_FILE, IMAGE_FOLDER
from flow_grpo.runs.record import NONE_OF_THEM, Record
from flow_grpo.statistics import Interval

MOST_IMAGE_BYTES = 24 << 20  # of all sprites in a page, before base64
MOST_STRIPS, MOST_STRIP_RUNS, STRIP_WIDTH = 3, 4, 1280  # film strips of a run, runs that have some, pixels
QUALITY = 80  # of pictures that are made anew, WebP
REFRESH_SECONDS = 20  # of the page of a run that goes on
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flow-matching-entropy")


@dataclass(frozen=True)
class Table:
    """Rows of a name and a value for each run; a row whose values are all the same has one."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Contents:
    """All that is on a page."""

    title: str
    data: Mapping[str, Any]  # for the scripts
    differing: Table  # settings in which the runs differ
    shared: Sequence[tuple[str, str]]  # the other settings
    environments: Table
    comparison: Sequence[Mapping[str, Any]]  # a row for each group of runs; [] for one run
    incomparable: Sequence[str]  # settings of what is measured in which the runs differ
    left_out: Sequence[Mapping[str, Any]]  # of runs that are not shown whole: run, shown, of, pictures
    stopped: Sequence[PageRun]  # by a guard
    measured: Mapping[str, Any]  # how: judge, features, ...
    strips: Sequence[Mapping[str, str]]  # film strips: name, data


def contents_of(runs: Sequence[PageRun], live: bool, label: str) -> Contents:
    """Read the pictures of the runs, and lay out what the page says of them."""
    groups = groups_of(runs)
    incomparable = differing_measures(runs)
    budget = MOST_IMAGE_BYTES // len(runs)
    shown = [checkpoints_within(run, budget) for run in runs]
    affordable = [_weight(run, chosen) <= budget for run, chosen in zip(runs, shown, strict=True)]
    plain_runs = [_run(*parts) for parts in zip(runs, shown, affordable, strict=True)]
    for number, group in enumerate(groups):
        for i in group.runs:
            plain_runs[i]["group"] = number
    data = {
        "words": load(),
        "figures": FIGURES,
        "refresh": REFRESH_SECONDS if live else 0,
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "label": label,
        "runs": plain_runs,
        "groups": [_group(group, runs) for group in groups],
    }
    differing, shared = _settings(runs)
    return Contents(
        title=", ".join(group.name for group in groups),
        data=data,
        differing=differing,
        shared=shared,
        environments=_environments(runs),
        comparison=_comparison(groups, runs, bool(incomparable)) if len(runs) > 1 else [],
        incomparable=incomparable,
        left_out=[
            {"run": run.name, "shown": len(chosen), "of": len(run.evaluations), "pictures": pictures}
            for run, chosen, pictures in zip(runs, shown, affordable, strict=True)
            if len(chosen) < len(run.evaluations) or not pictures
        ],
        stopped=[run for run in runs if run.stop is not None],
        measured=_measured(runs),
        strips=[strip for run in runs[:MOST_STRIP_RUNS] for strip in _strips(run, label, len(runs) > 1)],
    )


def _group(group: Group, runs: Sequence[PageRun]) -> dict[str, Any]:
    """A group of one run has no curves of its own: the page draws the run's."""
    return {"name": group.name, "runs": group.runs, "curves": curves(group, runs) if len(group.runs) > 1 else {}}


# --- runs -----------------------------------------------------------------------------------------------


def checkpoints_within(run: PageRun, budget: int) -> list[int]:
    """Indices of the evaluations that are checkpoints of the page, fewer where their pictures are over the budget.

    Where those of the first and the last alone are over it, all, without pictures: see `_weight`.
    """
    for most in range(MOST_CHECKPOINTS, 1, -1):
        chosen = run.shown(most)
        if _weight(run, chosen) <= budget:
            return chosen
    return run.shown(MOST_CHECKPOINTS)


def _weight(run: PageRun, shown: Sequence[int]) -> int:
    """Bytes of the pictures of these evaluations."""
    pictures = [run.evaluations[i].picture_path for i in shown]
    return sum(path.stat().st_size for path in pictures if path is not None and path.is_file())


def _run(run: PageRun, shown: Sequence[int], pictures: bool) -> dict[str, Any]:
    base = run.evaluations[0].record if run.evaluations[0].epoch == 0 else None
    prompts = list(dict.fromkeys(p for e in run.evaluations if e.record is not None for p in e.record.prompts))
    return {
        "name": run.name,
        "epoch": run.epoch,
        "trained": bool(run.config),  # else what is there already is looked at
        "best": run.best,
        "curve": _curve(run),
        "prompts": prompts,
        "n": _counts([e.record for e in run.evaluations if e.record is not None]),
        "evaluations": [_evaluation(evaluation, run.compares, base) for evaluation in run.evaluations],
        "checkpoints": [_checkpoint(i, run.evaluations[i], prompts, pictures) for i in shown],
    }


def _curve(run: PageRun) -> list[tuple[float, float]]:
    """The exact law from the run's base model on, (reward, Vendi score); [] without one of the run's reward."""
    path, base = run.folder / CURVE_FILE, run.evaluations[0]
    if not path.exists() or base.epoch != 0 or not {"reward", "vendi"} <= set(base.figures):
        return []
    try:
        curve = Curve.read(path)
    except ConfigError as error:
        say(f"{str(error).rstrip('.')}: no exact law is shown.")
        return []
    weights = {key.partition(".")[2]: w for key, w in run.config.items() if key.startswith("reward_fn.") and w}
    return curve.beside(base.figures["reward"], base.figures["vendi"]) if weights == curve.rewards else []


def _counts(records: Sequence[Record]) -> str:
    """How many images of a prompt the distances are of: "16", or "14 to 16"."""
    counts = {n for record in records if record.diversity is not None for n in record.diversity.images}
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def _evaluation(evaluation: Evaluation, compares: bool, base: Record | None) -> dict[str, Any]:
    changes, record = evaluation.changes, evaluation.record
    alike = base is None or record is None or record.setting == base.setting
    independent = record is not None and record.judge is not None and record.judge.independent
    directions = {name: _direction(name, evaluation, compares) for name in FIGURES}
    return {
        "epoch": evaluation.epoch,
        "name": evaluation.name,
        "seconds": evaluation.seconds,
        "network_evaluations": evaluation.network_evaluations,
        "figures": evaluation.figures,
        "changes": {name: asdict(change) for name, change in changes.items()},
        "directions": directions,
        "diversity": _diversity(evaluation, compares, alike),
        "exploitation": _exploitation(evaluation, independent, alike),
        "independent": independent,
        "alike": alike,  # drawn and measured as the base was
        "images": 0 if record is None else len(record.prompt),
        "extra": evaluation.extra,
    }


def _without_change(figure: str, evaluation: Evaluation, alike: bool, verdict: str) -> str:
    """Why a figure that was measured has no interval; the verdict where it was not measured."""
    record = evaluation.record
    measured = figure in evaluation.figures or (figure == "reward" and record is not None and "total" in record.rewards)
    if not measured:
        return verdict
    if record is None:
        return "no_records"
    return "no_interval" if alike else "other_setting"


def _diversity(evaluation: Evaluation, compares: bool, alike: bool) -> str:
    """A key of the words' verdicts."""
    if evaluation.epoch == 0:
        return _base_verdict(compares)
    change = evaluation.changes.get("vendi")
    verdict = diversity_verdict(change)
    return verdict if change is not None else _without_change("vendi", evaluation, alike, verdict)


def _exploitation(evaluation: Evaluation, independent: bool, alike: bool) -> str:
    """A key of the words' verdicts."""
    change = evaluation.changes.get("reward")
    verdict = exploitation_verdict(change, evaluation.changes.get("judge"), independent)
    return verdict if change is not None else _without_change("reward", evaluation, alike, verdict)


def _base_verdict(compares: bool) -> str:
    """Of what others are compared with; of what is alone."""
    return "base" if compares else "alone"


def _direction(figure: str, evaluation: Evaluation, compares: bool) -> str:
    """A key of the words' directions."""
    if figure not in evaluation.figures:
        return "not_measured"
    if evaluation.epoch == 0:
        return _base_verdict(compares)
    return direction(evaluation.changes[figure]) if figure in evaluation.changes else "no_interval"


def _checkpoint(index: int, evaluation: Evaluation, prompts: Sequence[str], pictures: bool) -> dict[str, Any]:
    """Image by image, those that are in the sprite; of all that were scored where there is no sprite."""
    found: dict[str, Any] = {"evaluation": index, "sprite": None, "picture": None}
    record = evaluation.record
    if record is None:
        picture = _embedded(evaluation.picture) if pictures else None
        return found | {"picture": picture, "prompt": [], "noise": []}
    picture = _data_url(record.sprite_path) if pictures and record.sprite is not None else None
    kept = range(len(record.prompt)) if record.sprite is None else record.sprite.images
    place = [prompts.index(prompt) for prompt in record.prompts]
    if record.sprite is not None and picture is not None:
        found["sprite"] = {"data": picture, "cell": record.sprite.cell, "columns": record.sprite.columns}
    found |= {"prompt": [place[record.prompt[i]] for i in kept], "noise": [record.noise[i] for i in kept]}
    found["rewards"] = {name: [values[i] for i in kept] for name, values in record.rewards.items()}
    if record.judge is not None:
        guess = [record.judge.guess[i] for i in kept]
        found["guess"] = [g if g in (None, NONE_OF_THEM) else place[g] for g in guess]
        found["probability"] = [record.judge.probability[i] for i in kept]
    if record.diversity is not None:
        scores = zip(record.diversity.prompts, record.diversity.vendi, strict=True)
        found["vendi"] = {str(place[p]): score for p, score in scores}
    return found


# --- pictures -------------------------------------------------------------------------------------------


def _data_url(path: Path | None) -> str | None:
    """A sprite as it is on the disk; None, which is told, where it is no WebP picture or cannot be read."""
    try:
        content = b"" if path is None else read_bytes(path, "json")
    except ConfigError as error:
        say(f"{str(error).rstrip('.')}: the page is without these images.")
        return None
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        say(f"{path} is not a WebP picture: the page is without these images.")
        return None
    return _webp(content)


def _embedded(path: Path | None, width: int | None = None) -> str | None:
    """A picture file as WebP, reduced to a width; None, which is told, where it cannot be read."""
    if path is None:
        return None
    try:
        image = Image.fromarray(read_rgb(path))
    except ConfigError as error:
        say(f"{str(error).rstrip('.')}: the page is without it.")
        return None
    if width is not None and image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return _webp(buffer.getvalue())


def _webp(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _strips(run: PageRun, label: str, named: bool) -> list[dict[str, str]]:
    """The film strips of a few evaluations, first and last among them."""
    found = [(e, run.folder / IMAGE_FOLDER / f"{label}_strip_{e.epoch:06d}.png") for e in run.evaluations]
    found = [(evaluation, path) for evaluation, path in found if path.is_file()]
    strips = []
    for i in evenly(range(len(found)), MOST_STRIPS):
        evaluation, path = found[i]
        picture = _embedded(path, STRIP_WIDTH)
        if picture is not None:
            strips.append({"name": f"{run.name}: {evaluation.name}" if named else evaluation.name, "data": picture})
    return strips


# --- tables ---------------------------------------------------------------------------------------------


def _comparison(groups: Sequence[Group], runs: Sequence[PageRun], incomparable: bool) -> list[dict[str, Any]]:
    """For each group: its last figures, and how they differ from the first group's."""
    rows = []
    for group in groups:
        last = [runs[i].last for i in group.runs]
        compared = {} if incomparable or group is groups[0] else differences(group, groups[0], runs)
        measured = {f: [e.figures[f] for e in last] for f in FIGURES if all(f in e.figures for e in last)}
        figures = {f: _compared(mean_of(values, *range_of(f)), compared.get(f)) for f, values in measured.items()}
        rows.append({"name": group.name, "runs": len(group.runs), "at": _at(last), "figures": figures})
    return rows


def _compared(estimate: Interval, difference: Difference | None) -> dict[str, Any]:
    return {"estimate": estimate, "difference": difference, "tone": _tone(difference)}


def _at(last: Sequence[Evaluation]) -> str:
    """Which models are compared."""
    return ", ".join(dict.fromkeys(evaluation.name for evaluation in last))


def _tone(difference: Difference | None) -> str:
    """A key of the words' directions."""
    if difference is None:
        return ""
    estimate = difference.estimate
    if not estimate.known:
        return "no_interval"
    return "better" if estimate.above(0) else "worse" if estimate.below(0) else "not_shown"


def _settings(runs: Sequence[PageRun]) -> tuple[Table, list[tuple[str, str]]]:
    """Settings in which the runs differ, with each run's value, and those they share."""
    keys = sorted({key for run in runs for key in run.config} - set(NOT_SETTINGS))
    values = {key: [json.dumps(run.config[key]) if key in run.config else "" for run in runs] for key in keys}
    differing = [(key, row) for key, row in values.items() if len(set(row)) > 1]
    shared = [(key, row[0]) for key, row in values.items() if len(set(row)) == 1]
    return Table([run.name for run in runs], differing), shared


def _environments(runs: Sequence[PageRun]) -> Table:
    """A column for each run; nothing of those that have none."""
    known = [run for run in runs if run.environment]
    rows = [("folder", [str(run.folder) for run in known])] if known else []
    for key in ("command", "started", "device", "processes", "threads", "platform", "python"):
        rows.append((key, [str(run.environment.get(key, "")) for run in known]))
    rows.append(("code", [_revision(run.environment.get("git")) for run in known]))
    for name in PACKAGES:
        rows.append((name, [_version(run.environment.get("packages"), name) for run in known]))
    return Table([run.name for run in known], [row for row in rows if any(row[1])])


def _revision(git: Any) -> str:
    if not isinstance(git, dict):
        return ""
    return f"{git.get('revision') or ''}{' (changed)' if git.get('dirty') else ''}"


def _version(packages: Any, name: str) -> str:
    return str(packages.get(name, "")) if isinstance(packages, dict) else ""


def _measured(runs: Sequence[PageRun]) -> dict[str, Any]:
    """Judge, features and images of the newest record; whether images were drawn here, and every change is paired."""
    record = next((e.record for run in runs for e in reversed(run.evaluations) if e.record is not None), None)
    known = {
        "trained": all(run.config for run in runs),
        "drawn": all(e.record is None or e.record.drawn for run in runs for e in run.evaluations),
        "paired": all(change.paired for run in runs for e in run.evaluations for change in e.changes.values()),
        "neighbours": NEIGHBOURS,
    }
    if record is None:
        return known | {"judge": None, "features": None, "rewards": [], "images": 0, "prompts": 0}
    return known | {
        "judge": record.judge,
        "features": None if record.diversity is None else record.diversity,
        "rewards": [name for name in record.rewards if name != "total"],
        "images": len(record.prompt),
        "prompts": len(record.prompts),
    }
