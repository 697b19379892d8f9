"""The runner trains each run of the study once, and goes on with what was cut short."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from config.grpo import RECIPES
from flow_grpo.errors import ConfigError
from flow_grpo.runs.lock import RunLock
from scripts.study import run
from scripts.study.run import ROOT, State, main, state_of, train_all
from scripts.study.testbeds import StudyRun

# stands in for scripts/train/train_sd3.py: reads the same command line, leaves a finished folder; seed 13 fails, and
# seed 7 is cut short halfway the first time
FAKE_TRAINER = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from flow_grpo.commands.cli import parse_config
config = parse_config(sys.argv, "")
folder = Path(config.logdir) / config.run_name
with (Path(config.logdir) / "calls.txt").open("a") as calls:
    print(config.run_name, bool(config.resume_from), file=calls)
if config.seed == 13:
    raise SystemExit("out of luck")
part = 0.5 if config.seed == 7 and not config.resume_from else 1
counters = dict(epoch=int(part * config.num_epochs), seconds=1000.0)
checkpoint = folder / "checkpoints" / f"checkpoint-{{counters['epoch']:06d}}"
checkpoint.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config.to_dict()))
state = dict(weights=dict(), counters=counters)
(checkpoint / "state.json").write_text(json.dumps(state))
(checkpoint / "training_state.pt").write_bytes(b"")
"""


# --- the runner -----------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE_TRAINER.format(root=str(ROOT)))
    monkeypatch.setattr(run, "TRAIN_SCRIPT", script)
    return script


def planned(*seeds: int) -> list[StudyRun]:
    return [StudyRun("tiny", "cfm", "tiny_sd3_cfm", seed, 5, {"num_epochs": 10, "train.beta": 0.1}) for seed in seeds]


def calls(out: Path) -> list[list[str]]:
    return sorted(line.split() for line in (out / "calls.txt").read_text().splitlines())


def test_what_is_done_is_not_trained_again_and_what_was_cut_short_goes_on(trainer: Path, tmp_path: Path) -> None:
    out, runs = tmp_path / "logs", planned(1, 7)
    assert [state_of(one, out) for one in runs] == [State.NEW, State.NEW]
    assert train_all(runs, out, jobs=2) == []
    assert [state_of(one, out) for one in runs] == [State.DONE, State.BEGUN]
    assert train_all(runs, out, jobs=2) == []
    assert [state_of(one, out) for one in runs] == [State.DONE, State.DONE]
    assert train_all(runs, out, jobs=2) == []
    assert calls(out) == [[runs[0].name, "False"], [runs[1].name, "False"], [runs[1].name, "True"]]


def test_a_failing_run_is_named_and_the_others_go_on(
    trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, runs = tmp_path / "logs", planned(13, 1)
    monkeypatch.setattr(run, "planned", lambda quick: runs)
    assert main(["--logs", str(out), "--jobs", "1"]) == 1
    assert f"error: {runs[0].name} failed" in capsys.readouterr().err
    assert [state_of(one, out) for one in runs] == [State.NEW, State.DONE]
    assert "out of luck" in (out / f"{runs[0].name}.log").read_text()


def test_a_run_with_other_settings_is_not_this_one(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    train_all([one], out, jobs=1)
    assert state_of(one, out) is State.DONE
    other = replace(one, overrides={**one.overrides, "train.beta": 0.2})
    assert state_of(other, out) is State.NEW
    assert state_of(replace(one, recipe="tiny_sd3"), out) is State.NEW
    assert state_of(replace(one, overrides={**one.overrides, "num_epochs": 20}), out) is State.NEW
    leftover = out / one.name / "leftover"
    leftover.write_text("of the earlier settings")
    train_all([other], out, jobs=1)
    assert not leftover.exists()
    assert json.loads((out / one.name / "config.json").read_text())["train"]["beta"] == 0.2


def test_a_run_with_an_override_that_the_plan_no_longer_has_is_not_this_one(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    before = replace(one, overrides={**one.overrides, "train.clip_range": 0.5})
    train_all([before], out, jobs=1)
    assert (state_of(before, out), state_of(one, out)) == (State.DONE, State.NEW)


@pytest.mark.parametrize("key", ["train.clip_range", "lora.target_modules"])
def test_a_run_of_a_recipe_that_changed_is_not_this_one(
    key: str, trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    train_all([one], out, jobs=1)
    assert state_of(one, out) is State.DONE
    values = {"train.clip_range": 0.5, "lora.target_modules": ("attn.to_q",)}
    changed = {key: values[key]}
    monkeypatch.setitem(RECIPES, one.recipe, lambda config: config.update_from_flattened_dict(changed))
    assert state_of(one, out) is State.NEW


def test_where_a_run_lies_and_how_it_is_reported_make_no_other_run_of_it(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    train_all([one], out, jobs=1)
    file = out / one.name / "config.json"
    elsewhere = {"logdir": "/elsewhere", "run_name": "x", "trackers": ["wandb"], "project": "x", "resume_from": "x"}
    file.write_text(json.dumps(json.loads(file.read_text()) | elsewhere))
    assert state_of(one, out) is State.DONE


def test_a_run_of_other_settings_is_moved_aside_and_never_while_it_is_written(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    train_all([one], out, jobs=1)
    before = (out / one.name / "config.json").read_bytes()
    other = replace(one, overrides={**one.overrides, "train.beta": 0.7})
    lock = RunLock(out / one.name)
    with pytest.raises(ConfigError, match="is being written by process"):
        train_all([other], out, jobs=1)
    lock.release()
    assert train_all([other], out, jobs=1) == []
    assert (out / f"{one.name}.earlier" / "config.json").read_bytes() == before


@pytest.mark.parametrize("file", ["config.json", "checkpoints/checkpoint-000010/state.json"])
def test_a_damaged_folder_is_named_in_one_sentence_and_nothing_is_lost(
    file: str, trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, (done, begun, new) = tmp_path / "logs", planned(1, 7, 2)
    train_all([done, begun], out, jobs=1)
    torn = out / done.name / file
    torn.write_text(torn.read_text()[:-9])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(run, "planned", lambda quick: [begun, done, new])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--logs", str(out)])
    assert ended.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"{torn} is not JSON" in sentence
    assert sentence.endswith(f"; move {out / done.name} away to train this run again.")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / done.name)
    assert main(["--logs", str(out)]) == 0
    assert [state_of(one, out) for one in (done, begun, new)] == [State.DONE] * 3
    assert [begun.name, "True"] in calls(out)


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_a_number_of_jobs_below_one_is_refused(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--jobs", jobs])
    assert ended.value.code == 2
    assert f"--jobs {jobs} is not allowed; it takes a whole number from 1 on" in capsys.readouterr().err


def test_runs_can_be_chosen_by_part_of_their_name_and_a_misspelt_one_is_refused(
    trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(run, "train_all", lambda runs, out, jobs: trained.extend(one.name for one in runs) or [])
    assert main(["--only", "tiny-grpo, scenes-nft-seed2", "--logs", str(tmp_path)]) == 0
    assert trained == [*(f"tiny-grpo-seed{seed}" for seed in range(5)), "scenes-nft-seed2"]
    with pytest.raises(SystemExit) as ended:
        main(["--only", "scenes-nft,scenes-ntf"])
    assert ended.value.code == 2
    assert "--only scenes-ntf: no run has such a name; tiny-grpo-seed0 is one." in capsys.readouterr().err
