"""The records of a run's evaluations: what was measured of every image, and the images themselves, small.

RUN/evaluations/<label>_<epoch>.json          a Record, written last: it is there whole or not at all
                <label>_<epoch>.webp          its sprite: the images, small, in a grid
                base_features.safetensors     features of the base model's images (flow_grpo/evaluators/diversity.py)

Nothing here imports torch: a page is made of records alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy.spatial.distance import squareform

from flow_grpo.diversity.paired import Change, change_of_means, change_of_reach, change_of_shares, change_of_vendi
from flow_grpo.errors import ConfigError
from flow_grpo.files import open_regular, read_object, strict_json, write_atomically
from flow_grpo.messages import say
from flow_grpo.runs.folder import EVALUATIONS

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
LABELS = ("eval", "eval_ema")  # of the current weights, and of their average
CHANGES = ("reward", "vendi", "reached", "judge")
DIGITS = 6  # significant, of every float
SMALL = 64  # pixels of the long side: images up to here are kept as they are, without loss
LONG_SIDE = 192  # pixels, to which larger ones are reduced
LOSSY = {"quality": 80}  # the WebP of larger ones
LOSSLESS = {"lossless": True, "quality": 50, "method": 2}  # of small ones; here `quality` is effort
MOST_PROMPTS, MOST_NOISES = 10, 8  # of larger ones
MOST_TILES = 4096  # of small ones: 50 MB of pixels at 64 x 64
COLUMNS = 16
FOLDERS = "folders "  # a setting begins so where images were not drawn, but there already
WEBP_SIDE = 16383  # pixels, at most


@dataclass(frozen=True)
class Judged:
    """What the judge makes of N images."""

    model: str  # directory or hub id
    independent: bool  # its model is none of the rewards' models in use
    guess: Sequence[int | None]  # (N,): index into the prompts that it likes best; None: the image is not finite
    probability: Sequence[float | None]  # (N,): of the image's own prompt, softmax at the judge's scale


@dataclass(frozen=True)
class Sprite:
    """Where the images are: row by row in one file, beside the record."""

    file: str
    cell: tuple[int, int]  # width and height, pixels
    columns: int
    images: Sequence[int]  # which of the N images, in the sprite's order


@dataclass(frozen=True)
class Distances:
    """Euclidean distances of unit features (0 to 2), prompt by prompt: cosine = 1 - distance^2 / 2."""

    features: str  # name of the extractor
    order: float  # q of the Vendi score
    prompts: Sequence[int]  # (P,): index into the record's prompts
    images: Sequence[int]  # (P,): n of each prompt
    noise: Sequence[Sequence[int]]  # (P, n): which images of the prompt
    within: Sequence[Sequence[float]]  # (P, n (n - 1) / 2): as scipy's pdist orders them
    to_base: Sequence[Sequence[float]] | None  # (P, n n): rows base images, columns this model's; None: of the base
    vendi: Sequence[float]  # (P,)
    rke: Sequence[float] | None  # (P,); None: no bandwidth fits


@dataclass(frozen=True)
class Record:
    """One evaluation of N images; None stands for a number that is not finite."""

    label: str  # "eval": the current weights, "eval_ema": the averaged ones
    epoch: int  # 0: the base model
    prompts: Sequence[str]  # distinct, in order
    prompt: Sequence[int]  # (N,): index into the prompts
    noise: Sequence[int]  # (N,): number of the image's noise among those of its prompt
    name: str = ""  # shown instead of "base model" or "epoch 10"
    seconds: float = 0.0  # of training
    network_evaluations: int = 0  # of training
    setting: str = ""  # digest of what decides the images and the trained reward; records that differ are not compared
    rewards: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # name -> (N,); "total": trained on
    judge: Judged | None = None
    sprite: Sprite | None = None
    diversity: Distances | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)  # of CHANGES, against the base; {} for the base
    extra: Mapping[str, float | None] = field(default_factory=dict)  # scalars of the same evaluation
    folder: Path = Path()  # that the record lies in, and its sprite

    @property
    def sprite_path(self) -> Path | None:
        """The file of the images."""
        return None if self.sprite is None else self.folder / self.sprite.file

    @property
    def drawn(self) -> bool:
        """Whether the images were drawn for it, from noises that other records share."""
        return not self.setting.startswith(FOLDERS)

    @property
    def images(self) -> dict[tuple[str, int], int]:
        """(prompt, noise) -> position of the image."""
        return {(self.prompts[p], s): i for i, (p, s) in enumerate(zip(self.prompt, self.noise, strict=True))}


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
        sprite, pixels = _sprite(record, images, picture.name)
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


def _sprite(record: Record, images: Tensor | np.ndarray, file: str) -> tuple[Sprite, bytes]:
    """The grid of the images that are kept, as WebP."""
    height, width = images.shape[2:]
    small = max(height, width) <= SMALL
    kept = _kept(record, COLUMNS * (WEBP_SIDE // height) if small else None)
    factor = 1.0 if small else LONG_SIDE / max(height, width)
    cell = (max(1, round(width * factor)), max(1, round(height * factor)))
    columns = min(COLUMNS, len(kept))
    grid = Image.new("RGB", (columns * cell[0], -(-len(kept) // columns) * cell[1]))
    for place, i in enumerate(kept):
        tile = Image.fromarray(_eight_bit(np.asarray(images[i])))
        row, column = divmod(place, columns)
        grid.paste(tile if small else tile.resize(cell, Image.Resampling.LANCZOS), (column * cell[0], row * cell[1]))
    buffer = io.BytesIO()
    grid.save(buffer, "WEBP", **(LOSSLESS if small else LOSSY))
    return Sprite(file, cell, columns, kept), buffer.getvalue()


def _kept(record: Record, room: int | None) -> list[int]:
    """Which images are in the sprite: of small ones all that there is room for, of large ones (None) the first of each
    of the first prompts.
    """
    order = range(len(record.prompt))
    if room is None:
        return [i for i in order if record.prompt[i] < MOST_PROMPTS and record.noise[i] < MOST_NOISES]
    return sorted(sorted(order, key=lambda i: (record.noise[i], record.prompt[i]))[: min(MOST_TILES, room)])


def _eight_bit(image: np.ndarray) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (np.nan_to_num(image, posinf=0.0, neginf=0.0).clip(0, 1).transpose(1, 2, 0) * 255).round().astype(np.uint8)


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
    if not all(item is None or (_is_whole(item) and item < prompts) for item in guess):
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


# --- against the base -----------------------------------------------------------------------------------


def with_changes(record: Record, base: Record, paired: bool = True) -> Record:
    """The record with its changes against the base, on the images that both have of one prompt and noise.

    There are none where the two were not drawn, or rewarded, alike. `paired`: False where images of one number have
    nothing in common, as in two folders of images.
    """
    if record.setting != base.setting:
        return replace(record, changes={})
    found = {
        "reward": _reward_change(record, base, paired),
        "vendi": _vendi_change(record, base, paired),
        "reached": _reach_change(record, base, paired),
        "judge": _judge_change(record, base, paired),
    }
    return replace(record, changes={name: change for name, change in found.items() if change is not None})


def _pairs(record: Record, base: Record) -> list[tuple[int, int]]:
    """Positions (in the base, in the record) of the images of one prompt and noise."""
    old = base.images
    return [(old[key], i) for key, i in record.images.items() if key in old]


def _reward_change(record: Record, base: Record, paired: bool) -> Change | None:
    before, after = base.rewards.get("total"), record.rewards.get("total")
    if before is None or after is None:
        return None
    known = [(before[i], after[j], record.prompt[j]) for i, j in _pairs(record, base)]
    known = [row for row in known if None not in row]
    if not known:
        return None
    old, new, groups = (np.array(column) for column in zip(*known, strict=True))
    return change_of_means(old.astype(float), new.astype(float), groups, paired)


def _judge_change(record: Record, base: Record, paired: bool) -> Change | None:
    before, after = base.judge, record.judge
    if before is None or after is None or before.model != after.model or _judged_among(record) != _judged_among(base):
        return None
    pairs = [(i, j) for i, j in _pairs(record, base) if None not in (before.guess[i], after.guess[j])]
    if not pairs:
        return None
    old = np.array([before.guess[i] == base.prompt[i] for i, _ in pairs])
    return change_of_shares(old, np.array([after.guess[j] == record.prompt[j] for _, j in pairs]), paired)


def _judged_among(record: Record) -> set[str]:
    """The prompts among which the judge chose: of fewer, more images are right by chance."""
    guesses = record.judge.guess if record.judge else ()
    return {record.prompts[p] for p, guess in zip(record.prompt, guesses, strict=True) if guess is not None}


def _matched(record: Record, base: Record) -> list[tuple[int, int]]:
    """Places (in the base's distances, in the record's) of the prompts that both measured on the same noises."""
    before, after = base.diversity, record.diversity
    if before is None or after is None or before.features != after.features:
        return []
    old = {base.prompts[p]: i for i, p in enumerate(before.prompts)}
    places = [(old.get(record.prompts[p], -1), j) for j, p in enumerate(after.prompts)]
    return [(i, j) for i, j in places if i >= 0 and list(before.noise[i]) == list(after.noise[j])]


def _vendi_change(record: Record, base: Record, paired: bool) -> Change | None:
    places = _matched(record, base)
    if not places or base.diversity is None or record.diversity is None:
        return None
    old = [squareform(base.diversity.within[i]) for i, _ in places]
    new = [squareform(record.diversity.within[j]) for _, j in places]
    return change_of_vendi(old, new, record.diversity.order, paired)


def _reach_change(record: Record, base: Record, paired: bool) -> Change | None:
    places = _matched(record, base)
    if not places or base.diversity is None or record.diversity is None or record.diversity.to_base is None:
        return None
    old = [squareform(base.diversity.within[i]) for i, _ in places]
    new = [squareform(record.diversity.within[j]) for _, j in places]
    across = [
        np.reshape(record.diversity.to_base[j], (len(matrix),) * 2) for (_, j), matrix in zip(places, new, strict=True)
    ]
    return change_of_reach(old, new, across, paired=paired)
