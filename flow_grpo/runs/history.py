"""A run's metrics.jsonl: one strict JSON object a line, each whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import LIMITS, open_regular, parse_json, strict_json, write_atomically
from flow_grpo.paths import identity
from flow_grpo.rewards.chosen import split_models


def append_line(path: Path, record: Mapping[str, Any], create: bool = True) -> None:
    """Append one object; an OSError, such as of a full disk, leaves what was there before.

    Args:
        create: whether a file that is not there is made; otherwise it is a FileNotFoundError.
    """
    line = (strict_json(record) + "\n").encode()
    if not create and not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(before)
            raise


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a last line torn by a crash is left out.

    Raises:
        ConfigError: if another line is not a JSON object with a step, or the file cannot be read.
    """
    history = []
    for number, line, last in _lines(path):
        record = _record(line, f"{path}, line {number},", torn=last)
        if record is not None:
            history.append(record)
    return history


def salvage_history(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that can be read, in order, and how many cannot."""
    history, lost = [], 0
    for number, line, last in _lines(path):
        try:
            record = _record(line, f"line {number}", torn=last)
        except ConfigError:
            lost += 1
            continue
        if record is not None:
            history.append(record)
    return history, lost


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Replace the file in one piece."""
    write_atomically(path, "".join(strict_json(line) + "\n" for line in history))


def digest_of_history(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of what has been logged so far, which is on the disk afterwards: for a checkpoint."""
    if not path.is_file():
        return {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def starts_with(path: Path, expected: Mapping[str, Any]) -> bool:
    """Whether the file still begins with what had been logged when a checkpoint was saved."""
    size, digest = expected.get("size"), hashlib.sha256()
    if not isinstance(size, int) or not path.is_file() or path.stat().st_size < size:
        return size == 0
    with open_regular(path) as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest() == expected.get("sha256")


def deciding_metric(config: Mapping[str, Any], label: str) -> str | None:
    """The metric that says how good a checkpoint is, of settings by their full names; never what is trained on.

    The judge's accuracy where there is a judge; else the first reward of `eval.rewards` that is held out; None where
    there is neither. Whatever has the model of a reward that is trained on is that reward by another name, and no
    measure of it. A reward of the gate is trained on too: what it dislikes is penalised.
    """
    groups = ("reward_fn.", "reward_constraint.")
    trained = {key.partition(".")[2] for key, value in config.items() if key.startswith(groups) and value}
    trained |= set(config.get("shaping.gate_rewards") or ())
    models = {model for name in trained for model in _models(config, name)}
    judge = config.get("eval.judge")
    if judge and identity(judge) not in models:
        return f"{label}/judge/accuracy"
    for name in config.get("eval.rewards") or ():
        if name not in trained and not models & _models(config, name):
            return f"{label}/reward/{name}"
    return None


def _models(config: Mapping[str, Any], name: str) -> set[str]:
    """What a reward's checkpoints are."""
    named = config.get(f"reward_model.{name}")
    return set(map(identity, split_models(named))) if named else set()


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of a history was measured on the evaluation's samples."""
    return any(name.startswith(("eval/", "eval_ema/")) for name in line)


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, content and whether it is the last, of every line; one at a time is in memory."""
    bound = LIMITS["history"]
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > bound.value:
            raise ConfigError(f"{path} is larger than {bound}.")
        for number, line in enumerate(file, start=1):
            yield number, line.rstrip(b"\r\n"), file.tell() >= size


def _record(line: bytes, where: str, torn: bool) -> dict[str, Any] | None:
    """The object of a line; None for a line that a crash may have torn."""
    try:
        record = parse_json(line.decode("utf-8"), where)
    except UnicodeDecodeError:
        if torn:
            return None
        raise ConfigError(f"{where} is not UTF-8 text.") from None
    except ConfigError:
        if torn:
            return None
        raise
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        shown = json.dumps(record)[:60]
        raise ConfigError(f"{where} is not an object with an integer 'step': {shown!r}.")
    return record
