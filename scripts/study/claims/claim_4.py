"""Claim 4: which forms of GRPO's likelihood ratio train, and where their gradients point.

Reads the runs of "ratio", and what gradient_noise.py wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results, Rows
from scripts.study.comparison import Side, mean_final, side
from scripts.study.forms import Form, by_form, fewest_epochs
from scripts.study.records import ACCURACY, REWARD, VENDI
from scripts.study.study_records import Study, StudyRecord, paired

SMALL = 0.05  # a share of the gradient's noise that makes no odds
SDE, ONE, EXACT = Form("sde", 1), Form("ode_step", 1), Form("ode_step", 0)
ENDS = ("step", "seconds", VENDI, ACCURACY)
STATISTICS = (
    "train/ratio_error", "train/clip_fraction", "train/ratio_std", "train/log_ratio_mean", "train/grad_norm",
    "train/zero_std_fraction",
)  # fmt: skip
Forms = Mapping[Form, Sequence[StudyRecord]]
Gains = Mapping[Form, CountedInterval]  # reward gained
Gradients = Mapping[Form, Mapping[str, CountedInterval]]  # what gradient_noise.py measured, by form and source


class Code(StrEnum):
    """What became of the claim."""

    NO_CONTROL = "control needs seeds"
    CONTROL_FAILS = "control does not train"
    NO_PROBE = "one probe needs seeds"
    TRAINS = "one probe trains"
    ONE_ONLY = "more probes not run"
    HOLDS = "holds"
    NOT_TOLD = "not told apart"
    BETWEEN = "trains in between"
    EXACT_FAILS = "exact trace does not train"
    EXACT_NOT_RUN = "exact trace not run"
    BY_GRADIENT = "by the exact gradient"


@dataclass(frozen=True)
class Verdict:
    """The code, and what became of ode_step with one probe and with most."""

    code: Code
    one: Side | None = None
    most: Form | None = None
    with_most: Side | None = None
    between: Sequence[Form] = ()  # forms that train where that with most probes does not
    uphill: Side | None = None  # where the exact trace's gradient points


@dataclass(frozen=True)
class Row:
    """One form after equal numbers of updates."""

    form: Form
    seeds: int
    gain: CountedInterval
    minus_sde: CountedInterval | None  # reward after the fewest epochs; None: of sde itself
    ends: Mapping[str, CountedInterval]  # of ENDS
    training: Mapping[str, tuple[float, float]]  # STATISTICS -> first epoch, mean over all; means over seeds


@dataclass(frozen=True)
class ProbeShares:
    """How much of a gradient's squared length probes make up."""

    shares: Gains  # of ode_step, by number of probes
    stands_in: Form | None  # the form with most, if its probes' share is SMALL


@dataclass(frozen=True)
class Ratios:
    """All numbers of the claim."""

    verdict: Verdict
    gains: Gains
    telling: Sequence[Form]
    epochs: float  # the fewest of any run
    rows: Sequence[Row]
    gradients: Gradients  # empty: not measured
    probes: ProbeShares
    figures: Sequence[str]

    def with_probes(self, ratio: str, probes: int) -> CountedInterval | None:
        """Reward gained; None: not run."""
        return self.gains.get(Form(ratio, probes))


def find(results: Results) -> Ratios | None:
    """None before any run of a form."""
    study, forms = results.study, by_form(results.study)
    if not forms:
        return None
    gains = {form: mean_interval(record.gain(REWARD) for record in records) for form, records in forms.items()}
    measured = gradients(results.noise)
    return Ratios(
        verdict=ratio_verdict(gains, measured, _advantage(forms)),
        gains=gains,
        telling=_telling(gains),
        epochs=fewest_epochs(study),
        rows=[_row(form, forms, study) for form in forms],
        gradients=measured,
        probes=probe_shares(measured),
        figures=["ratios", "ratio_statistics", *(["gradient_noise"] if measured else [])],
    )


# --- the verdict --------------------------------------------------------------------------------------------


def ratio_verdict(gains: Gains, measured: Gradients | None = None, advantage: CountedInterval | None = None) -> Verdict:
    """A form trains if the interval of its gain lies above zero.

    Args:
        gains: reward gained, by form.
        measured: of gradient_noise.py.
        advantage: of ode_step with most probes over one probe, in reward gained; seeds paired.
    """
    most, lacking = _most_probes(gains, "ode_step"), _lacking(gains)
    if lacking is not None or most is None:
        return Verdict(lacking or Code.NO_PROBE)
    one = side(gains[ONE])
    if one is Side.ABOVE:
        return Verdict(Code.TRAINS, one)
    if most == ONE:
        return Verdict(Code.ONE_ONLY, one)
    with_most = side(gains[most])
    if gains[most].above(0):
        told = advantage is not None and advantage.above(0)
        return Verdict(Code.HOLDS if told else Code.NOT_TOLD, one, most, with_most)
    between = [form for form in gains if form.ratio == "ode_step" and gains[form].above(0)]
    exact = (measured or {}).get(EXACT)
    uphill = None if exact is None else side(exact["uphill"])
    return Verdict(_without_training(most, between, uphill), one, most, with_most, between, uphill)


