"""Prompt files, and which prompts an epoch trains on.

The order of the prompts is an infinite stream: one keyed permutation of the dataset after another. An epoch takes the
next `groups` entries, from a position that checkpoints keep, whatever the number of processes; every prompt is used
once before any is used again, also where the number of groups changes on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flow_grpo.errors import ConfigError
from flow_grpo.randomness import keyed_generator
from flow_grpo.settings import BatchPlan
from flow_grpo.types import PromptBatch

FETCHED_FOLDER = "assets/prompts/pickscore"
FETCH_COMMAND = (
    "python scripts/train/fetch_prompts.py --dataset yuvalkirstain/pickapic_v1_no_images"
    f" --column caption --out {FETCHED_FOLDER}"
)


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of one file, in its order."""

    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]  # what else the line of a .jsonl file says; {} for .txt

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def load(path: str) -> PromptDataset:
        """Read a .txt file (one prompt a line) or a .jsonl file ({"prompt": ..., ...}); blank lines are skipped.

        Raises ConfigError when the file is missing, empty, of another kind, or has a line that is not a prompt.
        """
        entries = []
        parse = _parser(path)
        for number, line in enumerate(_read(path).split("\n"), start=1):
            if line.strip():
                entries.append(parse(line, f"line {number} of the prompt file {path}"))
        if not entries:
            raise ConfigError(f"the prompt file {path} is empty: it needs at least one prompt{_how_to_fetch(path)}.")
        prompts, metadata = zip(*entries, strict=True)
        return PromptDataset(prompts, metadata)


def epoch_prompts(dataset: PromptDataset, plan: BatchPlan, seed: int, start: int, rank: int) -> PromptBatch:
    """The prompts of the images that process `rank` makes in an epoch: each of its prompts `group_size` times.

    A group may be split between processes; its members share `group_ids`.

    Args:
        start: position in the stream, the number of prompts that the epochs before have drawn.
    """
    sample_ids = torch.arange(plan.images)[plan.process_slice(rank)]  # (N,)
    group_ids = sample_ids // plan.group_size  # (N,)
    drawn = _stream(len(dataset), seed, start=start, count=plan.groups)
    rows = [drawn[group] for group in group_ids.tolist()]
    return PromptBatch(
        prompts=tuple(dataset.prompts[row] for row in rows),
        metadata=tuple(dataset.metadata[row] for row in rows),
        sample_ids=sample_ids,
        group_ids=group_ids,
    )


def _stream(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start ... start + count - 1 of the stream of permutations of range(size)."""
    first, last = start // size, (start + count - 1) // size
    passes = [torch.randperm(size, generator=keyed_generator(seed, "prompts", i)) for i in range(first, last + 1)]
    offset = start - first * size
    return torch.cat(passes)[offset : offset + count].tolist()


def _read(path: str) -> str:
    """The file's text; ConfigError when there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"the prompt file {path} does not exist{_how_to_fetch(path)}.")
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"line {number} of the prompt file {path} is not UTF-8 text.") from None


def _how_to_fetch(path: str) -> str:
    """The second half of the sentence about a missing file of fetched prompts."""
    return f"; fetch it with `{FETCH_COMMAND}`" if FETCHED_FOLDER in Path(path).as_posix() else ""


def _parser(path: str) -> Callable[[str, str], tuple[str, dict[str, Any]]]:
    """The function that reads one line of this kind of file."""
    parsers = {".txt": _parse_text, ".jsonl": _parse_json}
    suffix = Path(path).suffix
    if suffix not in parsers:
        raise ConfigError(f"the prompt file {path} ends in {suffix!r}: only .txt and .jsonl are read.")
    return parsers[suffix]


def _parse_text(line: str, where: str) -> tuple[str, dict[str, Any]]:
    return line.strip(), {}


def _parse_json(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON ({error.msg}, column {error.colno}).") from None
    prompt = entry.pop("prompt", None) if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'{where} must be an object whose "prompt" is a string that is not empty.')
    return prompt.strip(), entry
