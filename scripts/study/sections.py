"""What the study's results say, claim by claim: verdicts, sentences and tables, as plain text.

Every verdict is decided by whether an interval excludes what it is held against; nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flow_grpo.recipes.base import leaves
from flow_grpo.recipes.sd3 import get_config
from scripts.study import plan
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI
from scripts.study.results import (
    DIVERSITY,
    NATS,
    SPREAD,
    Estimate,
    Form,
    RankCorrelation,
    Sample,
    SeedCrossing,
    Study,
    StudyRecord,
    agreement,
    by_form,
    by_label,
    crossing,
    equal_reward_difference,
    fewest_epochs,
    final_difference,
    frontier,
    hacking,
    mean_interval,
    paired,
    rank_correlation,
    shares_kept,
    undominated,
)

NOT_RUN, NOT_MEASURED = "not yet run", "not measured"
FAR = 0.2  # "far faster": in less than a fifth
CLOSE = 0.7  # "a close proxy": rank correlations above
SMALL = 0.05  # a share of the gradient's noise that makes no odds
NAMES = {
    REWARD: "reward",
    ACCURACY: "judge accuracy",
    VENDI: "Vendi score",
    RKE: "RKE",
    ENTROPY: "colour entropy (nats)",
    NATS: "differential entropy (nats)",
    SPREAD: "std of ode_log_prob (nats)",
}
SPECS = {REWARD: ".4f", ACCURACY: ".1%", VENDI: ".2f", RKE: ".2f", ENTROPY: ".2f", NATS: ".1f", SPREAD: ".1f"}
PERCENT = ".0%"
CLAIMED = (VENDI, RKE, SPREAD)  # what the second claim names


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A claim or question, and what the numbers say."""

    anchor: str
    claim: str
    verdict: str  # a few words, decided by intervals
    command: str  # that makes its results
    summary: str = ""  # a sentence, with the interval
    rule: str = ""  # how it is measured and decided
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[str] = field(default=())  # names, relative to the results' folder, without .png

    @property
    def answer(self) -> str:
        """Verdict and summary."""
        return f"**{self.verdict[0].upper()}{self.verdict[1:]}.** {self.summary}".strip()


@dataclass(frozen=True)
class Results:
    """All that is committed, and where."""

    study: Study
    noise: Sequence[Mapping[str, Any]]  # rows of gradient_noise.py
    scales: Sequence[Mapping[str, Any]]  # see results.frontier
    validation: Sequence[Mapping[str, Any]]  # rows of the entropy validation
    samples: Sequence[Sample]  # whose grids are committed


# --- words ------------------------------------------------------------------------------------------------


def words(estimate: Estimate, spec: str) -> str:
    """A mean with its interval."""
    if estimate.count == 0:
        return NOT_MEASURED
    mean = format(estimate.mean, spec)
    if estimate.count == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({format(estimate.low, spec)} to {format(estimate.high, spec)})"


def direction(estimate: Estimate, down: str = "lower", up: str = "higher", neither: str = "no difference shown") -> str:
    """Which side of zero the interval lies on."""
    if estimate.count < 2:
        return "no interval"
    return down if estimate.below(0) else up if estimate.above(0) else neither


def listed(names: Iterable[str]) -> str:
    """ "a, b and c"; "none" of nothing."""
    *first, last = [*names] or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def points(estimate: Estimate) -> str:
    """A difference of shares with its interval, in percentage points."""
    scaled = Estimate(100 * estimate.mean, 100 * estimate.low, 100 * estimate.high, estimate.count)
    return f"{words(scaled, '+.1f')} points"


def _short(name: str) -> str:
    return NAMES[name].partition(" (")[0]


def _mean(records: Iterable[StudyRecord], name: str) -> Estimate:
    return mean_interval(record.final(name) for record in records)


def _signed(name: str) -> str:
    return f"+{SPECS[name]}"


# --- claim 1 ----------------------------------------------------------------------------------------------

RUN, SCALE = "python scripts/study/run.py", "python scripts/study/lora_scales.py"
NOISE = "python scripts/study/gradient_noise.py"


def speed_section(study: Study) -> Section:
    """Claim 1."""
    head = ("claim-1", "1. DRTune's reward rises far faster than GRPO's")
    command, pairs = f"{RUN} --only claims", study.pairs()
    if not pairs:
        return Section(*head, NOT_RUN, command)
    crossings = [crossing(*pair) for pair in pairs]
    seconds = mean_interval(found.seconds for found in crossings)
    forwards = mean_interval(found.network_evaluations for found in crossings)
    gap = final_difference(pairs, REWARD)
    return Section(
        *head,
        speed_verdict(crossings),
        command,
        summary=(
            f"DRTune reaches GRPO's final reward in {words(seconds, '.1%')} of GRPO's seconds and "
            f"{words(forwards, '.1%')} of its network evaluations; {seconds.count} of {len(pairs)} seeds."
            f"{untuned(study)}"
        ),
        rule=(
            "Measured for each seed: when DRTune's reward reaches GRPO's final one. DRTune's is smoothed to rise "
            "(isotonic regression over evaluations), so that no upward fluctuation counts, and interpolated. Far "
            f"faster means: both intervals below {FAR:.0%}, and no seed that never gets there."
        ),
        sentences=[f"At equal time DRTune's reward minus GRPO's is {words(gap, '+.4f')}: {direction(gap)}."],
        tables=[_methods_table(study), _crossings_table(crossings)],
        figures=["reward"],
    )


