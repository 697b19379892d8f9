"""From the study's run folders to its committed results, and from those alone to figures, docs/study.md and README.md.

    python scripts/study/summarise.py                      # figures and pages again, from assets/study
    python scripts/study/summarise.py --logs logs/study    # first collect what the run folders hold
    python scripts/study/summarise.py --check              # are the pages what the committed results give?
    python scripts/study/summarise.py --quick logs/study   # do the quick runs lie within the committed intervals?

The README's part stands between `<!-- study -->` and `<!-- /study -->`. Every verdict is decided here by the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from scripts.study import plan
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI
from scripts.study.results import (
    DIVERSITY,
    NATS,
    NOISE_FILE,
    RUNS_FILE,
    SCALES_FILE,
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
    collect,
    compare_quick,
    crossing,
    equal_reward_difference,
    fewest_epochs,
    final_difference,
    frontier,
    gain_at_epoch,
    hacking,
    mean_interval,
    paired,
    rank_correlation,
    read_study,
    samples,
    shares_kept,
    undominated,
    write_study,
)

ROOT = Path(__file__).resolve().parents[2]
OUT, PAGE, README = ROOT / "assets/study", ROOT / "docs/study.md", ROOT / "README.md"
VALIDATION = ROOT / "assets/figures/entropy_validation/results.json"
TEMPLATE = "study.md.j2"
BEGIN, END = "<!-- study -->", "<!-- /study -->"
NOT_RUN, NOT_MEASURED = "not yet run", "not measured"
FAR = 0.2  # "far faster": in less than a fifth
CLOSE = 0.7  # "a close proxy": rank correlations above
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
        """Verdict and summary, for a table's cell."""
        return f"**{self.verdict}.** {self.summary}".strip()


@dataclass(frozen=True)
class Results:
    """All that is committed, and where."""

    study: Study
    noise: Sequence[Mapping[str, Any]]  # {"form", "probes", "source", "snr", "low", "high"}
    scales: Sequence[Mapping[str, Any]]  # see results.frontier
    validation: Sequence[Mapping[str, Any]]  # rows of the entropy validation
    samples: Sequence[Sample]  # whose grids are committed


def read_results(out: Path, validation: Path = VALIDATION) -> Results:
    """Everything in a folder of results; ConfigError without its runs.json."""
    rows, study = json.loads(validation.read_text())["rows"], read_study(out / RUNS_FILE)
    grids = [sample for sample in samples(study) if (out / sample.file).is_file()]
    return Results(study, _list(out / NOISE_FILE), _list(out / SCALES_FILE), rows, grids)


def _list(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


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


def _mean(records: Iterable[StudyRecord], name: str) -> Estimate:
    return mean_interval(record.final(name) for record in records)


def _signed(name: str) -> str:
    return f"+{SPECS[name]}"


# --- claim 1 ----------------------------------------------------------------------------------------------

RUN = "python scripts/study/run.py"


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
        ),
        rule=(
            "Measured for each seed: when DRTune's reward, interpolated between evaluations, first reaches GRPO's "
            f"final one. Far faster means: both intervals below {FAR:.0%}, and no seed that never gets there."
        ),
        sentences=[f"At equal time DRTune's reward minus GRPO's is {words(gap, '+.4f')}: {direction(gap)}."],
        tables=[_methods_table(study), _crossings_table(crossings)],
        figures=["reward"],
    )


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
        return "holds"
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
    changes = [f"{NAMES[n]} {direction(e, 'falls', 'rises', 'does not clearly move')}" for n, e in falls.items()]
    return Section(
        *head,
        diversity_verdict(at_time, at_reward),
        command,
        summary=(
            f"Vendi score, DRTune minus GRPO: {words(at_time[VENDI], '+.2f')} at equal time, "
            f"{words(at_reward[VENDI], '+.2f')} at equal reward."
        ),
        rule=(
            "Lower or higher means that the interval of the paired difference excludes zero. The honest comparison is "
            "at equal reward: DRTune where it first reaches the final reward of GRPO's run of the same seed. At equal "
            "time the faster method has simply gone further."
        ),
        sentences=[f"From the base model to DRTune's end, {listed(changes)}."],
        tables=[_diversity_table(study, at_time, at_reward)],
        figures=["diversity_vs_seconds", "diversity_vs_reward", *(["samples"] if results.samples else [])],
    )


