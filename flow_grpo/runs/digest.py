"""Which base model a checkpoint belongs to: a digest of its files, since a folder's name says little."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.files import read_object, sha256
from flow_grpo.models.hub import INDEX
from flow_grpo.models.lora_files import PEFT_CONFIG, read_lora
from flow_grpo.models.pipeline_files import family_of, whole_folder
from flow_grpo.paths import find
from flow_grpo.runs.saved import checkpoint_state

READ = (".safetensors", ".bin", ".json", ".model", ".txt")  # weights, configurations, vocabularies
NOT_CONTENT = "scheduler"  # settings of the sampler, not of the weights


def base_digest(pretrained: ConfigDict | FrozenConfigDict) -> str | None:
    """SHA-256 over the files of a pipeline's parts, and of the LoRA that is merged into it.

    None for a hub's model that is not whole in its cache. Large files of that cache are links to names that are their
    digests: those are not read, nor are the parts that `config.pretrained.skip` leaves out.

    Args:
        pretrained: `config.pretrained`.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = whole_folder(pretrained.model, pretrained.revision, pretrained.skip)
    if folder is None:
        return None
    files = _files(folder, pretrained.skip)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_digest, files)
        lines = [f"{file.relative_to(folder).as_posix()} {found}\n" for file, found in zip(files, digests, strict=True)]
    if pretrained.lora:
        lines += [f"lora {sha256(file)}\n" for file in _lora_files(Path(find(pretrained.lora)))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _lora_files(path: Path) -> list[Path]:
    """The weights of a LoRA, and the settings beside them."""
    file = read_lora(path).path
    return [file, *(settings for settings in [file.parent / PEFT_CONFIG] if settings.is_file())]


def _files(folder: Path, skip: Sequence[str]) -> list[Path]:
    """What a pipeline loads of its parts: the folders that its index names."""
    unread = {NOT_CONTENT, *(family_of(folder).without(skip) if skip else ())}
    parts = [name for name in read_object(folder / INDEX) if (folder / name).is_dir() and name not in unread]
    return sorted(f for part in parts for f in (folder / part).rglob("*") if f.suffix in READ and f.is_file())


def _digest(file: Path) -> str:
    """Of the content; of the hub's cache, the name that a link points to."""
    if file.is_symlink():
        target = Path(os.readlink(file)).name
        if re.fullmatch(r"[0-9a-f]{64}", target):
            return target
    return sha256(file)


def base_words(pretrained: ConfigDict | FrozenConfigDict) -> str:
    """The base model, as sentences of its mismatch begin."""
    merged = f", with config.pretrained.lora = {pretrained.lora!r}," if pretrained.lora else ""
    return f"config.pretrained.model = {pretrained.model!r}{merged}"


def base_mismatch(checkpoint: Path, digest: str | None) -> str | None:
    """How the base model that a checkpoint was trained from differs from one with this digest, in words; None: not."""
    recorded = checkpoint_state(checkpoint).get("base_sha256")
    if recorded is None or digest is None or recorded == digest:
        return None
    return (
        f"holds other weights or settings than those that {checkpoint} was trained from "
        f"(SHA-256 {digest[:12]}..., not {str(recorded)[:12]}...); take the same base model."
    )
