"""docs/extending.md is true: its files, written into an empty folder, train an epoch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
SMALL = [
    "reward_fn.pickscore=0", "reward_fn.brightness=1", "train.method=best_of", "num_epochs=1", "eval_freq=1",
    "trackers=()", "sample.groups_per_epoch=2", "sample.num_image_per_prompt=2", "eval.num_steps=2", "num_seeds=4",
    "train.updates_per_epoch=1", "eval.num_image_per_prompt=1", "num_threads=1",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in BLOCK.findall((ROOT / "docs/extending.md").read_text(encoding="utf-8")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def train(folder: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "train_mine.py", "train", "tiny_grpo", "--name", "mine", *SMALL, *changes)


def fme(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Forked from what has imported torch, unless the folder has a torch.py that must not be imported."""
    command = ("-m", "flow_grpo.commands.main", *arguments)
    return run(folder, *command) if (folder / "torch.py").exists() else forked.run(*command, cwd=folder)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_files_of_the_page_train_an_epoch(folder):
    done = train(folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "logs/mine/metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in lines if line["step"] == 1 for key, value in line.items()}
    assert last["train/loss"] > 0
    assert last["train/skipped_updates"] == 0
    assert 0.2 < last["eval/reward/brightness"] < 0.5  # the tiny model's garments stand on white: its own are above
    assert last["eval/contrast"] > 0


def test_a_file_outside_the_repository_is_a_reward_and_the_run_goes_on_with_it_from_another_folder(folder, tmp_path):
    """By its gradient, with no file of ours but the command; what is resumed finds it, and tells if it has changed."""
    changes = [change for change in SMALL if "method" not in change and "brightness" not in change]
    first = ["train", "tiny_drtune", "--reward", "bright=my_reward.py:Brightness", "--name", "mine", *changes]
    done = fme(folder, *first, "save_freq=1")
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = ["train", "--resume", str(folder / "logs/mine"), "num_epochs=2"]
    done = fme(elsewhere, *again)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "logs/mine/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/reward/bright" in line] == [1, 2]
    reward = folder / "my_reward.py"
    reward.write_text(reward.read_text() + "# changed\n")
    (elsewhere / "torch.py").write_text("raise RuntimeError('torch was imported')")
    done = fme(elsewhere, *again, "num_epochs=3")
    assert done.returncode == 2
    assert "error: reward_files.bright '" in done.stderr
    assert "SHA-256" in done.stderr
    reward.unlink()
    done = fme(elsewhere, *again, "num_epochs=3")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: reward_files.bright = '{reward}:Brightness': there is no file {reward}; ")


def test_the_methods_own_check_is_told_before_torch_is_imported(folder):
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    done = train(folder, "sample.num_image_per_prompt=1", "sample.groups_per_epoch=4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sample.num_image_per_prompt = 1 leaves best_of nothing to choose from")
