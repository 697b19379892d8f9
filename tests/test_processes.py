"""One process and two give the same samples and the same gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "worker.py"


def run_worker(processes: int, method: str, models: Path, out: Path) -> dict[str, torch.Tensor]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(WORKER), method, str(models), str(out)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=WORKER.parent.parent)
    assert result.returncode == 0, result.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("method", ["grpo", "drtune"])
def test_one_and_two_processes_give_the_same_gradient_and_samples(random_models, tmp_path, method):
    """3 groups of 4, of which two processes share one; 7 evaluation images, which two do not divide."""
    one = run_worker(1, method, random_models, tmp_path / "one.pt")
    two = run_worker(2, method, random_models, tmp_path / "two.pt")
    assert one["gradient"].norm() > 0
    assert ((two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()).item() < 1e-5
    assert len(one["images"]) == len(two["images"]) == 7
    torch.testing.assert_close(two["images"], one["images"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["latents"], one["latents"], rtol=1e-5, atol=1e-5)