def diversity_verdict(at_time: Mapping[str, Estimate], at_reward: Mapping[str, Estimate]) -> str:
    """Claim 2 in a few words: by which of its measures DRTune has less diversity, at equal time and at equal reward."""
    if any(at_time[name].count < 2 for name in CLAIMED):
        return "cannot be said: one seed has no interval"
    lower_then = [NAMES[name] for name in CLAIMED if at_time[name].below(0)]
    lower = [NAMES[name] for name in CLAIMED if at_reward[name].below(0)]
    higher = [NAMES[name] for name in CLAIMED if at_reward[name].above(0)]
    if not lower_then:
        return "does not hold: by none of the three is DRTune's diversity lower than GRPO's, even at equal time"
    if len(lower_then) == len(lower) == len(CLAIMED):
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
    return Table("Vendi score and RKE are means over prompts, of 16 images each:", header, rows)


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
            words(peak.accuracy_after, "+.1%"),
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
            f"{label}: after a peak at {words(peak.seconds, '.0f')} s, accuracy {words(peak.accuracy_after, '+.1%')} "
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
            f"{rho.pooled:.2f} ({rho.low:.2f} to {rho.high:.2f})",
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
            f"Rank correlation with the Vendi score: std {spread.pooled:.2f} ({spread.low:.2f} to {spread.high:.2f}), "
            f"differential entropy {nats.pooled:.2f} ({nats.low:.2f} to {nats.high:.2f})."
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
    head, command, forms = ("claim-4", claim), f"{RUN} --only ratio", by_form(study)
    if not forms:
        return Section(*head, NOT_RUN, command)
    gains = {form: mean_interval(record.gain(REWARD) for record in records) for form, records in forms.items()}
    return Section(
        *head,
        ratio_verdict(gains),
        command,
        summary="; ".join(f"{form.title}: {words(gain, '+.4f')}" for form, gain in gains.items()) + " (reward gained).",
        rule=(
            "A form trains if the interval of its reward gain lies above zero. `sde` is GRPO's own ratio, the control; "
            "`ode_step` the original experiment with both sides reduced alike; `ode_path` the density of the image, "
            "with the transport term that `ode_step` drops; `cfm` a ratio of flow-matching losses. The clip range and "
            "all else are GRPO's, so a form's failure may also be one of tuning."
        ),
        sentences=ratio_sentences(gains, noise),
        tables=[_ratio_table(study, gains), _statistics_table(forms), *_noise_tables(noise)],
        figures=["ratios", "ratio_statistics", *(["gradient_noise"] if noise else [])],
    )


def outcome(gain: Estimate | None) -> str:
    """Whether a form of the ratio trains."""
    if gain is None:
        return NOT_RUN
    return direction(gain, "lowers the reward", "trains", "is not shown to train")


def _most_probes(gains: Mapping[Form, Estimate], ratio: str) -> Form | None:
    """The form with the least variance: the exact trace if it was run."""
    found = [form for form in gains if form.ratio == ratio]
    return max(found, key=lambda form: form.probes or math.inf, default=None)


def ratio_verdict(gains: Mapping[Form, Estimate]) -> str:
    """Claim 4 in a few words."""
    trains = {form for form, gain in gains.items() if gain.above(0)}
    one, most = Form("ode_step", 1), _most_probes(gains, "ode_step")
    if Form("sde", 1) not in trains:
        return "cannot be settled: the control, sde, is not shown to train either"
    if one not in gains or gains[one].count < 2:
        return "cannot be settled: ode_step with one probe needs at least two seeds"
    if one in trains:
        return "does not hold: ode_step trains with one probe"
    if most in trains and most is not None:
        return f"holds: ode_step does not train with one probe, and does with {most.title.partition(', ')[2]}"
    if most == Form("ode_step", 0):
        return (
            "holds in part: ode_step does not train, but not for the probes' variance; nor does it with the exact trace"
        )
    more = f"nor with {most.probes}" if most is not None and most != one else "other numbers are not yet run"
    return f"holds in part: ode_step is not shown to train with one probe, {more}; the exact trace is not yet run"


