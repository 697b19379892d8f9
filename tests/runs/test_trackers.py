"""What dashboards are told: sections, axes, summaries, records; every point once; no run that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flow_grpo.errors import ConfigError, TrainingStopped
from flow_grpo.runs.dashboard import SAMPLES, Description, caption, captioned, shown_as, table_of
from flow_grpo.runs.evaluations import read_record, write_record
from flow_grpo.runs.progress import Counters
from flow_grpo.runs.record import Judged, Record
from flow_grpo.runs.run import Run
from flow_grpo.runs.tensorboard_board import TensorBoard
from flow_grpo.runs.wandb_board import wandb_mode
from tests.runs.new_runs import NewRun, finished_checkpoint, full, make_settings
from tests.wandb_file import OfflineRun


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[NewRun]:
    """Make a run in tmp_path, which has ended when the test has."""
    runs: list[Run] = []

    def new(**overrides: Any) -> Run:
        runs.append(Run(make_settings(tmp_path, **overrides), Accelerator(cpu=True)))
        return runs[-1]

    yield new
    for run in runs:
        run.finish()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def events(folder: Path) -> EventAccumulator:
    """All that tensorboard reads of a run."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in events(folder).Scalars(tag)]


def evaluation(folder: Path, epoch: int = 0, label: str = "eval") -> Record:
    """Two prompts of two images: the judge takes the last for the other prompt."""
    record = Record(
        label=label,
        epoch=epoch,
        seconds=1.5,
        network_evaluations=160,
        prompts=["a bag", "a boot"],
        prompt=[0, 0, 1, 1],
        noise=[0, 1, 0, 1],
        rewards={"total": [0.5, 0.25, None, 0.75]},
        judge=Judged("judge", True, [0, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]),
    )
    images = np.zeros((4, 3, 8, 8), np.float32)
    images[np.arange(4), 0] = np.arange(4)[:, None, None] / 4  # red: the number of the image
    return read_record(write_record(folder, record, images))


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("eval/reward/total", "a_reward/total"),
        ("eval_ema/reward/pickscore", "a_reward/pickscore_ema"),
        ("train/reward", "a_reward/train"),
        ("train/reward_std", "a_reward/train_std"),
        ("eval/judge/accuracy", "b_judge/accuracy"),
        ("eval/diversity/vendi", "c_diversity/vendi"),
        ("eval/diversity/vendi_low", None),
        ("checkpoint/diversity/rke_high", None),
        ("eval/modes/red", "c_diversity/modes/red"),
        ("eval/modes/sky_low", "c_diversity/modes/sky_low"),  # a mode of that name, no end of an interval
        ("eval_ema/ode_log_prob/std", "d_entropy/ode_log_prob/std_ema"),
        ("train/loss", "e_training/loss"),
        ("updates", "e_training/updates"),
        ("seconds", "seconds"),
        ("checkpoint/entropy/nats", "checkpoint/entropy/nats"),
    ],
)
def test_a_metric_stands_in_its_section(metric: str, name: str | None) -> None:
    assert shown_as(metric) == name


def test_sections_sort_in_the_order_of_use() -> None:
    metrics = ["eval/reward/total", "eval/judge/accuracy", "eval/diversity/vendi", "eval/entropy/nats", "train/loss"]
    names = [str(shown_as(metric)) for metric in metrics] + [f"{SAMPLES}/eval"]
    assert names == sorted(names)


# --- captions and tables --------------------------------------------------------------------------------


def test_a_caption_says_reward_judge_and_prompt(tmp_path: Path) -> None:
    record = evaluation(tmp_path)
    assert [caption(record, i) for i in range(4)] == [
        "0.5000 | ✓ 0.90 | a bag",
        "0.2500 | ✓ 0.80 | a bag",
        "- | ✓ 0.70 | a boot",
        "0.7500 | ✗ a bag 0.10 | a boot",
    ]


def test_a_caption_of_what_was_not_measured_has_the_prompt() -> None:
    assert caption(Record("eval", 0, ["a\nbag"], [0], [0]), 0) == "- | a bag"


