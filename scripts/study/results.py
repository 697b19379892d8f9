"""The study's results: read from run folders into one file of plain numbers, and what is computed from it.

Pages, tables and figures come from that file alone (assets/study/runs.json), so that they can be made again without a
run folder. Intervals are over seeds unless said otherwise. Pure functions of the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import chi2, rankdata, t

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI, RunRecord, load_runs

RUNS_FILE, NOISE_FILE, SCALES_FILE = "runs.json", "gradient_noise.json", "lora_scales.json"
NATS, SPREAD = "entropy/nats", "ode_log_prob/std"
DIVERSITY = (VENDI, RKE, ENTROPY, NATS, SPREAD)
SPENT = ("step", "seconds", "network_evaluations", "images")  # step: epochs completed
METRICS = (
    REWARD, ACCURACY, "judge/similarity", ENTROPY, VENDI, f"{VENDI}_low", f"{VENDI}_high", RKE, f"{RKE}_low",
    f"{RKE}_high", "diversity/distance", NATS, "entropy/standard_error", "entropy/half_width_95", SPREAD,
    f"{SPREAD}_corrected", "ode_log_prob/mean",
)  # fmt: skip
TRAINING = (
    "train/ratio_std", "train/clip_fraction", "train/ratio_error", "train/log_ratio_mean", "train/approx_kl",
    "train/grad_norm", "train/zero_std_fraction",
)  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "flow-matching-entropy")
LEVEL = 0.95
DIGITS = 6  # significant


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where the piecewise linear curve through the points (x, y), both (n,), first reaches a level; None: never."""
    reached = np.flatnonzero(y >= level)
    if len(reached) == 0:
        return None
    after = reached[0]
    if after == 0:
        return float(x[0])
    before = after - 1
    return float(x[before] + (x[after] - x[before]) * (level - y[before]) / (y[after] - y[before]))


@dataclass(frozen=True)
class StudyRecord:
    """One finished run, as it is committed."""

    name: str
    group: str
    label: str
    seed: int
    method: str  # "DRTune" or "GRPO"
    recipe: str
    overrides: Mapping[str, Any]
    budget: float  # seconds of training
    environment: int  # position among the study's environments
    dropped: int  # evaluations left out because their reward was not finite
    skipped_epochs: int  # epochs with an update skipped because it was not finite
    evaluations: Mapping[str, Sequence[float | None]]  # a column each of SPENT and METRICS; None: not measured, nan
    training: Mapping[str, Mapping[str, float | None]]  # TRAINING -> {"first": of the first epoch, "mean": of all}

    def curve(self, name: str) -> np.ndarray:
        """A column, (evaluations,); nan where there is no number."""
        missing = [None] * len(self.evaluations["step"])
        return np.array([math.nan if v is None else v for v in self.evaluations.get(name, missing)], dtype=float)

    def base(self, name: str) -> float:
        """Before training."""
        return float(self.curve(name)[0])

    def final(self, name: str) -> float:
        """At the last evaluation."""
        return float(self.curve(name)[-1])

    def gain(self, name: str) -> float:
        """Final minus base."""
        return self.final(name) - self.base(name)

    def at(self, quantity: str, value: float, name: str) -> float:
        """A column where `quantity`, one of SPENT, had come to `value`, by linear interpolation; nan: never."""
        x = self.curve(quantity)
        return _interpolate(value, x, self.curve(name)) if x[0] <= value <= x[-1] else math.nan

    @property
    def rising_reward(self) -> np.ndarray:
        """The rising curve nearest to the reward's, in least squares (isotonic regression), from the base model on.

        Where a noisy curve first touches a level it does so by an upward fluctuation; this one does not.
        """
        reward = self.curve(REWARD)
        return np.concatenate([reward[:1], np.maximum(isotonic_regression(reward[1:]).x, reward[0])])

    def where_reward_is(self, level: float, name: str) -> float:
        """A column where the rising reward reached `level`, by linear interpolation; nan: never."""
        positions = np.arange(len(self.curve(REWARD)), dtype=float)
        reached = first_crossing(positions, self.rising_reward, level)
        return math.nan if reached is None else _interpolate(reached, positions, self.curve(name))


