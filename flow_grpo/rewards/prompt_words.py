"""What the rewards that read a prompt by rule find in it. Torch is not imported."""

from __future__ import annotations

import re
from typing import Any

from flow_grpo.scenes.captions import parse

QUOTED = re.compile(r'["“”„«]([^"“”„«»]+)["“”»]')
COLOURS = ("black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "grey", "gray")


def asked_for(prompt: str) -> str:
    """The first words that a prompt quotes; ValueError if it quotes none."""
    match = QUOTED.search(prompt)
    if match is None or not letters(match[1]):
        raise ValueError(f'the reward ocr reads what a prompt quotes, as in: a sign that says "Hello"; got {prompt!r}')
    return match[1]


def letters(text: str) -> str:
    """What counts of a text: no spaces, and no case."""
    return "".join(text.split()).lower()


def named_colour(prompt: str) -> str:
    """The first of COLOURS that stands in a prompt; ValueError if there is none."""
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in COLOURS:
            return word
    raise ValueError(
        f"the reward target_colour takes its colour from the prompt, one of {', '.join(COLOURS)}, and there is none in "
        f"{prompt!r}; config.targets.colour names one for all prompts"
    )


# --- as `RewardSpec.reads` has them ---------------------------------------------------------------------


def read_quoted(prompt: str, config: Any) -> None:
    """ValueError unless a prompt quotes something."""
    asked_for(prompt)


def read_colour(prompt: str, config: Any) -> None:
    """ValueError unless a prompt names a colour, or the configuration does."""
    if not config.targets.colour:
        named_colour(prompt)


def read_caption(prompt: str, config: Any) -> None:
    """ConfigError unless a prompt is a caption of a scene."""
    parse(prompt)
