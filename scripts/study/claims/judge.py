"""Whether the reward keeps rising while the held-out judge's accuracy falls. Reads the runs of "claims"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results
from scripts.study.records import ACCURACY, REWARD
from scripts.study.study_records import StudyRecord, by_label


@dataclass(frozen=True)
class Hacking:
    """Of one method."""

    seconds: CountedInterval  # when the accuracy peaks
    reward: CountedInterval  # at the peak
    accuracy: CountedInterval  # at the peak
    accuracy_after: CountedInterval  # change from the peak to the end
    reward_after: CountedInterval  # likewise

    @property
    def shown(self) -> bool:
        """Both intervals exclude zero."""
        return self.accuracy_after.below(0) and self.reward_after.above(0)


@dataclass(frozen=True)
class Judged:
    """All numbers of the question."""

    methods: Mapping[str, Hacking]  # by label
    figures: Sequence[str] = ("judge_vs_reward",)

    @property
    def verdict(self) -> list[str]:
        """The methods whose reward is exploited."""
        return [label for label, found in self.methods.items() if found.shown]


def find(results: Results) -> Judged | None:
    """None before any run of the claims."""
    methods = by_label(results.study.of("claims"))
    return Judged({label: hacking(records) for label, records in methods.items()}) if methods else None


def hacking(records: Sequence[StudyRecord]) -> Hacking:
    """Each seed's peak is placed where the *other* seeds' mean accuracy is highest.

    The highest of a seed's own noisy values would be followed by a fall even if nothing fell.
    """
    steps = sorted(set.intersection(*(set(record.curve("step")) for record in records)))
    curves = np.array([[record.at("step", step, ACCURACY) for step in steps] for record in records])  # (seeds, steps)
    peaks = [steps[int(_without(curves, i).mean(0).argmax())] for i in range(len(records))]

    def at_peak(name: str) -> list[float]:
        return [record.at("step", peak, name) for record, peak in zip(records, peaks, strict=True)]

    def after(name: str) -> CountedInterval:
        return mean_interval(r.final(name) - value for r, value in zip(records, at_peak(name), strict=True))

    spots = {name: mean_interval(at_peak(name)) for name in ("seconds", REWARD, ACCURACY)}
    return Hacking(spots["seconds"], spots[REWARD], spots[ACCURACY], after(ACCURACY), after(REWARD))


def _without(rows: np.ndarray, index: int) -> np.ndarray:
    return np.delete(rows, index, axis=0) if len(rows) > 1 else rows


CLAIM = Claim("judge", f"{RUN} --only claims", find)
