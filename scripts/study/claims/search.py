"""How the two methods were tuned. Reads the runs of "search", and of "claims" what they changed of their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results
from scripts.study.records import REWARD
from scripts.study.study_records import StudyRecord, by_label


@dataclass(frozen=True)
class Search:
    """All numbers of the section."""

    tried: Sequence[StudyRecord]
    chosen: Mapping[str, Mapping[str, Any]]  # label of the claims' runs -> their changes of the recipe
    figures: Sequence[str] = ()

    @property
    def verdict(self) -> list[StudyRecord]:
        """The run with the highest final reward, of each method that was tried."""
        found = [[run for run in self.tried if run.method == method] for method in ("DRTune", "GRPO")]
        return [max(runs, key=lambda run: run.final(REWARD)) for runs in found if runs]


def find(results: Results) -> Search | None:
    """None before the search."""
    study = results.study
    claimed = {label: next(iter(runs)).overrides for label, runs in by_label(study.of("claims")).items()}
    return Search(study.of("search"), claimed) if study.of("search") else None


CLAIM = Claim("search", f"{RUN} --only search", find)