def ratio_sentences(gains: Mapping[Form, Estimate], noise: Sequence[Mapping[str, Any]]) -> list[str]:
    """The questions that tell variance from bias."""

    def answer(ratio: str, probes: int) -> str:
        gain = gains.get(Form(ratio, probes))
        return outcome(gain) + (f", by {words(gain, '+.4f')}" if gain is not None else "")

    paths = [
        f"{form.title.partition(', ')[2]} {answer('ode_path', form.probes)}"
        for form in gains
        if form.ratio == "ode_path"
    ]
    found = [
        f"Variance: with one probe `ode_step` {answer('ode_step', 1)}; with 4 {answer('ode_step', 4)}; with 16 "
        f"{answer('ode_step', 16)}.",
        f"Bias: with the exact trace, where no probe adds variance, `ode_step` {answer('ode_step', 0)}. What fails "
        "there fails for what the form leaves out, or for its scale against the clip range.",
        f"The density itself: `ode_path` with {'; with '.join(paths)}." if paths else f"`ode_path`: {NOT_RUN}.",
    ]
    return found if noise else [*found, f"Signal-to-noise of the gradient: {NOT_RUN}."]


def _ratio_table(study: Study, gains: Mapping[Form, Estimate]) -> Table:
    forms, epochs = by_form(study), fewest_epochs(study)
    control = forms.get(Form("sde", 1), [])
    rows = []
    for form, records in forms.items():
        against = final_difference(paired(records, control), REWARD)
        rows.append(
            [
                form.title,
                str(len(records)),
                words(_mean(records, "step"), ".0f"),
                words(gains[form], "+.4f"),
                outcome(gains[form]),
                "" if form.ratio == "sde" else f"{words(against, '+.4f')}: {direction(against)}",
                words(gain_at_epoch(records, epochs), "+.4f"),
                words(mean_interval(1000 * r.gain(REWARD) / r.final("step") for r in records), "+.3f"),
            ]
        )
    header = ["ratio", "seeds", "epochs", "reward gained", "it", "minus sde's, equal time",
              f"gained after {epochs:.0f} epochs, the fewest", "1000 x gain per epoch"]  # fmt: skip
    return Table("Reward gained at equal time, and at equal numbers of epochs:", header, rows)


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
    if not noise:
        return []
    sources = {"probes": "other probes, same images", "batches": "other images"}
    rows = [
        [
            Form(r["form"], r["probes"]).title,
            sources[r["source"]],
            f"{r['snr']:.3g} ({r['low']:.3g} to {r['high']:.3g})",
        ]
        for r in noise
    ]
    return [
        Table("Signal-to-noise of the gradient at theta_old:", ["ratio", "repeated", "ratio (95 % interval)"], rows)
    ]


# --- the frontier -----------------------------------------------------------------------------------------


