"""docs/extending.md is true: its files, written into an empty folder, train an epoch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "train_mine.py", "train", "tiny_grpo", "--name", "mine", *SMALL, *changes]
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


def test_the_methods_own_check_is_told_before_torch_is_imported(folder):
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    done = train(folder, "sample.num_image_per_prompt=1", "sample.groups_per_epoch=4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sample.num_image_per_prompt = 1 leaves best_of nothing to choose from")
