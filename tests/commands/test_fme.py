"""fme: what each command line means, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flow_grpo.commands import cli, ls, main, train
from flow_grpo.commands.train import as_typed
from flow_grpo.errors import Interrupted, TrainingStopped
from flow_grpo.recipes.base import KEYS, leaves
from flow_grpo.recipes.sd3 import NAMES, RECIPES, get_config
from flow_grpo.runs.folder import run_folder_of
from flow_grpo.runs.lock import RunLock, command_line, is_locked
from tests.synthetic_runs import ENVIRONMENT, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def started(monkeypatch):
    """Trainings that would begin, instead of beginning."""
    found = []
    monkeypatch.setattr(train, "train", found.append)
    monkeypatch.setattr(cli, "resolve", lambda *_, **__: None)  # that their values fit is another matter
    return found


def fme(*arguments: str) -> int:
    return main.main(arguments)


def refusal(capsys, *arguments: str) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        fme(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --- the command ----------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert fme("--help") == fme() == 0
    out = capsys.readouterr().out
    assert all(f"fme {name}" in out for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_commands_help_loads_no_torch(name):
    code = (
        "import sys\nfrom flow_grpo.commands.main import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: fme {name}" in done.stdout


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "fme train"), ("zzz", "there are demo, train"), ("veiw", "view")]
)
def test_a_misspelt_command_is_told_the_nearest(typed, meant, capsys):
    error = refusal(capsys, typed)
    assert f"fme {typed} is not a command" in error
    assert meant in error


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
    assert set(NAMES) & set(RECIPES) == set()


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
        "from flow_grpo.recipes.sd3 import get_config as base\n"
        "def get_config(name):\n    config = base('tiny_grpo')\n    config.run_name = name\n    return config\n"
    )
    fme("train", f"{tmp_path / 'mine.py'}:there", "seed=3")
    assert (started[0].run_name, started[0].seed) == ("there", 3)


# --- train: with another run ----------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path):
    """A run of tiny_drtune with other settings than its recipe's."""
    config = get_config("tiny_drtune")
    config.update({"num_epochs": 7, "seed": 5, "logdir": str(tmp_path), "run_name": "run"})
    folder = tmp_path / "run"
    folder.mkdir()
    text = json.dumps(config.to_dict())
    (folder / "config.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"config_sha256": digest}))
    return folder


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
    (("tiny_grpo", "beta=1"), ["error: beta is not a key; did you mean train.beta?"]),
    (("tiny_grpo", "num_epochs=1.5"), ["error: num_epochs = '1.5' is not allowed; it takes a whole number."]),
    (("tiny_grpo", "reward_fn=1"), ["error: reward_fn is a group of keys", " reward_fn.pickscore"]),
    (("tiny_grpo", "extra"), ["extra", "KEY=VALUE"]),
    (("tiny_grpo", "=1"), ["=1", "KEY=VALUE"]),
    (("tiny_grpo", "resume_from=x"), ["--resume"]),
    (("tiny_grpo", "run_name=x"), ["--name"]),
    (("tiny_grpo", "--resum", "x"), ["--resum"]),
    (("tiny_grpo", "--config.seed=1"), ["--config.seed=1"]),
    (("tiny_grpo", "--allow-changes"), ["--resume RUN"]),
    (("--resume", "/nowhere"), ["error: --resume '/nowhere' holds no checkpoint"]),
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


# --- ls -------------------------------------------------------------------------------------------------


def listed(capsys, *arguments: str) -> str:
    assert fme("ls", *arguments) == 0
    return capsys.readouterr().out


def test_every_recipe_is_listed_with_its_cost_and_first_name(capsys):
    out = listed(capsys, "recipes")
    for name, first in NAMES.items():
        assert f"{name}: " in out
        assert f"also called {first}\n" in out
    assert "not counted" not in out
    assert "an epoch, on 4 GPUs: 1,152 images; 23,040 sampling" in out


def test_every_key_is_listed_with_its_default_and_meaning(capsys):
    out = listed(capsys, "keys")
    assert all(key.meaning and key.meaning in out for key in KEYS.values())
    assert all(f"\n{name} " in out for name in KEYS)


def test_a_name_narrows_by_its_beginning_or_as_a_pattern(capsys):
    assert listed(capsys, "keys", "train.beta").splitlines()[1:] == [
        "train.beta  0.0  weight of the KL divergence to the reference model", "    takes a number of at least 0",
    ]  # fmt: skip
    assert listed(capsys, "keys", "*.batch_size").count("takes a whole number of at least 1") == 5
    assert listed(capsys, "recipes", "pickscore_sd3").startswith("sd35_grpo: ")


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [("keys", "beta", "train.beta"), ("recipes", "tiny_gpro", "tiny_grpo"), ("rewards", "pikscore", "pickscore")],
)
def test_an_unknown_name_is_told_the_nearest(kind, name, nearest, capsys):
    assert f"did you mean {nearest}" in refusal(capsys, "ls", kind, name)