def untuned(study: Study) -> str:
    """A warning where the claims' runs do not have the settings that the search found best; empty where they do."""
    if not study.of("search"):
        return " Neither method has been tuned yet: both ran with their recipes."
    late = []
    for method, ran in {record.method: record for record in study.of("claims")}.items():
        tried = [record for record in study.of("search") if record.method == method]
        best = max(tried, key=lambda record: record.final(REWARD), default=ran)
        if _settings(best) != _settings(ran):
            late.append(f"{method} (best: {best.label})")
    return f" These runs do not have the settings that the search found best: {listed(late)}." if late else ""


def _settings(record: StudyRecord) -> dict[str, Any]:
    return dict(leaves(get_config(record.recipe))) | dict(record.overrides)


def speed_verdict(crossings: Sequence[SeedCrossing]) -> str:
    """Claim 1 in a few words."""
    risen = [found for found in crossings if found.meaningful]
    reached = [found for found in risen if found.reached]
    if not risen:
        return "cannot be said: GRPO's reward did not rise in any seed"
    if len(reached) < len(risen):
        return f"does not hold: DRTune reached GRPO's final reward in {len(reached)} of {len(risen)} seeds"
    if len(reached) < 2:
        return "cannot be said: one seed has no interval"
    fractions = [mean_interval(f.seconds for f in reached), mean_interval(f.network_evaluations for f in reached)]
    if all(fraction.below(FAR) for fraction in fractions):
        some = f", in the {len(risen)} of {len(crossings)} seeds where GRPO's reward rose"
        return "holds" + (some if len(risen) < len(crossings) else "")
    if all(fraction.below(1) for fraction in fractions):
        return f"holds in part: faster, but not shown to take less than {FAR:.0%}"
    return "does not hold" if any(fraction.above(1) for fraction in fractions) else "not shown"


def _methods_table(study: Study) -> Table:
    rows = [
        [
            label,
            str(len(records)),
            words(_mean(records, "seconds"), ".1f"),
            words(_mean(records, "network_evaluations"), ",.0f"),
            words(_mean(records, "images"), ",.0f"),
            words(_mean(records, REWARD), ".4f"),
            words(_mean(records, ACCURACY), ".1%"),
        ]
        for label, records in by_label(study.of("claims")).items()
    ]
    base = study.of("claims")[0]
    rows.insert(0, ["base", "", "0", "0", "0", f"{base.base(REWARD):.4f}", f"{base.base(ACCURACY):.1%}"])
    header = ["at the end", "seeds", "seconds", "network evaluations", "images", "reward", "judge accuracy"]
    return Table("Where the runs end:", header, rows)


def _crossings_table(crossings: Sequence[SeedCrossing]) -> Table:
    header = [
        "seed",
        "GRPO's final reward",
        "DRTune there after (s)",
        "of GRPO's seconds",
        "of its network evaluations",
    ]
    rows = []
    for found in crossings:
        cells = [f"{found.seconds_spent:.1f}", f"{found.seconds:.1%}", f"{found.network_evaluations:.1%}"]
        never = "never" if found.meaningful else "GRPO did not rise"
        rows.append([str(found.seed), f"{found.level:.4f}", *(cells if found.reached else [never] * 3)])
    return Table("When DRTune reaches GRPO's final reward:", header, rows)


# --- claim 2 ----------------------------------------------------------------------------------------------


