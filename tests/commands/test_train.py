"""fme train: what each command line means, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flow_grpo.commands import train
from flow_grpo.commands.train import as_typed
from flow_grpo.errors import Interrupted, TrainingStopped
from flow_grpo.recipes.base import leaves
from flow_grpo.recipes.registry import NAMES, RECIPES, get_config
from flow_grpo.runs.folder import run_folder_of
from flow_grpo.runs.lock import RunLock, command_line, is_locked
from tests.commands.lines import ROOT, fme, refusal
from tests.synthetic_runs import write_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# --- train: what it means -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first"), NAMES.items())
def test_both_names_of_a_recipe_are_the_same_settings(name, first):
    assert first in RECIPES
    ours, theirs = dict(leaves(get_config(name))), dict(leaves(get_config(first)))
    assert ours.pop("recipe") == name
    assert theirs.pop("recipe") == first
    assert ours == theirs


def test_every_recipe_has_a_name_to_guess():
    assert sorted(NAMES.values()) == sorted(RECIPES)
    assert {name for name, first in NAMES.items() if name in RECIPES and name != first} == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("tiny_drtune", "num_epochs=3", "train.beta=0.5", "--name", "mine"),
        ("--name=mine", "tiny_drtune", "num_epochs=3", "train.beta=0.5"),
        ("tiny_drtune", "--name", "mine", "train.beta=0.5", "num_epochs=2", "num_epochs=3"),
    ],
)
def test_changes_and_options_come_in_any_order(arguments, started, capsys):
    assert fme("train", *arguments) == 0
    expected = get_config("tiny_drtune")
    expected.update_from_flattened_dict({"num_epochs": 3, "train.beta": 0.5, "run_name": "mine"})
    assert started[0].to_dict() == expected.to_dict()
    assert capsys.readouterr().err == ""


VALUES = [
    ("use_lora=false", False),
    ("trackers=()", ()),
    ("sample.sde_window_range=0,5", (0, 5)),
    ("eval.modes=", ""),
    ("project=a=b", "a=b"),
    ("train.learning_rate=3e-4", 3e-4),
]


@pytest.mark.parametrize(("change", "value"), VALUES)
def test_a_change_has_the_kind_of_its_key(change, value, started):
    fme("train", "tiny_grpo", change)
    assert dict(leaves(started[0]))[change.partition("=")[0]] == value


def test_a_file_of_recipes_is_taken_as_the_scripts_take_it(started, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from flow_grpo.recipes.registry import get_config as base\n"
        "def get_config(name):\n    config = base('tiny_grpo')\n    config.run_name = name\n    return config\n"
    )
    fme("train", f"{tmp_path / 'mine.py'}:there", "seed=3")
    assert (started[0].run_name, started[0].seed) == ("there", 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "tiny_grpo", "--resume", ""),
        ("train", "tiny_grpo", "--resume="),
        ("train", "tiny_grpo", "--seeds", " "),
        ("check", "lora", "--against", ""),
        ("view", ""),
    ],
)
def test_an_empty_argument_is_no_argument_left_out(arguments, started, capsys):
    """As of a variable that is not set: a run would begin where one was to go on."""
    assert "is empty; is a variable not set?" in refusal(capsys, *arguments)
    assert started == []


def test_a_lock_is_looked_at_without_writing(tmp_path, monkeypatch):
    """Also in a folder that may not be written, which is not being written for that."""
    assert not is_locked(tmp_path)
    lock = RunLock(tmp_path)
    assert is_locked(tmp_path)
    lock.release()
    opened = []
    monkeypatch.setattr(os, "open", lambda path, flags, open_=os.open: opened.append(flags) or open_(path, flags))
    assert not is_locked(tmp_path)
    assert [flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for flags in opened] == [0]


@pytest.mark.parametrize("file", ["config.json", ""])
def test_a_runs_settings_begin_a_new_run(earlier, file, started):
    fme("train", str(earlier / file), "num_epochs=2")
    config = started[0]
    assert (config.seed, config.num_epochs, config.recipe) == (5, 2, "tiny_drtune")
    assert (config.run_name, config.resume_from) == ("", "")


def test_settings_that_were_edited_are_taken_as_they_stand(earlier, started):
    path = earlier / "config.json"
    path.write_text(path.read_text().replace('"seed": 5', '"seed": 6'))
    fme("train", str(path))
    assert started[0].seed == 6


@pytest.mark.parametrize("recipe", [(), ("tiny_drtune",), ("tiny_sd3_use_gradient",)])
def test_a_run_goes_on_with_its_own_settings_under_either_name_of_its_recipe(earlier, recipe, started, capsys):
    fme("train", *recipe, "num_epochs=9", "--resume", str(earlier))
    config = started[0]
    assert (config.seed, config.num_epochs) == (5, 9)
    assert run_folder_of(config.resume_from) == earlier
    assert capsys.readouterr().err == "changed: num_epochs 7 -> 9\n"


def test_what_a_run_measures_changes_only_where_that_is_meant(earlier, started, capsys):
    error = refusal(capsys, "train", "--resume", str(earlier), "eval.num_steps=3")
    assert "error: eval.num_steps 10 -> 3 would change what the run draws or measures" in error
    fme("train", "--resume", str(earlier), "eval.num_steps=3", "--allow-changes")
    assert started[0].eval.num_steps == 3


# --- train: several seeds -------------------------------------------------------------------------------


@pytest.fixture
def processes(monkeypatch):
    """Commands that would run; the codes that they end with, 0 where none is left."""
    commands, codes = [], []

    def run(command):
        commands.append(command)
        write_run(Path("logs") / command[command.index("--name") + 1], [0.5, 0.6], [0, 10], gradient=True)
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(train, "run_process", run)
    return commands, codes


def test_seeds_are_runs_of_their_own_one_after_another(processes, started, capsys):
    assert fme("train", "tiny_drtune", "num_epochs=3", "--name", "mine", "--seeds", "1,2,30") == 0
    assert started == []
    commands, _ = processes
    assert [command[:3] for command in commands] == [[sys.executable, "-m", "flow_grpo.commands.main"]] * 3
    for command, seed in zip(commands, (1, 2, 30), strict=True):
        assert command[3:] == [
            "train",
            "tiny_drtune",
            "num_epochs=3",
            f"seed={seed}",
            "--name",
            f"mine-seed{seed}",
        ]
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "[1/3] mine-seed1", "[2/3] mine-seed2", "[3/3] mine-seed30", "page: logs/mine.html",
    ]  # fmt: skip
    assert err == ""
    assert "mine-seed30" in Path("logs/mine.html").read_text()


@pytest.mark.parametrize("code", [1, 2, 130])
def test_the_first_seed_that_fails_is_the_last(processes, code):
    commands, codes = processes
    codes += [0, code]
    assert fme("train", "tiny_drtune", "--seeds", "1,2,3") == code
    assert len(commands) == 2
    assert commands[0][commands[0].index("--name") + 1].startswith("tiny_drtune-")


def test_a_mistake_is_found_before_the_first_seed(processes, capsys):
    refusal(capsys, "train", "tiny_drtune", "num_epochs=x", "--seeds", "1,2")
    assert processes[0] == []


def test_seeds_that_evaluated_nothing_have_no_page_and_no_error(monkeypatch, capsys):
    monkeypatch.setattr(train, "run_process", lambda command: 0)
    assert fme("train", "tiny_drtune", "--seeds", "1,2") == 0
    assert "no page of all seeds" in capsys.readouterr().err


CHILD = """
import signal, sys
def stop(number, frame):
    print("stopped", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_end_of_the_run_waited_for(number):
    code = "import sys\nfrom flow_grpo.commands.train import run_process\n"
    code += "sys.exit(run_process([sys.executable, '-c', sys.argv[1]]))"
    with subprocess.Popen([sys.executable, "-c", code, CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        assert parent.stdout.read() == "stopped\n"
        assert parent.wait() == 128 + number


@pytest.mark.parametrize(
    ("program", "typed"),
    [("/usr/bin/fme", "fme"), ("/x/flow_grpo/commands/main.py", "fme"), ("scripts/a.py", "python scripts/a.py")],
)
def test_a_run_records_the_command_as_it_is_typed(program, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "a b"])
    assert command_line() == f"{typed} train 'a b'"


# --- train: mistakes ------------------------------------------------------------------------------------


MISTAKES = [
    ((), ["a recipe, FILE.py[:NAME], or the config.json of a run, or --resume RUN"]),
    (("sd35_gpro",), ["'sd35_gpro' is not a recipe", "did you mean sd35_grpo"]),
    (("zzz",), ["'zzz' is not a recipe", "fme ls recipes"]),
    (("tiny_grpo", "train.lerning_rate=1"), ["error: train.lerning_rate is not a key", "mean train.learning_rate"]),
    (("tiny_grpo", "beta=1"), ["error: beta is not a key; did you mean ", "train.beta"]),
    (("tiny_grpo", "num_epochs=1.5"), ["error: num_epochs = '1.5' is not allowed; it takes a whole number."]),
    (("tiny_grpo", "reward_fn=1"), ["error: reward_fn is a group of keys", " reward_fn.pickscore"]),
    (("tiny_grpo", "extra"), ["extra", "KEY=VALUE"]),
    (("tiny_grpo", "=1"), ["=1", "KEY=VALUE"]),
    (("tiny_grpo", "resume_from=x"), ["--resume"]),
    (("tiny_grpo", "run_name=x"), ["--name"]),
    (("tiny_grpo", "--resum", "x"), ["--resum"]),
    (("tiny_grpo", "--config.seed=1"), ["--config.seed=1"]),
    (("tiny_grpo", "--allow-changes"), ["--resume RUN"]),
    (("--resume", "/nowhere"), ["error: --resume '/nowhere' does not exist"]),
    (("num_epochs=1",), ["takes a recipe"]),
    (("nowhere.py:x",), ["nowhere.py:x names no Python file"]),
    (("nowhere/config.json",), ["nowhere/config.json cannot be read"]),
    (("tiny_grpo", "--seeds", "1,x"), ["--seeds 1,x"]),
    (("tiny_grpo", "--seeds", "1,01"), ["--seeds 1,01"]),
    (("tiny_grpo", "--seeds", "1,2", "seed=3"), ["seed is given twice"]),
    (("--resume", "x", "--seeds", "1,2"), ["--seeds begins runs"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES)
def test_a_mistake_is_one_sentence_in_the_words_that_were_typed(arguments, parts, started, capsys):
    error = refusal(capsys, "train", *arguments)
    assert [part for part in parts if part not in error] == []
    assert "config.train" not in error
    assert started == []


def test_another_recipe_than_the_runs_is_refused(earlier, capsys):
    assert "tiny_grpo is not the recipe of" in refusal(capsys, "train", "tiny_grpo", "--resume", str(earlier))


def test_a_value_that_is_out_of_range_names_its_key_as_typed(capsys):
    """Through the real start of a training, before anything loads."""
    with pytest.raises(SystemExit) as stopped:
        fme("train", "tiny_grpo", "train.updates_per_epoch=7")
    assert stopped.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: sample.groups_per_epoch = 10 groups of 8")
    assert "train.updates_per_epoch = 7 equal parts" in error


WORDS = [
    ("config.train.beta = 1 is bad", "train.beta = 1 is bad"),
    ("give --config.sample.batch_size=3.", "give sample.batch_size=3."),
    ("go on with --config.resume_from=/a/b.", "go on with --resume /a/b."),
    ("config.resume_from = 'x' holds", "--resume 'x' holds"),
    ("config.resume_from: x is damaged", "--resume: x is damaged"),
    ("logs/x/config.json is damaged, see config/base.py", "logs/x/config.json is damaged, see config/base.py"),
    ("the file my_config.json, or config.json", "the file my_config.json, or config.json"),
]


@pytest.mark.parametrize(("sentence", "expected"), WORDS)
def test_the_words_of_the_scripts_become_those_of_the_command(sentence, expected):
    assert as_typed(sentence) == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingStopped("config.logdir is full"), 1),
        (Interrupted(signal.Signals.SIGINT, "after epoch 4, go on with --config.resume_from=/x"), 130),
    ],
)
def test_how_a_training_ends_early_keeps_its_exit_code(error, code, monkeypatch, capsys):
    def stop(config):
        raise error

    monkeypatch.setattr(train, "train", stop)
    with pytest.raises(SystemExit) as stopped:
        fme("train", "tiny_grpo")
    assert stopped.value.code == code
    assert "config." not in capsys.readouterr().err
