"""What the study's figures share. Colours are Okabe and Ito's; no line is told by colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    """Of a line."""

    colour: str
    line: str


METHODS: Mapping[str, Style] = {
    "drtune": Style("#D55E00", "-o"),
    "grpo": Style("#0072B2", "--s"),
    "nft": Style("#CC79A7", ":^"),
    "anchored": Style("#009E73", "-.D"),
}


def panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A panel for each title, side by side."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, len(titles), 1 + place) for place in range(len(titles))]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """As a PNG that is the same on every machine with these fonts."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
