"""Every claim has its words, and every code of a verdict has some."""

from __future__ import annotations

import pytest

from scripts.study.claims import CLAIMS, claim_1, claim_2, claim_4, frontier, proxies
from scripts.study.comparison import Side
from scripts.study.forms import Form
from scripts.study.words import FOLDER, markdown, said, template_of


def test_a_claim_is_a_file_and_its_template() -> None:
    folder = FOLDER / "claims"
    found = {claim.anchor.replace("-", "_") for claim in CLAIMS}
    assert found == {path.stem for path in folder.glob("*.py")} - {"__init__", "claim"}
    assert {template_of(claim.anchor) for claim in CLAIMS} == {path.name for path in folder.glob("*.md.j2")}
    assert all(said(claim.anchor, "title") for claim in CLAIMS)


def test_every_code_has_words_of_its_own() -> None:
    most = Form("ode_step", 16)
    verdicts = {
        "claim-1": [claim_1.Verdict(code, 5, 4, 3) for code in claim_1.Code],
        "claim-2": [claim_2.Verdict(code, ["reward/total"], [], []) for code in claim_2.Code],
        "claim-4": [
            claim_4.Verdict(code, Side.NEITHER, most, Side.NEITHER, [most], Side.ABOVE) for code in claim_4.Code
        ],
        "frontier": [frontier.Verdict(code, ["x"]) for code in frontier.Code],
    }
    for anchor, each in verdicts.items():
        texts = [said(anchor, "verdict", verdict) for verdict in each]
        assert all(texts)
        assert len(set(texts)) == len(texts)
    assert len({said("proxies", "amounts_to", code) for code in proxies.Follows}) == len(proxies.Follows)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("one\n  line;\nthen\n\n\n\n  another \n", "one line; then\n\nanother"),
        ("\n| a | b |\n  c |\n|---|---|---|\n|  | 1 |\n 2 |\n", "| a | b | c |\n|---|---|---|\n|  | 1 | 2 |"),
        ("  \n", ""),
    ],
)
def test_paragraphs_and_rows_become_lines(template: str, text: str) -> None:
    assert markdown(template) == text
