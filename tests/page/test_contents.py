"""Which checkpoints a page shows, and what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_grpo.page import contents
from flow_grpo.page.build import build_page
from flow_grpo.page.contents import checkpoints_within
from flow_grpo.page.data import evenly, read_run
from tests.page.pages import beside_curve
from tests.page.small_runs import SMALL, data_of
from tests.synthetic_records import write_records


@pytest.mark.parametrize(
    ("count", "most", "wanted", "expected"),
    [
        (5, 12, None, [0, 1, 2, 3, 4]),
        (11, 3, None, [0, 5, 10]),
        (11, 3, 1, [0, 1, 10]),
        (11, 3, 10, [0, 5, 10]),
        (101, 5, 33, [0, 33, 50, 75, 100]),
        (9, 2, 4, [0, 8]),
        (0, 3, None, []),
        (1, 3, 0, [0]),
    ],
)
def test_first_best_last_and_even_ones(count: int, most: int, wanted: int | None, expected: list[int]) -> None:
    assert evenly(range(count), most, wanted) == expected


@pytest.mark.parametrize("wanted", range(40))
def test_no_checkpoint_twice_and_in_order(wanted: int) -> None:
    chosen = evenly(range(40), 12, wanted)
    assert len(chosen) == len(set(chosen)) == 12
    assert chosen == sorted(chosen)
    assert {0, 39, wanted} <= set(chosen)


def test_checkpoints_fit_the_bytes_they_may_weigh(tmp_path: Path) -> None:
    run = read_run(write_records(tmp_path / "run", epochs=range(0, 60, 10), prompts=("a bag",), noises=8), "run")
    weights = [(run.folder / f"evaluations/eval_{e.epoch:06d}.webp").stat().st_size for e in run.evaluations]
    assert checkpoints_within(run, sum(weights)) == [0, 1, 2, 3, 4, 5]
    some = checkpoints_within(run, sum(weights) * 2 // 3)
    assert 2 < len(some) < 6
    assert sum(weights[i] for i in some) <= sum(weights) * 2 // 3
    assert checkpoints_within(run, 0) == [0, 1, 2, 3, 4, 5]  # none of which has its pictures then


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MOST_CHECKPOINTS", 3)
    folder = write_records(tmp_path / "run", epochs=range(0, 60, 10), prompts=("a bag",), noises=8)
    page = build_page([folder], tmp_path / "page.html")
    assert [c["evaluation"] for c in data_of(page)["runs"][0]["checkpoints"]][::2] == [0, 5]
    assert len(data_of(page)["runs"][0]["evaluations"]) == 6
    assert "run: 3 of 6 evaluations are checkpoints of this page" in page.read_text()


def test_pictures_that_are_too_heavy_are_left_out_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MOST_IMAGE_BYTES", 100)
    page = build_page([write_records(tmp_path / "run", **SMALL)], tmp_path / "page.html")
    assert all(checkpoint["sprite"] is None for checkpoint in data_of(page)["runs"][0]["checkpoints"])
    assert "Its images are left out" in page.read_text()


def test_a_sprite_that_is_gone_leaves_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    (folder / "evaluations/eval_000010.webp").unlink()
    (folder / "evaluations/eval_000020.webp").write_bytes(b"<svg onload=alert(1)>")
    checkpoints = data_of(build_page([folder], tmp_path / "page.html"))["runs"][0]["checkpoints"]
    assert [c["sprite"] is not None for c in checkpoints] == [True, False, False]
    assert all(len(c["rewards"]["total"]) == 16 for c in checkpoints)
    assert capsys.readouterr().err.count("without these images") == 2


def test_the_exact_law_begins_at_the_runs_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_records(tmp_path / "run", **SMALL, overrides={"reward_fn.pickscore": 1.0})
    assert data_of(build_page([folder], tmp_path / "page.html"))["runs"][0]["curve"] == []
    run = data_of(build_page([beside_curve(folder)], tmp_path / "page.html"))["runs"][0]
    base = run["evaluations"][0]["figures"]
    assert run["curve"][0] == pytest.approx([base["reward"], base["vendi"]])
    assert run["curve"][2] == pytest.approx([base["reward"] + 0.2, base["vendi"] / 2])
    beside_curve(folder, weight=2.0)  # of another reward
    assert data_of(build_page([folder], tmp_path / "page.html"))["runs"][0]["curve"] == []
    (folder / "curve.json").write_text("{")
    assert data_of(build_page([folder], tmp_path / "page.html"))["runs"][0]["curve"] == []
    assert "no exact law is shown" in capsys.readouterr().err
