"""A run's folder: nothing doubled, nothing lost, strict JSON, one writer."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from ml_collections import FrozenConfigDict
from PIL import Image

from config.base import get_config
from flow_grpo import files
from flow_grpo.batching import plan_batches
from flow_grpo.errors import ConfigError, TrainingStopped
from flow_grpo.files import write_atomically
from flow_grpo.runs import run as tracking
from flow_grpo.runs.folder import fresh_folder
from flow_grpo.runs.history import append_line, read_history
from flow_grpo.runs.run import Counters, Run, _git_state
from flow_grpo.settings import Settings

NewRun = Callable[..., Run]


def make_settings(logdir: Path, **overrides: Any) -> Settings:
    config = get_config()
    config.update({"logdir": str(logdir), "run_name": "run", "trackers": (), **overrides})
    return Settings(FrozenConfigDict(config), plan_batches(groups=10, group_size=8, updates=2, num_processes=1), 1)


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """Make a run in tmp_path, as a process that has just started would."""
    return lambda **overrides: Run(make_settings(tmp_path, **overrides), Accelerator(cpu=True))


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def finished_checkpoint(folder: Path, epoch: int) -> None:
    """What a run of before manifests would have left."""
    checkpoint = folder / f"checkpoints/checkpoint-{epoch:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"weights": {}, "counters": Counters(epoch=epoch).state_dict()}))
    (checkpoint / "training_state.pt").write_bytes(b"")


# --- history --------------------------------------------------------------------------------------------


def test_metrics_are_strict_json_with_nan_and_infinities_as_null(new_run: NewRun) -> None:
    run = new_run()
    run.log({"train/loss": float("nan"), "train/kl": float("inf"), "train/reward": np.float32(0.5)}, step=3)
    text = (run.folder / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert record["train/loss"] is None
    assert record["train/kl"] is None
    assert record["train/reward"] == 0.5
    with pytest.raises(pytest.fail.Exception):  # the twin: what json writes when it is not told to be strict
        json.loads(json.dumps({"x": float("nan")}), parse_constant=lambda token: pytest.fail(token))


def test_every_line_carries_the_counters_and_is_there_at_once(new_run: NewRun) -> None:
    run = new_run()
    run.counters.images, run.counters.network_evaluations, run.counters.seconds = 80, 1600, 2.5
    run.log({"train/reward": 0.6}, step=1)
    run.counters.images += 80
    run.log({"eval/reward/pickscore": 0.7}, step=2)
    first, second = lines(run)
    assert first == {
        "step": 1,
        "seconds": 2.5,
        "network_evaluations": 1600,
        "images": 80,
        "updates": 0,
        "nonfinite_updates": 0,
        "train/reward": 0.6,
    }
    assert second["step"] == 2
    assert second["images"] == 160


def test_truncation_leaves_exactly_what_a_resumed_run_will_not_repeat(new_run: NewRun) -> None:
    run = new_run()
    run.log({"eval/reward/pickscore": 0.5}, step=0)
    for step in (1, 2, 3):
        run.log({"train/reward": step / 10}, step=step)
        run.log({"eval_ema/reward/pickscore": step / 10}, step=step)
    run.truncate_history(2, evaluation_redone=False)
    assert [line["step"] for line in lines(run)] == [0, 1, 1, 2, 2]
    run.truncate_history(2)  # the evaluation at 2 will be done again
    kept = lines(run)
    assert [line["step"] for line in kept] == [0, 1, 1, 2]
    assert "train/reward" in kept[-1]
    assert not list(run.folder.glob("*.tmp"))


def test_truncation_leaves_what_a_run_has_not_written(new_run: NewRun) -> None:
    run = new_run()
    (run.folder / "evaluations").mkdir()
    names = ["eval_000003.json", "eval_ema_000003.webp", "notes_20260101.json", "eval_2027.json", "eval_000003.txt"]
    for name in names:
        (run.folder / "evaluations" / name).write_text("")
    run.truncate_history(2)
    assert sorted(file.name for file in (run.folder / "evaluations").iterdir()) == sorted(names[2:])


def test_truncation_removes_the_evaluators_later_records_and_nothing_else(new_run: NewRun) -> None:
    run, later, kept = new_run(), [], []
    for folder, label in (("steps", "eval"), ("steps", "eval_ema"), ("diversity", "eval"), ("images", "eval")):
        (run.folder / folder).mkdir(exist_ok=True)
        for step in (0, 9, 10, 1_000_000):
            path = run.folder / folder / f"{label}_{step:06d}.json"
            path.write_text("{}")
            (later if step > 9 and folder != "images" else kept).append(path)
    kept.append(run.folder / "diversity/bandwidth.json")
    kept.append(run.folder / "steps/notes_about_10.txt")
    for path in kept[-2:]:
        path.write_text("{}")
    run.is_main = False
    run.truncate_history(9, evaluation_redone=False)
    assert all(path.exists() for path in later)  # only the main process writes
    run.is_main = True
    run.truncate_history(9, evaluation_redone=False)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in later)


def test_truncation_removes_a_line_torn_by_a_crash_so_that_appending_is_safe(new_run: NewRun) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/rew')
    run.truncate_history(2)
    run.log({"train/reward": 0.2}, step=2)
    assert [line["train/reward"] for line in read_history(run.folder / "metrics.jsonl")] == [0.1, 0.2]


@pytest.mark.parametrize("bad", ["{torn", "[1]", '{"seconds": 1}'])
def test_a_broken_line_inside_a_history_is_one_sentence_naming_it(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_history(path)


# --- counters and time ----------------------------------------------------------------------------------


def test_counters_survive_a_checkpoint_in_place() -> None:
    counters = Counters(epoch=3, seconds=1.5, network_evaluations=10, images=20, updates=6, nonfinite_updates=1)
    restored = Counters()
    restored.load_state_dict(json.loads(json.dumps(counters.state_dict())))
    assert restored == counters


def test_the_timer_counts_the_block_and_nothing_outside_it(new_run: NewRun) -> None:
    run = new_run()
    start = time.perf_counter()
    with run.timer():
        time.sleep(0.05)
    time.sleep(0.1)
    with run.timer():
        time.sleep(0.05)
    assert 0.1 <= run.counters.seconds <= time.perf_counter() - start - 0.1


def test_progress_iterates_over_a_total_or_an_iterable(new_run: NewRun) -> None:
    run = new_run()
    assert list(run.progress(3, "total")) == [0, 1, 2]
    assert list(run.progress("ab", "iterable")) == ["a", "b"]


# --- images ---------------------------------------------------------------------------------------------


def test_images_are_written_as_png_pixel_for_pixel(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    images: dict[str, Any] = {"bytes": pixels, "floats": pixels / 255, "pil": Image.fromarray(pixels)}
    for name, image in images.items():
        run.log_image(name, image, step=7)
        assert np.array_equal(np.asarray(Image.open(run.folder / f"images/{name}_000007.png")), pixels)
    run.finish()


# --- folders --------------------------------------------------------------------------------------------


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


# --- what cannot be written -----------------------------------------------------------------------------


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_metrics_that_cannot_be_written_stop_the_training_with_a_sentence(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    monkeypatch.setattr(tracking, "append_line", full)
    run.log({"train/reward": 0.2}, step=2)
    with pytest.raises(TrainingStopped, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
        run.check_stop()


def test_a_history_that_has_vanished_is_not_begun_anew(new_run: NewRun) -> None:
    run = new_run()
    run.log({"train/reward": 0.1}, step=1)
    run.folder.rename(run.folder.with_name("moved"))
    run.log({"train/reward": 0.2}, step=2)
    run.log_image("eval", np.zeros((2, 2, 3), np.uint8), 2)
    with pytest.raises(TrainingStopped, match=r"cannot be written \(the folder has been moved or deleted\)"):
        run.check_stop()
    assert not run.folder.exists()


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A disk that is full in the middle of a line; /dev/full takes nothing at all."""
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, {"step": 2, "train/reward": "x" * 100})
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == '{"step": 1}\n'


