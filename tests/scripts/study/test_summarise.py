"""From run folders to committed results, and from those to pages: every number of a page is one of a result."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from scripts.study import summarise
from scripts.study.claims import CLAIMS
from scripts.study.committed import read_results
from scripts.study.outcomes import RESULTS
from scripts.study.pages import BEGIN, END, page, pages, section
from scripts.study.paths import OUT, PAGE, README, ROOT
from scripts.study.run import State
from scripts.study.testbeds import COST, CURVE, TESTBEDS
from tests.scripts.study.claims.builders import SCENES_ENDS, TINY_ENDS, measured, results


@pytest.fixture
def copied(tmp_path):
    """The committed results, the page and the README, elsewhere; the arguments that name them."""
    out = tmp_path / "assets"
    for testbed in TESTBEDS.values():
        (out / testbed.name).mkdir(parents=True)
        for name in (RESULTS, COST, CURVE, "table.md"):
            shutil.copy(OUT / testbed.name / name, out / testbed.name / name)
    for path in OUT.glob("*.json"):
        shutil.copy(path, out)
    for path in (PAGE, README):
        shutil.copy(path, tmp_path)
    return out, ["--out", str(out), "--page", str(tmp_path / PAGE.name), "--readme", str(tmp_path / README.name)]


def test_the_committed_pages_are_what_the_committed_results_give(capsys):
    assert summarise.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_was_changed_is_named(copied, capsys):
    out, where = copied
    assert summarise.main(where) == 0
    assert summarise.main([*where, "--check"]) == 0
    table = out / "tiny/table.md"
    table.write_text(table.read_text().replace("DRTune", "DRTuned", 1))
    assert summarise.main([*where, "--check"]) == 1
    assert f"error: {table} is not what {out} gives" in capsys.readouterr().err


def test_a_result_that_changes_changes_the_page(copied, tmp_path):
    out, where = copied
    assert summarise.main(where) == 0
    before = (tmp_path / PAGE.name).read_text()
    content = json.loads((out / "scenes" / RESULTS).read_text())
    for found in content["outcomes"]:
        found["exact_reward"] = [value + 0.01 * i for i, value in enumerate(found["exact_reward"])]
    (out / "scenes" / RESULTS).write_text(json.dumps(content))
    assert summarise.main(where) == 0
    assert (tmp_path / PAGE.name).read_text() != before


def test_the_page_is_short_and_has_a_figure_a_table_and_a_command_for_each_claim():
    found = results()
    sections = [section(claim, found, OUT, PAGE.parent) for claim in CLAIMS]
    assert len(CLAIMS) == 5
    for one, claim in zip(sections, CLAIMS, strict=True):
        assert one.verdict, claim.anchor
        assert one.answer.endswith("."), claim.anchor
        assert "\n|---|" in one.body, claim.anchor
        assert one.command.startswith("python scripts/")
    text = page(sections, OUT)
    assert "{{" not in text
    assert text.count("![") == text.count("<details>") == 5


def test_every_figure_of_the_page_is_committed():
    for claim in CLAIMS:
        assert (OUT / claim.picture).resolve().is_file(), claim.picture


def test_the_readme_has_a_line_for_each_claim_and_one_figure():
    block = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert block.count("\n- [") == len(CLAIMS)
    assert block.count("![") == 1


def test_pages_follow_made_up_results_too(tmp_path):
    shutil.copy(README, tmp_path)
    found = pages(results(), OUT, tmp_path / "docs" / PAGE.name, tmp_path / README.name)
    assert len(found) == 4
    assert all(text.endswith("\n") for text in found.values())


def test_a_readme_without_the_places_is_refused(copied, tmp_path, capsys):
    _, where = copied
    (tmp_path / README.name).write_text("nothing\n")
    with pytest.raises(SystemExit) as ended:
        summarise.main(where)
    assert ended.value.code == 2
    assert "the README has no lines <!-- study -->" in capsys.readouterr().err


def test_results_that_are_missing_are_named(copied, capsys):
    out, where = copied
    (out / "tiny" / RESULTS).unlink()
    with pytest.raises(SystemExit):
        summarise.main(where)
    assert f"{out / 'tiny' / RESULTS} is missing: summarise.py --logs makes it" in capsys.readouterr().err


def test_done_runs_are_collected_and_the_folders_of_others_are_named(copied, tmp_path, monkeypatch, capsys):
    out, _ = copied
    states = {"nft": State.NEW, "grpo": State.BEGUN, "drtune": State.DONE}
    logs, seen = tmp_path / "logs", []
    for testbed in TESTBEDS.values():
        for label in states:
            (logs / testbed.run(label, 0).name).mkdir(parents=True)
    monkeypatch.setattr("scripts.study.run.state_of", lambda run, _: states.get(run.label, State.NEW))
    monkeypatch.setattr("scripts.study.outcomes.merged", lambda testbed, done, *_: seen.extend(done) or [])
    monkeypatch.setattr("scripts.study.outcomes.commit", lambda *_: None)
    summarise.collect(logs, out)
    assert {run.label for run in seen} == {"drtune"}
    said = capsys.readouterr().err
    assert "tiny-nft-seed0 is of other settings: it is left out." in said
    assert "scenes-grpo-seed0 is not finished: it is left out." in said


def test_quick_says_what_lies_outside(monkeypatch, capsys):
    from flow_grpo.statistics import CountedInterval
    from scripts.study.quick import Comparison

    expected = CountedInterval(1.0, 0.9, 1.1, count=5)
    found = [Comparison("one", 1.0, expected), Comparison("other", 2.0, expected)]
    monkeypatch.setattr("scripts.study.quick.compare", lambda *_: found)
    assert summarise.quick(SimpleNamespace(quick=ROOT, out=OUT)) == 1
    said = capsys.readouterr().out
    assert "  OUTSIDE  other: 2, committed 1 (0.9 to 1.1)" in said
    assert "1 of 2 quantities lie within the committed intervals." in said


def test_the_figures_are_drawn(tmp_path):
    from scripts.study.figures import save

    found = results()
    for claim in CLAIMS:
        if claim.draw is not None:
            save(claim.draw(found), tmp_path / f"{claim.anchor}.png")
            assert (tmp_path / f"{claim.anchor}.png").stat().st_size > 10_000


def test_the_committed_results_hold_what_is_planned():
    for one in read_results(OUT).testbeds:
        assert {found["label"] for found in one.outcomes} == set(one.testbed.entries)
        assert {found["label"] for found in one.tried} == set(one.testbed.tried)


def test_a_testbed_in_the_builders_has_all_that_is_claimed():
    assert len(measured(TESTBEDS["tiny"], TINY_ENDS).of("nft")) == 5
    assert set(TINY_ENDS) == set(SCENES_ENDS)