def diversity_section(results: Results) -> Section:
    """Claim 2."""
    study = results.study
    claim = "2. DRTune collapses diversity, and Vendi score, RKE and the std of ode_log_prob show it"
    head, command, pairs = ("claim-2", claim), f"{RUN} --only claims", study.pairs()
    if not pairs:
        return Section(*head, NOT_RUN, command)
    at_time = {name: final_difference(pairs, name) for name in DIVERSITY}
    at_reward = {name: equal_reward_difference(pairs, name) for name in DIVERSITY}
    falls = {name: mean_interval(drtune.gain(name) for drtune, _ in pairs) for name in CLAIMED}
    changes = [f"{_short(n)} {direction(e, 'falls', 'rises', 'does not clearly move')}" for n, e in falls.items()]
    slowly = _gentler(study)
    return Section(
        *head,
        diversity_verdict(at_time, at_reward, slowly),
        command,
        summary=(
            f"Vendi score, DRTune minus GRPO: {words(at_time[VENDI], '+.2f')} at equal time, "
            f"{words(at_reward[VENDI], '+.2f')} at equal reward{_of_seeds(at_reward[VENDI], pairs)}"
            + (f"; {plan.GENTLER} at equal reward: {words(slowly[VENDI], '+.2f')}." if slowly else ".")
        ),
        rule=(
            "Lower or higher means that the interval of the paired difference excludes zero. The honest comparison is "
            "at equal reward: DRTune where its reward, smoothed as above, is the final one of GRPO's run of the same "
            "seed. At equal time the faster method has simply gone further."
        ),
        sentences=[
            f"From the base model to DRTune's end, {listed(changes)}.",
            *_against(at_reward),
            *_rate_matters(slowly),
        ],
        tables=[_diversity_table(study, at_time, at_reward)],
        figures=["diversity_vs_seconds", "diversity_vs_reward", *(["samples"] if results.samples else [])],
    )


def _of_seeds(estimate: Estimate, pairs: Sequence[Any]) -> str:
    """How many seeds a comparison rests on, where that is not all of them."""
    return "" if estimate.count == len(pairs) else f" ({estimate.count} of {len(pairs)} seeds)"


def _against(at_reward: Mapping[str, Estimate]) -> list[str]:
    """What contradicts the second claim, plainly."""
    higher = [
        f"{_short(name)} ({words(at_reward[name], _signed(name))})" for name in CLAIMED if at_reward[name].above(0)
    ]
    if higher:
        return [f"Against the claim: where DRTune has GRPO's reward, it keeps *more* {listed(higher)} than GRPO."]
    unclear = [_short(name) for name in CLAIMED if not at_reward[name].below(0)]
    return [f"At equal reward these do not show the claim: {listed(unclear)}."] if unclear else []


def _gentler(study: Study) -> dict[str, Estimate]:
    """DRTune with a tenth of the learning rate minus GRPO, at equal reward; empty before two seeds have run."""
    records = by_label(study.of("frontier")).get(plan.GENTLER, [])
    pairs = paired(records, by_label(study.of("claims")).get("GRPO", []))
    found = {name: equal_reward_difference(pairs, name) for name in DIVERSITY}
    return found if found[VENDI].count > 1 else {}


def _rate_matters(slowly: Mapping[str, Estimate]) -> list[str]:
    """Whether what is seen at equal reward is the method's, or its learning rate's."""
    differences = [f"{_short(n)} {words(e, _signed(n))}: {direction(e)}" for n, e in slowly.items()]
    return [
        f"{plan.GENTLER}, which the search found slower, minus GRPO at equal reward ({slowly[VENDI].count} seeds): "
        f"{'; '.join(differences)}."
    ] if slowly else []  # fmt: skip


def diversity_verdict(
    at_time: Mapping[str, Estimate], at_reward: Mapping[str, Estimate], slowly: Mapping[str, Estimate] | None = None
) -> str:
    """Claim 2 in a few words: by which of its measures DRTune has less diversity, at equal time and at equal reward.

    `slowly`: at equal reward with a smaller learning rate; what holds with one of them only is not the method's.
    """
    if any(at_time[name].count < 2 for name in CLAIMED):
        return "cannot be said: one seed has no interval"
    lower_then = [_short(name) for name in CLAIMED if at_time[name].below(0)]
    lower = [_short(name) for name in CLAIMED if at_reward[name].below(0)]
    higher = [_short(name) for name in CLAIMED if at_reward[name].above(0)]
    if not lower_then:
        return "does not hold: by none of the three is DRTune's diversity lower than GRPO's, even at equal time"
    if len(lower_then) == len(lower) == len(CLAIMED):
        if slowly and not slowly[VENDI].below(0):
            return "holds at equal time; at equal reward it depends on DRTune's learning rate"
        return "holds, at equal time and at equal reward"
    part = (
        "holds at equal time" if len(lower_then) == len(CLAIMED) else f"at equal time it holds by {listed(lower_then)}"
    )
    if any(at_reward[name].count < 2 for name in CLAIMED):
        return f"{part}; too few seeds reach GRPO's reward to compare there"
    rest = f"lower by {listed(lower)}" if lower else "not lower by any"
    return f"{part}; at equal reward DRTune's diversity is {rest}" + (f", higher by {listed(higher)}" if higher else "")


