"""Prompt files. Torch is not imported."""

from __future__ import annotations

import json
import operator
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, overload

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.files import LIMITS, parse_json, read_bytes
from flow_grpo.paths import find
from flow_grpo.rules import NOT_NEGATIVE, text_fault

FETCHED_FOLDER = "assets/prompts/pickscore"
FETCH_COMMAND = f"fme prompts --dataset yuvalkirstain/pickapic_v1_no_images --column caption --out {FETCHED_FOLDER}"


LINE = re.compile(rb"[^\r\n]+")  # lines end in "\n", "\r\n" or "\r"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEGATIVE = "negative_prompt"  # of a line of JSON
MAX_NESTING = 64  # of what a line of JSON says besides the prompt; Python's own bound depends on who asks

Entry = tuple[str, dict[str, Any]]  # a prompt, and what else its line says
Parser = Callable[[str], Entry]  # of the text of a line; its ConfigError says what follows "line 3 of the prompt file"
Item = TypeVar("Item", covariant=True)


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of one file, in its order."""

    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]  # what else the line of a .jsonl file says; {} for .txt
    negatives: Mapping[str, str] = field(default_factory=dict)  # prompt -> its own negative one, of those that have one
    weights: Sequence[float] | None = None  # how often each is drawn, relative to the others; None: equally
    categories: Sequence[Sequence[int]] | None = None  # places of each category's; None: there are none

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def load(path: str) -> PromptDataset:
        """Read a .txt file (one prompt a line) or a .jsonl file ({"prompt": ..., ...}); blank lines are skipped.

        Every line is checked now, and parsed again when it is asked for: only the file's bytes are kept. A file that
        has not changed since is not read again.

        Raises:
            ConfigError: the file is missing, empty, too large, of another kind, or has a line that is not a prompt.
        """
        file = find(path)
        if not os.path.exists(file):
            raise ConfigError(f"the prompt file {path} does not exist{_how_to_fetch(path)}.")
        parse, found = _parser(path), os.stat(file)
        return _load(path, file, parse, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


def training_prompts(config: ConfigDict | FrozenConfigDict) -> PromptDataset:
    """`config.prompts.train`, to be drawn as `config.sample.prompt_sampling` says.

    Raises:
        ConfigError: as `PromptDataset.load`; or a line lacks the category, has a weight that is none, or none has one.
    """
    path, sample = config.prompts.train, config.sample
    dataset = PromptDataset.load(path)
    if sample.prompt_sampling == "weighted":
        return replace(dataset, weights=_weights(dataset, path))
    if sample.prompt_sampling == "balanced":
        return replace(dataset, categories=_categories(dataset, path, sample.prompt_category))
    return dataset


def _weights(dataset: PromptDataset, path: str) -> array[float]:
    """Of each prompt; 1 where a line has none."""
    weights, said = array("d"), False
    for number, metadata in enumerate(dataset.metadata, 1):
        weight, said = metadata.get("weight", 1.0), said or "weight" in metadata
        if not NOT_NEGATIVE.accepts(weight):
            raise ConfigError(
                f'prompt {number} of {path} has the "weight" {weight!r:.60}; it takes {NOT_NEGATIVE.allowed}.'
            )
        weights.append(weight)
    if not said or not any(weights):
        raise ConfigError(
            f'config.sample.prompt_sampling = "weighted" goes by the "weight" of each line, and {path} has none above '
            '0; it takes "uniform", or a .jsonl whose lines have weights.'
        )
    return weights


def _categories(dataset: PromptDataset, path: str, key: str) -> list[list[int]]:
    """The places of the prompts of each category."""
    found: dict[str | int, list[int]] = {}
    for place, metadata in enumerate(dataset.metadata):
        category = metadata.get(key)
        if not isinstance(category, str | int) or isinstance(category, bool):
            raise ConfigError(
                f"prompt {place + 1} of {path} has no {key!r} that is text or a whole number, which config.sample."
                'prompt_sampling = "balanced" goes by; it takes one in every line, or another config.sample.'
                "prompt_category."
            )
        found.setdefault(category, []).append(place)
    return list(found.values())


@lru_cache(maxsize=4)  # training, test and diversity prompts: the check of a configuration reads them first
def _load(path: str, file: str, parse: Parser, version: tuple[int, ...]) -> PromptDataset:
    """`version` changes with the file's content."""
    content = read_bytes(Path(file), "prompts", "the prompt file ")
    longest = LIMITS["prompt"].value
    spans = array("q")  # the first byte, and one past the last, of every line that is not blank
    negatives: dict[str, str] = {}
    for line in LINE.finditer(content, len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0):
        try:
            text = _decoded(line[0], longest)
            if text.strip():
                _add_negative(negatives, *parse(text))
                spans.extend(line.span())
        except ConfigError as error:
            raise ConfigError(f"line {_number(content, line.start())} of the prompt file {path}{error}") from None
    if not spans:
        raise ConfigError(f"the prompt file {path} is empty: it needs at least one prompt{_how_to_fetch(path)}.")
    lines = _Lines(content, spans, parse)
    return PromptDataset(_Column(lines, 0), _Column(lines, 1), negatives)


