"""From run folders to the page's contents: what is read, grouped, compared, left out and escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flow_grpo.diversity.paired import change_of_means
from flow_grpo.errors import ConfigError
from flow_grpo.page import contents, data
from flow_grpo.page.build import build_page, content_policy, number, safe_json
from flow_grpo.page.contents import checkpoints_within, contents_of
from flow_grpo.page.data import PageRun, evenly, read_run, read_runs, run_names
from flow_grpo.page.seeds import (
    Difference,
    Group,
    curves,
    differences,
    differing_measures,
    groups_of,
    mean_of,
)
from flow_grpo.page.words import FIGURES, load, model_name
from flow_grpo.runs.evaluations import write_record
from flow_grpo.statistics import Interval
from tests.synthetic_records import write_records
from tests.synthetic_runs import write_run

EPOCHS = (0, 10, 20)
SMALL: dict[str, Any] = {"prompts": ("a bag", "a boot"), "noises": 8, "epochs": EPOCHS}


def data_of(page: Path) -> dict[str, Any]:
    """What the page gives its scripts."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# --- reading ----------------------------------------------------------------------------------------------------


def test_an_evaluation_has_the_figures_of_its_record(tmp_path: Path) -> None:
    run = read_run(write_records(tmp_path / "run", **SMALL), "run")
    last, record = run.last, run.last.record
    assert record is not None
    assert record.judge is not None
    assert record.diversity is not None
    assert last.figures["reward"] == pytest.approx(np.mean(record.rewards["total"]), abs=1e-5)
    assert last.figures["judge"] == pytest.approx(np.mean(np.equal(record.judge.guess, record.prompt)), abs=1e-5)
    assert last.figures["vendi"] == pytest.approx(np.mean(record.diversity.vendi), abs=1e-4)
    assert last.figures["reached"] == last.changes["reached"].new
    assert run.evaluations[0].figures["reached"] == last.changes["reached"].old
    assert [e.name for e in run.evaluations] == ["base model", "epoch 10", "epoch 20"]
    assert run.epoch == 20


def test_evaluations_without_records_come_from_the_history(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    (folder / "evaluations/eval_000010.json").unlink()
    run = read_run(folder, "run")
    assert [e.epoch for e in run.evaluations] == [0, 10, 20]
    assert run.evaluations[1].record is None
    assert run.evaluations[1].figures.keys() == {"reward", "vendi", "judge"}
    assert run.evaluations[1].changes == {}


def test_an_older_run_has_its_history_and_pictures(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [0.5, None, 0.7], [0, 5, 10], True, density=True), "run")
    assert [e.figures.get("reward") for e in run.evaluations] == [0.5, None, 0.7]
    assert all(e.picture_path == e.picture is not None for e in run.evaluations)
    assert "entropy/nats" in run.last.extra


def test_a_damaged_record_and_a_damaged_line_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    (folder / "evaluations/eval_000020.json").write_text("{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 21, "seconds": 30.0}\n')
    run = read_run(folder, "run")
    assert run.evaluations[-1].record is None
    assert run.epoch == 21
    assert "eval_000020.json" in capsys.readouterr().err


def test_a_number_that_is_none_is_not_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [0.5, 0.6], [0, 5], True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["eval/judge/accuracy"], line["seconds"] = "high", None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder, "run")
    assert "judge" not in run.last.figures
    assert run.last.seconds == 0.0


def test_the_averaged_weights_are_another_label(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match="holds no evaluation called 'eval_ema'"):
        read_run(folder, "run", "eval_ema")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "none", "is not a folder"),
        (lambda folder: folder, "holds no evaluation called 'eval'"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        build_page([make(tmp_path)], tmp_path / "page.html")
    assert str(refusal.value).count("\n") == 0
    assert not (tmp_path / "page.html").exists()


def test_no_folder_and_a_folder_given_twice_are_refused(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match="no run folder"):
        read_runs([])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([folder, folder / "../run"])


def test_runs_of_one_name_are_told_apart_by_their_parents() -> None:
    assert run_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]


def test_the_best_is_the_judges_then_a_held_out_rewards_then_the_rewards(tmp_path: Path) -> None:
    run = read_run(write_records(tmp_path / "judge", epochs=(0, 20, 120), prompts=("a", "b", "c")), "run")
    judged = [e.figures["judge"] for e in run.evaluations[1:]]
    assert run.best == 1 + int(np.argmax(judged))
    alone = read_run(write_records(tmp_path / "reward", **SMALL, parts=("reward",)), "run")
    assert alone.best == 1 + int(np.argmax([e.figures["reward"] for e in alone.evaluations[1:]]))
    neither = read_run(write_records(tmp_path / "neither", **SMALL, parts=("diversity",)), "run")
    assert neither.best is None


