"""From the study's run folders to its committed results, and from those alone to figures, docs/study.md and README.md.

    python scripts/study/summarise.py                      # figures and pages again, from assets/study
    python scripts/study/summarise.py --logs logs/study    # first collect what the run folders hold
    python scripts/study/summarise.py --check              # are the pages what the committed results give?
    python scripts/study/summarise.py --quick logs/study   # do the quick runs lie within the committed intervals?

The README's part stands between `<!-- study -->` and `<!-- /study -->`. What the pages say is in sections.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_json, read_object, read_text, write_atomically

if TYPE_CHECKING:
    from scripts.study.results import Study
    from scripts.study.sections import Results, Section

ROOT = Path(__file__).resolve().parents[2]
OUT, PAGE, README = ROOT / "assets/study", ROOT / "docs/study.md", ROOT / "README.md"
VALIDATION = ROOT / "assets/figures/entropy_validation/results.json"
TEMPLATE = "study.md.j2"
TEXTS = ("form", "source", "label", "method")  # of optional results; what else they hold are numbers or null
BEGIN, END = "<!-- study -->", "<!-- /study -->"
IN_README = ("claim-1", "claim-2", "claim-3", "claim-4", "frontier")  # a line each; docs/study.md has the others
IN_README_DRAWN = "frontier"
SHORT = 170  # letters of a summary that the README has room for


def read_results(out: Path, validation: Path = VALIDATION) -> Results:
    """Everything in a folder of results; ConfigError without its runs.json."""
    from scripts.study.results import NOISE_FILE, RUNS_FILE, SCALES_FILE, read_study, samples
    from scripts.study.sections import Results

    rows, study = read_object(validation).get("rows"), read_study(out / RUNS_FILE)
    if not isinstance(rows, list):
        raise ConfigError(f"{validation} has no rows: it is not what validate_entropy.py writes.")
    grids = [sample for sample in samples(study) if (out / sample.file).is_file()]
    noise = _list(out / NOISE_FILE, ("form", "probes", "source", "batches", "value", "low", "high"), "gradient_noise")
    return Results(study, noise, _scales(out / SCALES_FILE, study), rows, grids)


def _scales(path: Path, study: Study) -> list[dict[str, Any]]:
    """The scaled LoRAs; ConfigError where they are of other runs than those of the study."""
    from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
    from scripts.study.results import rounded

    found = _list(path, ("label", "method", "seed", "scale", "seconds", REWARD, VENDI, RKE, ACCURACY), "lora_scales")
    trained = {(record.label, record.seed, rounded(record.final("seconds"))) for record in study.of("claims")}
    for entry in found:
        if (entry["label"], entry["seed"], entry["seconds"]) not in trained:
            raise ConfigError(
                f"{path} has {entry['label']}, seed {entry['seed']}, trained for {entry['seconds']} s, which is no run "
                f"of {path.parent / 'runs.json'}: run scripts/study/lora_scales.py again."
            )
    return found


def _list(path: Path, keys: Sequence[str], script: str) -> list[dict[str, Any]]:
    """The objects of a file, each with these keys; none if there is no file."""
    if not path.is_file():
        return []
    found, wrong = read_json(path), f"{path} is not what scripts/study/{script}.py writes"
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"{wrong}: it is not a list of objects.")
    for entry in found:
        if not set(keys) <= set(entry):
            raise ConfigError(f"{wrong}: an entry lacks one of {', '.join(keys)}.")
        for key in keys:
            if not isinstance(entry[key], str if key in TEXTS else (int, float, type(None))):
                raise ConfigError(f"{wrong}: {key!r} is {str(entry[key])[:60]!r}.")
    return found


# --- pages ------------------------------------------------------------------------------------------------


def page(results: Results, found: Sequence[Section], out: Path, folder: Path) -> str:
    """docs/study.md; `folder` is the one it lies in, `out` that of the results and figures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(  # Markdown: nothing is escaped
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    shown = [{**vars(s), "answer": s.answer, "figures": _links(s.figures, out, folder)} for s in found]
    return environment.get_template(TEMPLATE).render(
        sections=shown,
        missing=_missing(results.study),
        notes=_notes(results.study),
        environments=_environments(results.study.environments),
        out="assets/study" if out == OUT else out.name,
    )


def _links(names: Sequence[str], out: Path, folder: Path) -> list[dict[str, str]]:
    return [
        {"title": Path(name).name.replace("_", " "), "link": os.path.relpath(out / f"{name}.png", folder)}
        for name in names
    ]


def _missing(study: Study) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in study.missing.items():
        found.setdefault(name.partition("-")[0], []).append(f"{name} ({reason})")
    return found


def _notes(study: Study) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    for record in study.records:
        if record.dropped:
            found.append(f"{record.name}: {record.dropped} evaluations are left out, their reward was not finite.")
        if record.skipped_epochs:
            found.append(f"{record.name}: updates were skipped in {record.skipped_epochs} epochs, as not finite.")
    if len({environment["device"] for environment in study.environments}) > 1:
        found.append("The runs used different devices: their seconds are not comparable.")
    return found


def _environments(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each machine with its packages, and the revisions of the code that ran there."""
    revisions: dict[str, list[str]] = {}
    for found in environments:
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
        machine = f"{found['device']}, {found['threads']} thread(s) a run, Python {found['python']}, {packages}"
        changes = " with uncommitted changes" if found["uncommitted_changes"] else ""
        revisions.setdefault(machine, []).append(f"{(found['revision'] or 'no commit')[:10]}{changes}")
    return [f"{machine}; code at {', '.join(code)}" for machine, code in revisions.items()]


def readme_block(found: Sequence[Section], out: Path, folder: Path) -> str:
    """The README's part, markers included: a line for each claim, and one figure; `folder` is the README's."""
    page_link = os.path.relpath(PAGE, ROOT)
    shown = [section for section in found if section.anchor in IN_README]
    drawn = [name for section in shown for name in section.figures if name == IN_README_DRAWN]
    pictures = [f"![{link['title']}]({link['link']})" for link in _links(drawn[:1], out, folder)]
    lines = [f"- [{section.claim}]({page_link}#{section.anchor}). {_short_answer(section)}" for section in shown]
    return "\n".join([BEGIN, *lines, *(["", *pictures] if pictures else []), END])


def _short_answer(section: Section) -> str:
    """The verdict, with its numbers where they are few."""
    return (
        section.answer if len(section.summary) <= SHORT else f"**{section.verdict[0].upper()}{section.verdict[1:]}.**"
    )


def with_block(text: str, block: str) -> str:
    """The README with its part replaced; ConfigError if it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the README has no lines {BEGIN} and {END}: the study's part goes between them.")
    return before + block + after


def pages(results: Results, out: Path, page_path: Path, readme: Path) -> dict[Path, str]:
    """Both pages as the results give them."""
    from scripts.study.sections import sections

    found = sections(results)
    block = readme_block(found, out, readme.parent)
    return {page_path: page(results, found, out, page_path.parent), readme: with_block(read_text(readme), block)}


def outdated(out: Path = OUT, page_path: Path = PAGE, readme: Path = README) -> list[Path]:
    """Those of the two pages that are not, byte for byte, what the committed results give."""
    expected = pages(read_results(out), out, page_path, readme)
    return [path for path, text in expected.items() if not path.is_file() or path.read_bytes() != text.encode()]


# --- the command ------------------------------------------------------------------------------------------


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
    from scripts.study.results import RUNS_FILE, collect, write_study
    from scripts.study.study_figures import all_figures, samples_figure, save_figures

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


def copy_grids(study: Study, logs: Path, out: Path) -> None:
    """The few image grids that are committed; those of earlier results go."""
    from flow_grpo.runs.folder import IMAGE_FOLDER
    from scripts.study.results import samples

    chosen = samples(study)
    for old in set((out / "grids").glob("*.png")) - {out / sample.file for sample in chosen}:
        old.unlink()
    for sample in chosen:
        (out / sample.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(logs / sample.run / IMAGE_FOLDER / f"eval_{sample.step:06d}.png", out / sample.file)


def check(args: argparse.Namespace) -> int:
    """Say which pages are outdated."""
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
    from scripts.study.results import RUNS_FILE, collect, compare_quick, read_study

    found = collect(plan.quick(), args.quick)
    comparisons = compare_quick(found, read_study(args.out / RUNS_FILE))
    print("At equal network evaluations; intervals for a new seed, 95 % for all quantities together:")
    for item in comparisons:
        expected = item.expected
        print(
            f"  {'within ' if item.within else 'OUTSIDE'}  {item.quantity}: {item.value:.4g}, "
            f"committed {expected.mean:.4g} ({expected.low:.4g} to {expected.high:.4g})"
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
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    raise SystemExit(main())
