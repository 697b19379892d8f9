"""scripts/cli.py: overrides, --help, and one sentence with exit code 2 for every mistake."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from flow_grpo.commands.cli import one_sentence_errors, parse_config, run
from flow_grpo.errors import ConfigError, TrainingStopped
from flow_grpo.recipes.base import leaves
from flow_grpo.settings import resolve
from tests.synthetic_runs import ENVIRONMENT

ROOT = Path(__file__).parents[2]
TINY = "--config=config/grpo.py:tiny_sd3"
# models on a hub, so that only the mistake is a mistake
ELSEWHERE = [f"--config.{key}=org/name" for key in ("pretrained.model", "reward_model.pickscore", "eval.judge")]
SCRIPT = (
    "from flow_grpo.commands.cli import run\nrun(lambda config: print(config.train.beta), 'What the script does.')\n"
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "flow_grpo.settings.fetch_small_files", lambda config: None
    )  # tests/models/test_hub.py is about that
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def parse(*arguments: str) -> ConfigDict:
    return parse_config(["script.py", *arguments], "doc")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tiny script that takes a configuration."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def start(config: ConfigDict) -> None:
    """What a training script does before anything loads: one process, no GPU."""
    resolve(config, num_processes=1, cuda=False)


# --- what works -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [(TINY,), ("--config", "config/grpo.py:tiny_sd3"), ("-config=config/grpo.py:tiny_sd3",)]
)
def test_the_recipe_may_be_given_in_either_form(recipe):
    assert parse(*recipe).recipe == "tiny_sd3"


def test_base_is_a_configuration_too():
    assert parse("--config=config/base.py").recipe == ""


OVERRIDES = [
    (("--config.train.beta=0.02",), "train.beta", 0.02),
    (("--config.train.beta", "0.02"), "train.beta", 0.02),
    (("--config.train.beta=1",), "train.beta", 1.0),
    (("--config.train.learning_rate=3e-4",), "train.learning_rate", 3e-4),
    (("--config.reward_fn.clipscore=0.5",), "reward_fn.clipscore", 0.5),
    (("--config.num_epochs=3", "--config.num_epochs=4"), "num_epochs", 4),
    (("--config.run_name=a=b:c",), "run_name", "a=b:c"),
    (("--config.use_lora=false",), "use_lora", False),
    (("--noconfig.use_lora",), "use_lora", False),
    (("--config.use_reward_gradient",), "use_reward_gradient", True),
    (('--config.trackers=("wandb", "tensorboard")',), "trackers", ("wandb", "tensorboard")),
    (("--config.trackers=wandb", "--config.trackers=tensorboard"), "trackers", ("wandb", "tensorboard")),
    (("--config.trackers=wandb",), "trackers", ("wandb",)),
    (("--config.trackers=()",), "trackers", ()),
    (("--config.sample.sde_window_range=0,5",), "sample.sde_window_range", (0, 5)),
    (("--config.lora.target_modules=attn.to_q",), "lora.target_modules", ("attn.to_q",)),
    (("--config.eval.modes=",), "eval.modes", ""),
]


@pytest.mark.parametrize(("arguments", "key", "value"), OVERRIDES)
@pytest.mark.parametrize("recipe_comes_last", [False, True])
def test_an_override_changes_its_key_and_nothing_else(arguments, key, value, recipe_comes_last):
    config = parse(*arguments, TINY) if recipe_comes_last else parse(TINY, *arguments)
    expected = parse(TINY)
    expected.update_from_flattened_dict({key: value})
    assert config.to_dict() == expected.to_dict()
    assert config.is_locked


def test_parsing_twice_in_one_process_keeps_no_state():
    assert parse(TINY, "--config.train.beta=5").train.beta == 5.0
    assert parse(TINY).train.beta == 0.0


def test_help_lists_the_recipes_and_loads_no_torch():
    done = python("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("What the script does.")
    assert "pickscore_sd3_fast_nocfg" in done.stdout
    code = "import sys, flow_grpo.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- a run that goes on ---------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path):
    """A run that was started with other settings than its recipe's, by an earlier version that lacked a key."""
    config = parse(TINY, "--config.train.batch_size=8", "--config.num_epochs=40", "--config.seed=5").to_dict()
    del config["train"]["ratio_probes"]
    folder = tmp_path / "run"
    folder.mkdir()
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"config_sha256": digest}))
    return folder