def _diversity_table(study: Study, at_time: Mapping[str, Estimate], at_reward: Mapping[str, Estimate]) -> Table:
    pairs = study.pairs()
    rows = []
    for name in DIVERSITY:
        spec = SPECS[name]
        there = mean_interval(d.where_reward_is(g.final(REWARD), name) for d, g in pairs if g.gain(REWARD) > 0)
        rows.append(
            [
                NAMES[name],
                format(pairs[0][0].base(name), spec),
                words(_mean((drtune for drtune, _ in pairs), name), spec),
                words(_mean((grpo for _, grpo in pairs), name), spec),
                words(there, spec),
                f"{words(at_time[name], _signed(name))}: {direction(at_time[name])}",
                f"{words(at_reward[name], _signed(name))}: {direction(at_reward[name])}",
            ]
        )
    header = [
        "", "base", "DRTune, end", "GRPO, end", "DRTune at GRPO's reward", "DRTune minus GRPO, equal time",
        "DRTune minus GRPO, equal reward",
    ]  # fmt: skip
    images = plan.EVALUATION["num_seeds"]
    return Table(f"Vendi score and RKE are means over prompts, of {images} images each:", header, rows)


def hacking_section(study: Study) -> Section:
    """Where the reward is exploited."""
    head = ("judge", "Does the reward keep rising while the held-out judge falls?")
    command, methods = f"{RUN} --only claims", by_label(study.of("claims"))
    if not methods:
        return Section(*head, NOT_RUN, command)
    found = {label: hacking(records) for label, records in methods.items()}
    rows = [
        [
            label,
            words(peak.seconds, ".0f"),
            words(peak.reward, ".4f"),
            words(peak.accuracy, ".1%"),
            points(peak.accuracy_after),
            words(peak.reward_after, "+.4f"),
            "exploited" if peak.shown else "not shown",
        ]
        for label, peak in found.items()
    ]
    shown = [label for label, peak in found.items() if peak.shown]
    header = ["", "accuracy peaks after (s)", "reward there", "accuracy there", "accuracy, from there to the end",
              "reward, from there to the end", "the reward is"]  # fmt: skip
    return Section(
        *head,
        f"yes, of {listed(shown)}" if shown else "not shown of either method",
        command,
        summary="; ".join(
            f"{label}: after a peak at {words(peak.seconds, '.0f')} s, accuracy {points(peak.accuracy_after)} "
            f"while reward {words(peak.reward_after, '+.4f')}"
            for label, peak in found.items()
        )
        + ".",
        rule=(
            "The judge is a CLIP trained apart from the reward; its accuracy is the share of images whose prompt it "
            "recognises. A seed's peak is placed where the mean of the *other* seeds is highest, so that the fall "
            "after it is not an effect of choosing a maximum. The reward is exploited where the interval of the "
            "accuracy's change lies below zero and that of the reward's above."
        ),
        tables=[Table("From the judge's peak on:", header, rows)],
        figures=["judge_vs_reward"],
    )


def proxy_section(study: Study) -> Section:
    """Rank correlations."""
    head = ("proxies", "Is the std of ode_log_prob a proxy for diversity? Is the differential entropy?")
    if not study.records:
        return Section(*head, NOT_RUN, RUN)
    found = {(p, d): rank_correlation(study.records, p, d) for p in (SPREAD, NATS) for d in (VENDI, RKE)}
    rows = [
        [
            NAMES[proxy],
            NAMES[diversity],
            rho.text,
            f"{rho.evaluations:,} of {rho.runs} runs",
            words(rho.within, ".2f"),
            proxy_words(rho),
        ]
        for (proxy, diversity), rho in found.items()
    ]
    header = ["", "with", "rank correlation, all evaluations", "evaluations", "within a run, mean", "so it"]
    spread, nats = found[SPREAD, VENDI], found[NATS, VENDI]
    return Section(
        *head,
        f"the std {proxy_words(spread)}, the entropy {proxy_words(nats)}",
        RUN,
        summary=(
            f"Rank correlation with the Vendi score over all runs: std {spread.text}, differential entropy "
            f"{nats.text}; within a run {words(spread.within, '.2f')} and {words(nats.within, '.2f')}."
        ),
        rule=(
            "Spearman's rho over all evaluations of all runs; its interval comes from a bootstrap over runs. Beside it "
            "the mean of every run's own rho, with a t interval over runs. It follows diversity closely if both "
            f"intervals lie above {CLOSE}, loosely if both lie above 0."
        ),
        tables=[Table("The base model, the same in every run, is left out:", header, rows)],
        figures=["proxies"],
    )


def proxy_words(rho: RankCorrelation) -> str:
    """What a correlation amounts to."""
    lows = (rho.low, rho.within.low)
    if all(low > CLOSE for low in lows):
        return "follows diversity closely"
    if all(low > 0 for low in lows):
        return "follows diversity loosely"
    if rho.high < 0 or rho.within.below(0):
        if rho.low > 0:
            return "goes with diversity between runs, and against it within them"
        return "runs against diversity"
    return "is not shown to follow diversity"


# --- claim 3 ----------------------------------------------------------------------------------------------