# --- checkpoints ------------------------------------------------------------------------------------------------


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


# --- seeds ------------------------------------------------------------------------------------------------------


def seeded(folder: Path, seeds: tuple[int, ...], name: str = "run", **changes: Any) -> list[PageRun]:
    folders = [write_records(folder / f"{name}-seed{seed}", **SMALL, seed=seed, **changes) for seed in seeds]
    return read_runs(folders)


def test_runs_of_the_same_settings_but_the_seed_are_one_group(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1,), "other", overrides={"train.learning_rate": 1.0})
    assert groups_of(runs) == [Group("run", (0, 1)), Group("other-seed1", (2,))]


def test_runs_without_settings_are_groups_of_their_own(tmp_path: Path) -> None:
    folders = [write_records(tmp_path / name, **SMALL) for name in "ab"]
    for folder in folders:
        (folder / "config.json").unlink()
        (folder / "environment.json").unlink()
    assert [group.runs for group in groups_of(read_runs(folders))] == [(0,), (1,)]


def test_the_same_seed_again_is_no_other_seed(tmp_path: Path) -> None:
    """As of a run that branched off: with it, the mean over seeds would have an interval without a width."""
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1,), "again")
    assert [group.runs for group in groups_of(runs)] == [(0, 1), (2,)]


def test_seeds_that_differ_by_the_same_number_show_nothing(tmp_path: Path) -> None:
    """Shares of few images often do; a t interval would have no width, and say better or worse."""
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1, 2), "slow")

    def with_judge(run: PageRun, judge: float) -> PageRun:
        last = replace(run.last, figures={**run.last.figures, "judge": judge})
        return replace(run, evaluations=(*run.evaluations[:-1], last))

    runs = [with_judge(run, judge) for run, judge in zip(runs, (0.9, 0.7, 0.8, 0.6), strict=True)]
    groups = Group("slow", (2, 3)), Group("run", (0, 1))
    assert differences(*groups, runs)["judge"] == Difference(Interval(pytest.approx(-0.1)), "none")
    runs[3] = with_judge(runs[3], 0.75)  # the broken twin has a spread
    assert differences(*groups, runs)["judge"].how == "seeds"
    other_seeds = [replace(run, config={**run.config, "seed": 5 + i}) for i, run in enumerate(runs)]
    exact = [with_judge(run, judge) for run, judge in zip(other_seeds, (1.0, 1.0, 0.875, 0.875), strict=True)]
    assert differences(*groups, exact)["judge"] == Difference(Interval(-0.125), "none")


def test_the_interval_of_seeds_is_students() -> None:
    values = [1.0, 2.0, 4.0]
    found = mean_of(values)
    half = stats.t.ppf(0.975, 2) * math.sqrt(np.var(values, ddof=1) / 3)
    assert (found.estimate, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-12)
    assert mean_of(values, 0.0, 5.0) == Interval(found.estimate, 0.0, 5.0)  # what it can be
    assert not mean_of([3.0]).known
    assert (mean_of([3.0, 3.0]).low, mean_of([3.0, 3.0]).high) == (3.0, 3.0)


def test_a_mean_curve_has_the_epochs_that_all_seeds_evaluated(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3))
    (runs[2].folder / "evaluations/eval_000010.json").unlink()
    (runs[2].folder / "metrics.jsonl").unlink()
    runs = read_runs([run.folder for run in runs])
    points = curves(Group("run", (0, 1, 2)), runs)["reward"]
    assert [point["epoch"] for point in points] == [0, 20]
    assert points[1]["value"] == pytest.approx(np.mean([run.last.figures["reward"] for run in runs]))
    assert points[1]["seconds"] == pytest.approx(np.mean([run.last.seconds for run in runs]))