def _add_negative(negatives: dict[str, str], prompt: str, metadata: Mapping[str, Any]) -> None:
    """Take the negative prompt of a line, if it has one: images are known by their prompt, so each has one at most."""
    found = metadata.get(NEGATIVE)
    if found is not None and negatives.setdefault(prompt, found) != found:
        raise ConfigError(f" has another {NEGATIVE!r} than an earlier line of the same prompt.")


def own_negatives(config: ConfigDict | FrozenConfigDict) -> dict[str, str]:
    """Prompt -> its own negative one, of all prompts that a configuration trains on or evaluates.

    Raises:
        ConfigError: a prompt has two in different files.
    """
    found: dict[str, str] = {}
    for name in ("train", "test", *(["eval_diversity"] if config.eval_diversity else [])):
        for prompt, negative in PromptDataset.load(config.prompts[name]).negatives.items():
            if found.setdefault(prompt, negative) != negative:
                raise ConfigError(
                    f"config.prompts.{name} = {config.prompts[name]!r} has another {NEGATIVE!r} of {prompt!r:.80} than "
                    "the prompt files before it; a prompt takes one."
                )
    return found


@dataclass(frozen=True)
class _Lines:
    """The lines of a prompt file that are not blank."""

    content: bytes
    spans: array[int]  # first byte and one past the last of line 0, of line 1, ...
    parse: Parser

    def entry(self, index: int) -> Entry:
        """What a line says."""
        start, end = self.spans[2 * index : 2 * index + 2]
        return self.parse(self.content[start:end].decode("utf-8"))


class _Column(Sequence[Item]):
    """One of the two things that every line says. Equal to any sequence of the same items."""

    def __init__(self, lines: _Lines, which: int) -> None:
        self._lines, self._which = lines, which

    def __len__(self) -> int:
        return len(self._lines.spans) // 2

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]  # raises the IndexError
        if isinstance(places, range):
            return tuple(self[place] for place in places)
        return self._lines.entry(places)[self._which]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def _how_to_fetch(path: str) -> str:
    """The second half of the sentence about a missing file of fetched prompts."""
    return f"; fetch it with `{FETCH_COMMAND}`" if FETCHED_FOLDER in Path(path).as_posix() else ""


def _number(content: bytes, start: int) -> int:
    """The number of the line that begins at a byte, from 1 on."""
    before = content[:start].replace(b"\r\n", b"\n")
    return before.count(b"\n") + before.count(b"\r") + 1


def _parser(path: str) -> Parser:
    """The function that reads one line of this kind of file."""
    parsers = {".txt": _parse_text, ".jsonl": _parse_json}
    suffix = Path(path).suffix
    if os.path.isdir(find(path)):
        raise ConfigError(f"the prompt file {path} is a folder; it takes a .txt or a .jsonl.")
    if suffix not in parsers:
        raise ConfigError(f"the prompt file {path} ends in {suffix!r}: only .txt and .jsonl are read.")
    return parsers[suffix]


def _decoded(line: bytes, longest: int) -> str:
    """The text of a line of at most so many bytes."""
    if len(line) > longest:
        raise ConfigError(f" is longer than {LIMITS['prompt']}.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(" is not UTF-8 text.") from None


def _parse_text(line: str) -> Entry:
    return _checked(line), {}


def _parse_json(line: str) -> Entry:
    entry = parse_json(line, "")
    prompt = entry.pop("prompt", None) if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(' must be an object whose "prompt" is a string that is not empty.')
    if not _depth_is_at_most(MAX_NESTING, entry):
        raise ConfigError(f" is JSON nested more than {MAX_NESTING} deep.")
    if "\\u" in line and (fault := text_fault(json.dumps(entry, ensure_ascii=False))):  # what else is no text?
        raise ConfigError(f" {fault}.")
    if not isinstance(entry.get(NEGATIVE, ""), str | None):
        raise ConfigError(f" has a {NEGATIVE!r} that is no text.")
    return _checked(prompt), entry


def _checked(prompt: str) -> str:
    """The prompt without the blanks around it."""
    if fault := text_fault(prompt):
        raise ConfigError(f" {fault}.")
    return prompt.strip()


def _depth_is_at_most(depth: int, value: Any) -> bool:
    """Whether a JSON value has at most so many levels of objects and lists."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_depth_is_at_most(depth - 1, item) for item in inner)
