"""Runs for tests of what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from config.base import get_config
from flow_grpo.batching import plan_batches
from flow_grpo.runs.progress import Counters
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings

NewRun = Callable[..., Run]


def make_settings(logdir: Path, **overrides: Any) -> Settings:
    config = get_config()
    config.update({"logdir": str(logdir), "run_name": "run", "trackers": (), **overrides})
    return Settings(FrozenConfigDict(config), plan_batches(groups=10, group_size=8, updates=2, num_processes=1), 1)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def finished_checkpoint(folder: Path, epoch: int) -> None:
    """What a run of before manifests would have left."""
    checkpoint = folder / f"checkpoints/checkpoint-{epoch:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"weights": {}, "counters": Counters(epoch=epoch).state_dict()}))
    (checkpoint / "training_state.pt").write_bytes(b"")


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")
