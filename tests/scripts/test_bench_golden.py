"""scripts/bench/golden.py: what it calls equal, and what it does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.bench import golden
from scripts.bench.golden import CASES, Case, changes_of, difference
from tests.runs.new_runs import finished_checkpoint

ROOT = Path(__file__).parents[2]
LINE = {"step": 1, "seconds": 2.5, "train/loss": 0.25, "train/reward": None}
WEIGHT = torch.tensor([0.0, 1.0, torch.nan])


def run_of(folder: Path, line: dict = LINE, weight: torch.Tensor = WEIGHT, name: str = "a") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    finished_checkpoint(folder, 1)
    save_file({name: weight}, folder / "checkpoints/checkpoint-000001/weights.safetensors")
    return folder


def test_the_same_numbers_are_equal_whatever_the_clock_says(tmp_path):
    assert difference(run_of(tmp_path / "a"), run_of(tmp_path / "b", LINE | {"seconds": 9.0})) == ""


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"line": LINE | {"train/loss": 0.25000000000000006}}, "metrics: train/loss at step 1"),
        ({"line": LINE | {"train/more": 1.0}}, "metrics: train/more at step 1"),
        ({"weight": torch.tensor([-0.0, 1.0, torch.nan])}, "tensors: weights.safetensors: a differs"),
        ({"weight": WEIGHT.double()}, "tensors: weights.safetensors: a differs"),
        ({"name": "b"}, "is in one of them alone (2 are)"),
    ],
)
def test_one_bit_more_or_less_is_not(tmp_path, other, said):
    assert said in difference(run_of(tmp_path / "a"), run_of(tmp_path / "b", **other))


def test_a_metric_that_is_new_on_purpose_may_be_missing_in_the_older_tree_but_not_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "NEW", ("train/more",))
    runs = [
        run_of(tmp_path / f"{n}", LINE | extra) for n, extra in enumerate(({}, *({"train/more": x} for x in (1, 2))))
    ]
    assert difference(runs[0], runs[1]) == ""
    assert "train/more" in difference(runs[1], runs[2])
    assert "train/more" in difference(runs[1], runs[0])


def test_renamed_keys_and_metrics_have_their_old_names_in_the_older_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "KEYS", {"train.beta": ("train.kl", {0.25: "quarter"})})
    monkeypatch.setattr(golden, "METRICS", {"train/loss": "train/objective"})
    case = Case("x", "tiny_sd3", {"train.beta": 0.5})
    assert "--config.train.kl=0.5" in changes_of(case, tmp_path / "run", older=True)
    assert "--config.train.beta=0.5" in changes_of(case, tmp_path / "run", older=False)
    assert "--config.train.kl=quarter" in changes_of(Case("y", "tiny_sd3", {"train.beta": 0.25}), tmp_path, older=True)
    new = {"train/objective" if key == "train/loss" else key: value for key, value in LINE.items()}
    assert difference(run_of(tmp_path / "a"), run_of(tmp_path / "b", new)) == ""


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 25


def test_a_revision_that_is_none_is_one_sentence():
    command = [sys.executable, "scripts/bench/golden.py", "--against", "no-such-revision", "--only", "grpo_sde"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --against no-such-revision names no commit.\n")


def test_the_committed_result_is_of_every_case():
    found = json.loads((ROOT / "assets/figures/golden/result.json").read_text())
    assert set(found["cases"]) == {case.name for case in CASES}
    assert found["equal"] == len(CASES)
    assert set(found["cases"].values()) == {"equal"}
    assert not found["changed"]
