"""Which base model a checkpoint belongs to: a digest of its files, since a folder's name says little."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flow_grpo.files import read_object, sha256
from flow_grpo.paths import find
from flow_grpo.runs.saved import checkpoint_state

READ = (".safetensors", ".bin", ".json", ".model", ".txt")  # weights, configurations, vocabularies
INDEX = "model_index.json"
NOT_CONTENT = "scheduler"  # settings of the sampler, not of the weights


def base_digest(model: str, revision: str = "") -> str | None:
    """SHA-256 over the files of a pipeline's parts; None for a hub's model that is not in its cache.

    Large files of the hub's cache are links to names that are their digests: those are not read.

    Args:
        model: folder or hub id, as `config.pretrained.model`.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = Path(find(model))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, INDEX, revision=revision or None)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = _files(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_digest, files)
        lines = [f"{file.relative_to(folder).as_posix()} {found}\n" for file, found in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """What a pipeline loads of its parts: the folders that its index names."""
    parts = [name for name in read_object(folder / INDEX) if (folder / name).is_dir() and name != NOT_CONTENT]
    return sorted(f for part in parts for f in (folder / part).rglob("*") if f.suffix in READ and f.is_file())


def _digest(file: Path) -> str:
    """Of the content; of the hub's cache, the name that a link points to."""
    if file.is_symlink():
        target = Path(os.readlink(file)).name
        if re.fullmatch(r"[0-9a-f]{64}", target):
            return target
    return sha256(file)


def base_mismatch(checkpoint: Path, digest: str | None) -> str | None:
    """How the base model that a checkpoint was trained from differs from one with this digest, in words; None: not."""
    recorded = checkpoint_state(checkpoint).get("base_sha256")
    if recorded is None or digest is None or recorded == digest:
        return None
    return (
        f"holds other weights or settings than those that {checkpoint} was trained from "
        f"(SHA-256 {digest[:12]}..., not {str(recorded)[:12]}...); take the same base model."
    )