def test_the_table_has_a_row_for_each_image(tmp_path: Path) -> None:
    columns, rows = table_of(evaluation(tmp_path, 7))
    assert columns == [
        "epoch", "prompt", "noise", "reward total", "judge's guess", "judge is right", "judge's probability",
    ]  # fmt: skip
    assert rows[1] == [7, "a bag", 1, 0.25, "a bag", True, 0.8]
    assert rows[3] == [7, "a boot", 1, 0.75, "a bag", False, 0.1]


def test_captions_stand_under_their_own_images(tmp_path: Path) -> None:
    found = captioned(evaluation(tmp_path))
    assert [tile[..., 0].mean() / 255 * 4 for tile, _ in found] == pytest.approx([0, 1, 2, 3], abs=0.02)
    assert found[3][1].startswith("0.7500")


def test_a_sprite_that_is_damaged_leaves_the_table(tmp_path: Path) -> None:
    record = evaluation(tmp_path)
    assert record.sprite_path is not None
    record.sprite_path.write_bytes(b"RIFF")
    assert captioned(record) == []
    assert len(table_of(record)[1]) == 4


# --- descriptions ---------------------------------------------------------------------------------------


def test_a_description_has_method_tags_and_hyperparameters() -> None:
    config = {"use_reward_gradient": True, "pretrained.model": "hub/sd3", "reward_fn.a": 1.0, "reward_fn.b": 0.0}
    environment = {"device": "cpu", "batch_plan": {"images": 80}, "git": {"revision": "0123", "dirty": False}}
    described = Description("run", config | {"lora.rank": (1, 2)}, environment)
    assert described.method == "drtune"
    assert described.tags == ["drtune", "sd3", "a"]
    told = described.hyperparameters
    assert (told["device"], told["batch_plan.images"], told["git.revision"]) == ("cpu", 80, "0123")
    assert (told["git.dirty"], told["lora.rank"]) == (False, "(1, 2)")


# --- wandb ----------------------------------------------------------------------------------------------


def test_wandb_is_told_axes_summaries_group_and_kind(new_run: NewRun, offline: None) -> None:
    run = new_run(trackers=("wandb",), recipe="tiny_sd3")
    run.log({"train/reward": 0.25}, step=1)
    run.finish()
    told = OfflineRun(run.folder)
    assert (told.run.run_group, told.run.job_type, list(told.run.tags)) == ("tiny_sd3", "grpo", ["grpo", "tiny_sd3"])
    assert told.config["batch_plan.images"] == 80
    metrics = told.metrics
    assert all(metrics[axis].options.hidden for axis in ("epoch", "seconds", "network_evaluations"))
    assert {metric.step_metric for name, metric in metrics.items() if name.endswith("/*")} == {"epoch"}
    assert metrics["a_reward/*"].summary.max
    assert metrics["c_diversity/*"].summary.min
    assert not metrics["d_entropy/*"].summary.max


def test_every_row_of_wandb_has_all_axes_and_no_end_of_an_interval(new_run: NewRun, offline: None) -> None:
    run = new_run(trackers=("wandb",))
    run.log({"eval/diversity/vendi": 3.0, "eval/diversity/vendi_low": 2.5, "eval/reward/total": float("nan")}, step=4)
    run.finish()
    (row,) = OfflineRun(run.folder).rows
    assert (row["epoch"], row["seconds"], row["network_evaluations"]) == (4, 0, 0)
    assert {name for name in row if not name.startswith(("_", "e_"))} == {
        "epoch", "seconds", "network_evaluations", "c_diversity/vendi",
    }  # fmt: skip


def test_the_summary_has_the_evaluation_that_the_judge_likes_best_and_not_the_last(
    new_run: NewRun, offline: None
) -> None:
    run = new_run(trackers=("wandb",))
    for step, (reward, accuracy) in enumerate([(0.5, 0.7), (0.6, 0.9), (0.8, float("nan")), (0.9, 0.4)]):
        run.log({"eval/reward/total": reward, "eval/judge/accuracy": accuracy}, step=step)
    run.finish()
    summary = OfflineRun(run.folder).summary
    best = {name: value for name, value in summary.items() if name.startswith("best/")}
    assert best == {"best/epoch": 1, "best/score": 0.9, "best/reward_total": 0.6, "best/judge_accuracy": 0.9}
    assert summary["b_judge/accuracy"] == {"max": 0.9, "last": 0.4}
    assert summary["a_reward/total"]["max"] == 0.9


