"""From the study's run folders to its committed results, and from those alone to figures, docs/study.md and README.md.

    python scripts/study/summarise.py                      # figures and pages again, from assets/study
    python scripts/study/summarise.py --logs logs/study    # first collect what the run folders hold
    python scripts/study/summarise.py --check              # are the pages what the committed results give?
    python scripts/study/summarise.py --quick logs/study   # do the quick runs lie within the committed intervals?

The README's part stands between `<!-- study -->` and `<!-- /study -->`. What the pages say is in claims/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flow_grpo.commands import cli
from flow_grpo.files import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.study.paths import OUT, PAGE, README


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, help="collect the results of the study's run folders first")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and figures (default: assets/study)")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/study.md")
    parser.add_argument("--readme", type=Path, default=README, help="default: README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is not what the results give")
    parser.add_argument("--quick", type=Path, metavar="LOGS", help="write nothing; 1 if a quick run is out of bounds")
    args = parser.parse_args(arguments)
    args.out, args.page, args.readme = args.out.resolve(), args.page.resolve(), args.readme.resolve()
    return args


def collect(logs: Path, out: Path) -> None:
    """The outcomes of finished runs into each testbed's results.json; the folders of others are named."""
    from scripts.study.outcomes import commit, merged
    from scripts.study.run import State, state_of
    from scripts.study.testbeds import TESTBEDS

    for testbed in TESTBEDS.values():
        done = []
        for run in testbed.plan():
            state = state_of(run, logs)
            if state is State.DONE:
                done.append(run)
            elif (logs / run.name).exists():
                why = "is not finished" if state is State.BEGUN else "is of other settings"
                print(f"{logs / run.name} {why}: it is left out.", file=sys.stderr)
        commit(merged(testbed, done, logs, out / testbed.name), out / testbed.name)
        print(f"{testbed.name}: {len(done)} of {len(testbed.plan())} planned runs are in {logs}")


def write_all(args: argparse.Namespace) -> int:
    """Results, figures and pages."""
    from flow_grpo.figure_text import optional_figure
    from scripts.study.claims import CLAIMS
    from scripts.study.committed import read_results
    from scripts.study.figures import save
    from scripts.study.pages import pages
    from scripts.study.tables import draw

    if args.logs is not None:
        collect(args.logs, args.out)
    results = read_results(args.out)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in pages(results, args.out, args.page, args.readme).items():
        write_atomically(path, text)
    for measured in results.testbeds:
        with optional_figure(measured.folder / "frontier.png"):
            draw(measured.testbed, measured.outcomes, measured.folder)
    for claim in CLAIMS:
        if claim.draw is not None:
            with optional_figure(args.out / claim.picture):
                save(claim.draw(results), args.out / claim.picture)
    return 0


def check(args: argparse.Namespace) -> int:
    """Say which pages are outdated."""
    from scripts.study.pages import outdated

    found = outdated(args.out, args.page, args.readme)
    for path in found:
        print(
            f"error: {path} is not what {args.out} gives; `python scripts/study/summarise.py` writes it.",
            file=sys.stderr,
        )
    return 1 if found else 0


def quick(args: argparse.Namespace) -> int:
    """Hold the quick runs against the committed ones."""
    from scripts.study.committed import read_results
    from scripts.study.quick import compare

    comparisons = compare(args.quick, read_results(args.out))
    print("Intervals for a new seed, 95 % for all quantities together:")
    for item in comparisons:
        expected = item.expected
        print(
            f"  {'within ' if item.within else 'OUTSIDE'}  {item.quantity}: {item.value:.4g}, "
            f"committed {expected.estimate:.4g} ({expected.low:.4g} to {expected.high:.4g})"
        )
    outside = sum(not item.within for item in comparisons)
    print(f"{len(comparisons) - outside} of {len(comparisons)} quantities lie within the committed intervals.")
    return 1 if outside else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1: a check failed; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        if args.quick is not None:
            return quick(args)
        return check(args) if args.check else write_all(args)


if __name__ == "__main__":
    raise SystemExit(main())
