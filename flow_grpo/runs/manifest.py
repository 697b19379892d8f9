"""What a checkpoint must hold: size and SHA-256 of its files; written last, checked before anything loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, sha256, strict_json, write_atomically

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List every file below a folder."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(folder / MANIFEST, strict_json({"files": files}, indent=1) + "\n")


def damage(folder: Path, deep: bool, needed: Sequence[str] = ()) -> str | None:
    """What is wrong with a folder that has a manifest, in words; None: nothing.

    Args:
        needed: files that the manifest must list.
        deep: read every file and compare its SHA-256; otherwise sizes alone are compared.
    """
    try:
        entries = dict(_entries(read_object(folder / MANIFEST)))
        for name in needed:
            if name not in entries:
                return f"its {MANIFEST} does not list {name}"
        for name, expected in entries.items():
            if problem := _difference(folder / name, name, expected, deep):
                return problem
    except ConfigError as error:
        return str(error).rstrip(".")
    return None


def _entries(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and what is expected of them; ConfigError if that is not what the manifest holds."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"its {MANIFEST} lists no files")
    for name, expected in files.items():
        if not isinstance(expected, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"its {MANIFEST} has no size and digest of {name!r}")
        yield name, expected


def _difference(path: Path, name: str, expected: Mapping[str, Any], deep: bool) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != expected.get("size"):
        return f"{name} has {size:,} bytes instead of {expected.get('size')}"
    if deep and sha256(path) != expected.get("sha256"):
        return f"the content of {name} has changed"
    return None
