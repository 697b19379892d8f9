"""The files of a run's evaluations: a record of what was measured of every image, and the images themselves, small.

RUN/evaluations/<label>_<epoch>.json          a Record (runs/record.py), written last: it is there whole or not at all
                <label>_<epoch>.webp          its sprite (runs/sprite.py): the images, small, in a grid
                base_features.safetensors     features of the base model's images (flow_grpo/evaluators/diversity.py)

What is read is checked. Nothing here imports torch: a page is made of records alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flow_grpo.diversity.paired import Change
from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, read_object, strict_json, write_atomically
from flow_grpo.messages import say
from flow_grpo.runs.folder import EVALUATIONS
from flow_grpo.runs.record import NONE_OF_THEM, Distances, Judged, Record, Sprite
from flow_grpo.runs.sprite import LONG_SIDE, draw_sprite

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
LABELS = ("eval", "eval_ema")  # of the current weights, and of their average
CHANGES = ("reward", "vendi", "reached", "judge")
DIGITS = 6  # significant, of every float


# --- writing --------------------------------------------------------------------------------------------


def record_path(folder: Path, label: str, epoch: int) -> Path:
    """Of an evaluation of the run in `folder`."""
    return folder / EVALUATIONS / f"{label}_{epoch:06d}.json"


def write_record(folder: Path, record: Record, images: Tensor | np.ndarray | None) -> Path:
    """Write a record of the run in `folder`, with a sprite of its images, in the place of an earlier one of its name.

    Args:
        images: (N, 3, H, W) in [0, 1], on the CPU; what is not finite is black. None: no sprite.

    Returns:
        the JSON's path.

    Raises:
        OSError: nothing of this record is left then.
    """
    path = record_path(folder, record.label, record.epoch)
    picture = path.with_suffix(".webp")
    sprite, pixels = None, b""
    if images is not None:
        sprite, pixels = draw_sprite(record, images, picture.name)
    plain = _plain(replace(record, sprite=sprite))
    text = strict_json(plain | {"sha256": _digest(plain)})
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # never an old record of new images
    try:
        if sprite is None:
            picture.unlink(missing_ok=True)
        else:
            write_atomically(picture, pixels)
        write_atomically(path, text + "\n")
    except OSError:
        picture.unlink(missing_ok=True)
        raise
    return path


def _plain(record: Record) -> dict[str, Any]:
    """The record's JSON."""
    plain = asdict(record)
    del plain["folder"]
    return {"format": FORMAT} | rounded(plain)


def _digest(plain: Mapping[str, Any]) -> str:
    """Of a record's JSON: the base model's numbers are read again at every evaluation, where a wrong digit counts."""
    return hashlib.sha256(strict_json(plain).encode()).hexdigest()


def rounded(value: Any) -> Any:
    """Every float in it to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def copy_base(source: Path, folder: Path) -> None:
    """Copy the base model's records of a run to another's folder, unless that has its own.

    Raises:
        ConfigError: a record, or its sprite, cannot be read.
        OSError: as of any file that is written.
    """
    for label in LABELS:
        path, target = record_path(source, label, 0), record_path(folder, label, 0)
        if not path.exists() or target.exists():
            continue
        picture = read_record(path).sprite_path
        target.parent.mkdir(exist_ok=True)
        if picture is not None:
            with open_regular(picture) as file:
                write_atomically(target.with_suffix(".webp"), file.read())
        with open_regular(path) as file:
            write_atomically(target, file.read())


# --- reading --------------------------------------------------------------------------------------------


def records_of(folder: Path, label: str = "eval", read: Callable[[Path], Record] | None = None) -> list[Record]:
    """A run's records of one label, by epoch; those that cannot be read are left out, with one word for all.

    `read`: in the place of `read_record`.
    """
    name = re.compile(rf"{re.escape(label)}_\d{{6,}}\.json")
    found, problems = [], []
    for path in sorted((folder / EVALUATIONS).glob(f"{label}_*.json")):
        if not name.fullmatch(path.name):
            continue
        try:
            found.append((read or read_record)(path))
        except ConfigError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        say(f"{problems[0]}{more}: left out.")
    return sorted(found, key=lambda record: record.epoch)


def read_record(path: Path) -> Record:
    """A record, every length and index in it checked.

    Raises:
        ConfigError: it is missing, damaged, too large, or of a later format.
    """
    content = read_object(path)
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise ConfigError(f"{path} is of format {version}, but this version reads up to {FORMAT}.")
    try:
        if version != FORMAT:
            raise _Damaged("its format is missing")
        record = _record(_Part(content, ""), path.parent)
        digest = content.pop("sha256", None)
        if digest is not None and digest != _digest(content):
            raise _Damaged("its numbers are not those that were written")
        return record
    except _Damaged as problem:
        raise ConfigError(f"{path} is damaged: {problem}.") from None


class _Damaged(Exception):
    """What is wrong with a record, in words."""


class _Part:
    """An object of a record's JSON, whose values are checked as they are taken out."""

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise _Damaged(f"{name} is not an object")
        self.value, self.prefix = value, f"{name}." if name else ""

    def _need(self, fine: bool, key: str, what: str) -> None:
        if not fine:
            raise _Damaged(f"{self.prefix}{key} is not {what}")

    def raw(self, key: str) -> Any:
        """As it is there."""
        if key not in self.value:
            raise _Damaged(f"it lacks {self.prefix}{key}")
        return self.value[key]

    def part(self, key: str) -> _Part | None:
        """An object, or None for null."""
        value = self.raw(key)
        return None if value is None else _Part(value, f"{self.prefix}{key}")

    def named(self, key: str) -> _Part:
        """An object."""
        return _Part(self.raw(key), f"{self.prefix}{key}")

    def text(self, key: str) -> str:
        value = self.raw(key)
        self._need(isinstance(value, str), key, "text")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        self._need(isinstance(value, bool), key, "true or false")
        return value

    def whole(self, key: str, least: int = 0) -> int:
        value = self.raw(key)
        self._need(_is_whole(value, least), key, f"a whole number of at least {least}")
        return value

    def number(self, key: str) -> float | None:
        value = self.raw(key)
        self._need(value is None or _is_finite(value), key, "a finite number")
        return None if value is None else float(value)

    def array(self, key: str, length: int | None = None) -> list[Any]:
        value = self.raw(key)
        self._need(isinstance(value, list), key, "a list")
        self._need(length in (None, len(value)), key, f"a list of {length}")
        return value

    def wholes(self, key: str, length: int | None = None, below: float = math.inf, distinct: bool = False) -> list[int]:
        """Whole numbers of [0, below)."""
        value = self.array(key, length)
        self._need(all(_is_whole(item) and item < below for item in value), key, f"whole numbers below {below}")
        self._need(not distinct or len(set(value)) == len(value), key, "a list of distinct numbers")
        return value

    def numbers(self, key: str, length: int, missing: bool = False) -> list[Any]:
        """Finite numbers; None among them where `missing`."""
        value = self.array(key, length)
        self._need(all(_is_finite(x) or (missing and x is None) for x in value), key, "a list of finite numbers")
        return [None if item is None else float(item) for item in value]

    def rows(self, key: str, lengths: Sequence[int]) -> list[list[float]]:
        """Lists of finite numbers, of these lengths."""
        rows = self.numbered(key, len(lengths))
        return [rows.numbers(str(i), length) for i, length in enumerate(lengths)]

    def numbered(self, key: str, length: int) -> _Part:
        """A list, as an object whose keys are positions."""
        return _Part({str(i): item for i, item in enumerate(self.array(key, length))}, f"{self.prefix}{key}")


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # not a truth value; nan fails