def entropy_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Claim 3."""
    exact = [row for row in rows if row["field"] == "exact"]
    learnt = [row for row in rows if row["field"] != "exact"]
    found = agreement(exact)
    off = [row["target"] for row in learnt if abs(row["error_in_standard_errors"]) > 1.96]
    cells = [
        [
            row["target"],
            row["field"],
            f"{row['estimate']:.4f}",
            f"{row['theory']:.4f}",
            f"{row['error']:+.4f} ({row['error'] - 1.96 * row['standard_error']:+.4f} to "
            f"{row['error'] + 1.96 * row['standard_error']:+.4f})",
            f"{row['error_in_standard_errors']:+.2f}",
        ]
        for row in rows
    ]
    header = ["target", "velocity", "estimate (nats)", "theory", "error (95 % interval)", "error / standard error"]
    return Section(
        "claim-3",
        "3. The entropy estimator agrees with theory",
        "holds" if found.holds else "does not hold",
        "python scripts/diversity_metrics/validate_entropy.py",
        summary=(
            f"On {found.targets} targets with exact velocity fields the largest error is {found.largest:.2f} standard "
            f"errors; the sum of squares is {found.statistic:.1f}, and 95 % of such sums are below {found.limit:.1f}."
        ),
        rule=(
            "It holds if the errors of the exact fields, in standard errors, are together no larger than a standard "
            "normal's: the sum of their squares below the 95 % quantile of chi-square."
        ),
        sentences=[
            f"Of the {len(learnt)} velocity fields that were learnt, {len(off)} are off by more than 1.96 standard "
            f"errors ({listed(off)}): their errors hold the misfit of the MLP as well, and test that rather than the "
            "estimator."
        ],
        tables=[Table("From `assets/figures/entropy_validation/results.json`:", header, cells)],
        figures=["../figures/entropy_validation/errors"],
    )


# --- claim 4 ----------------------------------------------------------------------------------------------


def ratio_section(study: Study, noise: Sequence[Mapping[str, Any]]) -> Section:
    """Claim 4."""
    claim = "4. The ODE log-probability in GRPO's ratio does not train, for the variance of a single probe"
    head, command, forms = ("claim-4", claim), f"{RUN} --only ratio && {NOISE}", by_form(study)
    if not forms:
        return Section(*head, NOT_RUN, command)
    gains = {form: mean_interval(record.gain(REWARD) for record in records) for form, records in forms.items()}
    return Section(
        *head,
        ratio_verdict(gains, noise, _advantage(forms)),
        command,
        summary="; ".join(f"{form.title}: {words(gains[form], '+.4f')}" for form in _telling(gains))
        + " reward gained.",
        rule=(
            "A form trains if the interval of its reward gain lies above zero. `sde` is GRPO's own ratio, the control; "
            "`ode_step` the original experiment with both sides reduced alike; `ode_path` the density of the image, "
            "with the transport term that `ode_step` drops; `cfm` a ratio of flow-matching losses. Learning rate, clip "
            "range and all else are GRPO's, so a form's failure may also be one of tuning; all forms make the same "
            "number of updates (their seconds are indicative: other work ran beside them). The exact trace takes 256 "
            "products where a probe takes one, too many for a run: only its gradient was measured, and held against "
            "the gradient of the evaluated reward. scripts/study/gradient_noise.py says how, and what its columns are; "
            "its intervals are over groups, by the jackknife."
        ),
        sentences=ratio_sentences(gains, noise),
        tables=[_ratio_table(study, gains), _statistics_table(forms), *_noise_tables(noise)],
        figures=["ratios", "ratio_statistics", *(["gradient_noise"] if noise else [])],
    )


def _advantage(forms: Mapping[Form, Sequence[StudyRecord]]) -> Estimate | None:
    """Reward gained by ode_step with most probes minus that with one; seeds paired."""
    one, most = Form("ode_step", 1), _most_probes(forms, "ode_step")
    if one not in forms or most is None:
        return None
    return mean_interval(a.gain(REWARD) - b.gain(REWARD) for a, b in paired(forms[most], forms[one]))


def _telling(gains: Mapping[Form, Estimate]) -> list[Form]:
    """The control, and each ODE form with one probe and with the least variance."""
    wanted = [Form("sde", 1)]
    for ratio in ("ode_step", "ode_path"):
        wanted += [Form(ratio, 1), _most_probes(gains, ratio) or Form(ratio, 1)]
    return [form for form in dict.fromkeys(wanted) if form in gains]


def outcome(gain: Estimate) -> str:
    """Whether a form of the ratio trains."""
    return direction(gain, "lowers the reward", "trains", "is not shown to train")


def _most_probes(gains: Iterable[Form], ratio: str) -> Form | None:
    """The form with the least variance: the exact trace if it was run."""
    found = [form for form in gains if form.ratio == ratio]
    return max(found, key=lambda form: form.probes or math.inf, default=None)


def ratio_verdict(
    gains: Mapping[Form, Estimate],
    noise: Sequence[Mapping[str, Any]] = (),
    advantage: Estimate | None = None,
) -> str:
    """Claim 4 in a few words.

    Args:
        gains: reward gained, by form.
        noise: rows of gradient_noise.py.
        advantage: of ode_step with most probes over one probe, in reward gained; seeds paired.
    """
    one, most = Form("ode_step", 1), _most_probes(gains, "ode_step")
    lacking = _lacking(gains)
    if lacking or most is None:
        return f"cannot be settled: {lacking}"
    if gains[one].above(0):
        return "does not hold: ode_step trains with one probe"
    found = f"ode_step {outcome(gains[one])} with one probe"
    if most == one:
        return f"not settled: {found}; more probes are not yet run"
    found += f", and {outcome(gains[most])} with {_amount(most)}"
    if gains[most].above(0):
        told = advantage is not None and advantage.above(0)
        return f"holds: {found}" if told else f"not settled: {found}, but the two are not told apart"
    between = [form for form in gains if form.ratio == "ode_step" and gains[form].above(0)]
    if between:
        return f"not settled: {found}, yet it trains with {listed(map(_amount, between))}"
    if most == Form("ode_step", 0):
        return f"holds in part: {found}, where no probe adds variance"
    return _by_gradient(found, gradients(noise).get(Form("ode_step", 0)))


def _lacking(gains: Mapping[Form, Estimate]) -> str:
    """What is missing to say anything; empty where nothing is."""
    control, one = Form("sde", 1), Form("ode_step", 1)
    if control not in gains or gains[control].count < 2:
        return "the control, sde, needs at least two seeds"
    if not gains[control].above(0):
        return "the control, sde, is not shown to train either"
    return "" if one in gains and gains[one].count > 1 else "ode_step with one probe needs at least two seeds"


def _by_gradient(found: str, exact: Mapping[str, Estimate] | None) -> str:
    """The verdict where nothing trains, and the exact trace was not run but had its gradient measured."""
    if exact is None:
        return f"holds in part: {found}; the exact trace is not yet run"
    return f"holds in part: {found}, so not for a single probe's variance alone; its exact gradient {heads(exact)}"


def _amount(form: Form) -> str:
    """Its probes in words."""
    return "the exact trace" if form.probes == 0 else form.title.partition(", ")[2]


def gradients(noise: Sequence[Mapping[str, Any]]) -> dict[Form, dict[str, Estimate]]:
    """What gradient_noise.py measured, by form and source."""
    found: dict[Form, dict[str, Estimate]] = {}
    for row in noise:
        value, low, high = (math.nan if row[name] is None else row[name] for name in ("value", "low", "high"))
        estimate = Estimate(value, low, high, row["batches"])
        found.setdefault(Form(row["form"], row["probes"]), {})[row["source"]] = estimate
    return found


def heads(found: Mapping[str, Estimate]) -> str:
    """Where the mean gradient of a form points."""
    return direction(
        found["uphill"], "points down the reward", "points up the reward", "is not shown to point up the reward"
    )


def gradient_sentences(noise: Sequence[Mapping[str, Any]]) -> list[str]:
    """What probes add to the gradient's noise, and where the gradient points without them."""
    found = gradients(noise)
    probed = {
        form: _probe_share(sources["probes"])
        for form, sources in found.items()
        if form.ratio == "ode_step" and "probes" in sources
    }
    shares = [f"{words(share, '.0%')} with {form.probes}" for form, share in probed.items()]
    most = max(probed, key=lambda form: form.probes, default=None)
    near = ""
    if most is not None and probed[most].below(SMALL):
        near = f" So a run with the exact trace would follow nearly the gradients of one with {most.probes}."
    ways = [
        f"that of {form.title} {heads(sources)} ({words(sources['uphill'], '+.3f')} of its length)"
        for form, sources in found.items()
    ]
    behind = [
        f"{form.title} {words(sources['over_sde'], '+.3f')}: {direction(sources['over_sde'])}"
        for form, sources in found.items()
        if "over_sde" in sources
    ]
    return [
        f"The probes' share in the squared length of `ode_step`'s gradient on a group: {', '.join(shares)}.{near}",
        f"Where the gradients of a group point, on average: {'; '.join(ways)}.",
        f"That share of the length, minus that of sde's gradient on the same groups: {'; '.join(behind)}.",
    ]


