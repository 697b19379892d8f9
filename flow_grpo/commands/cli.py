"""The command line of every script: `--config FILE.py:NAME --config.KEY=VALUE ...`, and one sentence for a mistake.

What can be wrong with it is found here, so that it reads as a sentence.
With --config.resume_from the settings are those that the run was started with, not those of a recipe; what the command
line changes is said, and refused where it would change what is drawn or measured, unless --allow-changes is given.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.commands.overrides import OVERRIDE, read_overrides
from flow_grpo.errors import ConfigError, Interrupted, TrainingStopped
from flow_grpo.launcher import read_launcher
from flow_grpo.messages import PatientStream, say
from flow_grpo.methods.registry import check_read
from flow_grpo.places import line_in
from flow_grpo.recipes import registry as grpo
from flow_grpo.recipes.base import RENAMED, decides_what_is_seen, declare, leaves
from flow_grpo.rewards.own_files import digest, in_full
from flow_grpo.runs.config import config_from, read_config, write_out_models
from flow_grpo.runs.folder import check_name, flatten, run_folder_of
from flow_grpo.runs.saved import CHECKPOINT_STATE, checkpoint_state, find_checkpoint
from flow_grpo.settings import resolve

ALLOW_CHANGES = "--allow-changes"


def run(main: Callable[[ConfigDict], None], doc: str) -> None:
    """A script's entry point: call `main` with the configuration that the command line describes.

    A mistake in it ends the process with one sentence and exit code 2, training that cannot go on with 1.
    """
    with one_sentence_errors():
        config = parse_config(sys.argv, doc, check=True)
        main(config)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn ConfigError into exit code 2, TrainingStopped into 1, Interrupted into 128 + the signal's number.

    Each machine's first process says why. Output that nobody can read any more, or in letters that the terminal lacks,
    ends nothing.
    """
    os.environ["MPLBACKEND"] = "agg"  # figures are only written; another one may not even be installed
    with _patient_output():
        try:
            _check_working_folder()
            yield
        except (ConfigError, TrainingStopped, Interrupted) as error:
            say(str(error) if isinstance(error, Interrupted) else f"error: {error}")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            say("stopped by SIGINT.")
            raise SystemExit(128 + signal.SIGINT) from None


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise ConfigError("the working folder no longer exists; change to one that does.") from None


