"""Read what wandb wrote offline: its file is LevelDB's log of protobuf records, behind seven bytes of its own."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

IDENTIFICATION, BLOCK, HEADER = 7, 32768, 7
FULL, LAST = 1, 4  # kinds of parts after which a record is whole


def read_records(path: Path) -> list[Record]:
    """All records of a .wandb file."""
    content, place, found, parts = path.read_bytes(), IDENTIFICATION, [], b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        if place + HEADER + length > len(content):
            break  # half written
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found


class OfflineRun:
    """The one run that wandb wrote below a folder, and has ended."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.glob("wandb/offline-run-*/*.wandb")
        self.records = self._whole()
        self.run = next(r.run for r in self.records if r.HasField("run"))

    def _whole(self, patience: float = 30.0) -> list[Record]:
        """The records up to the last: wandb's own process writes them, and goes on when `finish` has returned."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            records = read_records(self.path)
            if any(r.HasField("exit") for r in records):
                return records
            time.sleep(0.02)
        raise AssertionError(f"{self.path} has no end")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged, row by row."""
        return [_items(r.history.item) for r in self.records if r.HasField("history")]

    @property
    def config(self) -> dict[str, Any]:
        """By key."""
        told = [self.run.config, *(r.config for r in self.records if r.HasField("config"))]
        return {name: value for part in told for name, value in _items(part.update).items()}

    @property
    def summary(self) -> dict[str, Any]:
        """What was set by hand, and what wandb last made of the rest."""
        told = [r.summary for r in self.records if r.HasField("summary")]
        return {name: value for part in told for name, value in _items(part.update).items()}

    @property
    def metrics(self) -> dict[str, Any]:
        """Definitions by name or pattern."""
        return {r.metric.name or r.metric.glob_name: r.metric for r in self.records if r.HasField("metric")}

    @property
    def exit_code(self) -> int:
        """With which it ended."""
        return next(r.exit.exit_code for r in self.records if r.HasField("exit"))


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
