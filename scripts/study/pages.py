"""docs/study.md and the README's part, from the committed results alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_text
from scripts.study.claims import CLAIMS
from scripts.study.claims.claim import Claim
from scripts.study.committed import Results, read_results
from scripts.study.paths import OUT, PAGE, README, ROOT
from scripts.study.study_records import Study
from scripts.study.words import environment, said

TEMPLATE, README_TEMPLATE = "study.md.j2", "study_in_readme.md.j2"
BEGIN, END = "<!-- study -->", "<!-- /study -->"
IN_README_DRAWN = "frontier"
SHORT = 170  # letters of a summary that the README has room for


@dataclass(frozen=True)
class Section:
    """What the page says of a claim, as Markdown."""

    anchor: str
    title: str
    verdict: str
    command: str
    summary: str = ""
    rule: str = ""
    body: str = ""
    figures: Sequence[str] = ()  # names, relative to the results' folder, without .png

    @property
    def bold(self) -> str:
        """The verdict as a sentence."""
        return f"**{self.verdict[0].upper()}{self.verdict[1:]}.**"

    @property
    def answer(self) -> str:
        """Verdict and summary."""
        return f"{self.bold} {self.summary}".strip()

    @property
    def short(self) -> str:
        """The verdict, with its numbers where they are few."""
        return self.answer if len(self.summary) <= SHORT else self.bold


@dataclass(frozen=True)
class Machine:
    """One machine with its packages, and the states of the code that ran there."""

    device: str
    threads: int
    python: str
    packages: Mapping[str, str]
    revisions: Sequence[Mapping[str, Any]]


def section(claim: Claim, results: Results) -> Section:
    """What the results say of one claim."""
    title, found = said(claim.anchor, "title"), claim.find(results)
    if found is None:
        return Section(claim.anchor, title, not_run(), claim.command)
    return Section(
        anchor=claim.anchor,
        title=title,
        verdict=said(claim.anchor, "verdict", found.verdict),
        command=claim.command,
        figures=found.figures,
        **{part: said(claim.anchor, part, found) for part in ("summary", "rule", "body")},
    )


def not_run() -> str:
    """The verdict on a claim without results."""
    return str(vars(environment().get_template("words.j2").module)["not_run"])


def sections(results: Results) -> list[Section]:
    """The whole study."""
    return [section(claim, results) for claim in CLAIMS]


def page(results: Results, found: Sequence[Section], out: Path, folder: Path) -> str:
    """docs/study.md; `folder` is the one it lies in, `out` that of the results and figures."""
    parts = ("anchor", "title", "answer", "rule", "body", "command")
    shown = [{name: getattr(s, name) for name in parts} | {"figures": _links(s.figures, out, folder)} for s in found]
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            sections=shown,
            missing=_missing(results.study),
            records=results.study.records,
            machines=machines(results.study.environments),
            out="assets/study" if out == OUT else out.name,
        )
    )


def _links(names: Sequence[str], out: Path, folder: Path) -> list[dict[str, str]]:
    return [
        {"title": Path(name).name.replace("_", " "), "link": os.path.relpath(out / f"{name}.png", folder)}
        for name in names
    ]


def _missing(study: Study) -> dict[str, dict[str, str]]:
    """Group -> planned runs without results -> why."""
    found: dict[str, dict[str, str]] = {}
    for name, reason in study.missing.items():
        found.setdefault(name.partition("-")[0], {})[name] = reason
    return found


def machines(environments: Sequence[Mapping[str, Any]]) -> list[Machine]:
    """Environments that differ in the code alone are one machine."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in environments:
        found.setdefault(repr([one[name] for name in ("device", "threads", "python", "packages")]), []).append(one)
    return [
        Machine(
            ran[0]["device"],
            ran[0]["threads"],
            ran[0]["python"],
            {name: version for name, version in ran[0]["packages"].items() if version},
            ran,
        )
        for ran in found.values()
    ]


def readme_block(found: Sequence[Section], out: Path, folder: Path) -> str:
    """The README's part, markers included: a line for each claim, and one figure; `folder` is the README's."""
    chosen = {claim.anchor for claim in CLAIMS if claim.in_readme}
    shown = [one for one in found if one.anchor in chosen]
    drawn = [name for one in shown for name in one.figures if name == IN_README_DRAWN]
    text = (
        environment()
        .get_template(README_TEMPLATE)
        .render(sections=shown, page=os.path.relpath(PAGE, ROOT), figures=_links(drawn[:1], out, folder))
    )
    return f"{BEGIN}\n{text}{END}"


def with_block(text: str, block: str) -> str:
    """The README with its part replaced; ConfigError if it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the README has no lines {BEGIN} and {END}: the study's part goes between them.")
    return before + block + after


def pages(results: Results, out: Path, page_path: Path, readme: Path) -> dict[Path, str]:
    """Both pages as the results give them."""
    found = sections(results)
    block = readme_block(found, out, readme.parent)
    return {page_path: page(results, found, out, page_path.parent), readme: with_block(read_text(readme), block)}


def outdated(out: Path = OUT, page_path: Path = PAGE, readme: Path = README) -> list[Path]:
    """Those of the two pages that are not, byte for byte, what the committed results give."""
    expected = pages(read_results(out), out, page_path, readme)
    return [path for path, text in expected.items() if not path.is_file() or path.read_bytes() != text.encode()]
