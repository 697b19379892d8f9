"""A run's folder, replayed into a dashboard: everything once, in order, and what is damaged said."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flow_grpo.commands import export
from flow_grpo.errors import ConfigError
from tests.runs.test_trackers import evaluation
from tests.synthetic_runs import write_run
from tests.wandb_file import OfflineRun


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three evaluations, a record and a page."""
    folder = write_run(tmp_path / "run", [0.5, None, 0.75], [0.0, 2.0, 4.0], gradient=True, diversity=True)
    evaluation(folder, 10)
    (folder / "page.html").write_text("<p>the page")
    return folder


def run_export(folder: Path, out: Path, *arguments: str) -> Path:
    """The new folder in `out`."""
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    assert export.main(parser.parse_args([str(folder), "--out", str(out), *arguments])) == 0
    return max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_every_row_is_sent_in_order_with_its_axes(run: Path, tmp_path: Path) -> None:
    told = OfflineRun(run_export(run, tmp_path / "out"))
    numbers = [row for row in told.rows if "a_reward/train" in row or "b_judge/accuracy" in row]
    assert [row["epoch"] for row in numbers] == [0, 0, 10, 10, 20, 20]
    assert [row["seconds"] for row in numbers] == [0, 0, 2, 2, 4, 4]
    assert [row.get("a_reward/total") for row in numbers] == [None, 0.5, None, None, None, 0.75]  # null is left out


def test_images_records_and_page_come_with_it(run: Path, tmp_path: Path) -> None:
    told = OfflineRun(run_export(run, tmp_path / "out"))
    assert [row["epoch"] for row in told.rows if "samples/eval/path" in row] == [0, 10, 20]
    (record,) = (row for row in told.rows if "samples/eval_table/nrows" in row)
    assert (record["epoch"], record["samples/eval_images/count"]) == (10, 4)
    assert "samples/page/path" in told.rows[-1]


def test_the_run_is_described_from_its_folder(run: Path, tmp_path: Path) -> None:
    told = OfflineRun(run_export(run, tmp_path / "out", "--name", "other", "--project", "elsewhere"))
    assert (told.run.display_name, told.run.project, told.run.job_type) == ("other", "elsewhere", "drtune")
    assert told.config["device"] == "cpu (synthetic)"
    assert told.config["git.dirty"] is False
    assert told.exit_code == 0


def test_the_run_is_only_read_and_each_export_is_a_fresh_one(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first, second = (OfflineRun(run_export(run, tmp_path / "out")).run.run_id for _ in range(2))
    assert first != second
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_tensorboard_gets_the_same(run: Path, tmp_path: Path) -> None:
    out = run_export(run, tmp_path / "out", "--tracker", "tensorboard")
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in found.Scalars("b_judge/accuracy")] == [0, 10, 20]
    assert [event.step for event in found.Images("samples/eval")] == [0, 10, 20]


def test_damaged_lines_and_files_are_said_and_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{torn", *lines[2:]]) + "\n")
    (run / "images/eval_000010.png").write_bytes(b"no image")
    (run / "evaluations/eval_000010.json").write_text("{}")
    told = OfflineRun(run_export(run, tmp_path / "out"))
    assert len([row for row in told.rows if "seconds" in row]) == len(lines) - 1
    said = capsys.readouterr()
    assert "metrics.jsonl has 1 damaged lines: they are left out." in said.err
    assert "eval_000010.png cannot be read as an image" in said.err
    assert "eval_000010.json is damaged" in said.err
    assert said.out.startswith(f"{len(lines) - 1} metrics, 2 images, 1 page to ")


def test_a_run_without_environment_is_exported_with_a_word(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "environment.json").unlink()
    told = OfflineRun(run_export(run, tmp_path / "out"))
    assert told.config["device"] == "None"
    assert "device, batch plan and state of the code are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "sentence"), [("config.json", r"config\.json cannot be read"), ("metrics.jsonl", "cannot be read")]
)
def test_a_folder_that_lacks_a_record_is_one_sentence(run: Path, tmp_path: Path, missing: str, sentence: str) -> None:
    (run / missing).unlink()
    with pytest.raises(ConfigError, match=sentence):
        run_export(run, tmp_path / "out")


def test_a_name_that_leaves_the_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--name '\.\./x' is not allowed"):
        run_export(run, tmp_path / "out", "--name", "../x")


def test_an_out_that_cannot_be_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"--out .* cannot be written"):
        run_export(run, tmp_path / "out")


def test_a_history_written_by_three_sessions_is_one_run(tmp_path: Path) -> None:
    """As the run's folder has it: what was done again is in it once."""
    folder = write_run(tmp_path / "run", [0.5, 0.6, 0.7, 0.8], [0.0, 2.0, 4.0, 6.0], gradient=False)
    sessions = [{"run_id": "abcd", "started": f"2026-11-2{day}"} for day in (1, 2)]
    environment = json.loads((folder / "environment.json").read_text()) | {"earlier_sessions": sessions}
    (folder / "environment.json").write_text(json.dumps(environment))
    shutil.rmtree(folder / "images")
    told = OfflineRun(run_export(folder, tmp_path / "out"))  # there is one
    assert [row["epoch"] for row in told.rows if "a_reward/total" in row] == [0, 10, 20, 30]
