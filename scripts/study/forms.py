"""The forms of the likelihood ratio, as the runs of the study have them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scripts.study.study_records import Study, StudyRecord


@dataclass(frozen=True)
class Form:
    """A form of the likelihood ratio, with the number of its probes or draws; 0: the exact trace."""

    ratio: str
    probes: int

    @classmethod
    def of(cls, record: StudyRecord) -> Form:
        """What a run was trained with."""
        ratio = record.overrides["train.ratio"]
        return cls(ratio, 1 if ratio == "sde" else record.overrides["train.ratio_probes"])

    @property
    def title(self) -> str:
        """In words."""
        if self.ratio == "sde":
            return "sde"
        if self.ratio == "cfm":
            return f"cfm, {self.probes} draws"
        amount = "exact trace" if self.probes == 0 else f"{self.probes} probe{'s' * (self.probes > 1)}"
        return f"{self.ratio}, {amount}"


def by_form(study: Study) -> dict[Form, list[StudyRecord]]:
    """The seeds of each form: by form as the plan has them, then by probes, the exact trace last."""
    found: dict[Form, list[StudyRecord]] = {}
    for record in study.of("ratio"):
        found.setdefault(Form.of(record), []).append(record)
    order = list(dict.fromkeys(form.ratio for form in found))
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0].ratio), item[0].probes or math.inf)))


def fewest_epochs(study: Study) -> float:
    """Of any run with a ratio: where all can be compared per epoch."""
    return min(record.final("step") for record in study.of("ratio"))
