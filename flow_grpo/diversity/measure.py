"""The diversity of groups of images, measured in features: within groups, pooled, and against a reference set.

A group is what one prompt gave. The headline is the mean over groups of a score of one group's images; the pooled score
of all images also counts the differences between prompts. Scores depend on the number of images: compare equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flow_grpo.diversity.bootstrap import LEAST_ROWS, RkeScore, VendiScore, grouped_interval
from flow_grpo.diversity.prdc import PRDC, mean_pairwise_distance, prdc
from flow_grpo.diversity.rke import relative_rke
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import figure_text, one_line
from flow_grpo.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's
NEIGHBOURS = 5  # k of precision, recall, density and coverage
MAX_ROWS = 60  # groups in the figure
NAME_WIDTH = 36  # letters of a group's name in a line of the figure, and two such lines in the table
NO_RKE = Interval(math.nan, math.nan, math.nan, 0.95)  # no bandwidth fits


@dataclass(frozen=True)
class Scores:
    """Of one set of images, or their means over groups."""

    vendi: Interval
    rke: Interval  # of nan: not measured
    distance: float  # mean Euclidean distance between unit features, 0 to 2


@dataclass(frozen=True)
class AgainstReference:
    """All images against all of the reference."""

    relative_rke: float  # nats; nan: not measured
    prdc: PRDC
    images: int  # in the reference


@dataclass(frozen=True)
class Diversity:
    """What was measured, and how."""

    within: Scores  # means over groups
    pooled: Scores  # of all images together
    groups: Mapping[str, Scores]
    counts: Mapping[str, int]  # images of each group
    features: str  # name of the extractor
    order: float  # q of the Vendi score, with the cosine kernel
    bandwidth: float | None  # h of RKE's Gaussian kernel; None: no bandwidth fits, and RKE is not measured
    draws: int  # of the bootstrap
    seed: int
    neighbours: int = NEIGHBOURS  # of precision, recall, density and coverage, where there is a reference
    reference: AgainstReference | None = None


def measure(
    features: Mapping[str, np.ndarray],
    bandwidth: float | None,
    order: float,
    extractor: str,
    draws: int,
    seed: int = 0,
) -> Diversity:
    """Measure groups (name -> (n, d) features), with 95 % intervals from `draws` bootstrap draws.

    Without a bandwidth, which images that are all alike cannot give, RKE is not measured: it is nan.

    The interval of the means holds the prompts fixed and draws their images anew; that of the pooled scores draws
    images of any prompt. Ends beyond what a score can be, 1 and the number of images, are cut off. Raises ConfigError
    for features that cannot be measured, naming what is wrong with them.
    """
    for name, group in features.items():
        if len(group) < LEAST_ROWS:
            raise ConfigError(
                f"{name!r} has {len(group)} images; an interval of their diversity needs at least {LEAST_ROWS}."
            )
    vendi, rke = VendiScore(order), None if bandwidth is None else RkeScore(bandwidth)

    def scores(groups: Sequence[np.ndarray]) -> Scores:
        return Scores(
            _within_range(grouped_interval(groups, vendi, draws=draws, seed=seed), groups),
            NO_RKE if rke is None else _within_range(grouped_interval(groups, rke, draws=draws, seed=seed), groups),
            float(np.mean([mean_pairwise_distance(group) for group in groups])),
        )

    return Diversity(
        within=scores(list(features.values())),
        pooled=scores([np.concatenate(list(features.values()))]),
        groups={name: scores([group]) for name, group in features.items()},
        counts={name: len(group) for name, group in features.items()},
        features=extractor,
        order=order,
        bandwidth=bandwidth,
        draws=draws,
        seed=seed,
    )


def _within_range(interval: Interval, groups: Sequence[np.ndarray]) -> Interval:
    """Scores lie between 1 and the number of images, and so does what they estimate."""
    return replace(interval, low=max(interval.low, 1.0), high=min(interval.high, float(np.mean([*map(len, groups)]))))


def against_reference(
    features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], bandwidth: float | None
) -> AgainstReference:
    """Compare two sets of groups, pooled; ConfigError if either has too few images."""
    ours, theirs = (np.concatenate(list(groups.values())) for groups in (features, reference))
    relative = math.nan if bandwidth is None else relative_rke(ours, theirs, bandwidth)
    return AgainstReference(relative, prdc(ours, theirs, NEIGHBOURS), len(theirs))


# --- as metrics, data, table and figure ----------------------------------------------------------------


SCORES = ("vendi", "rke")
METRICS = (
    *(f"diversity/{name}{end}" for name in SCORES for end in ("", "_low", "_high", "_pooled")),
    "diversity/distance",
    "diversity/distance_pooled",
)


def metrics(found: Diversity) -> dict[str, float]:
    """What is logged, METRICS: `diversity/<score>` of the means over prompts with its interval, and `_pooled`."""
    values: list[float] = []
    for name in SCORES:
        interval: Interval = getattr(found.within, name)
        values += [interval.estimate, interval.low, interval.high, getattr(found.pooled, name).estimate]
    return dict(zip(METRICS, [*values, found.within.distance, found.pooled.distance], strict=True))


def record(found: Diversity) -> dict[str, Any]:
    """Plain data, with everything needed to measure the same again."""
    return {"images": sum(found.counts.values()), "vendi_kernel": "cosine", "rke_kernel": "gaussian"} | asdict(found)


def table(found: Diversity) -> str:
    """A line for the means, for all images together, and for each group."""
    rows = [("mean over prompts", sum(found.counts.values()), found.within)]
    rows += [(one_line(name, 2 * NAME_WIDTH), found.counts[name], scores) for name, scores in found.groups.items()]
    if len(found.groups) > 1:
        rows.append(("all images together", sum(found.counts.values()), found.pooled))
    rke = "RKE" if found.bandwidth is None else f"RKE (h = {found.bandwidth:.4g})"
    cells = [("", "images", f"Vendi (q = {found.order:g})", rke, "mean distance")]
    cells += [(name, str(n), _cell(s.vendi), _cell(s.rke), f"{s.distance:.3f}") for name, n, s in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if found.reference:
        lines += ["", _against(found.reference)]
    if found.bandwidth is None:
        lines += ["", "RKE is not measured: half of the images within prompts are duplicates, so no bandwidth fits."]
    return "\n".join([*lines, "", f"95 % intervals; features {found.features}"])


def _against(reference: AgainstReference) -> str:
    scores, relative = reference.prdc, reference.relative_rke
    return (
        f"against {reference.images} reference images: precision {scores.precision:.3f}, recall {scores.recall:.3f}, "
        f"density {scores.density:.3f}, coverage {scores.coverage:.3f} (k = {NEIGHBOURS}); relative RKE "
        + ("not measured" if math.isnan(relative) else f"{relative:.3f} nats")
    )


def _cell(interval: Interval) -> str:
    if math.isnan(interval.estimate):
        return "not measured"
    return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def figure(found: Diversity) -> Figure:
    """Vendi and RKE of the first MAX_ROWS groups, with intervals; the line is the mean of all."""
    from matplotlib.figure import Figure

    names = list(found.groups)[:MAX_ROWS]
    texts = [f"{figure_text(name, NAME_WIDTH)} ({found.counts[name]})" for name in names]
    panels: list[tuple[str, str, Callable[[Scores], Interval]]] = [
        (f"Vendi score (q = {found.order:g}, cosine)", BLUE, lambda scores: scores.vendi)
    ]
    if found.bandwidth is not None:
        panels.append((f"RKE (Gaussian, h = {found.bandwidth:.4g})", ORANGE, lambda scores: scores.rke))
    drawn = Figure(figsize=(9, 1.8 + 0.32 * len(names)), layout="constrained")
    positions = np.arange(len(names))[::-1]
    every = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, colour, pick) in zip(every, panels, strict=True):
        intervals, mean = [pick(found.groups[name]) for name in names], pick(found.within)
        values = np.array([interval.estimate for interval in intervals])
        ends = np.array([(interval.low, interval.high) for interval in intervals]).T
        axes.axvspan(mean.low, mean.high, color=colour, alpha=0.15, lw=0)
        axes.axvline(mean.estimate, color=colour, lw=1)
        axes.errorbar(values, positions, xerr=np.abs(ends - values), fmt="o", color=colour, capsize=3)
        axes.set_xlabel(f"{label},\neffective number of images")
        axes.set_yticks(positions, texts, fontsize=8)
        axes.set_ylim(-0.75, len(names) - 0.25)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Diversity within a prompt, 95 % intervals; line and band: mean over prompts"
    more = len(found.groups) - len(names)
    hidden = f"\n(the first {len(names)} of {len(found.groups):,} prompts; {more:,} are not shown)" if more else ""
    drawn.suptitle(title + hidden, fontsize=10)
    return drawn
