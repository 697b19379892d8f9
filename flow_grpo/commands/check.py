"""What a model has lost in diversity, and whether it exploits its reward, in one page.

fme check logs/RUN                                 its newest checkpoint against its base, by its own settings
fme check LORA --base MODEL                        a LoRA of any trainer: how many layers load, and what they do
fme check IMAGES --against IMAGES                  two folders of images, or of folders, one for each prompt
fme check IMAGES                                   how many different images there are

THING is a run, a checkpoint, a LoRA (diffusers, peft, kohya, ai-toolkit), a pipeline (folder or hub id) or a folder of
images: what it is, is found out by looking. Both sides draw the same prompts from the same noises.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from ml_collections import ConfigDict

from flow_grpo.diversity.images import ImageFolder, read_images
from flow_grpo.diversity.paired import Change
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.files import strict_json
from flow_grpo.inspection.looking import LEAST_IMAGES, Look, Options, folder_config, look_at, told_as_given
from flow_grpo.inspection.things import Thing, find_out
from flow_grpo.launcher import read_launcher
from flow_grpo.messages import say
from flow_grpo.page.build import build_page, number
from flow_grpo.page.data import evaluation_of
from flow_grpo.page.verdicts import direction, diversity_verdict, exploitation_verdict
from flow_grpo.page.words import FIGURES, load
from flow_grpo.runs.folder import PAGE_FILE, fresh_folder
from flow_grpo.training.weights import output_folder

if TYPE_CHECKING:
    from flow_grpo.inspection.comparison import Comparison

PLACE = Path("logs", "check")  # of results, unless --out says otherwise
TEMPLATE = "check.txt.j2"
NAME_WIDTH = 60  # letters of a name on the terminal
NEEDS = {"reward": "--reward NAME", "judge": "--judge MODEL"}  # what a figure takes that was not measured


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least `least`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it takes a whole number of at least {least}")
        return int(text)

    return parse


def not_negative(text: str) -> float:
    """A parser of finite numbers of at least 0."""
    with suppress(ValueError):
        if math.isfinite(float(text)) and float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it takes a number of at least 0")


def shares(text: str) -> tuple[float, float]:
    """A parser of one or two numbers from 0 to 1; one counts twice."""
    with suppress(ValueError):
        found = [float(part) for part in text.split(",")]
        if len(found) in (1, 2) and all(0 <= share <= 1 for share in found):
            return found[0], found[-1]
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it takes one or two numbers from 0 to 1, as in 1,0.5")


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are drawn; the default is what the run, or else the pipeline, has."""
    parser.add_argument(
        "--base", default="", metavar="MODEL", help="pipeline that a LoRA is loaded on: folder or hub id"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="LORA", help="load this besides; may be repeated"
    )
    parser.add_argument("--steps", type=whole(1), help="sampler steps")
    parser.add_argument("--guidance", type=not_negative, help="guidance scale; 1: none")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--tuned-share",
        type=shares,
        metavar="G[,G0]",
        help="g v_tuned + (1 - g) v_base: g, or g of the noisiest and the last step (default: 1)",
    )
    parser.add_argument("--size", type=whole(1), help="pixels, height and width")
    parser.add_argument("--seed", type=whole(0), help="keys the noise")
    parser.add_argument("--batch-size", type=whole(1), help="images at once")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run or checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("thing", metavar="THING", help="run, checkpoint, LoRA, pipeline or folder of images")
    parser.add_argument("--against", default="", metavar="THING", help="compare with this (default: its base model)")
    parser.add_argument(
        "-n", type=whole(LEAST_IMAGES), default=16, metavar="N", help="images of each prompt (default: 16)"
    )
    parser.add_argument(
        "--prompts", default="", metavar="FILE", help=".txt or .jsonl (default: the run's, or ten things)"
    )
    parser.add_argument(
        "--features", default="", metavar="MODEL", help="[clip:]MODEL, dinov2:MODEL, scenes:MODEL or open_clip:NAME:TAG"
    )
    parser.add_argument(
        "--reward", default="", metavar="NAME[=MODEL|FILE.py:THING]", help="measure this reward; `fme ls rewards`"
    )
    parser.add_argument("--judge", default="", metavar="MODEL", help="a CLIP that is not the reward's")
    add_drawing_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of words")
    parser.add_argument("--out", default="", metavar="DIR", help=f"a new or empty folder (default: {PLACE}/NAME)")


