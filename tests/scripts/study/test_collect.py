"""What is collected of run folders is what they say, and survives being written and read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.study import plan
from scripts.study.collect import collect
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.study_records import NATS, SPREAD, Study, read_study, write_study
from tests.scripts.study.builders import write_study_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StudyRun], Path]:
    """Four planned runs: two finished, one cut short, one never begun."""
    logs = tmp_path_factory.mktemp("logs")
    runs = plan.claims(range(2), 40.0)
    write_study_run(runs[0], logs, 0.1)
    write_study_run(runs[1], logs, 0.02)
    write_study_run(runs[2], logs, 0.1, seconds=30.0)
    return runs, logs


def test_finished_runs_are_collected_and_the_others_named(pair: tuple[list[StudyRun], Path]) -> None:
    runs, logs = pair
    found = collect(runs, logs)
    assert [record.name for record in found.records] == [runs[0].name, runs[1].name]
    assert found.missing == {runs[2].name: "not finished", runs[3].name: "not run"}
    assert [record.method for record in found.records] == ["DRTune", "GRPO"]
    assert len(found.environments) == 1
    assert found.environments[0]["packages"]["torch"] == "2.15.0"


def test_every_number_is_the_run_folders_to_six_digits(pair: tuple[list[StudyRun], Path]) -> None:
    runs, logs = pair
    found = collect(runs, logs).records[0]
    lines = [json.loads(line) for line in (logs / runs[0].name / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/reward/total" in line]
    for name in (REWARD, ACCURACY, VENDI, f"{VENDI}_low", RKE, NATS, SPREAD):
        expected = [line[f"eval/{name}"] for line in evaluations]
        assert found.curve(name) == pytest.approx(expected, rel=5.1e-6)
        assert all(value == float(f"{value:.6g}") for value in found.evaluations[name])
    assert list(found.curve("network_evaluations")) == [line["network_evaluations"] for line in evaluations]
    clips = [line["train/clip_fraction"] for line in lines if "train/clip_fraction" in line]
    assert found.training["train/clip_fraction"]["first"] == pytest.approx(clips[0], rel=1e-5)
    assert found.training["train/clip_fraction"]["mean"] == pytest.approx(np.mean(clips), rel=1e-5)
    assert "train/loss" not in found.training


def test_the_file_is_strict_json_a_line_a_run_and_reads_back_as_it_was(
    pair: tuple[list[StudyRun], Path], tmp_path: Path
) -> None:
    runs, logs = pair
    damaged = logs / runs[1].name / "metrics.jsonl"
    text = damaged.read_text()
    damaged.write_text(text.replace('"eval/entropy/nats": -20.0', '"eval/entropy/nats": null', 1))
    found = collect(runs, logs)
    damaged.write_text(text)
    assert found.records[1].evaluations[NATS][0] is None
    write_study(found, tmp_path / "runs.json")
    written = (tmp_path / "runs.json").read_text()
    json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert sum(line.startswith('{"name"') for line in written.splitlines()) == 2
    again = read_study(tmp_path / "runs.json")
    assert again == Study(found.environments, found.missing, found.records)
    write_study(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == written
    for private in (str(logs), "started", "logdir", "/tmp"):
        assert private not in written
