"""The exact curve of a base model and a reward, as scripts/study/curve.py writes it, and how a model compares with it.

A point of the curve is the law p_base exp(lambda R): its mean reward, and the diversity of sets of images drawn from
it. A model with a gain in reward is held against the law of the same gain. Both are taken over the base model's
figures: the law's over those of all base images, the model's over those of the base images with the same noises, which
the curve keeps as `first`:

    kept = (V / V_first) / (V_law(R_base + R - R_first) / V_law(R_base))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object

ROUNDING = 1e-9  # of a gain at the curve's very end
DIVERSITIES = ("vendi", "rke", "modes")  # figures of sets, as far as they are there


@dataclass(frozen=True)
class Curve:
    """What a curve.json holds of the law; figures are means over the prompts."""

    prompts: tuple[str, ...]
    set_size: int  # images of a prompt whose diversity is measured
    rewards: Mapping[str, float]  # name -> weight
    features: str
    bandwidth: float  # of RKE
    law: Mapping[str, Sequence[float]]  # "reward" and diversities, at each point, the base first
    first: Mapping[str, float]  # the same of the base's first `set_size` images

    @classmethod
    def read(cls, path: Path) -> Curve:
        """Of a file; ConfigError if it is none, or is damaged."""
        found = read_object(path)
        try:
            points = [point["figures"] for point in found["points"]]
            names = ["reward", *(name for name in DIVERSITIES if name in points[0])]
            return cls(
                tuple(map(str, found["prompts"])),
                int(found["set_size"]),
                {str(name): float(weight) for name, weight in found["rewards"].items()},
                str(found["features"]),
                float(found["bandwidth"]),
                {name: [float(figures[name]["estimate"]) for figures in points] for name in names},
                {name: float(found["first"][name]) for name in names},
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise ConfigError(f"{path} is no curve.json of scripts/study/curve.py, or is damaged.") from None

    def share(self, name: str, gain: float) -> float:
        """What the law of a gain in mean reward keeps of the base's diversity; nan beyond the curve, 1 below it."""
        rewards = np.asarray(self.law["reward"])
        if not gain <= rewards[-1] - rewards[0] + ROUNDING:
            return math.nan
        shares = np.asarray(self.law[name]) / self.law[name][0]
        return float(np.interp(rewards[0] + gain, rewards, shares))

    def beside(self, reward: float, vendi: float) -> list[tuple[float, float]]:
        """The law's points (reward, Vendi score) from a base model of these figures on: gains added, shares times."""
        first = self.law["reward"][0], self.law["vendi"][0]
        return [
            (reward + r - first[0], vendi * v / first[1])
            for r, v in zip(self.law["reward"], self.law["vendi"], strict=True)
        ]

    def kept(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """`kept` of each diversity, from a model's figures on the same prompts and noises; nan beyond the curve."""
        gain = figures["reward"] - self.first["reward"]
        return {
            name: figures[name] / self.first[name] / self.share(name, gain)
            for name in DIVERSITIES
            if name in self.law and name in figures
        }