def test_wandb_gets_captioned_images_the_table_and_the_page(new_run: NewRun, offline: None) -> None:
    run = new_run(trackers=("wandb",))
    run.log_image("eval", np.zeros((4, 4, 3)), step=0)
    evaluation(run.folder)
    run.log_record(run.folder / "evaluations/eval_000000.json")
    (run.folder / "page.html").write_text("<p>the page")
    run.finish()
    told = OfflineRun(run.folder)
    image, record, page = told.rows
    assert image["samples/eval/_type"] == "image-file"
    assert record["samples/eval_images/captions"][0] == "0.5000 | ✓ 0.90 | a bag"
    assert (record["epoch"], record["seconds"], record["samples/eval_table/nrows"]) == (0, 1.5, 4)
    assert (told.path.parent / "files" / page["samples/page/path"]).read_text() == "<p>the page"


def test_a_run_that_never_began_is_not_shown(new_run: NewRun, offline: None) -> None:
    run = new_run(trackers=("wandb", "tensorboard"))
    with pytest.raises(ConfigError), run:
        raise ConfigError("the checkpoint does not fit the model")
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize(("error", "code"), [(TrainingStopped("nan"), 1), (ConfigError("no"), 2), (KeyError("x"), 1)])
def test_a_run_that_failed_is_not_left_running(new_run: NewRun, offline: None, error: Exception, code: int) -> None:
    run = new_run(trackers=("wandb",))
    run.log({"train/reward": 0.1}, step=1)
    with pytest.raises(type(error)), run:
        raise error
    assert OfflineRun(run.folder).exit_code == code


