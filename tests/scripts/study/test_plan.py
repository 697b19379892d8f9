"""The study's runs can be trained as they are listed, and the runner trains each of them once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from config.grpo import RECIPES, get_config
from flow_grpo.commands.cli import parse_config
from flow_grpo.errors import ConfigError
from flow_grpo.runs.lock import RunLock
from flow_grpo.settings import resolve
from scripts.study import plan, run
from scripts.study.plan import StudyRun
from scripts.study.records import NOT_MEASURE
from scripts.study.run import ROOT, State, command, main, state_of, train_all

RUNS = [*plan.whole(), *plan.quick()]

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
by_time = config.max_seconds > 0
counters = dict(epoch=10 if by_time else int(part * config.num_epochs))
counters["seconds"] = part * config.max_seconds if by_time else 1000.0
checkpoint = folder / "checkpoints" / f"checkpoint-{{counters['epoch']:06d}}"
checkpoint.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config.to_dict()))
state = dict(weights=dict(), counters=counters)
(checkpoint / "state.json").write_text(json.dumps(state))
(checkpoint / "training_state.pt").write_bytes(b"")
"""


# --- the plan -------------------------------------------------------------------------------------------


def test_names_are_unique_and_fit_for_folders() -> None:
    names = [one.name for one in RUNS]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)
    assert all(name.startswith(f"{one.group}-") for name, one in zip(names, RUNS, strict=True))


def one_seed_each() -> list[StudyRun]:
    return list({(one.group, one.label): one for one in RUNS}.values())


@pytest.mark.parametrize("one", one_seed_each(), ids=lambda one: f"{one.group} {one.label}")
def test_every_command_is_a_recipe_with_the_listed_changes(
    one: StudyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = parse_config(command(one, tmp_path, State.NEW)[1:], "")
    resolve(config, num_processes=1, cuda=False)
    recipe = get_config(one.recipe)
    recipe.update_from_flattened_dict(one.settings | {"logdir": str(tmp_path), "run_name": one.name, "trackers": ()})
    assert config.to_dict() == recipe.to_dict()
    assert (config.max_seconds, config.seed) == (one.seconds, one.seed)


def test_runs_are_evaluated_alike() -> None:
    """What decides the measure is in no run's own changes; frequencies may differ."""
    measure = ("eval.", "reward_fn.", "reward_model.", "prompts.", "diversity.", "entropy.", "num_seeds", "resolution")
    for one in RUNS:
        assert not [key for key in one.overrides if key.startswith(measure) and key not in NOT_MEASURE], one.name


def test_the_claims_have_five_seeds_of_both_methods_and_differ_in_the_method_alone() -> None:
    claims = [one for one in plan.whole() if one.group == "claims"]
    seeds = Counter(one.label for one in claims)
    assert seeds.keys() == {"DRTune", "GRPO"}
    assert min(seeds.values()) >= 5
    assert len({one.seconds for one in claims}) == 1
    tuned_on = {one.seed for one in plan.whole() if one.group == "search"}
    assert not tuned_on & {one.seed for one in claims}


def test_the_ratios_share_everything_but_the_ratio() -> None:
    ratios = [one for one in plan.whole() if one.group == "ratio"]
    forms = {one.overrides["train.ratio"] for one in ratios}
    assert forms == {"sde", "ode_step", "ode_path", "cfm"}
    own = ("train.ratio", "train.ratio_probes", "seed")
    shared = [
        {key: value for key, value in one.settings.items() if key not in own and not key.endswith("_freq")}
        for one in ratios
    ]
    assert all(settings == shared[0] for settings in shared)
    assert {(one.recipe, one.seconds, one.settings["num_epochs"]) for one in ratios} == {
        ("tiny_sd3", 0.0, plan.RATIO_EPOCHS)
    }


def test_quick_runs_are_short_claims_of_seeds_of_their_own() -> None:
    quick = plan.quick()
    assert {one.group for one in quick} == {"quick"}
    assert Counter(one.label for one in quick) == {"DRTune": 2, "GRPO": 2}
    assert sum(one.seconds for one in quick) <= 300
    for one in quick:
        claims = {claim.label: claim for claim in plan.claims([one.seed], plan.SECONDS)}
        assert replace(one, group="claims", seconds=plan.SECONDS) == claims[one.label]
    seen = {one.seed for one in plan.whole() if one.group in ("claims", "search")}
    assert not seen & {one.seed for one in quick}


# --- the runner -----------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE_TRAINER.format(root=str(ROOT)))
    monkeypatch.setattr(run, "TRAIN_SCRIPT", script)
    return script


def planned(*seeds: int) -> list[StudyRun]:
    return [StudyRun("ratio", "cfm 10", "tiny_sd3_cfm", seed, 20.0, 5, {"train.beta": 0.1}) for seed in seeds]


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
    monkeypatch.setattr(plan, "whole", lambda: runs)
    assert main(["--out", str(out), "--jobs", "1"]) == 1
    assert f"error: {runs[0].name} failed" in capsys.readouterr().err
    assert [state_of(one, out) for one in runs] == [State.NEW, State.DONE]
    assert "out of luck" in (out / f"{runs[0].name}.log").read_text()


def test_a_run_with_other_settings_is_not_this_one(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(1)
    train_all([one], out, jobs=1)
    assert state_of(one, out) is State.DONE
    assert state_of(replace(one, overrides={"train.beta": 0.2}), out) is State.NEW
    assert state_of(replace(one, recipe="tiny_sd3"), out) is State.NEW
    assert state_of(replace(one, seconds=30.0), out) is State.NEW
    leftover = out / one.name / "leftover"
    leftover.write_text("of the earlier settings")
    train_all([replace(one, overrides={"train.beta": 0.2})], out, jobs=1)
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


def test_a_run_without_a_time_limit_is_done_by_its_epochs(trainer: Path, tmp_path: Path) -> None:
    out, (one,) = tmp_path / "logs", planned(7)
    one = replace(one, seconds=0.0, overrides={**one.overrides, "num_epochs": 30})
    states = []
    for _ in range(3):
        states.append(state_of(one, out))
        assert train_all([one], out, jobs=1) == []
    assert states == [State.NEW, State.BEGUN, State.DONE]
    assert calls(out) == [[one.name, "False"], [one.name, "True"]]
    longer = replace(one, overrides={**one.overrides, "num_epochs": 60})
    assert state_of(longer, out) is State.NEW


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
    monkeypatch.setattr(plan, "whole", lambda: [begun, done, new])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(out)])
    assert ended.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"{torn} is not JSON" in sentence
    assert sentence.endswith(f"; move {out / done.name} away to train this run again.")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / done.name)
    assert main(["--out", str(out)]) == 0
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
    monkeypatch.setattr(run, "train_all", lambda runs, out, jobs: trained.extend(one.label for one in runs) or [])
    assert main(["--only", "claims, drtune-beta-1-", "--out", str(tmp_path)]) == 0
    assert set(trained) == {"DRTune", "GRPO", "DRTune beta 1"}
    with pytest.raises(SystemExit):
        main(["--only", "claimed"])
    assert "--only claimed: no run has such a name" in capsys.readouterr().err
