"""Images whose log-density is asked, each with its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.diversity.images import listing, read_rgb
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.prompts import PromptDataset
from flow_grpo.rules import text_fault

MAX_PAIRS, PROMPT_WIDTH = 20, 80  # images printed with their prompts, and letters of each


@dataclass(frozen=True)
class ImageFile:
    """An image whose density is asked, under its prompt."""

    path: Path
    prompt: str


def _prompts_of(count: int, prompt: str, prompts_file: str) -> Sequence[str]:
    """The prompt of each of `count` images; ConfigError unless one way of saying it is given, and fits."""
    if bool(prompt) == bool(prompts_file):
        raise ConfigError("--images needs either --prompt, one for all, or --prompts, a file with one for each.")
    if fault := text_fault(prompt):
        raise ConfigError(f"--prompt {fault}; it takes text.")
    prompts = PromptDataset.load(prompts_file).prompts if prompts_file else (prompt,) * count
    if len(prompts) != count:
        raise ConfigError(f"--prompts {prompts_file} has {len(prompts)} prompts for {count} images.")
    return prompts


def read_images(folder: Path, prompt: str, prompts_file: str, size: tuple[int, int]) -> list[ImageFile]:
    """The images of a folder in the order of their names, 2 before 10, each with its prompt.

    All are decoded once, so that nothing is found unreadable later.

    Raises:
        ConfigError: a file that is no image, or of another size; no image; not as many prompts as images.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is not a folder.")
    paths, folders = listing(folder)
    if folders:
        raise ConfigError(f"--images {folder} holds a folder ({folders[0].name}); it takes images only.")
    if not paths:
        raise ConfigError(f"--images {folder} holds no image.")
    prompts = _prompts_of(len(paths), prompt, prompts_file)
    for path in paths:
        height, width = read_rgb(path).shape[:2]
        if (height, width) != size:
            raise ConfigError(
                f"--images: {path} is {width} x {height} pixels; the run's are {size[1]} x {size[0]} "
                "(config.width x config.height, or config.resolution)."
            )
    return [ImageFile(path, text) for path, text in zip(paths, prompts, strict=True)]


def pairing(images: Sequence[ImageFile]) -> str:
    """Which image goes with which prompt: a line each, of the first MAX_PAIRS."""
    lines = [f"{image.path.name}: {one_line(image.prompt, PROMPT_WIDTH)}" for image in images[:MAX_PAIRS]]
    more = len(images) - len(lines)
    return "\n".join([*lines, *([f"and {more} more, in the order of the names"] if more else [])])
