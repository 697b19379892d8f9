"""One page of one or more runs, from their folders alone: an HTML file that needs nothing else.

fme view logs/mine                          logs/mine/page.html
fme view logs/a-seed1 logs/a-seed2 --out a.html
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from flow_grpo.errors import ConfigError
from flow_grpo.page.build import build_page
from flow_grpo.runs.folder import PAGE_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, as logs/mine")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {PAGE_FILE}, in RUN or beside several")
    parser.add_argument("--ema", action="store_true", help="show the averaged weights")


def main(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is; 0. Raises ConfigError as `build_page` does."""
    if arguments.out is not None and arguments.out.suffix != ".html":
        raise ConfigError(f"--out {arguments.out} is no page's name, which ends in .html; a file there is replaced.")
    print(f"page: {view(arguments.runs, arguments.out, arguments.ema)}")
    return 0


def view(runs: list[Path], out: Path | None = None, averaged: bool = False) -> Path:
    """Write the page of runs; where it is."""
    if out is None:
        folder = runs[0].expanduser().resolve()
        out = (folder if len(runs) == 1 else folder.parent) / PAGE_FILE
    command = shlex.join(["fme", "view", *map(str, runs), *(["--ema"] if averaged else [])])
    folders = [run.expanduser() for run in runs]
    return build_page(folders, out.expanduser(), command, label="eval_ema" if averaged else "eval")