@dataclass(frozen=True)
class Study:
    """Everything that is committed of the runs."""

    environments: tuple[Mapping[str, Any], ...]  # distinct ones: device, packages, revision
    missing: Mapping[str, str]  # planned runs without results: name -> why
    records: tuple[StudyRecord, ...]

    def of(self, *groups: str) -> list[StudyRecord]:
        """The records of some groups."""
        return [record for record in self.records if record.group in groups]

    def pairs(self, group: str = "claims") -> list[tuple[StudyRecord, StudyRecord]]:
        """DRTune and GRPO of the same seed."""
        found = {(record.label, record.seed): record for record in self.of(group)}
        seeds = sorted(seed for label, seed in found if label == "DRTune" and ("GRPO", seed) in found)
        return [(found["DRTune", seed], found["GRPO", seed]) for seed in seeds]


def by_label(records: Iterable[StudyRecord]) -> dict[str, list[StudyRecord]]:
    """The seeds of each label, labels in the order of their first run."""
    found: dict[str, list[StudyRecord]] = {}
    for record in records:
        found.setdefault(record.label, []).append(record)
    return found


def _interpolate(value: float, x: np.ndarray, y: np.ndarray) -> float:
    known = np.isfinite(y)
    return float(np.interp(value, x[known], y[known])) if known.any() else math.nan


# --- from run folders to the file -------------------------------------------------------------------------


def collect(runs: Sequence[StudyRun], logs: Path) -> Study:
    """The results of those of the planned runs that are finished, and the names of the others.

    Raises:
        ConfigError: a finished run's folder is damaged, or was evaluated otherwise than the rest.
    """
    from scripts.study.run import State, state_of

    states = {run.name: state_of(run, logs) for run in runs}
    reasons = {State.NEW: "not run", State.BEGUN: "not finished"}
    done = [run for run in runs if states[run.name] is State.DONE]
    read = load_runs([logs / run.name for run in done]) if done else []
    environments: list[dict[str, Any]] = []
    records = [_record(run, found, environments) for run, found in zip(done, read, strict=True)]
    missing = {name: reasons[state] for name, state in states.items() if state is not State.DONE}
    return Study(tuple(environments), missing, tuple(records))


def _record(run: StudyRun, found: RunRecord, environments: list[dict[str, Any]]) -> StudyRecord:
    from flow_grpo.runs.folder import HISTORY_FILE
    from flow_grpo.runs.history import read_history

    environment = _environment(found.environment)
    if environment not in environments:
        environments.append(environment)
    return StudyRecord(
        name=run.name,
        group=run.group,
        label=run.label,
        seed=run.seed,
        method="DRTune" if found.config["use_reward_gradient"] else "GRPO",
        recipe=run.recipe,
        overrides=dict(run.overrides),
        budget=run.seconds,
        environment=environments.index(environment),
        dropped=found.dropped,
        skipped_epochs=found.skipped_epochs,
        evaluations=_columns(found),
        training=_training(read_history(found.folder / HISTORY_FILE)),
    )


def _columns(found: RunRecord) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {
        name: [getattr(evaluation, name) for evaluation in found.evaluations] for name in SPENT
    }
    for name in METRICS:
        values = [{**evaluation.metrics, **evaluation.occasional}.get(name) for evaluation in found.evaluations]
        if any(value is not None for value in values):
            columns[name] = values
    return {name: [rounded(value) for value in values] for name, values in columns.items()}