def test_a_resumed_run_takes_its_own_settings_and_needs_no_recipe(earlier, capsys):
    for recipe in ((), (TINY,)):
        config = parse(*recipe, f"--config.resume_from={earlier}")
        assert (config.train.batch_size, config.num_epochs, config.seed) == (8, 40, 5)
        assert (config.logdir, config.run_name) == (str(earlier.parent), "run")
        assert config.train.ratio_probes == 1  # the default of a key that came later
    assert capsys.readouterr().err == ""


def test_what_the_command_line_changes_of_a_resumed_run_is_said(earlier, capsys):
    config = parse(f"--config.resume_from={earlier}", "--config.num_epochs=80", "--config.train.batch_size=8")
    assert config.num_epochs == 80
    assert capsys.readouterr().err == "changed: num_epochs 40 -> 80\n"


SEEN = ["sample.num_image_per_prompt=4", "eval.num_steps=3", "seed=6", "prompts.test=x.txt", "reward_fn.clipscore=1"]


@pytest.mark.parametrize("change", SEEN)
def test_a_change_of_what_is_drawn_or_measured_is_refused_unless_it_is_meant(earlier, change, capsys):
    arguments = (f"--config.resume_from={earlier}", f"--config.{change}")
    with pytest.raises(ConfigError, match=rf"config\.{change.split('=')[0]} .* -> .*--allow-changes"):
        parse(*arguments)
    key, _, value = change.partition("=")
    assert str(dict(leaves(parse(*arguments, "--allow-changes")))[key]) in (value, f"{value}.0")
    assert f"changed: {key} " in capsys.readouterr().err


def test_under_another_name_a_resumed_run_may_draw_what_it_likes(earlier, capsys):
    config = parse(f"--config.resume_from={earlier}", "--config.run_name=branch", "--config.seed=6")
    assert (config.seed, config.train.batch_size) == (6, 8)
    assert "run_name 'run' -> 'branch'" in capsys.readouterr().err


def test_another_recipe_than_the_runs_is_refused(earlier):
    with pytest.raises(ConfigError, match=r"tiny_sd3_use_gradient is not the recipe of .*, 'tiny_sd3'"):
        parse("--config=config/grpo.py:tiny_sd3_use_gradient", f"--config.resume_from={earlier}")


def test_home_is_understood_in_what_is_resumed(earlier, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(earlier.parent))
    assert parse("--config.resume_from=~/run").seed == 5
    with pytest.raises(ConfigError, match="--allow-changes"):
        parse("--config.resume_from=~/run", "--config.seed=7")


def test_a_checkpoint_away_from_its_run_brings_its_settings(earlier, tmp_path):
    kept = tmp_path / "kept" / "checkpoint-000003"
    kept.mkdir(parents=True)
    state = {"weights": {}, "counters": {"epoch": 3, "seconds": 1}}
    state["config"] = json.loads((earlier / "config.json").read_text())
    (kept / "state.json").write_text(json.dumps(state))
    (kept / "training_state.pt").write_bytes(b"")
    config = parse(f"--config.resume_from={kept}")
    assert (config.seed, config.train.batch_size, config.run_name) == (5, 8, "")


@pytest.mark.parametrize("recipe", ["config/base.py", "/nowhere.py:tiny_sd3_use_gradient"])
def test_any_other_recipe_is_refused_too(earlier, recipe):
    with pytest.raises(ConfigError, match="is not the recipe of"):
        parse(f"--config={recipe}", f"--config.resume_from={earlier}")


def test_settings_edited_beside_missing_records_are_those_of_the_newest_checkpoint(earlier, capsys):
    state = {"weights": {}, "counters": {"epoch": 3, "seconds": 1}}
    state["config"] = json.loads((earlier / "config.json").read_text())
    (earlier / "checkpoints/checkpoint-000003").mkdir(parents=True)
    (earlier / "checkpoints/checkpoint-000003/state.json").write_text(json.dumps(state))
    (earlier / "config.json").write_text(json.dumps(state["config"] | {"seed": 7}))
    (earlier / "environment.json").unlink()
    assert parse(f"--config.resume_from={earlier}").seed == 5
    assert "config.json is damaged, or was edited" in capsys.readouterr().err