def frontier_section(results: Results) -> Section:
    """What keeps diversity, and at what price."""
    study = results.study
    head = ("frontier", "How much of the collapse do a KL penalty, stopping early and scaling the LoRA undo?")
    command, points = f"{RUN} --only claims,frontier", frontier(study, results.scales)
    if not points:
        return Section(*head, NOT_RUN, command)
    base = {name: study.of("claims", "frontier")[0].base(name) for name in (REWARD, VENDI, RKE, ACCURACY)}
    labels = dict.fromkeys(point.label for point in points)
    rows, means, undoing = [], {"base": (base[REWARD], base[VENDI])}, []
    for label in labels:
        chosen = [point for point in points if point.label == label]
        undone, kept = shares_kept(points, label, base)
        means[label] = (mean_interval(p.reward for p in chosen).mean, mean_interval(p.vendi for p in chosen).mean)
        undoing += [label] if undone.above(0) else []
        rows.append(
            [
                label,
                str(len(chosen)),
                *(words(mean_interval(getattr(p, name) for p in chosen), spec)
                  for name, spec in (("seconds", ".0f"), ("reward", ".4f"), ("vendi", ".2f"), ("rke", ".2f"),
                                     ("accuracy", ".1%"))),
                *(["", ""] if label == "DRTune" else [words(undone, ".0%"), words(kept, ".0%")]),
            ]
        )  # fmt: skip
    header = ["", "seeds", "seconds", "reward", "Vendi score", "RKE", "judge accuracy",
              "of DRTune's loss of Vendi, undone", "of DRTune's reward gain, kept"]  # fmt: skip
    absent = [] if study.of("frontier") else [f"KL penalties and advantage modes: {NOT_RUN}."]
    absent += [] if results.scales else [f"LoRA scaled at sampling time: {NOT_RUN}."]
    return Section(
        *head,
        f"shown to undo some of it: {listed(undoing)}",
        command,
        summary=f"Not dominated in mean reward and Vendi score: {listed(undominated(means))}.",
        rule=(
            "All at the end of equal time, but for the stopped runs, which take less. The shares are of the DRTune run "
            "of the same seed: 100 % undone has the base model's Vendi score. A method is shown to undo some of the "
            "collapse if its interval lies above zero."
        ),
        sentences=absent,
        tables=[Table("Reward against diversity:", header, rows)],
        figures=["frontier"],
    )


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


# --- pages ------------------------------------------------------------------------------------------------


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


def page(results: Results, found: Sequence[Section], out: Path, folder: Path) -> str:
    """docs/study.md; `folder` is the one it lies in, `out` that of the results and figures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(  # Markdown: nothing is escaped
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    shown = [{**vars(s), "answer": s.answer, "figures": _links(s.figures, out, folder)} for s in found]
    return environment.get_template(TEMPLATE).render(
        sections=shown,
        missing=_missing(results.study),
        notes=_notes(results.study),
        environments=[_environment(environment) for environment in results.study.environments],
        out="assets/study" if out == OUT else out.name,
    )


def _links(names: Sequence[str], out: Path, folder: Path) -> list[dict[str, str]]:
    return [
        {"title": Path(name).name.replace("_", " "), "link": os.path.relpath(out / f"{name}.png", folder)}
        for name in names
    ]


def _missing(study: Study) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in study.missing.items():
        found.setdefault(name.partition("-")[0], []).append(f"{name} ({reason})")
    return found


def _notes(study: Study) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    for record in study.records:
        if record.dropped:
            found.append(f"{record.name}: {record.dropped} evaluations are left out, their reward was not finite.")
        if record.skipped_epochs:
            found.append(f"{record.name}: updates were skipped in {record.skipped_epochs} epochs, as not finite.")
    if len({environment["device"] for environment in study.environments}) > 1:
        found.append("The runs used different devices: their seconds are not comparable.")
    return found


def _environment(environment: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"{environment['device']}, {environment['threads']} thread(s) a run, Python {environment['python']}, "
        f"{packages}; code at {environment['revision'] or 'no commit'}{changes}"
    )


def readme_block(found: Sequence[Section], out: Path, folder: Path) -> str:
    """The README's part, markers included; `folder` is the README's."""
    found = [section for section in found if section.anchor != "search"]
    rows = [f"| {section.claim} | {section.answer} | `{section.command}` |" for section in found]
    drawn = {name for section in found for name in section.figures} & {"reward", "frontier"}
    pictures = [f"![{link['title']}]({link['link']})" for link in _links(sorted(drawn, reverse=True), out, folder)]
    lines = [
        BEGIN,
        "On the tiny SD3; means over seeds with 95 % intervals, from the runs committed in `assets/study`.",
        "[docs/study.md](docs/study.md) has the rules behind the verdicts, every table and every figure.",
        "`make study` trains it all again, `make study-quick` a part of it, to be held against these intervals.",
        "",
        "| claim or question | answer | made by |",
        "|---|---|---|",
        *rows,
        *(["", *pictures] if pictures else []),
        END,
    ]
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """The README with its part replaced; ConfigError if it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the README has no lines {BEGIN} and {END}: the study's part goes between them.")
    return before + block + after