def _probe_share(snr: Estimate) -> Estimate:
    """Of E|g|^2, what other probes for the same images change: 1 / (1 + signal to noise), within [0, 1]."""
    share, low, high = (1 / (1 + max(value, 0.0)) for value in (snr.mean, snr.high, snr.low))
    return Estimate(share, low, high, snr.count)


def ratio_sentences(gains: Mapping[Form, Estimate], noise: Sequence[Mapping[str, Any]]) -> list[str]:
    """The questions that tell variance from bias."""

    def answer(ratio: str, probes: int) -> str:
        gain = gains.get(Form(ratio, probes))
        return "was not run" if gain is None else f"{outcome(gain)}: {words(gain, '+.4f')}"

    paths = [
        f"{form.title.partition(', ')[2]} {answer('ode_path', form.probes)}"
        for form in gains
        if form.ratio == "ode_path"
    ]
    found = [
        f"With one probe `ode_step` {answer('ode_step', 1)}; with 4 {answer('ode_step', 4)}; with 16 "
        f"{answer('ode_step', 16)}; with the exact trace it {answer('ode_step', 0)}.",
        f"The density itself: `ode_path` with {'; with '.join(paths)}." if paths else f"`ode_path`: {NOT_RUN}.",
    ]
    return [*found, *(gradient_sentences(noise) if noise else [f"Signal-to-noise of the gradient: {NOT_RUN}."])]


