"""A run's folder: one writer, nothing of another's touched, resumed or begun anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from flow_grpo.errors import ConfigError, TrainingStopped
from flow_grpo.runs.folder import fresh_folder
from flow_grpo.runs.history import read_history
from flow_grpo.runs.run import Run
from tests.runs.new_runs import NewRun, finished_checkpoint, lines, make_settings


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(new_run: NewRun) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    finished_checkpoint(run.folder, 1)
    run.finish()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"run_name = 'run'.*already holds a run"):
        new_run(seed=7)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_being_written_is_refused_and_says_by_whom_since_when_and_where(new_run: NewRun) -> None:
    first = new_run()
    first.log({"train/reward": 0.1}, step=1)
    finished_checkpoint(first.folder, 1)
    for overrides in ({"seed": 7}, {"resume_from": str(first.folder)}):
        with pytest.raises(
            ConfigError,
            match=rf"is being written by process {os.getpid()} on {re.escape(socket.gethostname())} since 20..-",
        ):
            new_run(**overrides)
    first.finish()
    assert new_run(resume_from=str(first.folder)).resumed


def test_a_lock_ends_with_its_process_and_one_that_cannot_be_read_is_still_held(new_run: NewRun) -> None:
    run = new_run()
    (run.folder / "run.lock.json").write_text("{")
    with pytest.raises(ConfigError, match="is being written by another process"):
        new_run()
    run.finish()
    child = "import os, sys; from pathlib import Path; from flow_grpo.runs.lock import RunLock; "
    child += "RunLock(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", child, str(run.folder)], check=False).returncode == -9
    assert (run.folder / "run.lock.json").exists()  # of the process that was killed
    new_run()


def test_a_run_killed_before_its_first_checkpoint_starts_afresh_under_its_name(
    new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, value in ((1, 0.1), (2, 0.2)):
        run = new_run(seed=number)
        run.log({"train/reward": value}, step=1)
        (run.folder / "checkpoints/.partial-checkpoint-000001").mkdir(parents=True)
        (run.folder / "config.json.tmp").write_text("{")
        run.finish()
    run = new_run()
    assert f"it starts afresh; what was there is now in {run.folder / 'earlier-2'}" in capsys.readouterr().err
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "config.json", "earlier-1", "earlier-2", "environment.json", "run.lock", "run.lock.json",
    ]  # fmt: skip
    rewards = [read_history(run.folder / f"earlier-{n}/metrics.jsonl")[0]["train/reward"] for n in (1, 2)]
    assert rewards == [0.1, 0.2]


def test_a_kill_while_an_earlier_start_is_set_aside_does_not_block_the_name(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    (run.folder / "images").mkdir()
    run.finish()
    replace = os.replace
    for moved in range(4):  # killed after so many of metrics.jsonl, images/, config.json and environment.json
        left = iter(range(moved))

        def killed(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if target.parent.name.startswith("earlier-") and next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        folder = run.folder.with_name(f"run-{moved}")
        shutil.copytree(run.folder, folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                new_run(run_name=folder.name)
        again = new_run(run_name=folder.name)
        assert not (again.folder / "metrics.jsonl").exists()
        assert len(list(again.folder.glob("earlier-*/metrics.jsonl"))) == 1


def test_a_start_that_was_killed_while_it_wrote_its_first_record_does_not_block_its_name(
    new_run: NewRun, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.tmp").write_text("{")
    assert json.loads((new_run().folder / "config.json").read_text())["run_name"] == "run"


def test_files_that_are_no_runs_stay_where_they_are(new_run: NewRun, tmp_path: Path) -> None:
    """As of `command > logs/run/train.log`, before the first start and before the second."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/train.log").write_text("all of it")
    for start in (1, 2):
        run = new_run()
        run.log({"train/reward": 0.1}, step=start)
        run.finish()
        assert (run.folder / "train.log").read_text() == "all of it"
    assert (run.folder / "earlier-1/metrics.jsonl").exists()


def test_a_folder_that_is_no_runs_but_holds_what_a_run_writes_is_refused_and_left_as_it_was(
    new_run: NewRun, tmp_path: Path
) -> None:
    for name in ("images/mine.tmp", "wandb.tmp"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(ConfigError, match=r"is no run's, but holds 'images', which a run would write"):
        new_run()
    there = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*"))
    assert there == ["images", "images/mine.tmp", "wandb.tmp"]


def test_a_folder_that_was_moved_away_and_made_anew_belongs_to_the_second_run(new_run: NewRun) -> None:
    first = new_run()
    first.log({"train/reward": 0.1}, step=1)
    first.folder.rename(first.folder.with_name("moved"))
    second = new_run(seed=9)
    second.log({"train/reward": 0.9}, step=1)
    first.log({"train/reward": 0.2}, step=2)
    with pytest.raises(TrainingStopped, match="the folder has been moved or deleted"):
        first.check_stop()
    assert [line["train/reward"] for line in lines(second)] == [0.9]
    first.finish()
    assert (second.folder / "run.lock.json").exists()


def test_resuming_a_run_that_saved_nothing_says_how_it_is_started_again(new_run: NewRun) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    run.finish()
    with pytest.raises(ConfigError, match=r"holds no checkpoint.* start it again under its name"):
        new_run(resume_from=str(run.folder))


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_name = 'run': no folder can be made in logdir="):
        Run(make_settings(tmp_path / blocked), Accelerator(cpu=True))


def test_a_run_that_failed_before_its_first_result_does_not_block_its_name(new_run: NewRun) -> None:
    new_run().finish()
    assert json.loads((new_run(seed=7).folder / "config.json").read_text())["seed"] == 7


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/checkpoint-000010"])
def test_resuming_appends_to_the_run_folder_and_keeps_its_records(new_run: NewRun, inside: str) -> None:
    first = new_run()
    first.log({"train/reward": 0.1}, step=1)
    finished_checkpoint(first.folder, 10)
    first.finish()
    second = new_run(run_name="", resume_from=str(first.folder / inside), num_epochs=7)
    second.log({"train/reward": 0.2}, step=2)
    assert second.folder.resolve() == first.folder.resolve()
    assert second.resumed
    assert not first.resumed
    assert [line["step"] for line in lines(first)] == [1, 2]
    environment = json.loads((first.folder / "environment.json").read_text())
    assert environment["config_changes"]["num_epochs"] == [100, 7]
    assert [session["run_id"] for session in environment["earlier_sessions"]] == [environment["run_id"]]


def test_resuming_under_another_name_branches_off_into_a_new_folder(new_run: NewRun) -> None:
    first = new_run()
    first.log({"train/reward": 0.1}, step=1)
    finished_checkpoint(first.folder, 1)
    branch = new_run(run_name="branch", resume_from=str(first.folder))
    branch.truncate_history(1)
    assert branch.folder != first.folder
    assert not (branch.folder / "metrics.jsonl").exists()
    assert not branch.resumed


def test_an_empty_name_becomes_recipe_and_time_and_never_collides(new_run: NewRun) -> None:
    runs = [new_run(run_name="", recipe="tiny_sd3") for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    assert all(run.name.startswith("tiny_sd3-20") for run in runs)
    assert json.loads((runs[0].folder / "config.json").read_text())["run_name"] == runs[0].name


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_name_that_leaves_the_log_folder_is_refused(new_run: NewRun, name: str) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        new_run(run_name=name)


def test_fresh_folder_counts_up(tmp_path: Path) -> None:
    assert [fresh_folder(tmp_path / "demo").name for _ in range(3)] == ["demo", "demo-2", "demo-3"]
