"""A run: nothing doubled, nothing lost, strict JSON; what cannot be written; two processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flow_grpo import files
from flow_grpo.errors import TrainingStopped
from flow_grpo.files import write_atomically
from flow_grpo.runs import run as tracking
from flow_grpo.runs.history import read_history
from tests import forked
from tests.runs.new_runs import NewRun, full, lines

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


def test_the_timer_counts_the_block_and_nothing_outside_it(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = new_run(), [0.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with run.timer():
        now[0] += 3.0
    now[0] += 100.0
    with run.timer():
        now[0] += 2.0
    assert run.counters.seconds == 5.0


def test_what_is_uncounted_within_the_timer_is_left_out_of_that_block_alone(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = new_run(), [0.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with run.timer():
        now[0] += 3.0
        with run.uncounted():
            now[0] += 100.0
    with run.timer():
        now[0] += 2.0
    assert run.counters.seconds == 5.0


# --- images ---------------------------------------------------------------------------------------------


def test_images_are_written_as_png_pixel_for_pixel(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    images: dict[str, Any] = {"bytes": pixels, "floats": pixels / 255, "pil": Image.fromarray(pixels)}
    for name, image in images.items():
        run.log_image(name, image, step=7)
        assert np.array_equal(np.asarray(Image.open(run.folder / f"images/{name}_000007.png")), pixels)
    run.finish()


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


# --- processes ------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from flow_grpo.errors import ConfigError
from flow_grpo.batching import plan_batches
from flow_grpo.settings import Settings
from flow_grpo.runs import run as tracking
from flow_grpo.runs.run import Run
from tests.runs.new_runs import make_settings

logdir = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
run = Run(make_settings(logdir, run_name="", recipe="two", trackers=("tensorboard",)), accelerator)
tracking.time = SimpleNamespace(perf_counter=iter((0.0, 0.5 + 2 * rank)).__next__)
with run.timer():
    pass
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
    done = forked.run("-c", TWO_PROCESSES, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert main[1] == other[1]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert (main[2], other[2]) == (True, False)
    assert main[3] == other[3] == 0.5  # the main process's time, on both
    assert (main[4:], other[4:]) == ([False, 1, True], [True, 0, True])
    history = read_history(tmp_path / main[1] / "metrics.jsonl")
    assert [line["train/reward"] for line in history] == [0]
