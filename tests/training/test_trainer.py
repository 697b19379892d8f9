"""The loop around an epoch: which checkpoints it writes, and by what the best is chosen."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from flow_grpo.diversity.paired import Change
from flow_grpo.errors import ConfigError, Interrupted, TrainingStopped
from flow_grpo.evaluators.diversity import build_diversity_evaluators
from flow_grpo.evaluators.evaluation import sample_evaluators
from flow_grpo.runs.evaluations import read_record, records_of
from flow_grpo.runs.history import read_history
from flow_grpo.runs.record import Record
from flow_grpo.runs.stopping import Reason
from flow_grpo.training import checkpoint, trainer
from flow_grpo.training.trainer import fit, score_of
from flow_grpo.training.words import ends, evaluation
from tests.guard_worker import Scripted
from tests.test_processes import run_worker


def train(parts, updates, evaluators=(), due=True):
    """Epochs that apply so many updates each; fit, and the names of the checkpoints."""
    applied = iter(updates)

    def train_epoch(policy, prompts, reward, settings, run):
        count = next(applied)
        run.counters.updates += count
        policy.skipped_in_a_row = 0 if count else policy.skipped_in_a_row + 1
        with torch.no_grad():
            policy.trainable[0] += count
            policy.trainable[1] += 0.05 * count  # LoRA's B, without which A is nothing
        return {"reward": 0.0}

    fit(
        parts.policy,
        train_epoch,
        parts.prompts,
        parts.prompts,
        parts.reward,
        evaluators,
        parts.settings,
        parts.run,
        due,
    )
    return sorted(path.name for path in (parts.run.folder / "checkpoints").iterdir())


def name(epoch):
    return f"checkpoint-{epoch:06d}"


def test_a_last_epoch_whose_updates_were_skipped_is_saved(config, build):
    config.num_epochs, config.save_freq = 5, 10
    assert train(build(config), [1, 1, 1, 1, 0]) == [name(5)]


def test_an_epoch_with_one_update_skipped_is_saved_as_any_other(config, build):
    config.num_epochs, config.save_freq = 2, 1
    parts = build(config)
    parts.policy.skipped_in_a_row = 1
    assert train(parts, [1, 1]) == [name(1), name(2)]


def test_epochs_without_an_update_are_not_saved_again_before_the_last(config, build):
    config.num_epochs, config.save_freq = 5, 1
    assert train(build(config), [1, 0, 0, 1, 0]) == [name(1), name(4), name(5)]


def failing(monkeypatch, times):
    """The disk is full the first so many times."""
    left, export = iter(range(times)), checkpoint.export

    def sometimes(*arguments):
        if next(left, None) is not None:
            raise OSError(28, "No space left on device")
        export(*arguments)

    monkeypatch.setattr(checkpoint, "export", sometimes)


def test_a_checkpoint_that_could_not_be_written_is_tried_again_after_every_epoch(config, build, monkeypatch):
    config.num_epochs, config.save_freq = 7, 3
    failing(monkeypatch, 2)
    assert train(build(config), [1] * 7) == [name(5), name(6), name(7)]


def test_a_last_checkpoint_that_cannot_be_written_is_one_sentence(config, build, monkeypatch):
    config.num_epochs, config.save_freq = 2, 1
    parts = build(config)
    failing(monkeypatch, 10**9)
    with pytest.raises(TrainingStopped, match="the last checkpoint could not be written; what was saved"):
        train(parts, [1, 1])


METRICS = {
    "eval/reward/total": 9.0,
    "eval/reward/pickscore": 9.0,
    "eval/reward/clipscore": 3.0,
    "eval/judge/accuracy": 0.5,
}


@pytest.mark.parametrize(
    ("judge", "measured", "expected"),
    [
        (True, ("clipscore",), ("eval/judge/accuracy", 0.5)),
        (False, ("pickscore", "clipscore"), ("eval/reward/clipscore", 3.0)),
    ],
)
def test_the_best_is_chosen_by_judge_then_held_out_reward(config, build, judge, measured, expected):
    config.eval.rewards, config.reward_model.clipscore = measured, config.eval.judge
    if not judge:
        config.eval.judge = config.eval.modes = ""
    found = score_of(METRICS, build(config).settings, "eval")
    assert (found.metric, found.value) == expected


@pytest.mark.parametrize("measured", [(), ("pickscore",), ("clipscore",)])
def test_what_is_trained_on_decides_nothing_under_any_name(config, build, measured):
    """In this configuration CLIPScore has the model of PickScore, which is trained on; so is the judge made to."""
    config.eval.rewards = measured
    for judge in ("", config.reward_model.pickscore):
        config.eval.judge, config.eval.modes = judge, ""
        assert score_of(METRICS, build(config).settings, "eval") is None


def test_a_reward_of_the_gate_decides_nothing_nor_does_a_judge_of_its_model(config, build):
    config.reward_model.clipscore, config.eval.rewards, config.train.beta = config.eval.judge, ("clipscore",), 0.1
    config.shaping.gate_share, config.shaping.gate_rewards = 0.1, ("clipscore",)
    assert score_of(METRICS, build(config).settings, "eval") is None


def test_without_a_held_out_metric_no_checkpoint_is_the_best_and_the_run_says_so(evaluated, build, capsys):
    evaluated.eval.judge = evaluated.eval.modes = ""
    folder = train_evaluated(evaluated, build, [1, 1]).run.folder
    assert capsys.readouterr().err.count("no best checkpoint is chosen, the latest are kept") == 1
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/state.json")]
    assert [(state["best"], state["score"], state["score_of"]) for state in states] == [(None, None, None)] * 2


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_was_not_measured_or_is_not_finite_is_no_score(config, build, value):
    metrics = METRICS | {"eval/judge/accuracy": value}
    assert score_of(metrics, build(config).settings, "eval") is None


@pytest.mark.parametrize(("epochs", "total"), [(2, 2), (10**6, None)])
def test_the_bar_has_an_end_unless_the_clock_alone_says_it(config, build, monkeypatch, epochs, total):
    """A limit of time beside a number of epochs is a limit, not the budget."""
    config.num_epochs, config.max_seconds, config.save_freq = epochs, 1e-9 if total is None else 1e6, 1
    parts, totals = build(config), []
    made = parts.run.progress

    def progress(*arguments, **options):
        bar = made(*arguments, **options)
        if options.get("leave"):
            bar.set_postfix = lambda **_: totals.append(bar.total)
        return bar

    monkeypatch.setattr(parts.run, "progress", progress)
    train(parts, [1] * 2)
    assert set(totals) == {total}


# --- what is said, and the page --------------------------------------------------------------------------


@pytest.fixture
def evaluated(config):
    """Evaluated after every epoch, with a checkpoint of each."""
    config.eval_freq = config.eval_diversity_freq = config.save_freq = 1
    config.eval_diversity, config.num_checkpoint_limit, config.num_epochs = True, 0, 2
    config.eval.ema = False
    return config


def train_evaluated(config, build, updates):
    """`train` with rewards, judge and diversity; the parts. Goes on where config.resume_from says so."""
    parts, device = build(config), torch.device("cpu")
    evaluators = sample_evaluators(parts.reward, parts.settings, device)
    evaluators += build_diversity_evaluators(parts.settings, parts.run, device)
    due = checkpoint.resume(parts.policy, parts.run, parts.settings)
    train(parts, updates, evaluators, due)
    return parts


def test_it_says_where_it_writes_what_each_evaluation_found_and_where_the_page_is(evaluated, build, capsys):
    folder = train_evaluated(evaluated, build, [1, 1]).run.folder
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in said if "%|" not in line and "it/s" not in line]
    assert f"{folder}: 8 images an epoch; watch {folder / 'page.html'}" in lines
    assert sum(line.startswith("base model: reward ") for line in lines) == 1
    assert sum(line.startswith(("epoch 1, 0 s: reward ", "epoch 2, 0 s: reward ")) for line in lines) == 2
    assert ends(folder, 2) == f"done: epoch 2; the page is {folder / 'page.html'}"


CHANGE = Change(0.5, 0.53125, 0.03125, 0.03, 0.0325)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({}, ""),
        ({"rewards": {"total": [0.25, None, 0.75]}}, "epoch 10, 3 s: reward 0.5000"),
        (
            {"rewards": {"total": [0.53125] * 3}, "changes": {"reward": CHANGE}},
            "epoch 10, 3 s: reward 0.5312 (+0.0312 ± 0.0013)",
        ),
        ({"epoch": 0, "rewards": {"total": [0.5] * 3}}, "base model: reward 0.5000"),
    ],
)  # fmt: skip
def test_an_evaluations_line_has_what_was_measured(found, line):
    plain = {"label": "eval", "epoch": 10, "prompts": ["a"], "prompt": [0] * 3, "noise": [0, 1, 2], "seconds": 3.2}
    assert evaluation(Record(**plain | found)) == line


def test_the_page_is_live_until_the_end_and_its_building_is_no_training(evaluated, build, monkeypatch):
    built = []

    def build_page(folders, out, command="", live=False, label="eval"):
        built.append((folders, out, live))

    monkeypatch.setattr(trainer, "build_page", build_page)
    run = train_evaluated(evaluated, build, [1, 1]).run
    assert built == [([run.folder], run.folder / "page.html", live) for live in (True, True, False)]


def test_the_page_of_a_training_that_cannot_go_on_is_no_longer_live(evaluated, build, monkeypatch):
    live = []
    monkeypatch.setattr(trainer, "build_page", lambda *_, **words: live.append(words["live"]))
    failing(monkeypatch, 10**9)
    with pytest.raises(TrainingStopped):
        train_evaluated(evaluated, build, [1, 1])
    assert live == [True, True, False]


def test_the_page_of_an_evaluation_that_fails_is_no_longer_live(evaluated, build, monkeypatch):
    live = []
    monkeypatch.setattr(trainer, "build_page", lambda *_, **words: live.append(words["live"]))
    evaluate = trainer.evaluate_weights

    def fail(policy, prompts, evaluators, settings, run):
        if run.counters.epoch:
            raise ConfigError("these images cannot be measured.")
        return evaluate(policy, prompts, evaluators, settings, run)

    monkeypatch.setattr(trainer, "evaluate_weights", fail)
    with pytest.raises(ConfigError, match="cannot be measured"):
        train_evaluated(evaluated, build, [1, 1])
    assert live == [True, False]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ConfigError("it cannot be written.")])
def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(evaluated, build, monkeypatch, capsys, error):
    def build_page(*_, **__):
        raise error

    monkeypatch.setattr(trainer, "build_page", build_page)
    run = train_evaluated(evaluated, build, [1, 1]).run
    said = capsys.readouterr().err
    assert said.count("no page of") == 1
    assert ends(run.folder, 2) == f"done: epoch 2, in {run.folder}"


def test_another_error_of_the_page_is_not_hidden(evaluated, build, monkeypatch):
    monkeypatch.setattr(trainer, "build_page", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_evaluated(evaluated, build, [1, 1])


def test_an_epoch_whose_rewards_teach_nothing_is_told_of_once(config, build, capsys):
    parts, shares = build(config), iter((0.5, 1.0, 1.0))

    def train_epoch(*_):
        return {"reward": 0.0, "zero_std_fraction": next(shares)}

    for _ in range(3):
        trainer._one_epoch(parts.policy, train_epoch, parts.prompts, parts.reward, parts.settings, parts.run)
    said = capsys.readouterr().err
    assert "epoch 2: the images of each prompt all have the same reward" in said
    assert said.count("the same reward") == 1


def test_ctrl_c_is_one_sentence_that_says_how_to_go_on():
    reason = next(reason for reason in Reason if reason.name == "SIGINT")
    assert str(Interrupted(reason, "after epoch 40, checkpoint 40 is whole")) == (
        "stopped after epoch 40, checkpoint 40 is whole."
    )


# --- records of a run that goes on -----------------------------------------------------------------------


def untimed(run):
    plain = [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]
    return [{key: value for key, value in one.items() if key not in ("seconds", "sha256")} for one in plain]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_writes_later_records_anew(evaluated, build):
    unbroken = train_evaluated(evaluated, build, [1, 2]).run.folder
    evaluated.run_name = "broken"
    folder = train_evaluated(evaluated, build, [1, 5]).run.folder
    other = untimed(folder)
    evaluated.resume_from, evaluated.num_epochs = str(folder / "checkpoints/checkpoint-000001"), 2
    train_evaluated(evaluated, build, [2])
    assert untimed(folder) == untimed(unbroken) != other
    sprites = [sorted(path.read_bytes() for path in (run / "evaluations").glob("*.webp")) for run in (folder, unbroken)]
    assert sprites[0] == sprites[1]


def test_later_records_and_their_images_go_when_a_run_goes_back(evaluated, build):
    folder = train_evaluated(evaluated, build, [1, 2]).run.folder
    evaluated.resume_from, evaluated.num_epochs = str(folder / "checkpoints/checkpoint-000001"), 2
    parts = build(evaluated)
    checkpoint.resume(parts.policy, parts.run, parts.settings)
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        "base_features.safetensors", "eval_000000.json", "eval_000000.webp", "eval_000001.json", "eval_000001.webp",
    }  # fmt: skip


def test_a_run_that_branches_off_is_compared_with_the_same_base(evaluated, build):
    unbroken = train_evaluated(evaluated, build, [1, 2]).run.folder
    evaluated.resume_from, evaluated.run_name = str(unbroken / "checkpoints/checkpoint-000001"), "branch"
    folder = train_evaluated(evaluated, build, [2]).run.folder
    assert [record.epoch for record in records_of(folder)] == [0, 2]
    ours, theirs = (read_record(run / "evaluations/eval_000002.json") for run in (folder, unbroken))
    assert ours.changes == theirs.changes
    assert ours.diversity == theirs.diversity


def test_lost_base_features_are_told_and_the_run_goes_on_without(evaluated, build, capsys):
    folder = train_evaluated(evaluated, build, [1, 2]).run.folder
    path = folder / "evaluations/base_features.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    evaluated.resume_from, evaluated.num_epochs = str(folder), 3
    train_evaluated(evaluated, build, [1])
    said = capsys.readouterr().err
    assert said.count("base_features.safetensors is damaged") == 1
    assert path.with_name("base_features.safetensors.damaged").is_file()
    assert set(records_of(folder)[-1].changes) == {"reward", "judge", "vendi"}


# --- guards ---------------------------------------------------------------------------------------------


def train_scripted(config, build, values, metric="judge/accuracy"):
    """Trained up to the epoch of the last value of the metric; goes on where config.resume_from says so."""
    config.num_epochs = len(values) - 1
    parts = build(config)
    due = checkpoint.resume(parts.policy, parts.run, parts.settings)
    train(parts, [1] * config.num_epochs, [Scripted(parts.run, metric, values)], due)
    return parts


@pytest.fixture
def guarded(evaluated):
    evaluated.eval_diversity, evaluated.save_freq = False, 10
    evaluated.guard.patience = 2
    return evaluated


def test_a_guard_ends_a_run_as_its_last_epoch_does(guarded, build, capsys):
    run = train_scripted(guarded, build, [0.5, 0.8, 0.7, 0.8, 0.9]).run
    assert run.counters.epoch == 3
    saved = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert saved == [name(1), name(3)]  # the best, whatever save_freq, and the last
    assert read_history(run.folder / "metrics.jsonl")[-1]["eval/judge/accuracy"] == 0.8
    why = (
        "eval/judge/accuracy 0.8000 is no better than 0.8000 of epoch 1 (evaluations since then: 2; guard.patience = 2)"
    )
    best = run.folder / "checkpoints" / name(3)  # of equals the newest
    assert capsys.readouterr().err.count(f"ended early, after epoch 3: {why}; the best checkpoint is {best}") == 1
    page = (run.folder / "page.html").read_text()
    assert f"run was ended early, after epoch 3: {why}." in page
    assert '"refresh":0' in page.replace(" ", "")  # no longer live


def test_without_a_guard_the_same_run_goes_on_and_saves_as_often_as_it_was_told(guarded, build):
    guarded.guard.patience = 0
    run = train_scripted(guarded, build, [0.5, 0.8, 0.7, 0.8, 0.9]).run
    assert run.counters.epoch == 4
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == [name(4)]


def test_a_guard_that_ends_a_run_worse_than_its_base_calls_no_checkpoint_the_best(guarded, build, capsys):
    train_scripted(guarded, build, [0.8, 0.5, 0.7, 0.6])
    assert "; no checkpoint is better than the base model, 0.8000" in capsys.readouterr().err


def test_weights_below_the_floor_of_diversity_are_not_the_best(evaluated, build):
    evaluated.guard.diversity_floor, evaluated.save_freq = 0.75, 1
    evaluated.num_epochs = 2
    parts = build(evaluated)
    judge = Scripted(parts.run, "judge/accuracy", [0.5, 0.6, 0.9])
    train(parts, [1, 1], [judge, Scripted(parts.run, "diversity/vendi", [4.0, 3.1, 2.9])])
    assert parts.run.counters.epoch == 2
    assert checkpoint.best_checkpoint(parts.run).name == name(1)


def test_a_run_that_a_guard_ended_goes_on_only_when_the_guard_is_changed(guarded, build):
    accuracies = [0.5, 0.8, 0.7, 0.8, 0.9, 0.8]
    folder = train_scripted(guarded, build, accuracies).run.folder
    guarded.resume_from = str(folder)
    with pytest.raises(ConfigError, match=r"was ended early: eval/judge/accuracy .* change config.guard.patience"):
        build(guarded)
    guarded.guard.patience = 3
    assert train_scripted(guarded, build, accuracies).run.counters.epoch == 5


def test_a_run_that_goes_on_is_ended_where_an_unbroken_one_is(guarded, build):
    accuracies = [0.5, 0.8, 0.7, 0.8, 0.9, 0.8]
    guarded.save_freq = 1
    folder = train_scripted(guarded, build, accuracies[:3]).run.folder
    guarded.resume_from = str(folder)
    assert train_scripted(guarded, build, accuracies).run.counters.epoch == 3


def test_a_run_that_branches_off_begins_its_guards_anew(guarded, build):
    accuracies = [0.5, 0.8, 0.7, 0.8, 0.7, 0.7, 0.7]
    guarded.resume_from = str(train_scripted(guarded, build, accuracies).run.folder)
    guarded.run_name = "branch"
    assert train_scripted(guarded, build, accuracies).run.counters.epoch == 6  # 4 is its first evaluation


def test_a_diversity_floor_is_a_share_of_what_the_base_of_the_run_has(evaluated, build, capsys):
    evaluated.guard.diversity_floor = 0.75
    run = train_scripted(evaluated, build, [4.0, 3.1, 2.9, 2.8], "diversity/vendi").run
    assert run.counters.epoch == 2
    assert "eval/diversity/vendi 2.9000 is below 3.0000, the base's 4.0000 times" in capsys.readouterr().err


def test_two_processes_end_together(random_models, tmp_path):
    """The second process has measured nothing: it is told."""
    out = run_worker(2, "tests/guard_worker.py", random_models, tmp_path / "out")
    assert sorted(path.read_text() for path in tmp_path.glob("out-process*")) == ["3", "3"]
    assert "ended early, after epoch 3" in out.read_text()


def test_a_floor_of_a_base_that_is_not_known_is_told_once(evaluated, build, monkeypatch, capsys):
    evaluated.guard.diversity_floor = 0.9
    monkeypatch.setattr(trainer, "base_diversity", lambda *_: None)
    train_evaluated(evaluated, build, [0, 0])
    assert capsys.readouterr().err.count("the base model's vendi is not known") == 1