def test_an_image_that_cannot_be_written_is_told_once_and_leaves_nothing(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    monkeypatch.setattr(tracking, "write_atomically", full)
    for step in (1, 2):
        run.log_image("eval", np.zeros((2, 2, 3), np.uint8), step)
    said = capsys.readouterr().err
    assert said.count("could not be written (No space left on device); the run goes on.") == 1
    assert list((run.folder / "images").iterdir()) == []


def test_a_file_that_cannot_be_written_keeps_its_old_content_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- records --------------------------------------------------------------------------------------------


def test_the_records_hold_the_whole_config_and_what_it_ran_on(new_run: NewRun) -> None:
    run = new_run()
    config = json.loads((run.folder / "config.json").read_text())
    assert set(config) == set(get_config())
    assert config["sample"]["num_steps"] == 10
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["packages"]["accelerate"]
    assert environment["processes"] == 1
    assert environment["threads"] >= 1
    assert environment["command"].startswith("python ")
    assert environment["device"].startswith("cpu")
    assert environment["batch_plan"]["images"] == 80
    assert not any(os.environ.get(secret, "\0") in json.dumps(environment) for secret in ("WANDB_API_KEY", "HF_TOKEN"))


def test_the_git_state_is_none_where_the_code_is_not_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    code = tmp_path / "tracking.py"
    code.write_text("x = 1\n")
    monkeypatch.setattr("flow_grpo.runs.run.__file__", str(code))
    git("init")
    assert _git_state() is None  # inside a checkout that does not track it, such as a virtual environment's
    git("add", ".")
    git("commit", "-m", "one")
    state = _git_state()
    assert state is not None
    assert len(state["revision"]) == 40
    assert state["dirty"] is False
    code.write_text("x = 2\n")
    assert (_git_state() or {})["dirty"] is True


# --- processes ------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys, time
from pathlib import Path
from accelerate import Accelerator
from flow_grpo.errors import ConfigError
from flow_grpo.batching import plan_batches
from flow_grpo.settings import Settings
from flow_grpo.runs.run import Run
from tests.runs.test_run import make_settings

logdir = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
run = Run(make_settings(logdir, run_name="", recipe="two", trackers=("tensorboard",)), accelerator)
with run.timer():
    time.sleep(0.05 + 2 * rank)
bar = run.progress(2, "bar")
run.log({"train/reward": rank}, step=1)
run.log_image("eval", __import__("numpy").zeros((2, 2, 3)), step=1)
accelerator.wait_for_everyone()
try:
    Run(make_settings(logdir, run_name=run.name), accelerator)
    refused = False
except ConfigError:
    refused = True
report = [rank, run.name, run.is_main, run.counters.seconds, bar.disable, len(accelerator.trackers), refused]
Path(f"{logdir}/report-{rank}.json").write_text(json.dumps(report))
run.finish()
"""


def test_two_processes_share_one_folder_and_only_the_main_one_writes(tmp_path: Path) -> None:
    script, root = tmp_path / "script.py", Path(__file__).parents[2]
    script.write_text(TWO_PROCESSES)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert main[1] == other[1]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert (main[2], other[2]) == (True, False)
    assert main[3] == other[3] < 2  # the main process's time, on both
    assert (main[4:], other[4:]) == ([False, 1, True], [True, 0, True])
    history = read_history(tmp_path / main[1] / "metrics.jsonl")
    assert [line["train/reward"] for line in history] == [0]
