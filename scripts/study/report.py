"""The page of one or more runs: `fme view`, under its first name.

python scripts/study/report.py logs/demo/drtune logs/demo/grpo --out logs/demo/report
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flow_grpo.commands import cli
from flow_grpo.commands.view import view
from flow_grpo.runs.folder import PAGE_FILE


def main(argv: Sequence[str] | None = None) -> None:
    """Build the page in a folder; exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="e.g. logs/demo/grpo")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where page.html is written")
    arguments = parser.parse_args(argv)
    with cli.one_sentence_errors():
        print(f"page: {view(arguments.folders, cli.create_folder(arguments.out) / PAGE_FILE)}")


if __name__ == "__main__":
    main()
