"""What there is: recipes, settings, rewards and runs.

    fme ls recipes [NAME]      names, what an epoch of them costs, the GPUs that they are meant for
    fme ls keys [NAME]         settings with their defaults and meanings; with NAME, what they take
    fme ls rewards [NAME]      names, whether they have a gradient, how to train on them
    fme ls runs [NAME|FOLDER]  the runs in a folder (default: logs): how far they are and what was measured last

NAME is the beginning of a name, or a pattern such as "*batch_size".
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.methods.registry import METHODS
from flow_grpo.recipes import registry
from flow_grpo.recipes.base import KEYS, SECTIONS, leaves
from flow_grpo.rewards.own_files import announced
from flow_grpo.rewards.registry import REWARDS, RewardSpec
from flow_grpo.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, run_config
from flow_grpo.runs.history import salvage_history
from flow_grpo.runs.lock import is_locked

T = TypeVar("T")

MOST_NAMED = 20  # names in the sentence about one that is none

LOGS = "logs"
REWARD, VENDI = "eval/reward/total", "eval/diversity/vendi"
COLUMNS = ("run", "recipe", "state", "epochs", "reward", "Vendi", "size")
COST = re.compile(r"Cost of an epoch, on (\d+) process(?:es)?: (.*?)\.(?:\s|$)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("kind", choices=tuple(LISTS), metavar="|".join(LISTS), help="what to list")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="list only these")


def main(arguments: argparse.Namespace) -> int:
    """Print the list; 0. Raises ConfigError where no name fits."""
    for line in LISTS[arguments.kind](arguments.name):
        print(line)
    return 0


def narrowed(named: Mapping[str, T], name: str, kind: str) -> dict[str, T]:
    """Those that `name` fits; ConfigError with the nearest where there are none."""
    found = {key: value for key, value in named.items() if key.startswith(name) or fnmatchcase(key, name)}
    if not found:
        nearest = cli.nearest(name, list(named))
        few = ", ".join(named) if 0 < len(named) <= MOST_NAMED else f"`fme ls {kind}s` lists all"
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"{few}."
        raise ConfigError(f"there is no {kind} {name!r}; {advice}")
    return found


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell; the last is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# --- recipes, keys, rewards ----------------------------------------------------------------------------


def recipes(name: str) -> Iterable[str]:
    """Three lines for each: what it is; what an epoch costs; its other name. Of one alone, its settings too."""
    named, chosen = {new: registry.RECIPES[old] for new, old in registry.NAMES.items()}, name
    if name in registry.RECIPES:
        named = {new: recipe for new, recipe in named.items() if registry.NAMES[new] == name}
        name = chosen = next(iter(named))
    for new, recipe in narrowed(named, name, "recipe").items():
        doc = inspect.getdoc(recipe) or ""
        cost = COST.search(doc)
        processes = registry.INTENDED_PROCESSES[registry.NAMES[new]]
        meant = "a CPU" if new.startswith(("tiny", "scenes")) else f"{processes} GPU{'s' if processes > 1 else ''}"
        yield f"{new}: {doc.splitlines()[0]}"
        yield f"    an epoch, on {meant}: {' '.join(cost[2].split()) if cost else 'not counted'}"
        if new != registry.NAMES[new]:
            yield f"    also called {registry.NAMES[new]}"
        if new == chosen:
            yield from (f"    {key} = {value!r}" for key, value in _own(registry.NAMES[new]))
    yield "Costs are images, and evaluations of the transformer over all processes. `fme train NAME` starts one."


def _own(recipe: str) -> Iterable[tuple[str, Any]]:
    """The settings of a recipe that are not the defaults."""
    return [(key, value) for key, value in leaves(registry.get_config(recipe)) if value != KEYS[key].default]


def keys(name: str) -> Iterable[str]:
    """By section; one line for each, and with `name` what it takes."""
    chosen = narrowed(KEYS, name, "key")
    for title, section in SECTIONS.items():
        shown = repr if len(chosen) == 1 else _shown
        rows = [(key.name, shown(key.default), key.meaning) for key in section if key.name in chosen]
        if rows:
            yield f"--- {title}"
        for (key, *_), line in zip(rows, table(rows), strict=True):
            yield line
            if name:
                yield f"    takes {KEYS[key].rule.allowed}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 36 else f"{text[:32]} ..."


def methods(name: str) -> Iterable[str]:
    """A table, and how to choose one."""
    rows = [("method", "what it is", "use_reward_gradient")]
    rows += [(m.name, m.title, str(m.reward_gradient)) for m in narrowed(METHODS, name, "method").values()]
    yield from table(rows)
    yield "Recipes have chosen one; train.method=NAME is another of the same family."


def rewards(name: str) -> Iterable[str]:
    """A table, and how to use one."""
    rows = [("reward", "gradient", "model", "to train on it")]
    own = {other: RewardSpec(other, True, "", place) for other, place in announced().items() if other not in REWARDS}
    for reward in narrowed(REWARDS | own, name, "reward").values():
        if reward.name in own:
            rows.append((reward.name, "tried", reward.factory, f"reward_fn.{reward.name}=1"))
            continue
        model = f"reward_model.{reward.name}={KEYS[f'reward_model.{reward.name}'].default}" if reward.scorer else "none"
        rows.append((reward.name, "yes" if reward.differentiable else "no", model, f"reward_fn.{reward.name}=1"))
    yield from table(rows)
    yield "Recipes that train by the reward's gradient take those that have one."
    yield "One of your own: `fme train RECIPE --reward NAME=FILE.py:THING`; docs/extending.md."


# --- runs ----------------------------------------------------------------------------------------------


def runs(name: str) -> Iterable[str]:
    """A table of the runs in a folder, or of those of a name in logs/."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        name = ""
    else:
        folder = Path(LOGS)
    found = {str(run.relative_to(folder)) if run != folder else run.name: run for run in _run_folders(folder)}
    if not found:
        raise ConfigError(f"{folder.resolve()} holds no run; `fme ls runs FOLDER` looks elsewhere.")
    yield from table([COLUMNS, *(_row(shown, run) for shown, run in narrowed(found, name, "run").items())])