def _lacking(gains: Gains) -> Code | None:
    """What is missing to say anything."""
    if SDE not in gains or gains[SDE].count < 2:
        return Code.NO_CONTROL
    if not gains[SDE].above(0):
        return Code.CONTROL_FAILS
    return None if ONE in gains and gains[ONE].count > 1 else Code.NO_PROBE


def _without_training(most: Form, between: Sequence[Form], uphill: Side | None) -> Code:
    """Where most probes do not train."""
    if between:
        return Code.BETWEEN
    if most == EXACT:
        return Code.EXACT_FAILS
    return Code.EXACT_NOT_RUN if uphill is None else Code.BY_GRADIENT


def _advantage(forms: Forms) -> CountedInterval | None:
    """Reward gained by ode_step with most probes minus that with one; seeds paired."""
    most = _most_probes(forms, "ode_step")
    if ONE not in forms or most is None:
        return None
    return mean_interval(a.gain(REWARD) - b.gain(REWARD) for a, b in paired(forms[most], forms[ONE]))


def _most_probes(gains: Iterable[Form], ratio: str) -> Form | None:
    """The form with the least variance: the exact trace if it was run."""
    found = [form for form in gains if form.ratio == ratio]
    return max(found, key=lambda form: form.probes or math.inf, default=None)


def _telling(gains: Gains) -> list[Form]:
    """The control, and each ODE form with one probe and with the least variance."""
    wanted = [SDE]
    for ratio in ("ode_step", "ode_path"):
        wanted += [Form(ratio, 1), _most_probes(gains, ratio) or Form(ratio, 1)]
    return [form for form in dict.fromkeys(wanted) if form in gains]


# --- the runs -------------------------------------------------------------------------------------------------


def _row(form: Form, forms: Forms, study: Study) -> Row:
    records, epochs = forms[form], fewest_epochs(study)
    against = mean_interval(
        one.at("step", epochs, REWARD) - other.at("step", epochs, REWARD)
        for one, other in paired(records, forms.get(SDE, []))
    )
    return Row(
        form=form,
        seeds=len(records),
        gain=mean_interval(record.gain(REWARD) for record in records),
        minus_sde=None if form.ratio == "sde" else against,
        ends={name: mean_final(records, name) for name in ENDS},
        training={name: (_mean(records, name, "first"), _mean(records, name, "mean")) for name in STATISTICS},
    )


def _mean(records: Sequence[StudyRecord], name: str, which: str) -> float:
    values = (record.training.get(name, {}).get(which) for record in records)
    return mean_interval(value for value in values if value is not None).estimate


# --- the gradients ----------------------------------------------------------------------------------------------


def gradients(noise: Rows) -> dict[Form, dict[str, CountedInterval]]:
    """Of the rows of gradient_noise.json."""
    found: dict[Form, dict[str, CountedInterval]] = {}
    for row in noise:
        value, low, high = (math.nan if row[name] is None else row[name] for name in ("value", "low", "high"))
        interval = CountedInterval(value, low, high, count=row["batches"])
        found.setdefault(Form(row["form"], row["probes"]), {})[row["source"]] = interval
    return found


def probe_shares(measured: Gradients) -> ProbeShares:
    """Of E|g|^2 of ode_step, what other probes for the same images change."""
    shares = {
        form: _probe_share(sources["probes"])
        for form, sources in measured.items()
        if form.ratio == "ode_step" and "probes" in sources
    }
    most = max(shares, key=lambda form: form.probes, default=None)
    return ProbeShares(shares, most if most is not None and shares[most].below(SMALL) else None)


def _probe_share(snr: CountedInterval) -> CountedInterval:
    """1 / (1 + signal to noise), within [0, 1]."""
    share, low, high = (1 / (1 + max(value, 0.0)) for value in (snr.estimate, snr.high, snr.low))
    return CountedInterval(share, low, high, count=snr.count)


CLAIM = Claim("claim-4", f"{RUN} --only ratio && python scripts/study/gradient_noise.py", find, in_readme=True)
