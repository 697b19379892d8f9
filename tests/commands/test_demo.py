"""The demo trains both methods for a fixed number of epochs, and compares them only where both made all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from flow_grpo.commands import demo, main
from flow_grpo.commands.demo import DEMOS
from flow_grpo.recipes.base import get_config as base_config
from flow_grpo.recipes.registry import INTENDED_PROCESSES, NAMES, get_config
from flow_grpo.settings import resolve
from tests.synthetic_runs import write_run

ROOT = Path(__file__).parents[2]
REWARDS = {"drtune": [0.5, 0.6, 0.9], "grpo": [0.5, 0.65, 0.75], "nft": [0.5, 0.65, 0.75]}
METHODS = DEMOS["tiny"].methods
EVERY = [method for chosen in DEMOS.values() for method in chosen.methods]
SECONDS = {"drtune": [0, 10, 20], "grpo": [0, 50, 100], "nft": [0, 50, 100]}


def method_of(name, command):
    return next(method for method in EVERY if method.run_name == name and method.recipe in command)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Commands that would train; each leaves a run of known numbers, of which `rewards` may be changed."""
    monkeypatch.chdir(tmp_path)
    commands, rewards = [], {name: list(values) for name, values in REWARDS.items()}

    def train(command):
        commands.append(command)
        name = command[command.index("--name") + 1]
        out = Path(next(part for part in command if part.startswith("logdir=")).partition("=")[2])
        values = rewards[name]
        write_run(
            out / name, values, SECONDS[name][: len(values)], name == "drtune", diversity=True,
            evals_every=method_of(name, command).epochs // 2,
            collapse=[0, 0.2, 0.9][: len(values)] if name == "drtune" else None,
            overrides={"num_epochs": method_of(name, command).epochs},
        )  # fmt: skip
        return 0

    monkeypatch.setattr(demo, "run_process", train)
    return commands, rewards


def run_demo(capsys, *arguments: str) -> list[str]:
    assert main.main(["demo", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.recipe)
def test_the_settings_are_the_recipes_with_a_number_of_epochs(method, tmp_path):
    config = get_config(method.recipe)
    changes = dict(change.split("=") for change in demo.changed(method, tmp_path, method.epochs, 7, 600.0))
    kept = {"logdir", "seed", "num_epochs", "max_seconds", "eval_freq", "eval.ema", "save_freq", "num_checkpoint_limit"}
    kept |= {"eval_ode_log_prob", "eval_ode_log_prob_freq"} if method.entropy_freq else set()
    assert set(changes) == kept | ({"eval.rewards"} if method.measured else set())
    assert changes["num_epochs"] == str(method.epochs)
    assert config.use_reward_gradient == (method.label == "DRTune")
    assert config.eval.seed == base_config().eval.seed
    assert method.epochs % method.eval_freq == method.entropy_freq % method.eval_freq == 0
    resolve(config, num_processes=1, cuda=False)


def test_no_image_of_the_quick_start_is_drawn_for_its_diversity_alone():
    for method in METHODS:
        config = get_config(method.recipe)
        assert config.num_seeds == config.eval.num_image_per_prompt


def test_scenes_are_compared_by_the_judge_as_their_rewards_differ(trained, capsys):
    lines = run_demo(capsys, "scenes")
    commands, _ = trained
    assert [command[4] for command in commands] == ["scenes_drtune", "scenes_nft"]
    assert 'eval.rewards=("scenes",)' in commands[0]
    assert "max_seconds=3600.0" in commands[1]
    text = "\n".join(lines)
    assert "reward" not in text.partition("different images")[0]
    assert "DiffusionNFT ended at 78.0%, not above the base model: there is nothing for DRTune to reach." in text


def test_the_commands_train_one_after_another_into_a_folder_of_their_own(trained, tmp_path, capsys):
    (tmp_path / "logs/demo").mkdir(parents=True)
    (tmp_path / "logs/demo/earlier").write_text("earlier")
    lines = run_demo(capsys, "--seed", "3")
    commands, _ = trained
    folder = tmp_path / "logs/demo-2"
    assert [command[3:5] for command in commands] == [["train", "tiny_drtune"], ["train", "tiny_grpo"]]
    assert all(command[0] == sys.executable for command in commands)
    assert all({f"logdir={folder}", "seed=3", "max_seconds=600.0"} <= set(command) for command in commands)
    assert lines[:2] == ["[1/2] DRTune: 360 epochs", "[2/2] GRPO: 100 epochs"]
    assert lines[-1] == f"page: {folder / 'page.html'}"
    assert (folder / "page.html").is_file()
    assert [path.name for path in (tmp_path / "logs/demo").iterdir()] == ["earlier"]


def test_whole_runs_are_compared_by_time_and_at_equal_reward(trained, capsys):
    lines = run_demo(capsys)
    start = next(index for index, line in enumerate(lines) if line.startswith("base model"))
    assert [line.split() for line in lines[start : start + 3]] == [
        ["base", "model", "0.5000", "3.50", "78.0%"],
        ["DRTune", "0.9000", "1.25", "78.0%"],
        ["GRPO", "0.7500", "3.50", "78.0%"],
    ]
    assert "DRTune had GRPO's final reward (0.7500) after 20 s of training, GRPO after 100 s." in lines
    assert "Then DRTune made 1.25 different images (epoch 360), GRPO 3.50." in lines
    assert "cut" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grpo", "GRPO was cut by the clock: 50 of 100 epochs in 50 s"),
        ("drtune", "DRTune was cut by the clock: 180 of 360 epochs in 10 s"),
    ],
)
def test_a_cut_run_is_said_first_and_nothing_is_compared(trained, name, says, capsys):
    """The busy machine of issue 12: GRPO had made one epoch, and DRTune was said to have beaten it."""
    trained[1][name].pop()
    lines = run_demo(capsys)
    assert lines[2].startswith(says)
    text = "\n".join(lines[2:])
    assert "Nothing is compared." in text
    assert "final reward" not in text
    assert "0.75" not in text
    assert lines[-1].startswith("page: ")


