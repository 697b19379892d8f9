"""What a run is and ran on: config.json and environment.json in its folder, enough to repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.messages import say
from flow_grpo.runs.folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    config_digest,
    flatten,
    keep_damaged,
)
from flow_grpo.runs.lock import command_line
from flow_grpo.runs.saved import checkpoint_state

if TYPE_CHECKING:
    from flow_grpo.settings import Settings


def write_records(
    folder: Path, settings: Settings, accelerator: Accelerator, resumed_from: Path | None
) -> dict[str, Any]:
    """Write config.json and environment.json, which is returned and keeps what earlier sessions wrote.

    Args:
        resumed_from: the checkpoint from which the run of this folder goes on; None: it begins here.

    Raises:
        ConfigError: the folder cannot be written.
    """
    config = json.loads(strict_json(settings.config.to_dict() | {"run_name": folder.name}))
    environment = describe_environment(settings, accelerator)
    if resumed_from is not None:
        environment |= _earlier(folder, config, resumed_from)
    text = strict_json(config, indent=2) + "\n"
    environment["config_sha256"] = config_digest(text.encode())
    try:
        write_atomically(folder / CONFIG_FILE, text)
        write_atomically(folder / ENVIRONMENT_FILE, strict_json(environment, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}).") from None
    return environment


def _earlier(folder: Path, config: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What environment.json takes over from the sessions before; a damaged one is kept under another name."""
    found: dict[str, Any] = {}
    if run_id := checkpoint_state(checkpoint).get("run_id"):
        found["run_id"] = run_id
    before = _readable(folder, CONFIG_FILE)
    if before is not None:
        old, new = flatten(before), flatten(config)
        found["config_changes"] = {key: [old.get(key), new[key]] for key in new if old.get(key) != new[key]}
    earlier = _readable(folder, ENVIRONMENT_FILE)
    if earlier is not None and isinstance(earlier.get("run_id"), str):
        sessions = earlier.pop("earlier_sessions", [])
        sessions = sessions if isinstance(sessions, list) else []
        found |= {"run_id": earlier["run_id"], "earlier_sessions": [*sessions, earlier]}
    return found


def _readable(folder: Path, name: str) -> dict[str, Any] | None:
    """A record of the run; None for one that is missing or damaged, which is told and kept."""
    path = folder / name
    try:
        return read_object(path)
    except ConfigError as error:
        if path.exists():
            say(f"{str(error).rstrip('.')}: it is written anew, and the old one is now {keep_damaged(path)}.")
        return None


def describe_environment(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """What a run ran on and with: enough to repeat it."""
    return {
        "run_id": uuid.uuid4().hex[:8],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "working_folder": os.getcwd(),  # that relative paths in the configuration start from
        "git": _git_state(),
        "device": _device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "batch_plan": asdict(settings.plan),
        "config_changes": {},  # against the session before, of a resumed run: key -> [old, new]
        "earlier_sessions": [],  # environments of the sessions before, of a resumed run
    }


@cache  # a process has those that it began with
def _package_versions() -> dict[str, str]:
    distributions = importlib.metadata.distributions()
    return dict(sorted((package.name, package.version) for package in distributions if package.name))


def _git_state() -> dict[str, Any] | None:
    """Revision of this code and whether it has uncommitted changes; None outside a git checkout of it."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    status = _git(here.parent, "status", "--porcelain")
    return {"revision": _git(here.parent, "rev-parse", "HEAD"), "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({models[0] if models else platform.machine()})"