def test_groups_of_the_same_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3)) + seeded(tmp_path, (3, 1, 2), "slow", speed=0.2)
    found = differences(Group("slow", (3, 4, 5)), Group("run", (0, 1, 2)), runs)["reward"]
    new, old = ([runs[i].last.figures["reward"] for i in order] for order in ((4, 5, 3), (0, 1, 2)))
    paired = stats.ttest_rel(new, old).confidence_interval()
    assert found.how == "seeds"
    assert (found.estimate.low, found.estimate.high) == pytest.approx((paired.low, paired.high))
    unequal = stats.ttest_rel([runs[i].last.figures["reward"] for i in (3, 4, 5)], old).confidence_interval()
    assert found.estimate.low != pytest.approx(unequal.low)  # in the order of the folders it would be another interval


def test_groups_of_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3)) + seeded(tmp_path, (4, 5), "slow", speed=0.2)
    found = differences(Group("slow", (3, 4)), Group("run", (0, 1, 2)), runs)["reward"]
    new, old = ([runs[i].last.figures["reward"] for i in members] for members in ((3, 4), (0, 1, 2)))
    welch = stats.ttest_ind(new, old, equal_var=False).confidence_interval()
    assert found.how == "runs"
    assert (found.estimate.low, found.estimate.high) == pytest.approx((welch.low, welch.high))


def test_two_single_runs_are_compared_image_by_image(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1,)) + seeded(tmp_path, (2,), "slow", speed=0.2)
    found = differences(Group("slow", (1,)), Group("run", (0,)), runs)
    new, old = runs[1].last.record, runs[0].last.record
    assert new is not None
    assert old is not None
    expected = change_of_means(
        np.array(old.rewards["total"], float), np.array(new.rewards["total"], float), np.array(new.prompt)
    )
    assert expected is not None
    assert {figure: one.how for figure, one in found.items()} == {
        "reward": "images", "vendi": "images", "judge": "images", "reached": "none",
    }  # fmt: skip
    assert (found["reward"].estimate.low, found["reward"].estimate.high) == pytest.approx((expected.low, expected.high))


def test_runs_that_measure_something_else_are_not_compared(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1,)) + seeded(tmp_path, (1,), "other", overrides={"eval.num_steps": 20})
    assert differing_measures(runs) == ["eval.num_steps"]
    found = contents_of(runs, live=False, label="eval")
    assert all(figure["difference"] is None for row in found.comparison for figure in row["figures"].values())
    assert differing_measures(runs[:1]) == []


