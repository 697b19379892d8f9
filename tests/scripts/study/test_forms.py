"""Forms of the ratio are told apart."""

from __future__ import annotations

from scripts.study.forms import Form, by_form
from tests.scripts.study.builders import record, study_of


def test_forms_are_known_by_their_settings_and_the_exact_trace_comes_last() -> None:
    settings = [("sde", 1), ("ode_step", 0), ("ode_step", 16), ("ode_step", 1), ("cfm", 10)]
    records = [
        record(f"{form} {probes}", group="ratio", overrides={"train.ratio": form, "train.ratio_probes": probes})
        for form, probes in settings
    ]
    titles = [form.title for form in by_form(study_of(records))]
    assert titles == ["sde", "ode_step, 1 probe", "ode_step, 16 probes", "ode_step, exact trace", "cfm, 10 draws"]
    assert Form("ode_path", 4).title == "ode_path, 4 probes"
