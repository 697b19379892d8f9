"""The exact curve of a base model and a reward, as scripts/study/curve.py writes it, and how a model compares with it.

A point of the curve is the law p_base exp(lambda R): its mean reward, and the diversity of sets of images drawn from
it. A model with a gain in reward is held against the law of the same gain. Both are taken over the base model's
figures: the law's over those of all base images, the model's over those of the base images with the same noises, which
the curve keeps as `first`:

    kept = (V / V_first) / (V_law(R_base + R - R_first) / V_law(R_base)),   lost = V (1 / kept - 1)

V, R: means over the prompts. Intervals are the jackknife's over prompts, with Student's t; the curve itself is taken as
it is, and has intervals of its own in its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.statistics import Estimate, Interval

ROUNDING = 1e-9  # of a gain at the curve's very end
FIGURES = ("vendi", "rke", "modes")  # of sets, as far as they are there


@dataclass(frozen=True)
class Kept:
    """Where a model stands beside the law of the same gain in reward; nan where there is none."""

    share: Interval  # of the law's diversity
    lost: Interval  # diversity that the gain does not cost


@dataclass(frozen=True)
class Curve:
    """What a curve.json holds of the law; figures are means over the prompts."""

    prompts: tuple[str, ...]
    set_size: int  # images of a prompt whose diversity is measured
    rewards: Mapping[str, float]  # name -> weight
    features: str
    bandwidth: float  # of RKE
    law: Mapping[str, Sequence[float]]  # "reward" and diversities, at each point, the base first
    first: Mapping[str, Sequence[float]]  # the same of each prompt's first `set_size` images of the base
    best: float  # mean over prompts of the base's best reward
    drawing: str = ""  # how the images were drawn: see evaluators.evaluation.drawing_of
    is_whole: bool = False  # its end is the most reward that there is: of 0 or 1, always 1

    @classmethod
    def read(cls, path: Path) -> Curve:
        """Of a file; ConfigError if it is none, or is damaged."""
        found = read_object(path)
        try:
            points = [point["figures"] for point in found["points"]]
            names = ["reward", *(name for name in FIGURES if name in points[0])]
            curve = cls(
                tuple(map(str, found["prompts"])),
                int(found["set_size"]),
                {str(name): float(weight) for name, weight in found["rewards"].items()},
                str(found["features"]),
                float(found["bandwidth"]),
                {name: [float(figures[name]["estimate"]) for figures in points] for name in names},
                {name: [float(value) for value in found["first"][name]] for name in names},
                float(found["best"]),
                str(found["drawing"]),
                found["points"][-1]["strength"] == "inf",
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            curve = None
        if curve is None or not curve._is_sound():
            raise ConfigError(f"{path} is no curve.json of scripts/study/curve.py, or is damaged.")
        return curve

    def _is_sound(self) -> bool:
        """Rewards that rise, and figures of sets, above 0 on average, of each of the prompts."""
        sets = [values for part in (self.law, self.first) for name, values in part.items() if name != "reward"]
        return (
            min(len(self.prompts), self.set_size) > 0
            and {len(values) for values in self.first.values()} == {len(self.prompts)}
            and all(map(math.isfinite, chain((self.best, self.bandwidth), *self.law.values(), *self.first.values())))
            and all(low < high for low, high in pairwise(self.law["reward"]))
            and all(min(values) >= 0 < sum(values) for values in sets)
        )

    def share(self, name: str, gain: float) -> float:
        """What the law of a gain in mean reward keeps of the base's diversity; nan beyond the curve, 1 below it.

        A curve that is whole has no beyond: base images whose reward is not the law's may gain more than it.
        """
        rewards = self.law["reward"]
        is_known = self.is_whole or gain <= rewards[-1] - rewards[0] + ROUNDING
        return self._share(name, gain) if is_known and math.isfinite(gain) else math.nan

    def _share(self, name: str, gain: float) -> float:
        """The same; beyond the curve its end's."""
        rewards, values = np.asarray(self.law["reward"]), np.asarray(self.law[name])
        return float(np.interp(rewards[0] + gain, rewards, values / values[0]))

    def is_off_support(self, reward: Sequence[float]) -> bool:
        """Whether a model of these mean rewards, by prompt, is above what the base's best images have."""
        return float(np.mean(reward)) > self.best + ROUNDING

    def beside(self, reward: float, vendi: float) -> list[tuple[float, float]]:
        """The law's points (reward, Vendi score) from a base model of these figures on: gains added, shares times."""
        first = self.law["reward"][0], self.law["vendi"][0]
        return [
            (reward + r - first[0], vendi * v / first[1])
            for r, v in zip(self.law["reward"], self.law["vendi"], strict=True)
        ]

    def kept(self, figures: Mapping[str, Sequence[float]]) -> dict[str, Kept]:
        """By diversity, from a model's figures of each of the prompts, with the noises of the base's first images."""
        return {name: self._kept(name, figures) for name in FIGURES if name in self.law and name in figures}

    def _kept(self, name: str, figures: Mapping[str, Sequence[float]]) -> Kept:
        pairs = self.first["reward"], figures["reward"], self.first[name], figures[name]
        columns = np.array(pairs, dtype=np.float64)  # (4, P)
        if not math.isfinite(self.share(name, columns[1].mean() - columns[0].mean())):
            return Kept(Interval(math.nan), Interval(math.nan))

        def share(means: np.ndarray) -> float:
            return float(means[3] / means[2] / self._share(name, means[1] - means[0]))

        def lost(means: np.ndarray) -> float:
            return float(means[2] * self._share(name, means[1] - means[0]) - means[3])

        return Kept(_over_prompts(columns, share), _over_prompts(columns, lost))


def _over_prompts(columns: np.ndarray, figure: Callable[[np.ndarray], float]) -> Interval:
    """A function of the means of columns (k, P), with the jackknife's interval over the P; none of a single one."""
    value, count = figure(columns.mean(1)), columns.shape[1]
    if count < 2:
        return Interval(value)
    others = [figure(np.delete(columns, place, axis=1).mean(1)) for place in range(count)]
    error = math.sqrt((count - 1) * float(np.var(others)))
    return Estimate(value, error, count - 1).interval()