def _record(found: _Part, folder: Path) -> Record:
    prompts = found.array("prompts")
    if not all(isinstance(prompt, str) for prompt in prompts) or len(set(prompts)) < len(prompts):
        raise _Damaged("prompts are not distinct texts")
    prompt = found.wholes("prompt", below=len(prompts))
    noise = found.wholes("noise", len(prompt))
    if len(set(zip(prompt, noise, strict=True))) < len(prompt):
        raise _Damaged("an image is in it twice")
    rewards, extra, changes = found.named("rewards"), found.named("extra"), found.named("changes")
    judge, sprite, diversity = found.part("judge"), found.part("sprite"), found.part("diversity")
    return Record(
        label=found.text("label"),
        epoch=found.whole("epoch"),
        prompts=prompts,
        prompt=prompt,
        noise=noise,
        name=found.text("name"),
        seconds=found.number("seconds") or 0.0,
        network_evaluations=found.whole("network_evaluations"),
        setting=found.text("setting") if "setting" in found.value else "",
        rewards={name: rewards.numbers(name, len(prompt), missing=True) for name in rewards.value},
        judge=None if judge is None else _judged(judge, len(prompt), len(prompts)),
        sprite=None if sprite is None else _sprite_of(sprite, len(prompt)),
        diversity=None if diversity is None else _distances(diversity, len(prompts)),
        changes={name: _change(changes.named(name)) for name in changes.value if name in CHANGES},
        extra={name: extra.number(name) for name in extra.value},
        folder=folder,
    )


def _judged(found: _Part, images: int, prompts: int) -> Judged:
    guess = found.array("guess", images)
    if not all(item is None or (_is_whole(item, NONE_OF_THEM) and item < prompts) for item in guess):
        raise _Damaged("judge.guess are not prompts")
    probability = found.numbers("probability", images, missing=True)
    return Judged(found.text("model"), found.flag("independent"), guess, probability)


def _sprite_of(found: _Part, images: int) -> Sprite:
    file, (width, height) = found.text("file"), found.wholes("cell", 2)
    if Path(file).name != file or not file.endswith(".webp"):
        raise _Damaged("sprite.file is not the name of a .webp file beside it")
    if not (0 < width <= LONG_SIDE and 0 < height <= LONG_SIDE):
        raise _Damaged(f"sprite.cell is not a size of 1 to {LONG_SIDE} pixels")
    return Sprite(file, (width, height), found.whole("columns", 1), found.wholes("images", None, images, True))


def _distances(found: _Part, prompts: int) -> Distances:
    chosen = found.wholes("prompts", below=prompts, distinct=True)
    counts = found.wholes("images", len(chosen))
    noise = found.numbered("noise", len(chosen))
    order = found.number("order")
    return Distances(
        features=found.text("features"),
        order=math.inf if order is None else order,
        prompts=chosen,
        images=counts,
        noise=[noise.wholes(str(i), n, distinct=True) for i, n in enumerate(counts)],
        within=found.rows("within", [n * (n - 1) // 2 for n in counts]),
        to_base=None if found.raw("to_base") is None else found.rows("to_base", [n * n for n in counts]),
        vendi=found.numbers("vendi", len(chosen)),
        rke=None if found.raw("rke") is None else found.numbers("rke", len(chosen)),
    )


def _change(found: _Part) -> Change:
    numbers = {name: found.number(name) for name in ("old", "new", "difference", "low", "high", "level")}
    known = {name: math.nan if value is None else value for name, value in numbers.items()}
    return Change(**known, images=found.whole("images"), paired=found.flag("paired"))
