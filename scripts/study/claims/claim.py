"""What a claim of the study is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from matplotlib.figure import Figure

from scripts.study.committed import Results


class Found(Protocol):
    """What a claim found in the results: its numbers, which its template tells."""

    @property
    def verdict(self) -> Any:
        """A code and what it depends on."""


@dataclass(frozen=True)
class Claim:
    """A claim or question.

    Its words are macros of a template beside its file, of what was found: title(), verdict(found), which is two or
    three words, answer(found), a sentence with numbers, body(found), a small table, and details(found), which the page
    folds: how it is measured, and whatever else there is.
    """

    anchor: str  # names the template and the figure too: claim-1 has claim_1.md.j2
    command: str  # that makes its results
    find: Callable[[Results], Found]
    draw: Callable[[Results], Figure] | None = None  # its figure, <anchor>.png; None: `figure` is there already
    figure: str = ""  # relative to the results' folder

    @property
    def picture(self) -> str:
        """Its file, relative to the results' folder."""
        return self.figure or f"{self.anchor}.png"


RUN = "python scripts/study/run.py"
