"""docs/study.md and the README's part, from the committed results alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_text
from scripts.study.claims import CLAIMS
from scripts.study.claims.claim import Claim
from scripts.study.committed import Results, read_results
from scripts.study.paths import OUT, PAGE, README, ROOT
from scripts.study.tables import table
from scripts.study.words import environment, said

TEMPLATE, README_TEMPLATE = "study.md.j2", "study_in_readme.md.j2"
BEGIN, END = "<!-- study -->", "<!-- /study -->"
IN_README_DRAWN = "scenes/frontier.png"


@dataclass(frozen=True)
class Section:
    """What the page says of a claim, as Markdown."""

    anchor: str
    title: str
    verdict: str
    answer: str
    body: str
    details: str
    command: str
    link: str  # of its figure


def section(claim: Claim, results: Results, out: Path, folder: Path) -> Section:
    """What the results say of one claim, on a page in `folder`."""
    found = claim.find(results)
    words = {part: said(claim.anchor, part, found) for part in ("verdict", "answer", "body", "details")}
    link = os.path.relpath(out / claim.picture, folder)
    return Section(anchor=claim.anchor, title=said(claim.anchor, "title"), command=claim.command, link=link, **words)


def page(found: Sequence[Section], out: Path) -> str:
    """docs/study.md; `out` is the folder of the results and figures."""
    named = "assets/study" if out == OUT else out.name
    return environment().get_template(TEMPLATE).render(sections=found, out=named)


def readme_block(found: Sequence[Section], out: Path, folder: Path) -> str:
    """The README's part, markers included: a line for each claim, and one figure; `folder` is the README's."""
    figure, template = os.path.relpath(out / IN_README_DRAWN, folder), environment().get_template(README_TEMPLATE)
    return f"{BEGIN}\n{template.render(sections=found, page=os.path.relpath(PAGE, ROOT), figure=figure)}{END}"


def with_block(text: str, block: str) -> str:
    """The README with its part replaced; ConfigError if it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the README has no lines {BEGIN} and {END}: the study's part goes between them.")
    return before + block + after


def pages(results: Results, out: Path = OUT, page_path: Path = PAGE, readme: Path = README) -> dict[Path, str]:
    """Every page as the results give it: the study's, the README, and the testbeds' tables."""
    found = [section(claim, results, out, page_path.parent) for claim in CLAIMS]
    block = readme_block(found, out, readme.parent)
    tables = {
        measured.folder / "table.md": table(measured.testbed, [*measured.outcomes, *measured.tried], measured.folder)
        for measured in results.testbeds
    }
    return {page_path: page(found, out), readme: with_block(read_text(readme), block), **tables}


def outdated(out: Path = OUT, page_path: Path = PAGE, readme: Path = README) -> list[Path]:
    """Those of the pages that are not, byte for byte, what the committed results give."""
    expected = pages(read_results(out), out, page_path, readme)
    return [path for path, text in expected.items() if not path.is_file() or path.read_bytes() != text.encode()]
