"""Train by a recipe, by the settings of another run, or go on with a run.

fme train tiny_drtune                                      a recipe; `fme ls recipes` lists them
fme train tiny_grpo train.beta=0.02 --name mine            with a key changed; `fme ls keys` lists them
fme train tiny_grpo --seeds 1,2,3                          one after another: NAME-seed1, NAME-seed2, ...
fme train logs/mine/config.json num_epochs=20              a new run with another run's settings
fme train my_recipes.py:NAME                               what get_config("NAME") of a file returns
fme train tiny_grpo --reward mine=my_reward.py:score       with a reward of one's own besides; docs/extending.md
fme train --resume logs/mine                               go on, with the run's own settings
accelerate launch -m flow_grpo.commands.main train NAME    on several GPUs
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from ml_collections import ConfigDict

from flow_grpo.commands import cli
from flow_grpo.commands.view import view
from flow_grpo.errors import ConfigError, Interrupted, TrainingStopped
from flow_grpo.launcher import read_launcher
from flow_grpo.messages import say
from flow_grpo.methods.registry import black_box, reward_gradient
from flow_grpo.recipes import registry
from flow_grpo.rewards.own_files import read_option
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.runs.config import config_of_file
from flow_grpo.runs.folder import CONFIG_FILE

WHAT = "a recipe, FILE.py[:NAME], or the config.json of a run"
SCRIPT_WORDS = re.compile(r"(?<![\w./-])(?:--)?config\.(?!(?:json|py)\b)|--config (?=\S)")  # before a key or a file
RESUME = re.compile(r"(?<![\w./-])(?:--)?config\.resume_from(?: ?= ?)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("start", nargs="?", metavar="RECIPE|RUN/config.json|FILE.py", help="where settings come from")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings that differ from it")
    parser.add_argument("--name", default="", help="the run's folder, in `logdir` (default: recipe and time of day)")
    parser.add_argument("--seeds", default="", metavar="1,2,3", help="a run for each, one after another")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="NAME[=MODEL|FILE.py:THING]",
        help="train on this reward besides, with the weight reward_fn.NAME (default: 1); can be given again",
    )  # fmt: skip
    parser.add_argument("--resume", default="", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument(cli.ALLOW_CHANGES, action="store_true", help="of a run that goes on, also what it measures")


def main(arguments: argparse.Namespace) -> int:
    """Train; the exit code. Raises ConfigError, TrainingStopped and Interrupted, in the words of this command line."""
    _tidy(arguments)
    with _as_typed():
        config = configuration(arguments)
        launched = read_launcher()  # before torch is imported: the answer is quick
        if arguments.seeds:
            if launched.num_processes > 1:
                raise ConfigError("--seeds starts processes of its own; under a launcher, start one seed at a time.")
            return train_seeds(arguments, config)
        train(config)
    return 0


def configuration(arguments: argparse.Namespace) -> ConfigDict:
    """What the command line describes, not yet checked value by value."""
    overrides = [f"--config.{change}" for change in arguments.changes]
    if arguments.name:
        overrides.append(f"--config.run_name={arguments.name}")
    if arguments.resume:
        overrides.append(f"--config.resume_from={arguments.resume}")
    return cli.configure(arguments.start or "", overrides, arguments.allow_changes, load, check=True)


def train(config: ConfigDict) -> None:
    """The same as scripts/train/train_sd3.py."""
    from flow_grpo.training.opening import open_training

    with open_training(config) as training:
        training.fit(reward_gradient(config) if config.use_reward_gradient else black_box(config))


def load(start: str) -> ConfigDict:
    """The configuration that `start` names: a recipe's, a file's, or that of another run without its name."""
    path = Path(start).expanduser()
    if (module := start.partition(":")[0]).endswith(".py"):
        if not Path(module).is_file():
            raise ConfigError(f"{start} names no Python file (from {Path.cwd()}).")
        return cli.load_file(start)
    if path.suffix == ".json" or (path / CONFIG_FILE).is_file():
        file = path if path.suffix == ".json" else path / CONFIG_FILE
        return config_of_file(file, {"run_name": "", "resume_from": ""})
    if registry.first_name(start) not in registry.RECIPES:
        nearest = registry.nearest_recipes(start)
        advice = f"did you mean {' or '.join(nearest[:2])}?" if nearest else "`fme ls recipes` lists them."
        raise ConfigError(f"{start!r} is not {WHAT}; {advice}")
    return registry.get_config(start)


# --- the words of the command line -------------------------------------------------------------------


def _tidy(arguments: argparse.Namespace) -> None:
    """Find the changes among the positional arguments; ConfigError for what cannot go together."""
    if arguments.start and "=" in arguments.start:  # no recipe: a run goes on
        arguments.changes.insert(0, arguments.start)
        arguments.start = None
    if not arguments.start and not arguments.resume:
        raise ConfigError(f"fme train takes {WHAT}, or --resume RUN; `fme ls recipes` lists recipes.")
    arguments.changes = [*_rewards(arguments), *arguments.changes]
    for change in arguments.changes:
        key, equals, _ = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"the argument {change} is not understood; changes look like KEY=VALUE.")
        for word, option in (("resume_from", "--resume"), ("run_name", "--name")):
            if key == word:
                raise ConfigError(f"{word} is given as {option}.")
    _check_seeds(arguments)


def _rewards(arguments: argparse.Namespace) -> list[str]:
    """What --reward changes, as KEY=VALUE; a weight that is given besides comes after."""
    found = []
    for text in arguments.reward:
        asked = read_option(text, REWARDS)
        if asked.place:
            found.append(f"reward_files.{asked.name}={asked.place}")
            continue
        found.append(f"reward_fn.{asked.name}=1")
        if asked.model:
            found.append(f"reward_model.{asked.name}={asked.model}")
    return found


def _check_seeds(arguments: argparse.Namespace) -> None:
    if arguments.seeds and arguments.resume:
        raise ConfigError("--seeds begins runs, and --resume goes on with one; give one of the two.")
    if arguments.seeds and any(change.startswith("seed=") for change in arguments.changes):
        raise ConfigError("seed is given twice; --seeds says it.")


@contextmanager
def _as_typed() -> Iterator[None]:
    """Let sentences about --config.KEY=VALUE, as the scripts have it, name the key as it is typed here."""
    try:
        yield
    except (ConfigError, TrainingStopped, Interrupted) as error:
        error.args = (as_typed(str(error)),)
        raise


def as_typed(sentence: str) -> str:
    """--config.resume_from=RUN -> --resume RUN, config.run_name = 'N' -> --name 'N', and config.KEY -> KEY."""
    sentence = sentence.replace("config.run_name = ", "--name ")
    return SCRIPT_WORDS.sub("", RESUME.sub(lambda found: f"--resume{' ' * ('=' in found[0])}", sentence))


# --- several seeds -----------------------------------------------------------------------------------


def train_seeds(arguments: argparse.Namespace, config: ConfigDict) -> int:
    """Train one seed after another, each in a process of its own; the exit code of the first that fails, or 0."""
    seeds = _seeds(arguments)
    name = arguments.name or f"{config.recipe or 'run'}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for number, seed in enumerate(seeds, start=1):
        run_name = f"{name}-seed{seed}"
        print(f"[{number}/{len(seeds)}] {run_name}", flush=True)
        code = run_process(train_command(arguments.start, [*arguments.changes, f"seed={seed}"], run_name))
        if code != 0:
            return code
    _show([Path(config.logdir, f"{name}-seed{seed}").expanduser() for seed in seeds], name)
    return 0


def _show(folders: list[Path], name: str) -> None:
    """The page of all seeds, beside their folders."""
    try:
        print(f"page: {view(folders, folders[0].with_name(f'{name}.html'))}")
    except ConfigError as error:  # they evaluated nothing
        say(f"no page of all seeds: {error}")


def _seeds(arguments: argparse.Namespace) -> list[int]:
    parts = arguments.seeds.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds {arguments.seeds} is not allowed; it takes different whole numbers, as in 1,2,3.")
    return [int(part) for part in parts]


def train_command(start: str, changes: Sequence[str], name: str) -> list[str]:
    """The command that trains one run, of settings that a command of ours has chosen."""
    return [sys.executable, "-m", "flow_grpo.commands.main", "train", start, *changes, "--name", name]


def run_process(command: Sequence[str]) -> int:
    """Run a command to its end; its exit code. A signal to this process is passed on, and its end is waited for."""
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)  # Ctrl-C reaches both: the run takes two within a second for one

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 - code if code < 0 else code
