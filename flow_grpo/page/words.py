"""The words for figures and verdicts, shared by the page and the commands."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FIGURES = ("reward", "vendi", "reached", "judge")  # of the first screen, in its order


@cache
def load() -> dict[str, Any]:
    """The content of words.json, beside this file."""
    return json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))


def range_of(figure: str) -> tuple[float | None, float | None]:
    """The least and the most that a figure can be; None: any number."""
    least, most = load()["figures"][figure]["range"]
    return least, most


def model_name(epoch: int, name: str = "") -> str:
    """What a model is called: its own name, else "base model" or "epoch 10"."""
    return name or (load()["epoch"].format(epoch=epoch) if epoch else load()["base"])
