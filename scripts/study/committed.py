"""Everything that is committed of the study, read for its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_json, read_object
from scripts.study.outcomes import RESULTS, Outcome, committed
from scripts.study.paths import NOISE, RATIOS, VALIDATION
from scripts.study.ratios import Trained
from scripts.study.ratios import read as read_ratios
from scripts.study.tables import summarise
from scripts.study.testbeds import COST, CURVE, SEARCH_SEED, TESTBEDS, Testbed

Rows = Sequence[Mapping[str, Any]]  # of a JSON file


@dataclass(frozen=True)
class Measured:
    """A testbed's runs and its exact law."""

    testbed: Testbed
    folder: Path
    outcomes: Sequence[Outcome]  # but for what was tried
    tried: Sequence[Outcome]

    @cached_property
    def curve(self) -> Curve:
        """The exact law."""
        return Curve.read(self.folder / CURVE)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Means over seeds, by label: tables.summarise."""
        return {row["label"]: row for row in summarise(self.testbed, self.outcomes, self.folder)}

    @cached_property
    def cost(self) -> dict[str, Any]:
        """Seconds an epoch, and on what machine."""
        return read_object(self.folder / COST)

    def of(self, label: str) -> list[Outcome]:
        """The seeds of an entry."""
        return [found for found in self.outcomes if found["label"] == label]

    def seconds_an_epoch(self, label: str) -> float:
        """Of an entry."""
        return self.testbed.seconds_an_epoch(label, self.cost)


@dataclass(frozen=True)
class Results:
    """All that is committed."""

    testbeds: Sequence[Measured]
    ratios: Sequence[Trained]  # ratios.py
    noise: Rows  # gradient_noise.py
    validation: Rows  # of the entropy estimator


def read_results(out: Path, validation: Path = VALIDATION) -> Results:
    """Everything in a folder of results; ConfigError where a file is missing, or is not what it should be."""
    rows, noise = read_object(validation).get("rows"), read_json(out / NOISE)
    if not isinstance(rows, list):
        raise ConfigError(f"{validation} has no rows: it is not what validate_entropy.py writes.")
    if not isinstance(noise, list):
        raise ConfigError(f"{out / NOISE} is not a list of rows: it is not what gradient_noise.py writes.")
    measured = [read_testbed(testbed, out / testbed.name) for testbed in TESTBEDS.values()]
    return Results(measured, read_ratios(out / RATIOS), noise, rows)


def read_testbed(testbed: Testbed, folder: Path) -> Measured:
    """One testbed's folder; ConfigError without its results.json."""
    if not (folder / RESULTS).is_file():
        raise ConfigError(f"{folder / RESULTS} is missing: summarise.py --logs makes it from the folders of runs.")
    every = committed(folder)
    outcomes, tried = ([o for o in every if (o["seed"] == SEARCH_SEED) == which] for which in (False, True))
    return Measured(testbed, folder, outcomes, tried)