def _run_folders(folder: Path) -> list[Path]:
    """`folder` itself, or those in it and one level deeper, as of seeds and demos."""
    candidates = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    return [run for run in candidates if all(os.path.isfile(run / name) for name in (CONFIG_FILE, ENVIRONMENT_FILE))]


def _row(name: str, folder: Path) -> tuple[str, ...]:
    history = _history(folder)
    epochs = max((line["step"] for line in history), default=0)
    try:
        config = run_config(folder)
    except ConfigError:
        return (one_line(name), "", "damaged", str(epochs), "", "", _size(folder))
    wanted = config.get("num_epochs")
    return (
        one_line(name),
        one_line(str(config.get("recipe", ""))),
        _state(folder, config, history, epochs),
        f"{epochs} of {wanted}" if isinstance(wanted, int) else str(epochs),
        _last(history, REWARD, "{:.4f}"),
        _last(history, VENDI, "{:.2f}"),
        _size(folder),
    )


def _history(folder: Path) -> list[dict[str, Any]]:
    """The lines that can be read."""
    try:
        return salvage_history(folder / HISTORY_FILE)[0]
    except ConfigError:
        return []


def _state(folder: Path, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]], epochs: int) -> str:
    if is_locked(folder):
        return "running"
    seconds = max((line["seconds"] for line in history if isinstance(line.get("seconds"), int | float)), default=0.0)
    limit, most = config.get("num_epochs"), config.get("max_seconds")
    if isinstance(limit, int) and epochs >= limit:
        return "finished"
    return "cut by the clock" if isinstance(most, int | float) and 0 < most <= seconds else "stopped"


def _last(history: Sequence[Mapping[str, Any]], metric: str, form: str) -> str:
    """The last value of a metric that was measured; empty: none was."""
    values = [line[metric] for line in history if isinstance(line.get(metric), int | float)]
    return form.format(values[-1]) if values else ""


def _size(folder: Path) -> str:
    """Of all files in a folder; links are not followed."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
            except OSError:  # of a run that goes on, and has just removed it
                continue
    return f"{total / 1e6:,.1f} MB"


LISTS: dict[str, Callable[[str], Iterable[str]]] = {
    "recipes": recipes,
    "keys": keys,
    "methods": methods,
    "rewards": rewards,
    "runs": runs,
}