def test_a_page_that_is_written_again_reads_what_is_new_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds the distances of no evaluation: those of a long run would fill the memory."""
    folder, read = write_records(tmp_path / "run", **SMALL), []
    whole = data.read_record
    monkeypatch.setattr(data, "read_record", lambda path: read.append(path.name) or whole(path))
    first = build_page([folder], tmp_path / "page.html").read_bytes()
    assert len(read) == len(EPOCHS)
    assert build_page([folder], tmp_path / "page.html").read_bytes() == first
    assert len(read) == len(EPOCHS)
    path = folder / "evaluations/eval_000010.json"
    write_record(folder, replace(whole(path), name="renamed", sprite=None), None)
    run = read_run(folder, "run")
    assert read[len(EPOCHS) :] == [path.name]
    assert run.evaluations[1].name == "renamed"
    kept = [e.record.diversity for e in run.evaluations if e.record is not None and e.record.diversity is not None]
    assert all(not any(one.within) and one.to_base is None for one in kept)
    last = run.last_record()
    assert last is not None
    assert last.diversity is not None
    assert all(last.diversity.within)


# --- the file ---------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Names and attributes of a page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_one_file_that_names_no_other(tmp_path: Path) -> None:
    page = build_page([write_records(tmp_path / "run", **SMALL)], tmp_path / "deep/er/page.html", "fme view run")
    elements = Elements(page.read_text()).found
    addresses = [value for _, attributes in elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in addresses)
    assert "@import" not in page.read_text()
    assert "url(" not in page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html"]


def test_its_policy_allows_its_own_script_and_style_alone(tmp_path: Path) -> None:
    text = build_page([write_records(tmp_path / "run", **SMALL)], tmp_path / "page.html").read_text()
    policy = next(a["content"] or "" for name, a in Elements(text).found if "http-equiv" in a)
    for kind, content in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert content_policy("a", "b") != content_policy("b", "a")


def test_json_in_the_page_cannot_end_its_element() -> None:
    text = "</script><!-- <b>&\u2028"
    found = safe_json({"prompt": text, "value": math.nan})
    assert not set("<>&\u2028") & set(found)
    assert json.loads(found) == {"prompt": text, "value": None}


def test_a_run_can_be_called_otherwise_than_its_folder(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "visualization", **SMALL)
    page = build_page([folder], tmp_path / "page.html", names=["mine"])
    assert data_of(page)["runs"][0]["name"] == "mine"
    assert "<title>mine" in page.read_text()


def test_names_settings_and_the_command_are_escaped(tmp_path: Path) -> None:
    evil = "<i onclick=x>&"
    folder = write_records(tmp_path / evil, **SMALL, overrides={"prompts.train": evil})
    text = build_page([folder], tmp_path / "page.html", command=f"fme view {evil}").read_text()
    assert not any(name == "i" for name, _ in Elements(text).found)
    assert text.count("&lt;i onclick=x&gt;&amp;") >= 4  # title, folder, setting, command


def test_the_same_folders_give_the_same_page(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    pages = [build_page([folder], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"page\.html cannot be written"):
        build_page([folder], tmp_path / "file/page.html")


def test_film_strips_are_bounded(tmp_path: Path) -> None:
    from PIL import Image

    folder = write_records(tmp_path / "run", epochs=range(0, 60, 10), prompts=("a bag",), noises=8)
    (folder / "images").mkdir()
    for epoch in range(0, 60, 10):
        Image.new("RGB", (4000, 30), "red").save(folder / f"images/eval_strip_{epoch:06d}.png")
    (folder / "images/eval_strip_000050.png").write_bytes(b"no picture")
    strips = contents_of(read_runs([folder]), live=False, label="eval").strips
    assert [strip["name"] for strip in strips] == ["base model", "epoch 20"]  # and epoch 50, which is damaged
    assert all(len(strip["data"]) < 10_000 for strip in strips)


@pytest.mark.parametrize("parts", [(), ("judge",), ("reward",), ("diversity",), ("reward", "judge", "images")])
def test_any_part_may_be_missing(tmp_path: Path, parts: tuple[str, ...]) -> None:
    page = build_page([write_records(tmp_path / "run", **SMALL, parts=parts)], tmp_path / "page.html")
    last = data_of(page)["runs"][0]["evaluations"][-1]
    assert set(last["figures"]) == {name for part in parts for name in
                                    {"judge": ["judge"], "reward": ["reward"], "diversity": ["vendi", "reached"],
                                     "images": []}[part]}  # fmt: skip
    assert last["diversity"] == ("less" if "diversity" in parts else "not_measured")
    assert last["exploitation"] == ("no_reward" if "reward" not in parts else
                                    "not_shown" if "judge" in parts else "no_judge")  # fmt: skip


# --- words ------------------------------------------------------------------------------------------------------


def test_there_are_words_for_everything_that_can_be_said() -> None:
    words = load()
    assert words["diversity"].keys() >= {"less", "more", "not_shown", "not_measured"}
    assert words["exploitation"].keys() >= {"exploited", "not_shown", "no_judge", "no_reward"}
    assert words["direction"].keys() >= {"better", "worse", "not_shown", "not_measured"}
    assert tuple(words["figures"]) == FIGURES
    assert "not exploited" not in json.dumps(words)
    assert (model_name(0), model_name(10), model_name(10, "mine")) == ("base model", "epoch 10", "mine")


@pytest.mark.parametrize(
    ("value", "unit", "sign", "expected"),
    [
        (0.51234, "number", False, "0.512"),
        (0.53, "number", False, "0.530"),
        (123.4, "number", False, "123"),
        (-0.0227, "number", False, "\N{MINUS SIGN}0.0227"),
        (0.0227, "number", True, "+0.0227"),
        (0.0, "number", True, "0"),
        (-0.001, "share", True, "\N{MINUS SIGN}0.1"),  # an end of an interval: on which side of 0, is the verdict
        (-0.001, "share", False, "0"),
        (0.876, "share", False, "88"),
        (-0.2, "share", True, "\N{MINUS SIGN}20"),
    ],
)
def test_numbers_as_people_read_them(value: float, unit: str, sign: bool, expected: str) -> None:
    assert number(value, unit, sign) == expected


def test_changes_that_are_not_finite_are_not_shown(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    record = read_run(folder, "run").last_record()
    assert record is not None
    unknown = replace(record.changes["vendi"], low=math.nan)
    write_record(folder, replace(record, changes={**record.changes, "vendi": unknown}), None)
    last = read_run(folder, "run").last
    assert last.changes.keys() == {"reward", "judge", "reached"}
    assert last.picture_path is None