def _ratio_table(study: Study, gains: Mapping[Form, Estimate]) -> Table:
    forms, epochs = by_form(study), fewest_epochs(study)
    control = forms.get(Form("sde", 1), [])
    rows = []
    for form, records in forms.items():
        against = mean_interval(
            one.at("step", epochs, REWARD) - other.at("step", epochs, REWARD) for one, other in paired(records, control)
        )
        rows.append(
            [
                form.title,
                str(len(records)),
                words(_mean(records, "step"), ".0f"),
                words(_mean(records, "seconds"), ".0f"),
                words(gains[form], "+.4f"),
                outcome(gains[form]),
                "" if form.ratio == "sde" else f"{words(against, '+.4f')}: {direction(against)}",
                words(_mean(records, VENDI), ".2f"),
                words(_mean(records, ACCURACY), ".1%"),
            ]
        )
    header = ["ratio", "seeds", "epochs", "seconds", "reward gained", "it",
              f"minus sde's, after {epochs:.0f} epochs", "Vendi score", "judge accuracy"]  # fmt: skip
    return Table("After equal numbers of updates:", header, rows)


def _statistics_table(forms: Mapping[Form, Sequence[StudyRecord]]) -> Table:
    columns = (
        ("train/ratio_error", ".1e"), ("train/clip_fraction", ".1%"), ("train/ratio_std", ".2e"),
        ("train/log_ratio_mean", "+.1e"), ("train/grad_norm", ".2e"), ("train/zero_std_fraction", ".1%"),
    )  # fmt: skip
    rows = []
    for form, records in forms.items():
        cells = []
        for name, spec in columns:
            first, mean = (_training_mean(records, name, which) for which in ("first", "mean"))
            cells.append(f"{first:{spec}}, {mean:{spec}}" if math.isfinite(first) else NOT_MEASURED)
        rows.append([form.title, *cells])
    header = ["ratio", "\\|r - 1\\| at theta_old", "share clipped", "std of log r", "mean of log r", "gradient norm",
              "groups without spread"]  # fmt: skip
    return Table("First epoch, mean over all epochs; each a mean over seeds:", header, rows)


def _training_mean(records: Sequence[StudyRecord], name: str, which: str) -> float:
    values = (record.training.get(name, {}).get(which) for record in records)
    return mean_interval(value for value in values if value is not None).mean