def pages(results: Results, out: Path, page_path: Path, readme: Path) -> dict[Path, str]:
    """Both pages as the results give them."""
    found = sections(results)
    block = readme_block(found, out, readme.parent)
    return {page_path: page(results, found, out, page_path.parent), readme: with_block(readme.read_text(), block)}


def outdated(out: Path = OUT, page_path: Path = PAGE, readme: Path = README) -> list[Path]:
    """Those of the two pages that are not, byte for byte, what the committed results give."""
    expected = pages(read_results(out), out, page_path, readme)
    return [path for path, text in expected.items() if not path.is_file() or path.read_text() != text]


# --- the command ------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, help="collect the results of the study's run folders first")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and figures (default: assets/study)")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/study.md")
    parser.add_argument("--readme", type=Path, default=README, help="default: README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is not what the results give")
    parser.add_argument("--quick", type=Path, metavar="LOGS", help="write nothing; 1 if a quick run is out of bounds")
    args = parser.parse_args(arguments)
    args.out, args.page, args.readme = args.out.resolve(), args.page.resolve(), args.readme.resolve()
    return args


def write_all(args: argparse.Namespace) -> int:
    """Results, figures and pages."""
    from scripts.study.study_figures import all_figures, samples_figure, save_figures

    if args.logs is not None:
        found = collect(plan.whole(), args.logs)
        write_study(found, args.out / RUNS_FILE)
        copy_grids(found, args.logs, args.out)
    results = read_results(args.out)
    save_figures(all_figures(results.study, results.noise, results.scales), args.out)
    if results.samples:
        save_figures({"samples": samples_figure(results.samples, args.out)}, args.out)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in pages(results, args.out, args.page, args.readme).items():
        path.write_text(text)
    missing = results.study.missing
    print(f"{len(results.study.records)} runs in {args.out / RUNS_FILE}; {len(missing)} planned ones are missing")
    for name, reason in missing.items():
        print(f"  {name}: {reason}")
    return 0


def copy_grids(study: Study, logs: Path, out: Path) -> None:
    """The few image grids that are committed."""
    from flow_grpo.tracking import IMAGE_FOLDER

    for sample in samples(study):
        (out / sample.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(logs / sample.run / IMAGE_FOLDER / f"eval_{sample.step:06d}.png", out / sample.file)


def check(args: argparse.Namespace) -> int:
    """Say which pages are outdated."""
    found = outdated(args.out, args.page, args.readme)
    for path in found:
        print(
            f"error: {path} is not what {args.out} gives; `python scripts/study/summarise.py` writes it.",
            file=sys.stderr,
        )
    return 1 if found else 0


def quick(args: argparse.Namespace) -> int:
    """Hold the quick runs against the committed ones."""
    found = collect(plan.quick(), args.quick)
    comparisons = compare_quick(found, read_study(args.out / RUNS_FILE))
    print("At equal network evaluations; intervals for a new seed, 95 % for all quantities together:")
    for item in comparisons:
        expected = item.expected
        print(
            f"  {'within ' if item.within else 'OUTSIDE'}  {item.quantity}: {item.value:.4g}, "
            f"committed {expected.mean:.4g} ({expected.low:.4g} to {expected.high:.4g})"
        )
    for name, reason in found.missing.items():
        print(f"  MISSING  {name}: {reason}")
    outside = sum(not item.within for item in comparisons)
    print(f"{len(comparisons) - outside} of {len(comparisons)} quantities lie within the committed intervals.")
    return 1 if outside or found.missing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1: a check failed; 2 with one sentence about bad input."""
    args = parse(arguments)
    try:
        if args.quick is not None:
            return quick(args)
        return check(args) if args.check else write_all(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
