"""The quick runs held against the committed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flow_grpo.errors import ConfigError
from flow_grpo.statistics import LEVEL, CountedInterval, prediction_interval
from scripts.study.comparison import crossing
from scripts.study.records import ACCURACY, REWARD
from scripts.study.study_records import DIVERSITY, Study, StudyRecord


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


def compare_quick(quick: Study, whole: Study) -> list[Comparison]:
    """At the quick runs' end, in network evaluations: what a number of seconds buys depends on the machine.

    The intervals hold 95 % of the time for all quantities together (Bonferroni). What the run or all but one of the
    committed ones do not have, such as the time until a reward that was not reached, is not compared.

    Raises:
        ConfigError: there are no pairs of runs to compare.
    """
    pairs, references = quick.pairs("quick"), whole.pairs()
    if not pairs or len(references) < 2:
        raise ConfigError(
            f"there are {len(pairs)} seeds of quick runs and {len(references)} committed ones with both methods; it "
            "takes at least 1 and 2."
        )
    found: list[tuple[str, float, list[float]]] = []
    for pair in pairs:
        for index, record in enumerate(pair):
            found += _values_at_end(record, [reference[index] for reference in references])
        found += _speed(pair, references)
    found = [item for item in found if math.isfinite(item[1]) and np.isfinite(item[2]).sum() > 1]
    level = 1 - (1 - LEVEL) / len(found)
    return [Comparison(name, value, prediction_interval(others, level)) for name, value, others in found]


def _values_at_end(record: StudyRecord, references: Sequence[StudyRecord]) -> list[tuple[str, float, list[float]]]:
    spent = _common_end(record, references)
    return [
        (
            f"{record.label} seed {record.seed}: {name}",
            record.at("network_evaluations", spent, name),
            [reference.at("network_evaluations", spent, name) for reference in references],
        )
        for name in (REWARD, ACCURACY, *DIVERSITY)
    ]


def _speed(
    pair: tuple[StudyRecord, StudyRecord], references: Sequence[tuple[StudyRecord, StudyRecord]]
) -> list[tuple[str, float, list[float]]]:
    """Its values are nan where GRPO had not risen by then: there is no speed to compare."""
    drtune, grpo = pair
    end = _common_end(grpo, [reference for _, reference in references])

    def fraction(runs: tuple[StudyRecord, StudyRecord]) -> float:
        spent = {"network_evaluations": end, "seconds": runs[1].at("network_evaluations", end, "seconds")}
        return crossing(*runs, at=spent).network_evaluations

    name = f"seed {drtune.seed}: network evaluations of DRTune until GRPO's reward / GRPO's"
    return [(name, fraction(pair), [fraction(reference) for reference in references])]


def _common_end(record: StudyRecord, references: Sequence[StudyRecord]) -> float:
    """Network evaluations at the end of the run, or of the shortest reference if that comes first."""
    return min(run.final("network_evaluations") for run in (record, *references))