@pytest.mark.parametrize(
    ("name", "rewards", "says"),
    [
        ("drtune", [0.5, 0.55, 0.6], "DRTune did not reach GRPO's final reward (0.7500)."),
        ("grpo", [0.5, 0.6, 0.45], "GRPO ended at 0.4500, not above the base model: there is nothing for DRTune"),
    ],
)  # fmt: skip
def test_a_reward_that_is_not_reached_or_did_not_rise_is_said(trained, name, rewards, says, capsys):
    trained[1][name][:] = rewards
    assert says in "\n".join(run_demo(capsys))


def test_fewer_epochs_may_be_asked_for(trained, capsys):
    main.main(["demo", "--epochs", "4"])
    assert all("num_epochs=4" in command for command in trained[0])


def test_a_run_that_fails_ends_the_demo_with_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_process", lambda command: 2)
    assert main.main(["demo"]) == 2
    assert "training with DRTune ended with exit code 2" in capsys.readouterr().err
    assert not (tmp_path / "logs/demo").exists()


@pytest.mark.parametrize(
    "arguments", [("--max-seconds", "0"), ("--epochs", "-1"), ("--seed", "-1"), ("--max-seconds", "nan")]
)
def test_a_number_that_is_not_allowed_is_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        main.main(["demo", *arguments])
    assert refusal.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as refusal:
        main.main(["demo", "--out", "/proc/nowhere"])
    assert refusal.value.code == 2
    assert "error: --out /proc/nowhere cannot be made (" in capsys.readouterr().err


def test_the_next_step_names_a_recipe_for_as_many_gpus():
    text = (ROOT / "flow_grpo/commands" / demo.TEMPLATE).read_text()
    processes, recipe = re.search(r"--num_processes (\d+) -m flow_grpo.commands.main train (\w+)", text).groups()
    assert INTENDED_PROCESSES[NAMES[recipe]] == int(processes)