def create_folder(folder: Path) -> Path:
    """A folder for results, made if needed; ConfigError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be a folder ({error.strerror}).") from None
    return folder


@contextmanager
def _patient_output() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PatientStream(sys.stdout), PatientStream(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def parse_config(argv: Sequence[str], doc: str, check: bool = False) -> ConfigDict:
    """The locked configuration described by `argv` (as sys.argv: the program comes first); `--help` prints and exits.

    Raises ConfigError for a missing --config, an unknown file, recipe or key, a value of the wrong kind, and changes of
    a run that goes on.
    """
    if {"-h", "--help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(_help(doc))
        raise SystemExit(0)
    return configure(*_split(argv[1:]), load_file, check=check)


def configure(
    recipe: str,
    overrides: Sequence[str],
    allow_changes: bool,
    load: Callable[[str], ConfigDict],
    check: bool = False,
) -> ConfigDict:
    """The locked configuration of a recipe, or of the run that --config.resume_from names, with overrides.

    Args:
        recipe: what `load` takes; empty: the run's own settings.
        overrides: each --config.KEY=VALUE, or as two arguments.
        allow_changes: also those that change what a run that goes on draws or measures.
        check: also everything that can be known before torch is imported; the answer is quick.

    Raises:
        ConfigError: as `parse_config`.
    """
    before = _settings_of_run(_value_of("resume_from", overrides), recipe)
    config = load(recipe) if before is None else before
    declared = dict(leaves(config))
    declare(config, (found[2] for override in overrides if (found := OVERRIDE.fullmatch(override))))
    known = dict(leaves(config))
    for override in overrides:
        _check_key(override, known)
    config.update_from_flattened_dict(read_overrides(overrides, known))
    config.reward_files.update({name: in_full(place) for name, place in config.reward_files.items()})
    changes = _changes(declared, dict(leaves(config)))
    if before is not None:
        rewritten = _rewritten(config)
        changes |= rewritten
        refused = [text for key, text in changes.items() if key in rewritten or decides_what_is_seen(key)]
        _check_changes(refused, _folder_of(declared) == _folder_of(dict(leaves(config))), allow_changes)
    elif allow_changes:
        raise ConfigError(f"{ALLOW_CHANGES} is for a run that goes on; it comes with --config.resume_from=RUN.")
    if before is None:
        write_out_models(config)
    if check:
        resolve(config, read_launcher().num_processes, cuda=True, fetch=True)
        check_read(config, changes)
        if os.environ.get("RANK", "0") == "0":  # others may find the folder that this one has just made
            check_name(config)
    if changes and before is not None:
        say(f"changed: {', '.join(changes.values())}")
    return config


# --- a run that goes on ---------------------------------------------------------------------------------


def _settings_of_run(resume_from: str, recipe: str) -> ConfigDict | None:
    """The settings of the run that is continued, its folder's present place included; None: none is, or none are known.

    Raises ConfigError where a recipe is named besides that is another than the run's.
    """
    if not resume_from:
        return None
    folder = run_folder_of(resume_from)
    if folder is None:
        config = _settings_of_checkpoint(resume_from)
    else:
        config = read_config(folder, {}, num_processes=None)
        config.update({"logdir": str(folder.resolve().parent), "run_name": folder.resolve().name})
    if config is None:
        if not recipe and not os.path.exists(os.path.expanduser(resume_from)):
            raise ConfigError(f"config.resume_from = {resume_from!r} does not exist; it takes a run folder.")
        if not recipe:
            raise ConfigError(
                f"config.resume_from = {resume_from!r} holds no checkpoint that knows its settings; it takes a run "
                "folder, its checkpoints folder or one checkpoint of it."
            )
    elif recipe and _recipe_of(recipe) != grpo.first_name(config.recipe):
        raise ConfigError(
            f"--config {recipe} is not the recipe of {resume_from}, {config.recipe!r}: a run goes on with its own "
            "settings; name no other ones, and change keys one by one."
        )
    return config


def _recipe_of(recipe: str) -> str:
    """The first name of the recipe that FILE.py:NAME, or NAME, means."""
    path, _, name = recipe.partition(":")
    return grpo.first_name(name if path.endswith(".py") else recipe)


def _settings_of_checkpoint(resume_from: str) -> ConfigDict | None:
    """Those that a checkpoint away from its run's folder carries, for a run of another name; None: it has none."""
    try:
        checkpoint = find_checkpoint(resume_from)
    except ConfigError:
        return None  # there is a better sentence for it where it is resumed
    kept = checkpoint_state(checkpoint).get("config")
    if not isinstance(kept, dict):
        return None
    return config_from(flatten(kept), checkpoint / CHECKPOINT_STATE, {"resume_from": "", "run_name": ""})


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What overrides have changed, in words, by key."""
    changes = {key: f"{key} {before.get(key)!r} -> {new!r}" for key, new in after.items() if before.get(key) != new}
    changes.pop("resume_from", None)
    if _folder_of(before) == _folder_of(after):
        changes.pop("logdir", None)  # the same, written otherwise
    return changes


def _rewritten(config: ConfigDict) -> dict[str, str]:
    """One's own rewards whose code is no longer what the checkpoint was trained by, in words, by key."""
    try:
        kept = checkpoint_state(find_checkpoint(config.resume_from)).get("reward_sha256")
    except ConfigError:  # there is a better sentence for it where it is resumed
        return {}
    found = {}
    for name, place in config.reward_files.items():
        before, now = (kept.get(name) if isinstance(kept, dict) else None), digest(place)
        if before and now and before != now:
            found[f"reward_files.{name}"] = f"reward_files.{name} {place!r} (SHA-256 {before[:12]}... -> {now[:12]}...)"
    return found


def _check_changes(refused: Sequence[str], goes_on: bool, allowed: bool) -> None:
    """ConfigError for what would change what a run, that goes on in its folder, draws or measures; in words."""
    if refused and goes_on and not allowed:
        raise ConfigError(
            f"config.{refused[0]} would change what the run draws or measures from here on; leave it as it was, give "
            "--allow-changes if that is meant, or begin another run with another config.run_name."
        )


def _folder_of(values: Mapping[str, Any]) -> Path:
    return Path(values["logdir"], values["run_name"]).expanduser().resolve()


# --- the recipe -----------------------------------------------------------------------------------------


