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
from flow_grpo.errors import ConfigError
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


def write_all(args: argparse.Namespace) -> int:
    """Results, figures and pages."""
    from scripts.study import plan
    from scripts.study.collect import collect
    from scripts.study.committed import read_results
    from scripts.study.grids import copy_grids
    from scripts.study.pages import pages
    from scripts.study.study_figures import all_figures, samples_figure, save_figures
    from scripts.study.study_records import RUNS_FILE, write_study

    if args.logs is not None:
        found = collect(plan.whole(), args.logs)
        if not found.records:
            raise ConfigError(f"--logs {args.logs} holds no finished run of the study; what is committed is kept.")
        write_study(found, args.out / RUNS_FILE)
        copy_grids(found, args.logs, args.out)
    results = read_results(args.out)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in pages(results, args.out, args.page, args.readme).items():
        write_atomically(path, text)
    save_figures(all_figures(results.study, results.noise, results.scales), args.out)
    if results.samples:
        save_figures({"samples": samples_figure(results.samples, args.out)}, args.out)
    missing = results.study.missing
    print(f"{len(results.study.records)} runs in {args.out / RUNS_FILE}; {len(missing)} planned ones are missing")
    for name, reason in missing.items():
        print(f"  {name}: {reason}")
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
    from scripts.study import plan
    from scripts.study.collect import collect
    from scripts.study.quick import compare_quick
    from scripts.study.study_records import RUNS_FILE, read_study

    found = collect(plan.quick(), args.quick)
    comparisons = compare_quick(found, read_study(args.out / RUNS_FILE))
    print("At equal network evaluations; intervals for a new seed, 95 % for all quantities together:")
    for item in comparisons:
        expected = item.expected
        print(
            f"  {'within ' if item.within else 'OUTSIDE'}  {item.quantity}: {item.value:.4g}, "
            f"committed {expected.estimate:.4g} ({expected.low:.4g} to {expected.high:.4g})"
        )
    for name, reason in found.missing.items():
        print(f"  MISSING  {name}: {reason}")
    outside = sum(not item.within for item in comparisons)
    print(f"{len(comparisons) - outside} of {len(comparisons)} quantities lie within the committed intervals.")
    return 1 if outside or found.missing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1: a check failed; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        if args.quick is not None:
            return quick(args)
        return check(args) if args.check else write_all(args)


if __name__ == "__main__":
    raise SystemExit(main())