def test_a_run_that_goes_on_without_trackers_has_ended_there(
    new_run: NewRun, offline: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(trackers=("wandb", "tensorboard"))
    run.log({"train/reward": 0.1}, step=1)
    monkeypatch.setattr(TensorBoard, "log", full)
    for step in (2, 3):
        run.log({"train/reward": 0.2}, step=step)
    assert capsys.readouterr().err.count("a tracker cannot write (No space left on device)") == 1
    assert OfflineRun(run.folder).exit_code == 1
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def no_wandb_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_is_online_only_with_a_key(tmp_path: Path, no_wandb_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine example.org login user password secret\n")
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == "online"
    (tmp_path / "netrc").write_text("not a netrc file\n")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"
    for mode in ("disabled", "DISABLED"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(ConfigError, match="WANDB_MODE=off is not allowed; it takes online, offline"):
        wandb_mode()


def test_a_key_for_the_server_of_the_installed_wandb_is_found(tmp_path: Path, no_wandb_key: None) -> None:
    import wandb

    host = wandb.Settings().base_url.removeprefix("https://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
    assert wandb_mode() == "online"


def test_a_wandb_mode_that_is_none_is_refused_before_anything_is_written(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(ConfigError, match="WANDB_MODE=off"):
        new_run(trackers=("wandb",))
    assert not list(tmp_path.rglob("*.json"))


def test_wandb_without_a_key_runs_offline_and_asks_nothing(
    new_run: NewRun, no_wandb_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("wandb asked"))
    run = new_run(trackers=("wandb",))
    run.log({"train/reward": 0.25}, step=1)
    run.finish()
    assert OfflineRun(run.folder).rows[0]["a_reward/train"] == 0.25


def test_wandb_that_cannot_be_reached_leaves_the_run_offline_and_no_other(
    new_run: NewRun, no_wandb_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    started = wandb.init

    def init(mode: Any, **options: Any) -> Any:
        if mode == "online":
            (Path(options["dir"]) / f"wandb/run-20261126_115201-{options['id']}/files").mkdir(parents=True)
            raise wandb.errors.CommError("no route to host")
        return started(mode=mode, **options)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", init)
    run = new_run(trackers=("wandb", "tensorboard"))
    with pytest.warns(UserWarning, match=r"no route to host.*offline"):
        run.log({"train/reward": 0.25}, step=1)
    assert [tracker.name for tracker in run.accelerator.trackers] == ["wandb", "tensorboard"]
    run.finish()
    (only,) = (path for path in (run.folder / "wandb").glob("*run-*-*") if not path.is_symlink())
    assert only.name.startswith("offline-run-")


def test_a_wandb_that_cannot_even_start_offline_is_done_without(
    new_run: NewRun, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**options: Any) -> Any:
        raise wandb.errors.UsageError("no such project")

    monkeypatch.setattr(wandb, "init", init)
    run = new_run(trackers=("wandb", "tensorboard"))
    with pytest.warns(UserWarning, match=r"no such project.*goes on without wandb"):
        run.log({"train/reward": 0.25}, step=1)
    assert [tracker.name for tracker in run.accelerator.trackers] == ["tensorboard"]


def test_a_tracker_that_is_not_installed_is_left_out(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="'tensorboard' is not installed"):
        run = new_run(trackers=("tensorboard",))
    run.log({"train/reward": 0.25}, step=1)
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 1


# --- tensorboard ----------------------------------------------------------------------------------------


def test_tensorboard_receives_what_is_logged_in_the_same_sections(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    run.log({"train/reward": 0.25, "eval/diversity/vendi_low": 1.0}, step=4)
    run.log_image("eval", np.zeros((4, 4, 3)), step=4)
    run.finish()
    assert points(run.folder, "a_reward/train") == [(4, 0.25)]
    found = events(run.folder)
    assert found.Images("samples/eval")[0].step == 4
    assert not any("low" in tag for tag in found.Tags()["scalars"])


def train(run: Run, first: int, last: int, value: float) -> None:
    """Epochs of a run that is evaluated after every one."""
    for step in range(first, last + 1):
        run.log({"train/reward": value}, step=step)
        run.log_image("eval", np.full((2, 2, 3), value), step)
        run.log({"eval/reward/total": value}, step=step)


def test_a_run_stopped_at_8_that_goes_on_from_5_shows_every_point_once(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    train(run, 1, 8, 0.25)
    finished_checkpoint(run.folder, 5)
    run.finish()
    again = new_run(trackers=("tensorboard",), resume_from=str(run.folder))
    again.truncate_history(5, evaluation_redone=False)
    train(again, 6, 7, 0.5)
    again.finish()
    assert len(list((run.folder / "tensorboard").glob("events*"))) == 2
    expected = [(step, 0.25 if step <= 5 else 0.5) for step in range(1, 8)]
    assert points(run.folder, "a_reward/train") == expected
    assert points(run.folder, "a_reward/total") == expected
    assert points(run.folder, "seconds") == [(step, 0) for step in range(1, 8)]
    assert [event.step for event in events(run.folder).Images("samples/eval")] == list(range(1, 8))


def test_an_evaluation_that_is_done_again_is_shown_once_and_its_epoch_stays(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    train(run, 1, 5, 0.25)
    finished_checkpoint(run.folder, 5)
    state = {"weights": {}, "counters": Counters(epoch=5).state_dict(), "evaluated": False}
    (run.folder / "checkpoints/checkpoint-000005/state.json").write_text(json.dumps(state))
    run.finish()
    again = new_run(trackers=("tensorboard",), resume_from=str(run.folder))
    again.truncate_history(5)
    again.log_image("eval", np.ones((2, 2, 3)), 5)
    again.log({"eval/reward/total": 0.5}, step=5)
    again.finish()
    assert points(run.folder, "a_reward/train") == [(step, 0.25) for step in range(1, 6)]
    assert points(run.folder, "a_reward/total") == [(1, 0.25), (2, 0.25), (3, 0.25), (4, 0.25), (5, 0.5)]
    assert [event.step for event in events(run.folder).Images("samples/eval")] == [1, 2, 3, 4, 5]


def test_tensorboard_shows_one_run_for_all_sessions(new_run: NewRun) -> None:
    run = new_run(trackers=("tensorboard",))
    run.log({"train/reward": 0.1}, step=1)
    finished_checkpoint(run.folder, 1)
    run.finish()
    again = new_run(trackers=("tensorboard",), resume_from=str(run.folder))
    again.log({"train/reward": 0.2}, step=2)
    again.finish()
    assert not [path for path in (run.folder / "tensorboard").iterdir() if path.is_dir()]