def _split(arguments: Sequence[str]) -> tuple[str, list[str], bool]:
    """The value of --config (empty: a run's settings), the arguments besides, and whether --allow-changes is one."""
    recipes, others, rest = [], [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            recipes.append(value if equals else next(rest, ""))
        else:
            others.append(argument)
    allow_changes = ALLOW_CHANGES in others
    others = [argument for argument in others if argument != ALLOW_CHANGES]
    resumes = bool(_value_of("resume_from", others)) and not recipes
    if not resumes and (not recipes or not recipes[-1]):
        names = ", ".join(grpo.RECIPES)
        raise ConfigError(f"--config is missing; give --config config/grpo.py:NAME, NAME one of {names}.")
    return "" if resumes else recipes[-1], others, allow_changes


def _value_of(key: str, arguments: Sequence[str]) -> str:
    """What the last --config.KEY=VALUE (or --config.KEY VALUE) of a key says; empty: there is none."""
    found = ""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == f"config.{key}":
            found = value if equals else following
    return found


def load_file(recipe: str) -> ConfigDict:
    """The configuration of "file.py" or "file.py:NAME": what the file's get_config() or get_config(NAME) returns."""
    path, colon, name = recipe.partition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise ConfigError(
            f"--config {recipe} names no Python file (from {Path.cwd()}); give config/grpo.py:NAME, NAME one of "
            f"{', '.join(grpo.RECIPES)}."
        )
    with _somebodys_code(path):
        module = _import(path)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"--config {recipe} has no get_config() function; config/grpo.py is an example.")
    arguments = (name,) if colon else ()
    if not _accepts(get_config, arguments):
        wants = "takes no :NAME" if colon else "needs a :NAME"
        raise ConfigError(f"--config {recipe} is not allowed; get_config() of {path} {wants}.")
    with _somebodys_code(path):
        config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config {recipe} is not allowed; get_config() of {path} returns no ConfigDict.")
    return config


@contextmanager
def _somebodys_code(path: str) -> Iterator[None]:
    """Turn whatever a file of recipes may raise into a sentence that names the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        line = getattr(error, "lineno", None) or line_in(error, path) or "?"
        raise ConfigError(f"--config {path}, line {line}: {type(error).__name__}: {error}.") from None


def _import(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("chosen_config", Path(path).resolve())
    assert spec is not None  # .py files have a spec and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _accepts(function: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


# --- the overrides --------------------------------------------------------------------------------------


def _check_key(argument: str, declared: dict[str, Any]) -> None:
    """ConfigError if this is the override of a key that does not exist, or of a whole group of keys."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match is None or match[1] in declared:
        return
    key = match[1]
    if key in RENAMED:
        now, meanings = RENAMED[key]
        values = " or ".join(f"{new!r} for what was {old!r}" for old, new in meanings.items())
        raise ConfigError(f"config.{key} has become config.{now}, which takes {values}.")
    members = [f"config.{name}" for name in declared if name.startswith(f"{key}.")]
    if members:
        raise ConfigError(f"config.{key} is a group of keys, which are set one by one: {', '.join(members)}.")
    alike = [f"config.{name}" for name in nearest(key, list(declared))]
    advice = f"did you mean {' or '.join(alike)}?" if alike else "`fme ls keys` lists all there are."
    raise ConfigError(f"config.{key} is not a key; {advice}")


def nearest(key: str, declared: list[str]) -> list[str]:
    """Up to three declared keys: first those of that name in another group, then those spelt alike."""
    elsewhere = [name for name in declared if name.split(".")[-1] == key.split(".")[-1]]
    last_names = {name.split(".")[-1]: name for name in declared}
    elsewhere += [name for last, name in last_names.items() if _initials(last) == key.split(".")[-1]]
    alike = get_close_matches(key, declared, n=3, cutoff=0.7)
    alike += [last_names[name] for name in get_close_matches(key.split(".")[-1], last_names, n=3, cutoff=0.7)]
    return list(dict.fromkeys(elsewhere + alike))[:3]


def _initials(name: str) -> str:
    """lr, of learning_rate."""
    return "".join(word[0] for word in name.split("_") if word)


def _help(doc: str) -> str:
    """The script's docstring, the recipes with their first lines, and how to override a key."""
    width = max(map(len, grpo.RECIPES))
    summaries = ((name, (inspect.getdoc(recipe) or "").split("\n")[0]) for name, recipe in grpo.RECIPES.items())
    recipes = "\n".join(f"  {name:{width}}  {summary}" for name, summary in summaries)
    return (
        f"{inspect.cleandoc(doc)}\n\n"
        "arguments:\n"
        "  --config FILE.py:NAME   the recipe\n"
        "  --config.KEY=VALUE      change one key; `fme ls keys` lists them all with their meaning\n"
        "  --config.resume_from=RUN   go on with a run, by its own settings: give no --config then\n"
        "  --allow-changes         with resume_from: change what is drawn or measured, too\n\n"
        f"recipes of config/grpo.py:\n{recipes}"
    )