def main(arguments: argparse.Namespace) -> int:
    """Look, write the page, and print what was found; 0. Raises ConfigError before any model loads for bad input."""
    check_one_process("check")
    thing = find_out(arguments.thing)
    against = find_out(arguments.against) if arguments.against else None
    options = replace(
        options_of(arguments),
        prompts=arguments.prompts,
        images=arguments.n,
        features=arguments.features,
        reward=arguments.reward,
        judge=arguments.judge,
    )
    with_images = [other.kind == "images" for other in (thing, against) if other]
    if any(with_images) and not all(with_images):
        raise ConfigError(f"{thing.text} and --against {arguments.against} are images and a model; it takes two alike.")
    with told_as_given(options), new_folder(arguments.out, PLACE / thing.name) as out:
        look = folders_of(thing, against, options) if any(with_images) else look_at(thing, against, options)
        found = _compare(look, out)
        page = build_page([out], out / PAGE_FILE, shlex.join(["fme", *sys.argv[1:]]))
    paired = not isinstance(look, FolderLook) or look.paired
    result = result_of(thing, against, found, paired) | {"out": str(out), "page": str(page)}
    print(strict_json(result) if arguments.json else words_of(result, found))
    return 0


def check_one_process(command: str) -> None:
    """ConfigError under a launcher of several: each would write results of its own."""
    if read_launcher().num_processes > 1:
        raise ConfigError(f"fme {command} is one process; start it without a launcher.")


def options_of(arguments: argparse.Namespace) -> Options:
    """Those of `add_drawing_arguments`."""
    return Options(
        base=arguments.base,
        loras=tuple(arguments.lora),
        steps=arguments.steps,
        guidance=arguments.guidance,
        negative=arguments.negative,
        tuned_share=arguments.tuned_share,
        size=arguments.size,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        ema=arguments.ema,
    )


def _compare(look: Look | FolderLook, out: Path) -> Comparison:
    from flow_grpo.inspection import comparison  # torch, once the input is known to be good

    if isinstance(look, FolderLook):
        return comparison.compare_folders(look.folders, look.config, look.rewarded, look.paired, out)
    return comparison.compare_models(look, out)


@contextmanager
def new_folder(out: str, default: Path) -> Iterator[Path]:
    """The folder for results, empty at first. After a failure what was made goes again: in it, and itself.

    Raises:
        ConfigError: --out is a file, holds something, or cannot be made.
    """
    wanted = output_folder(out) if out else default
    made = [path for path in (wanted, *wanted.absolute().parents) if not path.exists()]
    try:
        folder = wanted if out else fresh_folder(default)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--out {out} is not empty; it takes a new or an empty folder.")
    except OSError as error:
        raise ConfigError(f"{out or default} cannot be made ({error.strerror}).") from None
    try:
        yield folder
    except BaseException as error:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in made if out else dict.fromkeys((folder, *made)):
            with suppress(OSError):
                path.rmdir()  # only if it is empty
        if not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error})."
        ) from None


# --- folders of images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderLook:
    """Folders of images with as many images of each prompt, the base first; or one."""

    folders: dict[str, ImageFolder]  # name -> folder
    paired: bool  # their files have the same names
    config: ConfigDict
    rewarded: bool


def folders_of(thing: Thing, against: Thing | None, options: Options) -> FolderLook:
    """Read the folders, and settle what is measured; ConfigError if they cannot be compared, or not so."""
    found = [read_images(Path(other.place)) for other in (against, thing) if other is not None]
    config, rewarded = folder_config(options, max(max(folder.size) for folder in found))
    if (rewarded or options.judge) and any(_is_flat(folder) for folder in found):
        raise ConfigError(f"{thing.text}: a reward or judge needs a folder of images for each prompt, of its name.")
    paired = len(found) == 1 or _files(found[0]) == _files(found[1])
    given = _count(found)
    if len(found) > 1:
        found = _alike(found[0], found[1])
    for name, group in found[0].groups.items():
        if len(group) < LEAST_IMAGES:
            raise ConfigError(
                f"{name!r} has {len(group)} images to compare; an interval takes at least {LEAST_IMAGES}."
            )
    if left_out := given - _count(found):
        say(f"{left_out} images are left out, so that both folders have as many of each prompt.")
    return FolderLook(dict(zip(_names(against, thing), found, strict=True)), paired, config, rewarded)


def _count(folders: Sequence[ImageFolder]) -> int:
    return sum(len(group) for folder in folders for group in folder.groups.values())


def _names(against: Thing | None, thing: Thing) -> list[str]:
    """Of the folders, with their paths where the names are equal; ConfigError for one folder given twice."""
    things = [other for other in (against, thing) if other is not None]
    for names in ([other.name for other in things], [other.place for other in things]):
        if len(set(names)) == len(things):
            return names
    raise ConfigError(f"{thing.text} is compared with itself; --against takes another folder.")


