"""Pairs of models whose images are points: laws, situations, and a row of what repeats of one gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from flow_grpo.diversity.paired import Change

Law = Callable[[np.ndarray], np.ndarray]  # noise (..., 17) -> unit features (..., 16)
DIMS = 16
CENTRES = np.linalg.qr(np.random.default_rng(5).normal(size=(DIMS, DIMS)))[0]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def modes(shares: Sequence[float], moved: float = 0.0) -> Law:
    """Modes with these shares, `moved` of the images of each going to the first; the first noise chooses the mode."""
    rest = np.array(shares) * (1 - moved)
    rest[0] += moved
    edges = np.cumsum(rest)[:-1]
    return lambda z: unit(CENTRES[np.searchsorted(edges, norm.cdf(z[..., 0]))] + 0.1 * z[..., 1:])


def diffuse(spread: float) -> Law:
    """Around one direction."""
    return lambda z: unit(CENTRES[0] + spread * z[..., 1:])


BALANCED, UNBALANCED = [0.25] * 4, [0.7, 0.2, 0.1]
PAIRS: dict[str, tuple[Law, Law]] = {
    "balanced, equal": (modes(BALANCED), modes(BALANCED)),
    "unbalanced, equal": (modes(UNBALANCED), modes(UNBALANCED)),
    "diffuse, equal": (diffuse(0.4), diffuse(0.4)),
    "balanced, partial": (modes(BALANCED), modes(BALANCED, 0.3)),
    "unbalanced, partial": (modes(UNBALANCED), modes(UNBALANCED, 0.5)),
    "diffuse, partial": (diffuse(0.4), diffuse(0.3)),
    "balanced, nearly all": (modes(BALANCED), modes(BALANCED, 0.95)),
}


@dataclass(frozen=True)
class Situation:
    """Two laws, n images of each of so many prompts, and how alike the noises are."""

    name: str
    images: int
    prompts: int
    rho: float
    paired: bool = True

    def noises(self, sets: int, rng: np.random.Generator, dims: int = DIMS + 1) -> tuple[np.ndarray, np.ndarray]:
        """Of both models, (sets, n, dims) each."""
        z, e = rng.normal(size=(2, sets, self.images, dims))
        return z, self.rho * z + math.sqrt(1 - self.rho**2) * e

    def draw(self, sets: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Features of both models, (sets, n, 16) each."""
        old, new = PAIRS[self.name]
        a, b = self.noises(sets, rng)
        return old(a), new(b)


@dataclass(frozen=True)
class Row:
    """What so many repeats gave: percentages, and widths in the figure's own unit."""

    figure: str
    situation: str
    images: int
    prompts: int
    rho: float
    paired: bool
    repeats: int
    truth: float
    coverage: float
    less: float
    more: float
    half_width: float
    spread: float  # standard deviation of the difference


def row(figure: str, situation: Situation, truth: float, changes: Sequence[Change], name: str = "") -> Row:
    """The row of one figure in one situation."""
    low, high = (np.array([getattr(change, end) for change in changes]) for end in ("low", "high"))
    return Row(
        figure,
        name or situation.name,
        situation.images,
        situation.prompts,
        situation.rho,
        situation.paired,
        len(changes),
        truth,
        100 * float(((low <= truth) & (truth <= high)).mean()),
        100 * float((high < 0).mean()),
        100 * float((low > 0).mean()),
        float((high - low).mean()) / 2,
        float(np.std([change.difference for change in changes])),
    )


def given(change: Change | None) -> Change:
    """Every set drawn here is large enough for an interval."""
    assert change is not None
    return change


def situations() -> Iterator[Situation]:
    """All with 16 images; with 8 those of equal models, and the others at rho = 0.5; equal models of one prompt."""
    equal = [name for name in PAIRS if name.endswith("equal")]
    for name in PAIRS:
        yield from (Situation(name, 16, 10, rho) for rho in (0.0, 0.5, 0.95))
        yield Situation(name, 16, 10, 0.0, paired=False)
    for name in PAIRS:
        yield from (Situation(name, 8, 10, rho) for rho in ((0.0, 0.5, 0.95) if name in equal else (0.5,)))
    yield from (Situation(name, 16, 1, 0.5) for name in equal)