def _training(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {name: [line[name] for line in history if line.get(name) is not None] for name in TRAINING}
    return {
        name: {"first": rounded(values[0]), "mean": rounded(float(np.mean(values)))}
        for name, values in found.items()
        if values
    }


def _environment(full: Mapping[str, Any]) -> dict[str, Any]:
    git = full.get("git") or {}
    return {
        "device": full.get("device"),
        "threads": full.get("threads"),
        "python": full.get("python"),
        "packages": {name: full.get("packages", {}).get(name) for name in PACKAGES},
        "revision": git.get("revision"),
        "uncommitted_changes": git.get("dirty"),
    }


def rounded(value: float | None) -> float | None:
    """To so many digits as are committed; None where there is no number."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a list of objects: strict JSON, a line for each, numbers rounded."""
    lines = [strict_json({k: rounded(v) if isinstance(v, float) else v for k, v in row.items()}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_study(study: Study, path: Path) -> None:
    """Write runs.json: strict JSON, a line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n".join(strict_json(asdict(record)) for record in study.records)
    head = f'"environments": {strict_json(list(study.environments))},\n"missing": {strict_json(dict(study.missing))}'
    write_atomically(path, f'{{\n{head},\n"runs": [\n{runs}\n]\n}}\n')


def read_study(path: Path) -> Study:
    """Read runs.json.

    Raises:
        ConfigError: it is not there, or is not what `write_study` writes.
    """
    if not path.exists():
        raise ConfigError(f"{path} is missing: --logs makes it from the folders of the study's runs.")
    content = read_object(path)
    try:
        records = tuple(StudyRecord(**run) for run in content["runs"])
        for record in records:
            for name in ("step", *record.evaluations):
                record.base(name)  # a column of numbers
        return Study(tuple(content["environments"]), content["missing"], records)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path} does not hold a study's results: {error}.") from None


# --- intervals --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; without one (nan) where there is a single value."""

    mean: float
    low: float
    high: float
    count: int

    def above(self, value: float) -> bool:
        """The whole interval is."""
        return self.low > value

    def below(self, value: float) -> bool:
        """The whole interval is."""
        return self.high < value


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """Mean of the finite values, with Student's t interval."""
    return _t_interval(values, level, lambda count: 1 / count)


def prediction_interval(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """Mean of the finite values, with the interval that a further one falls into: mean +- t s sqrt(1 + 1 / n)."""
    return _t_interval(values, level, lambda count: 1 + 1 / count)


def _t_interval(values: Iterable[float], level: float, share: Any) -> Estimate:
    finite = np.array([value for value in values if math.isfinite(value)])
    count = len(finite)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(finite.mean())
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(t.ppf((1 + level) / 2, count - 1) * finite.std(ddof=1) * math.sqrt(share(count)))
    return Estimate(mean, mean - half, mean + half, count)


def ratio_of(part: float, whole: float) -> float:
    """part / whole, nan where the whole is not positive."""
    return part / whole if whole > 0 else math.nan


# --- claim 1: speed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedCrossing:
    """What DRTune of one seed spent until GRPO's final reward of that seed, as fractions of what GRPO spent."""

    seed: int
    level: float  # GRPO's final reward
    meaningful: bool  # whether GRPO rose at all
    seconds: float  # nan: never, or not meaningful
    network_evaluations: float  # likewise
    seconds_spent: float  # likewise; in seconds

    @property
    def reached(self) -> bool:
        """Whether there was something to reach, and it was."""
        return math.isfinite(self.seconds)


def crossing(drtune: StudyRecord, grpo: StudyRecord, at: Mapping[str, float] | None = None) -> SeedCrossing:
    """When DRTune's rising reward came to GRPO's final one; `at`: what GRPO had spent, for its reward then."""
    spent = at or {name: grpo.final(name) for name in ("seconds", "network_evaluations")}
    level = grpo.final(REWARD) if at is None else grpo.at("network_evaluations", at["network_evaluations"], REWARD)
    meaningful = level > grpo.base(REWARD)
    found = {name: first_crossing(drtune.curve(name), drtune.rising_reward, level) for name in spent}
    reached = {name: math.nan if value is None or not meaningful else value for name, value in found.items()}
    return SeedCrossing(
        seed=grpo.seed,
        level=level,
        meaningful=meaningful,
        seconds=reached["seconds"] / spent["seconds"],
        network_evaluations=reached["network_evaluations"] / spent["network_evaluations"],
        seconds_spent=reached["seconds"],
    )


def final_difference(pairs: Sequence[tuple[StudyRecord, StudyRecord]], name: str) -> Estimate:
    """First minus second at equal time: when the shorter of the two ended."""
    differences = []
    for first, second in pairs:
        seconds = min(first.final("seconds"), second.final("seconds"))
        differences.append(first.at("seconds", seconds, name) - second.at("seconds", seconds, name))
    return mean_interval(differences)


# --- claim 2: diversity -----------------------------------------------------------------------------------


def equal_reward_difference(pairs: Sequence[tuple[StudyRecord, StudyRecord]], name: str) -> Estimate:
    """DRTune, where its rising reward was GRPO's final one, minus GRPO at its end."""
    return mean_interval(
        drtune.where_reward_is(grpo.final(REWARD), name) - grpo.final(name)
        for drtune, grpo in pairs
        if grpo.gain(REWARD) > 0
    )


@dataclass(frozen=True)
class Hacking:
    """Whether the reward keeps rising while the held-out judge's accuracy falls."""

    seconds: Estimate  # when the accuracy peaks
    reward: Estimate  # at the peak
    accuracy: Estimate  # at the peak
    accuracy_after: Estimate  # change from the peak to the end
    reward_after: Estimate  # likewise

    @property
    def shown(self) -> bool:
        """Both intervals exclude zero."""
        return self.accuracy_after.below(0) and self.reward_after.above(0)


@dataclass(frozen=True)
class Sample:
    """An image grid that is committed with the results."""

    title: str
    method: str | None  # None: the base model
    run: str
    step: int
    reward: float

    @property
    def file(self) -> str:
        """Below the folder of the results."""
        return f"grids/{self.run}_{self.step:06d}.png"


def samples(study: Study) -> list[Sample]:
    """Of the first seed with both methods: base, DRTune at GRPO's reward, DRTune at its end, GRPO at its end."""
    if not study.pairs():
        return []
    drtune, grpo = study.pairs()[0]
    reached = np.flatnonzero(drtune.rising_reward >= grpo.final(REWARD))
    chosen: list[tuple[str, StudyRecord, int]] = [("base", drtune, 0)]
    if len(reached) > 0:
        chosen.append(("DRTune at GRPO's reward", drtune, int(reached[0])))
    chosen += [("DRTune", drtune, -1), ("GRPO", grpo, -1)]
    return [
        Sample(
            title if title == "base" else f"{title}, {record.curve('seconds')[i]:.0f} s",
            None if title == "base" else record.method,
            record.name,
            int(record.curve("step")[i]),
            float(record.curve(REWARD)[i]),
        )
        for title, record, i in chosen
    ]


def hacking(records: Sequence[StudyRecord]) -> Hacking:
    """Each seed's peak is placed where the *other* seeds' mean accuracy is highest.

    The highest of a seed's own noisy values would be followed by a fall even if nothing fell.
    """
    steps = sorted(set.intersection(*(set(record.curve("step")) for record in records)))
    curves = np.array([[record.at("step", step, ACCURACY) for step in steps] for record in records])  # (seeds, steps)
    peaks = [steps[int(_without(curves, i).mean(0).argmax())] for i in range(len(records))]

    def at_peak(name: str) -> list[float]:
        return [record.at("step", peak, name) for record, peak in zip(records, peaks, strict=True)]

    def after(name: str) -> Estimate:
        return mean_interval(r.final(name) - value for r, value in zip(records, at_peak(name), strict=True))

    spots = {name: mean_interval(at_peak(name)) for name in ("seconds", REWARD, ACCURACY)}
    return Hacking(spots["seconds"], spots[REWARD], spots[ACCURACY], after(ACCURACY), after(REWARD))


def _without(rows: np.ndarray, index: int) -> np.ndarray:
    return np.delete(rows, index, axis=0) if len(rows) > 1 else rows


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of two metrics over evaluations."""

    pooled: float  # over all evaluations of all runs
    low: float  # 95 % by bootstrap over runs
    high: float
    evaluations: int
    runs: int
    within: Estimate  # mean of the runs' own rho

    @property
    def text(self) -> str:
        """Rho over all runs with its interval."""
        interval = f"{self.low:.2f} to {self.high:.2f}" if math.isfinite(self.low) else "one run"
        return f"{self.pooled:.2f} ({interval})"


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two samples, both (n,); nan where one is constant or n < 3."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def rank_correlation(
    records: Sequence[StudyRecord], first: str, second: str, draws: int = 1000, seed: int = 0
) -> RankCorrelation:
    """Of two metrics over all evaluations after training began; the base model, the same in every run, is left out.

    Evaluations of one run are alike, so it is runs that are resampled, with replacement; percentile interval.
    """
    samples = [_finite_pairs(record, first, second) for record in records]
    samples = [sample for sample in samples if sample.shape[1] > 0]
    if not samples:
        nothing = mean_interval([])
        return RankCorrelation(math.nan, math.nan, math.nan, 0, 0, nothing)
    everything = np.concatenate(samples, axis=1)
    low = high = math.nan
    if len(samples) > 1:
        generator = np.random.default_rng(seed)
        chosen = generator.integers(len(samples), size=(draws, len(samples)))
        rhos = [spearman(*np.concatenate([samples[i] for i in row], axis=1)) for row in chosen]
        low, high = (float(end) for end in np.nanquantile(rhos, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    within = mean_interval(spearman(*sample) for sample in samples)
    return RankCorrelation(spearman(*everything), low, high, everything.shape[1], len(samples), within)


def _finite_pairs(record: StudyRecord, first: str, second: str) -> np.ndarray:
    """(2, evaluations) after the first."""
    values = np.stack([record.curve(first), record.curve(second)])[:, 1:]
    return values[:, np.isfinite(values).all(0)]


# --- claim 3: the entropy estimator ----------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Errors in standard errors against a standard normal, together."""

    targets: int
    statistic: float  # sum of squares
    limit: float  # its 95 % quantile
    largest: float  # error in absolute value, in standard errors

    @property
    def holds(self) -> bool:
        """The errors are no larger than their standard errors explain."""
        return self.statistic <= self.limit


def agreement(rows: Sequence[Mapping[str, Any]]) -> Agreement:
    """Of rows of assets/figures/entropy_validation/results.json."""
    errors = np.array([row["error_in_standard_errors"] for row in rows])
    return Agreement(len(rows), float(np.square(errors).sum()), float(chi2.ppf(LEVEL, len(rows))), abs(errors).max())


# --- claim 4: the ratio -----------------------------------------------------------------------------------


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


def paired(first: Sequence[StudyRecord], second: Sequence[StudyRecord]) -> list[tuple[StudyRecord, StudyRecord]]:
    """Records of the same seed."""
    others = {record.seed: record for record in second}
    return [(record, others[record.seed]) for record in first if record.seed in others]


# --- the frontier -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One model: a method, a seed."""

    label: str
    method: str
    seed: int
    seconds: float
    reward: float
    vendi: float
    rke: float
    accuracy: float


def frontier(study: Study, scales: Sequence[Mapping[str, Any]] = ()) -> list[Point]:
    """Every run at its end, DRTune stopped at GRPO's reward, and LoRAs that were scaled at sampling time.

    Args:
        study: its groups "claims" and "frontier".
        scales: {"label", "method", "seed", "scale", "seconds"} and the metrics by name, of each scaled LoRA.
    """
    points = [_final_point(record) for record in study.of("claims", "frontier")]
    for drtune, grpo in study.pairs():
        level = grpo.final(REWARD)
        if level > grpo.base(REWARD) and level <= drtune.rising_reward[-1]:
            values = [drtune.where_reward_is(level, name) for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
            points.append(Point("DRTune stopped at GRPO's reward", "DRTune", drtune.seed, *values))
    for entry in scales:
        label = f"{entry['label']} LoRA scaled by {entry['scale']:g}"
        values = [entry[name] for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
        points.append(Point(label, entry["method"], entry["seed"], *values))
    return points


def _final_point(record: StudyRecord) -> Point:
    values = [record.final(name) for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
    return Point(record.label, record.method, record.seed, *values)


def undominated(means: Mapping[str, tuple[float, float]]) -> list[str]:
    """Labels than which no other has both more reward and more diversity; means: (reward, diversity)."""
    return [
        label
        for label, (reward, diversity) in means.items()
        if not any(r > reward and d > diversity for r, d in means.values())
    ]


def shares_kept(points: Sequence[Point], label: str, base: Mapping[str, float]) -> tuple[Estimate, Estimate]:
    """Of DRTune's loss of Vendi score, the share undone; of its reward gain, the share kept; seeds paired.

    Args:
        points: among them "DRTune" and `label`.
        label: the method in question.
        base: the base model's REWARD and VENDI.
    """
    reference = {point.seed: point for point in points if point.label == "DRTune"}
    matched = [(point, reference[point.seed]) for point in points if point.label == label and point.seed in reference]
    undone = mean_interval(ratio_of(p.vendi - full.vendi, base[VENDI] - full.vendi) for p, full in matched)
    kept = mean_interval(ratio_of(p.reward - base[REWARD], full.reward - base[REWARD]) for p, full in matched)
    return undone, kept


# --- quick runs against the whole -------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One quantity of a quick run beside the committed runs."""

    quantity: str
    value: float
    expected: Estimate  # prediction interval for a new seed

    @property
    def within(self) -> bool:
        """Whether the value lies in it."""
        return self.expected.low <= self.value <= self.expected.high


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
