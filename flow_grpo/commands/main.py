"""fme: train flow-matching models by reward, and see what that did to their diversity.

Each subcommand is a module beside this one, with `add_arguments(parser)` and `main(arguments) -> int`; it is imported
when it is asked for, and imports torch when it has parsed its arguments. Under a launcher:

    accelerate launch --num_processes 4 -m flow_grpo.commands.main train sd35_grpo_4gpu
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError

DISTRIBUTION = "flow-matching-entropy"
COMMANDS = {  # in the order of use; the modules of this package
    "demo": "train the tiny SD3 two ways and look at both: minutes on a laptop",
    "train": "fine-tune a model by a recipe, by the settings of another run, or go on with a run",
    "view": "one page of one or more runs",
    "check": "what a run, checkpoint, LoRA or folder of images has lost in diversity, and whether it is exploited",
    "sample": "images of a prompt",
    "prompts": "fetch training and test prompts from a dataset",
    "serve": "rewards over HTTP, for training that runs elsewhere",
    "export": "send a run to wandb or tensorboard, from its folder",
    "ls": "recipes, keys, methods, rewards and runs",
}


class Parser(argparse.ArgumentParser):
    """Complains in one sentence, as every other mistake does."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        typed = re.fullmatch(r"unrecognized arguments: --([\w.]+=.*)", message)
        if typed and self.prog == "fme train":
            setting = typed[1].removeprefix("config.")  # as the script takes it
            raise ConfigError(f"{self.prog}: --{typed[1]} is not an option; settings take no dashes: {setting}.")
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` says what it takes.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code. SystemExit after a sentence about a mistake: see `cli.one_sentence_errors`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"fme {_version()}")
        return 0
    with one_sentence_errors():
        name, *rest = arguments
        _check_command(name)
        _check_none_is_empty(name, rest)
        command = import_module(f"flow_grpo.commands.{name}")
        parser = Parser(
            prog=f"fme {name}",
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        return command.main(parser.parse_intermixed_args(rest))


def _check_command(name: str) -> None:
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        advice = f"did you mean `fme {nearest[0]}`?" if nearest else f"there are {', '.join(COMMANDS)}."
        raise ConfigError(f"fme {name} is not a command; {advice}")


def _check_none_is_empty(name: str, arguments: Sequence[str]) -> None:
    """ConfigError for `--resume "$RUN"` where RUN is not set: without a word, a new run would begin."""
    for number, argument in enumerate(arguments, start=1):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            shown = argument.strip() or f"number {number}"
            raise ConfigError(f"fme {name}: the argument {shown} is empty; is a variable not set?")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  fme {name:<{width}}   {summary}" for name, summary in COMMANDS.items())
    return "\n".join([__doc__.splitlines()[0], "", *lines, "", "`fme COMMAND --help` says more."])


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # the folder is on the path, and not installed
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