def test_rewards_say_how_to_train_on_them(capsys):
    lines = {line.split()[0]: line.split() for line in listed(capsys, "rewards").splitlines()}
    assert lines["pickscore"] == [
        "pickscore",
        "yes",
        "reward_model.pickscore=assets/tiny_pickscore",
        "reward_fn.pickscore=1",
    ]
    assert lines["jpeg_compressibility"][1:3] == ["no", "none"]


def rows(capsys, *arguments: str) -> dict[str, str]:
    return {line.split("  ")[0]: line for line in listed(capsys, "runs", *arguments).splitlines()[1:]}


def test_runs_are_listed_with_what_they_have_come_to(capsys, tmp_path):
    write_run(tmp_path / "logs/done", [0.5, 0.6], [0, 10], gradient=True, diversity=True, overrides={"num_epochs": 10})
    write_run(tmp_path / "logs/pair/cut", [0.5, 0.7], [0, 10], gradient=True, overrides={"max_seconds": 9.0})
    write_run(tmp_path / "logs/pair/on", [0.5, 0.8], [0, 10], gradient=True)
    (tmp_path / "logs/none").mkdir()
    found = rows(capsys, str(tmp_path / "logs"))
    assert list(found) == ["done", "pair/cut", "pair/on"]
    assert "finished  " in found["done"]
    assert "10 of 10   0.6000  3.50   " in found["done"]
    assert "cut by the clock" in found["pair/cut"]
    assert "stopped" in found["pair/on"]
    assert "10 of 100  0.8000" in found["pair/on"]
    assert list(rows(capsys, str(tmp_path / "logs/done"))) == ["done"]


def test_a_damaged_run_and_a_foreign_name_spoil_nothing(capsys, tmp_path):
    for name in ("a\x1b[31m\nb", "damaged"):
        write_run(tmp_path / "logs" / name, [0.5, 0.6], [0, 10], gradient=True)
    (tmp_path / "logs/damaged/config.json").write_text("{")
    with (tmp_path / "logs/damaged/metrics.jsonl").open("a") as file:
        file.write("no JSON\n{}\n")
    lines = listed(capsys, "runs", str(tmp_path / "logs")).splitlines()
    assert len(lines) == 3
    assert not any("\x1b" in line for line in lines)
    assert "damaged" in lines[2].split()[1]


def test_a_folder_without_runs_is_said(capsys):
    assert "holds no run" in refusal(capsys, "ls", "runs")


def test_a_table_is_as_wide_as_its_cells():
    assert ls.table([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]


# --- view -----------------------------------------------------------------------------------------------


def test_the_page_of_one_run_lies_in_it_and_of_several_beside_them(capsys, tmp_path):
    runs = [write_run(tmp_path / name, [0.5, 0.6], [0, 10], gradient=True) for name in ("a", "b")]
    assert fme("view", str(runs[0])) == 0
    assert capsys.readouterr().out == f"page: {runs[0] / 'page.html'}\n"
    assert fme("view", *map(str, runs)) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n"
    assert fme("view", str(runs[0]), "--out", "mine.html") == 0
    assert capsys.readouterr().out == "page: mine.html\n"
    assert "fme view" in Path("mine.html").read_text()


def test_what_is_no_run_has_no_page(capsys, tmp_path):
    assert "is not a folder" in refusal(capsys, "view", str(tmp_path / "nowhere"))
    run = write_run(tmp_path / "a", [0.5, 0.6], [0, 10], gradient=True)
    assert "eval_ema" in refusal(capsys, "view", str(run), "--ema")


def test_a_page_is_made_without_torch(tmp_path):
    run = write_run(tmp_path / "a", [0.5, 0.6], [0, 10], gradient=True)
    code = f"import sys\nfrom flow_grpo.commands.main import main\nmain(['view', {str(run)!r}])\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_page_replaces_nothing_but_a_page(earlier, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert "ends in .html" in refusal(capsys, "view", str(earlier), "--out", str(tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
