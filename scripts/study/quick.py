"""The runs of `make study-quick` held against the committed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.statistics import LEVEL, CountedInterval, prediction_interval
from scripts.study.committed import Measured, Results
from scripts.study.outcomes import Outcome, column, outcome
from scripts.study.paths import RATIOS
from scripts.study.ratios import Trained, read
from scripts.study.run import State, state_of
from scripts.study.testbeds import SEARCH_SEED

FIGURES = {"exact_reward": "reward", "exact_vendi": "Vendi score", "judge": "judge"}


@dataclass(frozen=True)
class Comparison:
    """One quantity of a quick run beside the committed runs."""

    quantity: str
    value: float
    expected: CountedInterval  # prediction interval for a new seed

    @property
    def within(self) -> bool:
        """Whether the value lies in it."""
        return self.expected.holds(self.value)


def compare(logs: Path, results: Results) -> list[Comparison]:
    """Every run of a testbed at its end, and every form of the ratio; the intervals hold for all together (Bonferroni).

    Raises:
        ConfigError: a run is missing or not finished, or there are fewer than two committed ones.
    """
    found: list[tuple[str, float, list[float]]] = []
    for measured in results.testbeds:
        for run in measured.testbed.quick():
            if state_of(run, logs) is not State.DONE:
                raise ConfigError(f"{logs / run.name} is not done; `python scripts/study/run.py --quick` trains it.")
            found += at_end(outcome(measured.testbed, run, logs), measured)
    if not (logs / RATIOS).is_file():
        raise ConfigError(f"{logs / RATIOS} is missing; `python scripts/study/ratios.py --quick` writes it.")
    found += of_ratios(read(logs / RATIOS), results.ratios)
    for name, _, others in found:
        if len(others) < 2:
            raise ConfigError(f"{name}: there are {len(others)} committed seeds; it takes at least 2.")
    level = 1 - (1 - LEVEL) / len(found)
    return [Comparison(name, value, prediction_interval(others, level)) for name, value, others in found]


def at_end(quick: Outcome, measured: Measured) -> list[tuple[str, float, list[float]]]:
    """Figures at a quick run's last epoch, and those of the committed seeds there."""
    epoch, label = quick["epoch"][-1], quick["label"]
    return [
        (
            f"{measured.testbed.name}, {label}, epoch {epoch}: {title}",
            float(column(quick, name)[-1]),
            [float(np.interp(epoch, column(o, "epoch"), column(o, name))) for o in measured.of(label)],
        )
        for name, title in FIGURES.items()
    ]


def of_ratios(quick: Sequence[Trained], committed: Sequence[Trained]) -> list[tuple[str, float, list[float]]]:
    """The gain of each form, as a mean over the quick seeds, and those of committed seeds after as many epochs."""
    found = []
    for key in dict.fromkeys(one.key for one in quick):
        mine = [one for one in quick if one.key == key]
        place = len(mine[0].reward) - 1
        others = [one for one in committed if one.key == key and one.seed != SEARCH_SEED]
        gains = [one.reward[place] - one.reward[0] for one in others]
        found.append((", ".join(map(str, key)), float(np.mean([one.gain for one in mine])), gains))
    return found
