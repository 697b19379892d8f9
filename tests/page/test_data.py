"""From run folders to what is known of them: read, named, the best found, nothing read twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.page import data
from flow_grpo.page.build import build_page
from flow_grpo.page.data import read_run, read_runs, run_names
from flow_grpo.runs.evaluations import read_record, write_record
from tests.page.small_runs import EPOCHS, SMALL
from tests.synthetic_records import write_records
from tests.synthetic_runs import write_run


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


def test_the_best_is_the_judges_then_a_held_out_rewards_and_never_the_trained_ones(tmp_path: Path) -> None:
    run = read_run(write_records(tmp_path / "judge", epochs=(0, 20, 120), prompts=("a", "b", "c")), "run")
    judged = [e.figures["judge"] for e in run.evaluations[1:]]
    assert run.best == 1 + int(np.argmax(judged))
    held_out = {"eval.judge": "", "eval.rewards": ("clipscore",), "reward_model.clipscore": "another"}
    records = write_records(tmp_path / "held_out", **SMALL, parts=("reward",), overrides=held_out)
    for epoch, value in ((10, 0.7), (20, 0.6)):  # the trained reward rises
        record = read_record(records / f"evaluations/eval_{epoch:06d}.json")
        rewards = {**record.rewards, "clipscore": [value] * len(record.prompt)}
        write_record(records, replace(record, rewards=rewards), None)
    assert read_run(records, "run").best == 1
    alone = write_records(tmp_path / "reward", **SMALL, parts=("reward",), overrides={"eval.judge": ""})
    assert read_run(alone, "run").best is None
    neither = read_run(write_records(tmp_path / "neither", **SMALL, parts=("diversity",)), "run")
    assert neither.best is None


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