def test_without_a_recipe_what_is_resumed_must_be_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.resume_from = .* holds no checkpoint"):
        parse(f"--config.resume_from={tmp_path}")


def test_settings_that_were_changed_after_they_were_written_are_not_taken(earlier):
    text = (earlier / "config.json").read_text().replace('"seed": 5', '"seed": 4')
    (earlier / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json is damaged, or was edited, .* and no checkpoint"):
        parse(f"--config.resume_from={earlier}")


def test_damaged_settings_are_taken_from_the_newest_checkpoint(earlier, capsys):
    state = {
        "weights": {},
        "counters": {"epoch": 3, "seconds": 1},
        "config": json.loads((earlier / "config.json").read_text()),
    }
    (earlier / "checkpoints/checkpoint-000003").mkdir(parents=True)
    (earlier / "checkpoints/checkpoint-000003/state.json").write_text(json.dumps(state))
    (earlier / "config.json").write_bytes(b"\0" * 100)
    assert parse(f"--config.resume_from={earlier}").seed == 5
    assert "the settings are taken from the newest checkpoint" in capsys.readouterr().err


# --- what does not --------------------------------------------------------------------------------------


MISTAKES = [
    ((), ["--config is missing", "config/grpo.py:NAME", "tiny_sd3"]),
    (("--config",), ["--config is missing"]),
    (("--config=config/grpo.py",), ["needs the name of a recipe", "tiny_sd3"]),
    (("--config=config/grpo.py:tiny_sd4",), ["'tiny_sd4'", "tiny_sd3"]),
    (("--config=config/none.py:x",), ["config/none.py:x", "no Python file"]),
    (("--config=README.md",), ["README.md", "no Python file"]),
    (("--config=config/__init__.py",), ["no get_config()"]),
    (("--config=config/base.py:x",), ["config/base.py:x", "takes no :NAME"]),
    ((TINY, "--config.train.lerning_rate=1"), ["config.train.lerning_rate is not a key", "config.train.learning_rate"]),
    ((TINY, "--config.beta=1"), ["config.beta is not a key", "config.train.beta"]),
    ((TINY, "--config.eval.num_stesp=1"), ["config.eval.num_stesp is not a key", "config.eval.num_steps"]),
    (
        (TINY, "--config.train.global_std=true"),
        ["config.train.global_std has become config.train.advantage_std", "'batch' for what was True"],
    ),
    ((TINY, "--config.zzz=1"), ["config.zzz is not a key", "fme ls keys"]),
    ((TINY, "--config.train.beta.x=1"), ["config.train.beta.x is not a key"]),
    ((TINY, "--noconfig.use_lroa"), ["config.use_lroa is not a key", "config.use_lora"]),
    ((TINY, "--config.reward_fn={}"), ["config.reward_fn is a group", "config.reward_fn.pickscore"]),
    ((TINY, "--config.train.beta=much"), ["config.train.beta = 'much'", "a number"]),
    ((TINY, "--config.num_epochs=1.5"), ["config.num_epochs = '1.5'", "a whole number"]),
    ((TINY, "--config.use_lora=maybe"), ["config.use_lora = 'maybe'", "true or false"]),
    ((TINY, "--config.sample.sde_window_range=(0, 5"), ["config.sample.sde_window_range = '(0, 5'", "tuple"]),
    ((TINY, "--config.train.beta"), ["--config.train.beta", "Missing value"]),
    ((TINY, "--learning_rate=1"), ["learning_rate", "--config.KEY=VALUE"]),
    ((TINY, "extra"), ["extra", "--config.KEY=VALUE"]),
    ((TINY, "--allow-changes"), ["--allow-changes", "--config.resume_from=RUN"]),
    ((TINY, "--noconfig.use_lora=3"), ["use_lora", "--config.KEY=VALUE"]),
    ((TINY, "--flagfile=/nowhere"), ["/nowhere", "--config.KEY=VALUE"]),
    ((TINY, "--config.sample.groups_per_epoch=1000000000000000"), ["groups_per_epoch", "at most 10000000"]),
    ((TINY, "--config.mixed_precision=fp16"), ["mixed_precision", "GPU"]),
    ((TINY, "--config.num_processes=2"), ["num_processes = 2", "1 started"]),
    ((TINY, "--config.train.updates_per_epoch=3"), ["updates_per_epoch = 3", "would work"]),
    ((TINY, "--config.pretrained.model=./nowhere"), ["pretrained.model", "./nowhere"]),
    (
        (TINY, "--config.use_reward_gradient", "--config.reward_fn.jpeg_compressibility=1"),
        ["jpeg_compressibility", "no gradient"],
    ),
    (("--config=config/grpo.py:pickscore_sd3_4gpu",), ["num_processes = 4"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_code_2(arguments, parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *ELSEWHERE, *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(start, "doc")
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [part for part in parts if part not in err] == []


BROKEN_RECIPES = [
    ("x = (\n", "line 1: SyntaxError"),
    ("\nimport nowhere\n", "line 2: ModuleNotFoundError"),
    ("1 / 0", "line 1: ZeroDivisionError"),
    ("\0", "SyntaxError"),
    ("from config.base import get_config as base\ndef get_config():\n    base().x = 1", "line 3: AttributeError"),
    ("def get_config():\n    return {}", r"get_config\(\) of .* returns no ConfigDict"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_RECIPES)
def test_a_file_of_recipes_that_cannot_be_run_is_one_sentence_with_the_line(tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=rf"--config .*mine\.py.*{message}"):
        parse(f"--config={tmp_path / 'mine.py'}")


FILES = [
    ("prompts.train", "none.txt", "does not exist"),
    ("prompts.test", "empty.txt", "is empty"),
    ("resume_from", "folder", "holds no checkpoint"),
    ("pretrained.model", "folder", "has no model_index.json"),
]


@pytest.mark.parametrize(("key", "name", "message"), FILES)
def test_a_file_or_folder_without_what_it_should_hold_exits_with_2(key, name, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "some.txt").write_text("a sneaker\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    files = {"prompts.train": "some.txt", "prompts.test": "some.txt"} | {key: name}
    arguments = [f"--config.{key}={tmp_path / name}" for key, name in files.items()]
    monkeypatch.setattr(sys, "argv", ["script.py", TINY, *ELSEWHERE, "--config.eval.modes=", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(start, "doc")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert str(tmp_path / name) in err
    assert message in err
    assert err.count("\n") == 1


def test_a_real_process_ends_without_a_traceback():
    done = python(TINY, "--config.train.betta=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: config.train.betta is not a key; did you mean config.train.beta")
    assert done.stderr.count("\n") == 1
    assert python(TINY, "--config.train.beta=0.25").stdout == "0.25\n"


def stopping(error: Exception):
    def main(config: ConfigDict) -> None:
        raise error

    return main


def test_a_terminal_that_has_gone_or_lacks_letters_ends_nothing(tmp_path):
    """Output into a pipe that nobody reads, in a locale of ASCII."""
    lines = [
        "from flow_grpo.commands.cli import one_sentence_errors",
        "import sys",
        "with one_sentence_errors():",
        "    for _ in range(100):",
        "        print('ein grüner Hund', flush=True)",
        "        sys.stderr.write('狗')",
        f"    open({str(tmp_path / 'reached')!r}, 'w').close()",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines), encoding="utf-8")
    command = f"{sys.executable} {tmp_path / 'script.py'} 2>&1 | head -c 10"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT), "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, shell=True, env=os.environ | env, capture_output=True, check=True)
    assert done.stdout == b"ein gr\\xfc"
    assert (tmp_path / "reached").exists()


@pytest.mark.parametrize(("error", "code"), [(ConfigError("bad\n input."), 2), (TrainingStopped("bad\n input."), 1)])
@pytest.mark.parametrize(("rank", "message"), [("0", "error: bad input.\n"), ("1", "")])
def test_only_the_first_process_speaks_and_all_have_the_exit_code(error, code, rank, message, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stopped, one_sentence_errors():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == message


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", TINY])
    with pytest.raises(ZeroDivisionError):
        run(stopping(ZeroDivisionError()), "doc")
