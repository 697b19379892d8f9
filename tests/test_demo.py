"""The demo trains both methods with real commands and recipes, overwrites nothing, and ends with what to do next."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from config.base import get_config as base_config
from config.grpo import INTENDED_PROCESSES, get_config
from flow_grpo.commands.cli import parse_config
from flow_grpo.settings import resolve
from scripts.study import demo
from scripts.study.demo import METHODS, ROOT, parse_arguments, run_demo, train_command

# stands in for scripts/train/train_sd3.py: reads the same command line, writes a run folder of known numbers
FAKE_TRAINER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from flow_grpo.commands.cli import parse_config
from tests.synthetic_runs import write_run
config = parse_config(sys.argv, "")
gradient = config.use_reward_gradient
rewards = [0.5, 0.6, 0.9] if gradient else [0.5, 0.65, 0.75]
write_run(Path(config.logdir) / config.run_name, rewards, [0, 10, 20] if gradient else [0, 50, 100], gradient,
          diversity=True)
print("trained", config.recipe, config.max_seconds, config.seed)
"""


@dataclass(frozen=True)
class Demo:
    """A demo that was run where an earlier one's folder stood."""

    folder: Path
    earlier: Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo with the stand-in trainer, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    trainer, earlier = folder / "fake_trainer.py", folder / "demo/drtune/metrics.jsonl"
    trainer.write_text(FAKE_TRAINER.format(root=str(ROOT)))
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    call = f"from scripts.study.demo import *; raise SystemExit(run_demo(Path('demo'), 5, 3, Path({str(trainer)!r})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", call], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Demo(folder / "demo-2", earlier, done.stdout)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_the_commands_are_the_recipes_with_the_clock_and_nothing_else(
    method: demo.Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = parse_config(train_command(method, tmp_path, seconds=180, seed=7)[1:], "")
    resolve(config, num_processes=1, cuda=False)
    changed = {"logdir", "run_name", "seed", "max_seconds", "num_epochs", "eval_freq", "save_freq", "eval"}
    changed |= {"eval_ode_log_prob", "eval_ode_log_prob_freq", "eval_diversity", "eval_diversity_freq", "num_seeds"}
    changed |= {"num_checkpoint_limit"}
    assert config.num_seeds == config.eval.num_image_per_prompt  # no image is drawn for the diversity alone
    recipe = get_config(method.recipe)
    assert {key for key in recipe if config[key] != recipe[key]} <= changed
    assert (config.logdir, config.run_name, config.seed, config.max_seconds) == (
        str(tmp_path),
        method.run_name,
        7,
        180.0,
    )
    assert config.use_reward_gradient == (method.label == "DRTune")
    assert not config.eval.ema
    assert config.eval.seed == base_config().eval.seed


def test_the_demo_ends_with_numbers_report_and_next_step(finished: Demo) -> None:
    out = finished.output
    assert "trained tiny_sd3_use_gradient 5.0 3" in out
    assert "trained tiny_sd3 5.0 3" in out
    assert out.index("[1/2] DRTune") < out.index("trained tiny_sd3_use_gradient") < out.index("[2/2] GRPO")
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("held-out noise"))
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["base", "0.5000", "78.0%", "3.50", "(3.40", "to", "3.60)", "4.50", "(4.30", "to", "4.70)"],
        ["DRTune", "0.9000", "78.0%", "3.50", "(3.40", "to", "3.60)", "4.50", "(4.30", "to", "4.70)"],
        ["GRPO", "0.7500", "78.0%", "3.50", "(3.40", "to", "3.60)", "4.50", "(4.30", "to", "4.70)"],
    ]
    assert lines[start + 4].startswith("DRTune reached GRPO's final reward (0.7500) after 15.0 s of training, 15.0%")
    assert lines[start + 5] == f"Report: {finished.folder / 'report/report.html'}"
    assert "\n".join(lines[start + 6 :]) == demo.NEXT


def test_an_earlier_demo_is_left_as_it_was(finished: Demo) -> None:
    assert finished.earlier.read_text() == "earlier"
    assert (finished.folder / "report/report.html").is_file()


def test_a_failing_command_ends_the_demo_with_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "failing.py"
    script.write_text("raise SystemExit(2)")
    assert run_demo(tmp_path / "demo", seconds=5, seed=3, train_script=script) == 2
    assert "training with DRTune ended with exit code 2" in capfd.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_time_that_is_not_positive_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse_arguments(["--seconds", "0"])
    assert refusal.value.code == 2
    assert "--seconds must be positive" in capsys.readouterr().err


def test_the_next_step_names_a_recipe_and_a_launch_file_that_exist() -> None:
    words = demo.NEXT.split()
    get_config(words[words.index("--config") + 1].partition(":")[2])
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    assert int(words[words.index("--num_processes") + 1]) == INTENDED_PROCESSES["pickscore_sd3_4gpu"]
    assert demo.train_command(METHODS[0], Path("x"), 1, 1)[0] == sys.executable