def _noise_tables(noise: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A row for each form; gradient_noise.py says what the columns are."""
    if not noise:
        return []
    specs = {"probes": ".3g", "batches": ".3g", "uphill": "+.3f", "over_sde": "+.3f", "cosine": "+.2f"}
    rows = [
        [
            form.title,
            str(found["uphill"].count),
            *(_known(found[name], spec) if name in found else "" for name, spec in specs.items()),
        ]
        for form, found in gradients(noise).items()
    ]
    header = ["ratio", "groups", "signal / noise, other probes", "signal / noise, other images",
              "uphill, of its length", "minus sde's, same groups", "cosine with the reward's gradient"]  # fmt: skip
    return [Table("The gradient of a group of 8 images, at the base model:", header, rows)]


def _known(estimate: Estimate, spec: str) -> str:
    return words(estimate, spec) if math.isfinite(estimate.mean) else "not told from 0"


# --- the frontier -----------------------------------------------------------------------------------------


def frontier_section(results: Results) -> Section:
    """What keeps diversity, and at what price."""
    study = results.study
    head = ("frontier", "How much of the collapse do a KL penalty, stopping early and scaling the LoRA undo?")
    command = f"{RUN} --only claims,frontier && {SCALE}"
    points, control = frontier(study, results.scales), by_label(study.of("claims")).get("GRPO", [])
    runs = by_label(study.of("claims", "frontier"))
    if not points:
        return Section(*head, NOT_RUN, command)
    base = {name: study.of("claims", "frontier")[0].base(name) for name in (REWARD, VENDI, RKE, ACCURACY)}
    labels = dict.fromkeys(point.label for point in points)
    rows, means, shares = [], {"base": (base[REWARD], base[VENDI])}, {}
    for label in labels:
        chosen = [point for point in points if point.label == label]
        undone, kept = shares_kept(points, label, base)
        means[label] = (mean_interval(p.reward for p in chosen).mean, mean_interval(p.vendi for p in chosen).mean)
        if chosen[0].method == "DRTune" and label != "DRTune":
            shares[label] = undone
        rows.append(
            [
                label,
                str(len(chosen)),
                *(words(mean_interval(getattr(p, name) for p in chosen), spec)
                  for name, spec in (("seconds", ".0f"), ("reward", ".4f"), ("vendi", ".2f"), ("rke", ".2f"),
                                     ("accuracy", ".1%"))),
                *(["", ""] if label == "DRTune" else [words(undone, ".0%"), words(kept, ".0%")]),
                _at_equal_reward(runs.get(label, []), control),
            ]
        )  # fmt: skip
    header = ["", "seeds", "seconds", "reward", "Vendi score", "RKE", "judge accuracy",
              "of DRTune's loss of Vendi, undone", "of DRTune's reward gain, kept",
              "Vendi minus GRPO's, at GRPO's reward"]  # fmt: skip
    absent = [] if study.of("frontier") else [f"KL penalties: {NOT_RUN}."]
    absent += [] if results.scales else [f"LoRA scaled at sampling time: {NOT_RUN}."]
    return Section(
        *head,
        undoing_verdict(shares),
        command,
        summary=f"Of DRTune's loss of Vendi score: {listed(f'{k} {words(v, PERCENT)}' for k, v in shares.items())}.",
        rule=(
            "All at the end of equal time, but for the stopped runs, which take less. The shares are of the DRTune run "
            "of the same seed: 100 % undone has the base model's Vendi score. A method is shown to undo some of the "
            "collapse if its interval lies above zero."
        ),
        sentences=[f"Not dominated, in mean reward and Vendi score together: {listed(undominated(means))}.", *absent],
        tables=[Table("Reward against diversity:", header, rows)],
        figures=["frontier"],
    )


def _at_equal_reward(records: Sequence[StudyRecord], control: Sequence[StudyRecord]) -> str:
    """Vendi score where a run has the final reward of GRPO's of the same seed, minus that of GRPO's."""
    if not records or records[0].method == "GRPO":
        return ""
    pairs = paired(records, control)
    found = equal_reward_difference(pairs, VENDI)
    return f"{words(found, _signed(VENDI))}{_of_seeds(found, pairs)}" if found.count else "not reached"


def undoing_verdict(shares: Mapping[str, Estimate]) -> str:
    """Which variants of DRTune keep diversity that DRTune loses; shares of the loss that they undo."""
    if all(undone.count < 2 for undone in shares.values()):
        return "cannot be said: no variant of DRTune has two seeds to compare"
    return f"shown to undo some of it: {listed(label for label, undone in shares.items() if undone.above(0))}"


def search_section(study: Study) -> Section:
    """How the two methods were tuned."""
    head, command = ("search", "How the two methods were tuned"), f"{RUN} --only search"
    records = study.of("search")
    if not records:
        return Section(*head, NOT_RUN, command)
    rows = [
        [r.label, f"{r.final('seconds'):.0f}"]
        + [format(r.final(name), SPECS[name]) for name in (REWARD, ACCURACY, VENDI)]
        for r in records
    ]
    best = {
        method: max((r for r in records if r.method == method), key=lambda r: r.final(REWARD), default=None)
        for method in ("DRTune", "GRPO")
    }
    highest = listed(f"{r.label} ({r.final(REWARD):.4f})" for r in best.values() if r is not None)
    chosen = "; ".join(
        f"{label}: {_changes(next(iter(runs)).overrides)}" for label, runs in by_label(study.of("claims")).items()
    )
    return Section(
        *head,
        f"highest final rewards: {highest}",
        command,
        rule="One seed, which no claim uses, and a part of the time; highest final reward.",
        sentences=[f"The claims' runs change of their recipes: {chosen}."] if chosen else [],
        tables=[Table("The search:", ["", "seconds", "reward", "judge accuracy", "Vendi score"], rows)],
    )


def _changes(overrides: Mapping[str, Any]) -> str:
    return listed(f"{key} = {value}" for key, value in overrides.items()) if overrides else "nothing"


# --- all of it ----------------------------------------------------------------------------------------


def sections(results: Results) -> list[Section]:
    """The whole study."""
    study = results.study
    return [
        speed_section(study),
        diversity_section(results),
        hacking_section(study),
        proxy_section(study),
        entropy_section(results.validation),
        ratio_section(study, results.noise),
        frontier_section(results),
        search_section(study),
    ]
