"""What a claim of the study is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scripts.study.committed import Results


class Found(Protocol):
    """What a claim found in the results: its numbers, which its template tells."""

    @property
    def verdict(self) -> Any:
        """A code and what it depends on."""

    @property
    def figures(self) -> Sequence[str]:
        """Names, relative to the results' folder, without .png."""


@dataclass(frozen=True)
class Claim:
    """A claim or question.

    Its words are macros of a template beside its file: title(), verdict(found.verdict), and, of what was found,
    summary(found) in a sentence, rule(found) on how it is measured and decided, and body(found).
    """

    anchor: str  # names the template too: claim-1 has claim_1.md.j2
    command: str  # that makes its results
    find: Callable[[Results], Found | None]  # None: nothing was run yet
    in_readme: bool = False  # a line of its own; docs/study.md has every claim


RUN = "python scripts/study/run.py"
