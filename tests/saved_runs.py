"""Change what a checkpoint holds, for the tests of what reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flow_grpo.runs.folder import config_digest
from flow_grpo.runs.manifest import write_manifest


def edit_tensors(checkpoint: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every tensor by change(name, tensor); the manifest agrees afterwards."""
    path = checkpoint / "training_state.safetensors"
    save_file({name: change(name, value) for name, value in load_file(path).items()}, path)
    write_manifest(checkpoint)


def edit_state(checkpoint: Path, **values: Any) -> None:
    """Set keys of state.json; the manifest agrees afterwards."""
    (checkpoint / "state.json").write_text(json.dumps(read_state(checkpoint) | values))
    write_manifest(checkpoint)


def make_old(checkpoint: Path, names: list[str]) -> None:
    """Turn a checkpoint into one of before the manifest; `names` are the trained weights', in the model's order."""
    tensors, state = load_file(checkpoint / "training_state.safetensors"), read_state(checkpoint)
    moments = {
        number: {moment: tensors[f"optimizer.{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
        for number, name in enumerate(names)
    }
    average = state["plain"]["average"] | {"shadow_params": [tensors[f"average.{name}"] for name in names]}
    saved = {"trainable": [tensors[f"weights.{name}"] for name in names], "ema": average, "scaler": None}
    torch.save(saved | {"optimizer": {"state": moments, "param_groups": []}}, checkpoint / "training_state.pt")
    counters = {name: value for name, value in state["counters"].items() if name != "groups"}
    old = {"counters": counters, "score": state["score"], "weights": state["weights"]}
    (checkpoint / "state.json").write_text(json.dumps(old))
    (checkpoint / "training_state.safetensors").unlink()
    (checkpoint / "manifest.json").unlink()


def edit_config(folder: Path, **values: Any) -> None:
    """Set keys of a run's config.json, "train.ema" for a nested one; environment.json agrees afterwards."""
    path, records = folder / "config.json", json.loads((folder / "environment.json").read_text())
    config = json.loads(path.read_text())
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        (config[group] if group else config)[key] = value
    path.write_text(json.dumps(config))
    records["config_sha256"] = config_digest(path.read_bytes())
    (folder / "environment.json").write_text(json.dumps(records))


def spoil(checkpoint: Path) -> None:
    """Make a trained weight, and its average, nan."""
    first = sorted(
        name for name in load_file(checkpoint / "training_state.safetensors") if name.startswith("weights.")
    )[0]
    spoilt = (first, first.replace("weights.", "average.", 1))
    edit_tensors(checkpoint, lambda name, value: torch.full_like(value, torch.nan) if name in spoilt else value)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json says."""
    return json.loads((checkpoint / "state.json").read_text())