def _is_flat(folder: ImageFolder) -> bool:
    """Whether the images lie in the folder itself."""
    return next(iter(folder.groups.values()))[0].parent == folder.root


def _files(folder: ImageFolder) -> list[Path]:
    return [path.relative_to(folder.root) for group in folder.groups.values() for path in group]


def _alike(base: ImageFolder, other: ImageFolder) -> list[ImageFolder]:
    """The same prompts, and of each as many images: scores depend on their number. Those that are more are left out."""
    if _is_flat(base) and _is_flat(other):
        name = next(iter(other.groups))
        base = replace(base, groups={name: next(iter(base.groups.values()))})
    different = sorted(base.groups.keys() ^ other.groups.keys())
    if different:
        raise ConfigError(
            f"{base.root} and {other.root} hold different prompts: {different[0]!r} is in one of them alone."
        )
    counts = {name: min(len(group), len(base.groups[name])) for name, group in other.groups.items()}
    return [
        replace(folder, groups={name: folder.groups[name][:count] for name, count in counts.items()})
        for folder in (base, other)
    ]


# --- what is said -----------------------------------------------------------------------------------------


def result_of(thing: Thing, against: Thing | None, found: Comparison, paired: bool) -> dict[str, Any]:
    """What --json prints, but for the places."""
    record = found.records[-1]
    changes = record.changes
    independent = record.judge is not None and record.judge.independent
    return {
        "format": 1,
        "thing": thing.text,
        "kind": thing.kind,
        "name": record.name,
        "against": against.text if against else found.records[0].name if len(found.records) > 1 else None,
        "layers": [
            {"name": lora.name, "loaded": lora.layers, "of": lora.of, "text_encoder": lora.text_encoder,
             "unknown": list(lora.unknown)}
            for lora in found.loaded
        ],
        "images": len(record.prompt),
        "prompts": len(record.prompts),
        "paired": paired if len(found.records) > 1 else None,
        "features": record.diversity.features if record.diversity else None,
        "figures": dict(evaluation_of(record).figures),
        "vendi": asdict(found.vendi) if found.vendi else None,
        "changes": {name: asdict(change) for name, change in changes.items()},
        "verdicts": None
        if len(found.records) == 1
        else {
            "diversity": diversity_verdict(changes.get("vendi")),
            "exploitation": exploitation_verdict(changes.get("reward"), changes.get("judge"), independent),
        },
    }  # fmt: skip


def words_of(result: dict[str, Any], found: Comparison) -> str:
    """The same for a person."""
    words, alone = load(), len(found.records) == 1
    record = found.records[-1]
    distances = record.diversity
    places = {"n": round(float(np.mean(distances.images))) if distances else 0}
    titles = {name: words["figures"][name]["title"].format(**places) for name in FIGURES}
    chosen = [name for name in FIGURES if name in result["figures"]] if alone else FIGURES
    rows = [(titles[name], *_cells(name, result, found.records[-1].changes.get(name))) for name in chosen]
    verdicts = [] if alone else [words[kind][code]["words"] for kind, code in result["verdicts"].items()]
    return _template().render(
        loaded=[{"name": one_line(lora.name, NAME_WIDTH), "text": one_line(str(lora), 200)} for lora in found.loaded],
        old=None if alone else one_line(found.records[0].name, NAME_WIDTH),
        new=one_line(record.name, NAME_WIDTH),
        images=result["images"],
        prompts=result["prompts"],
        paired=result["paired"],
        width=max(map(len, titles.values())),
        rows=rows,
        verdicts=verdicts,
        page=result["page"],
    )


def _cells(name: str, result: dict[str, Any], change: Change | None) -> tuple[str, str]:
    """The value, old -> new, and the interval with what it means."""
    words = load()
    unit = words["figures"][name]["unit"]
    percent = " %" if unit == "share" else ""
    if result["against"] is None:
        interval = result["vendi"] if name == "vendi" else None
        more = f"{number(interval['low'])} to {number(interval['high'])}" if interval else ""
        return f"{number(result['figures'][name], unit)}{percent}", more
    if change is None:
        return words["direction"]["not_measured"], NEEDS.get(name, "")
    value = f"{number(change.old, unit)} -> {number(change.new, unit)}{percent}"
    ends = [number(x, unit, sign=True) for x in (change.difference, change.low, change.high)]
    return value, f"{ends[0]}, {ends[1]} to {ends[2]}: {words['direction'][direction(change)]}"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # plain text: nothing is escaped
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


if __name__ == "__main__":
    from flow_grpo.commands.main import main as fme

    raise SystemExit(fme(["check", *sys.argv[1:]]))
