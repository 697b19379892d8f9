"""What made assets/."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flow_grpo.errors import ConfigError


def exit_code_of(action: Callable[[], None]) -> int:
    """Of a command: 0, or 2 after one sentence about bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        action()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def common_flags(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of pretrain.py and measure.py alike."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="/usr/share/datasets/fashion-mnist", help="folder of Fashion-MNIST (default: %(default)s)"
    )
    parser.add_argument("--out", default="assets", help="folder of the models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def measuring(
    arguments: Sequence[str] | None, description: str | None, measure: Callable[[Path, Path, int], None]
) -> int:
    """A command that measures the models of a folder with the photographs of another; the exit code."""
    args = common_flags(description).parse_args(arguments)
    return exit_code_of(lambda: measure(Path(args.out), Path(args.data), args.seed))


def pretraining(
    arguments: Sequence[str] | None,
    description: str | None,
    stages: Sequence[str],
    work: str,
    run_stage: Callable[[str, argparse.Namespace], None],
) -> int:
    """A command that trains models in stages: its flags, then one stage, or all in their order; the exit code."""
    parser = common_flags(description)
    parser.add_argument("--stage", choices=("all", *stages), default="all", help="what to train (default: all)")
    parser.add_argument("--work", default=work, help="where states go (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between states (default: %(default)s)")
    args = parser.parse_args(arguments)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)

    def run() -> None:
        for stage in stages if args.stage == "all" else (args.stage,):
            run_stage(stage, args)

    return exit_code_of(run)
