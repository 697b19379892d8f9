"""The study's statistics agree with independent computations, and its results survive being written and read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from config.grpo import get_config
from flow_grpo.errors import ConfigError
from flow_grpo.recipes.base import leaves
from scripts.study import plan
from scripts.study.plan import StudyRun
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.results import (
    NATS,
    SPREAD,
    Form,
    Study,
    StudyRecord,
    agreement,
    by_form,
    collect,
    compare_quick,
    crossing,
    equal_reward_difference,
    final_difference,
    frontier,
    hacking,
    mean_interval,
    prediction_interval,
    rank_correlation,
    read_study,
    samples,
    shares_kept,
    spearman,
    undominated,
    write_study,
)
from tests.synthetic_runs import write_run

EVALS_EVERY, POINTS = 6, 9


def write_study_run(
    run: StudyRun, logs: Path, reward: float, seconds: float | None = None, collapse: float = 0.5, wobble: float = 0.0
) -> Path:
    """A finished run of the study: reward rises by `reward`, diversity falls by `collapse`, from one base model."""
    gradient = "use_gradient" in run.recipe
    t, spent = np.linspace(0, 1, POINTS), seconds or (run.seconds or 40.0) + 0.5
    generator = np.random.default_rng([run.seed, len(run.label), int(1000 * abs(reward))])
    noise = wobble * generator.standard_normal(POINTS) * (t > 0)
    folder = write_run(
        logs / run.name,
        rewards=list(0.5 + reward * t**0.5 + 0.01 * noise),
        seconds=list(t * spent),
        gradient=gradient,
        accuracy=list(0.8 + 0.4 * t - (0.9 if gradient else 0.3) * t**2 + 0.02 * noise),
        collapse=list(np.clip(collapse * t + 0.05 * noise, 0, 1)),
        evals_every=EVALS_EVERY,
        overrides=dict(leaves(get_config(run.recipe))) | run.settings,
        density=True,
        diversity=True,
    )
    add_training(folder, clip=0.1 + 0.01 * run.seed)
    checkpoint = folder / f"checkpoints/checkpoint-{EVALS_EVERY * (POINTS - 1):06d}"
    checkpoint.mkdir(parents=True)
    counters = {"epoch": EVALS_EVERY * (POINTS - 1), "seconds": spent}
    (checkpoint / "state.json").write_text(json.dumps({"weights": {}, "counters": counters}))
    (checkpoint / "training_state.pt").write_bytes(b"")
    return folder


def add_training(folder: Path, clip: float) -> None:
    path, lines = folder / "metrics.jsonl", []
    for index, line in enumerate(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())):
        if "train/reward" in line:
            line |= {"train/clip_fraction": clip * index, "train/ratio_std": 1e-3 * (index + 1)}
            line |= {"train/ratio_error": 0.0, "train/grad_norm": 0.1, "train/loss": 0.2}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def record(
    label: str = "DRTune",
    seed: int = 0,
    reward: Sequence[float | None] = (0.5, 0.6, 0.9),
    seconds: Sequence[float] = (0, 10, 20),
    group: str = "claims",
    forwards: float = 100,
    overrides: Mapping[str, Any] | None = None,
    **columns: Sequence[float | None],
) -> StudyRecord:
    """A record by hand; columns by their last word: vendi=..., accuracy=..."""
    names = {"vendi": VENDI, "rke": RKE, "accuracy": ACCURACY, "spread": SPREAD, "nats": NATS}
    spent = {"step": [10 * i for i in range(len(seconds))], "seconds": seconds, "images": seconds}
    evaluations = spent | {"network_evaluations": [forwards * s for s in seconds], REWARD: reward}
    evaluations |= {names[name]: values for name, values in columns.items()}
    return StudyRecord(
        name=f"{group}-{label}-seed{seed}",
        group=group,
        label=label,
        seed=seed,
        method=label.split()[0],
        recipe="tiny_sd3",
        overrides=overrides or {},
        budget=20.0,
        environment=0,
        dropped=0,
        skipped_epochs=0,
        evaluations=evaluations,
        training={},
    )


def study_of(records: Iterable[StudyRecord]) -> Study:
    return Study((), {}, tuple(records))


# --- collecting -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[StudyRun], Path]:
    """Four planned runs: two finished, one cut short, one never begun."""
    logs = tmp_path_factory.mktemp("logs")
    runs = plan.claims(range(2), 40.0)
    write_study_run(runs[0], logs, 0.1)
    write_study_run(runs[1], logs, 0.02)
    write_study_run(runs[2], logs, 0.1, seconds=30.0)
    return runs, logs


def test_finished_runs_are_collected_and_the_others_named(pair: tuple[list[StudyRun], Path]) -> None:
    runs, logs = pair
    found = collect(runs, logs)
    assert [record.name for record in found.records] == [runs[0].name, runs[1].name]
    assert found.missing == {runs[2].name: "not finished", runs[3].name: "not run"}
    assert [record.method for record in found.records] == ["DRTune", "GRPO"]
    assert len(found.environments) == 1
    assert found.environments[0]["packages"]["torch"] == "2.15.0"


def test_every_number_is_the_run_folders_to_six_digits(pair: tuple[list[StudyRun], Path]) -> None:
    runs, logs = pair
    found = collect(runs, logs).records[0]
    lines = [json.loads(line) for line in (logs / runs[0].name / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/reward/total" in line]
    for name in (REWARD, ACCURACY, VENDI, f"{VENDI}_low", RKE, NATS, SPREAD):
        expected = [line[f"eval/{name}"] for line in evaluations]
        assert found.curve(name) == pytest.approx(expected, rel=5.1e-6)
        assert all(value == float(f"{value:.6g}") for value in found.evaluations[name])
    assert list(found.curve("network_evaluations")) == [line["network_evaluations"] for line in evaluations]
    clips = [line["train/clip_fraction"] for line in lines if "train/clip_fraction" in line]
    assert found.training["train/clip_fraction"]["first"] == pytest.approx(clips[0], rel=1e-5)
    assert found.training["train/clip_fraction"]["mean"] == pytest.approx(np.mean(clips), rel=1e-5)
    assert "train/loss" not in found.training


def test_the_file_is_strict_json_a_line_a_run_and_reads_back_as_it_was(
    pair: tuple[list[StudyRun], Path], tmp_path: Path
) -> None:
    runs, logs = pair
    damaged = logs / runs[1].name / "metrics.jsonl"
    text = damaged.read_text()
    damaged.write_text(text.replace('"eval/entropy/nats": -20.0', '"eval/entropy/nats": null', 1))
    found = collect(runs, logs)
    damaged.write_text(text)
    assert found.records[1].evaluations[NATS][0] is None
    write_study(found, tmp_path / "runs.json")
    written = (tmp_path / "runs.json").read_text()
    json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert sum(line.startswith('{"name"') for line in written.splitlines()) == 2
    again = read_study(tmp_path / "runs.json")
    assert again == Study(found.environments, found.missing, found.records)
    write_study(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == written
    for private in (str(logs), "started", "logdir", "/tmp"):
        assert private not in written


def test_a_file_that_is_no_study_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs\.json is missing: --logs makes it"):
        read_study(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_text('{"runs": [{"name": "x"}], "environments": [], "missing": {}}')
    with pytest.raises(ConfigError, match="does not hold a study's results"):
        read_study(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_bytes(b'{"runs": "\xff"}')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_study(tmp_path / "runs.json")


@pytest.mark.parametrize("value", ["ten", 10**400])
def test_a_column_that_is_not_of_numbers_is_one_sentence(tmp_path: Path, value: object) -> None:
    write_study(Study((), {}, (record("DRTune", 0),)), tmp_path / "runs.json")
    content = json.loads((tmp_path / "runs.json").read_text())
    content["runs"][0]["evaluations"][REWARD][1] = value
    (tmp_path / "runs.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not hold a study's results"):
        read_study(tmp_path / "runs.json")


# --- intervals ------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_students() -> None:
    values = [1.0, 2.5, 3.0, 7.0, math.nan]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values[:4]), scale=stats.sem(values[:4]))
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((np.mean(values[:4]), low, high, 4))


@pytest.mark.parametrize(("interval", "of_a_mean"), [(mean_interval, True), (prediction_interval, False)])
def test_intervals_hold_what_they_are_for_95_times_in_100(interval: Callable[..., Any], of_a_mean: bool) -> None:
    generator, held, repetitions = np.random.default_rng(0), 0, 4000
    for _ in range(repetitions):
        *seen, new = generator.standard_normal(6)
        found = interval(seen)
        held += found.low <= (0.0 if of_a_mean else new) <= found.high
    assert held / repetitions == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repetitions))


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = mean_interval([3.0])
    assert (found.mean, found.count) == (3.0, 1)
    assert not found.above(0)
    assert not found.below(5)
    assert mean_interval([]).count == 0


# --- speed and diversity --------------------------------------------------------------------------------


def test_the_crossing_is_a_fraction_of_what_grpo_spent() -> None:
    grpo = record("GRPO", reward=(0.5, 0.65, 0.75), seconds=(0, 50, 100), forwards=200)
    found = crossing(record(), grpo)
    assert found.seconds_spent == pytest.approx(15)  # half way from 0.6 at 10 s to 0.9 at 20 s
    assert found.seconds == pytest.approx(0.15)
    assert found.network_evaluations == pytest.approx(1500 / 20000)
    early = crossing(record(), grpo, at={"network_evaluations": 5000, "seconds": 25})  # GRPO at 0.575 then
    assert early.seconds == pytest.approx(7.5 / 25)


@pytest.mark.parametrize(("grpo", "meaningful"), [((0.5, 0.95), True), ((0.5, 0.45), False)])
def test_a_level_never_reached_or_not_worth_reaching_is_no_crossing(
    grpo: tuple[float, float], meaningful: bool
) -> None:
    found = crossing(record(), record("GRPO", reward=grpo, seconds=(0, 100)))
    assert found.meaningful == meaningful
    assert not found.reached


def test_diversity_at_equal_reward_and_at_equal_time() -> None:
    pairs = []
    for seed, loss in enumerate((0.0, 0.2, 0.4)):
        drtune = record(seed=seed, vendi=(4.0, 3.5 - loss, 1.0), reward=(0.5, 0.6, 0.9))
        pairs.append((drtune, record("GRPO", seed, (0.5, 0.75), (0, 40), vendi=(4.0, 3.0))))
    # reward 0.75 is half way between DRTune's second and third evaluation: Vendi (3.5 - loss + 1) / 2
    assert equal_reward_difference(pairs, VENDI).mean == pytest.approx(np.mean([2.25, 2.15, 2.05]) - 3.0)
    # at 20 s, where DRTune ends, GRPO is half way: 3.5
    assert final_difference(pairs, VENDI).mean == pytest.approx(1.0 - 3.5)
    assert final_difference(pairs, RKE).count == 0  # not measured


def test_a_fall_after_the_peak_is_not_an_effect_of_choosing_the_peak() -> None:
    """Accuracies of pure noise: a seed's own maximum is followed by a fall, the one chosen by the others is not."""
    falls, biased = [], []
    for repetition in range(200):
        generator = np.random.default_rng(repetition)
        noise = generator.standard_normal((5, 12))
        records = [
            record(seed=seed, reward=list(np.linspace(0, 1, 12)), seconds=list(range(12)), accuracy=list(row))
            for seed, row in enumerate(noise)
        ]
        falls.append(hacking(records).accuracy_after.mean)
        biased.append(float(np.mean([row[-1] - row.max() for row in noise])))
    assert abs(np.mean(falls)) < 4 * np.std(falls) / math.sqrt(len(falls))
    assert np.mean(biased) < -1


def test_a_real_fall_is_found_where_it_begins() -> None:
    records = [
        record(
            seed=seed,
            reward=(0.5, 0.6, 0.7, 0.8),
            seconds=(0, 10, 20, 30),
            accuracy=(0.8, 0.9 + 0.01 * seed, 0.8, 0.6),
        )
        for seed in range(4)
    ]
    found = hacking(records)
    assert found.seconds.mean == 10
    assert found.accuracy_after.mean == pytest.approx(0.6 - 0.915)
    assert found.reward_after.mean == pytest.approx(0.2)
    assert found.shown
    falling = [replace(one, evaluations={**one.evaluations, REWARD: (0.5, 0.8, 0.7, 0.6)}) for one in records]
    assert not hacking(falling).shown  # both fall: nothing is exploited


# --- proxies --------------------------------------------------------------------------------------------


def clustered(runs: int, seed: int, slope: float = 0.0) -> list[StudyRecord]:
    """Each run has a level of its own in both metrics; within it they go together by `slope`."""
    generator, found = np.random.default_rng(seed), []
    for number in range(runs):
        x, y = generator.standard_normal(2)[:, None] + 0.2 * generator.standard_normal((2, 8))
        found.append(
            record(
                seed=number, reward=[0.5] * 8, seconds=list(range(8)), spread=[*x[:7], None], vendi=list(y + slope * x)
            )
        )
    return found


def test_the_rank_correlation_is_spearmans_without_the_base_model() -> None:
    records = clustered(6, seed=1, slope=0.5)
    x, y = (np.concatenate([one.curve(name)[1:7] for one in records]) for name in (SPREAD, VENDI))  # 7: not measured
    found = rank_correlation(records, SPREAD, VENDI, draws=200)
    assert found.pooled == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert (found.evaluations, found.runs) == (36, 6)
    within = [stats.spearmanr(one.curve(SPREAD)[1:7], one.curve(VENDI)[1:7]).statistic for one in records]
    assert found.within.mean == pytest.approx(np.mean(within), abs=1e-12)
    assert found == rank_correlation(records, SPREAD, VENDI, draws=200)  # seeded
    tied = np.array([1.0, 1.0, 2.0, 3.0, 3.0])
    other = np.array([2.0, 1.0, 2.0, 5.0, 4.0])
    assert spearman(tied, other) == pytest.approx(stats.spearmanr(tied, other).statistic, abs=1e-12)
    assert math.isnan(spearman(np.ones(5), other))


def test_runs_are_resampled_because_evaluations_of_a_run_are_alike() -> None:
    """Independent metrics, levels by run: over runs the interval holds zero, over evaluations (the twin) rarely."""
    held = twin_held = 0
    repetitions = 60
    for repetition in range(repetitions):
        records = clustered(20, seed=100 + repetition)
        found = rank_correlation(records, SPREAD, VENDI, draws=150)
        held += found.low <= 0 <= found.high
        x, y = (np.concatenate([one.curve(name)[1:7] for one in records]) for name in (SPREAD, VENDI))
        twin_held += abs(np.arctanh(spearman(x, y))) < 1.96 / math.sqrt(len(x) - 3)
    assert held >= 0.85 * repetitions
    assert twin_held <= 0.75 * repetitions


# --- entropy, ratios, frontier --------------------------------------------------------------------------


def test_agreement_is_a_chi_square_test() -> None:
    rows = [{"error_in_standard_errors": value} for value in (0.5, -1.5, 1.0)]
    found = agreement(rows)
    assert found.statistic == pytest.approx(3.5)
    assert stats.chi2.sf(found.limit, 3) == pytest.approx(0.05)
    assert (found.largest, found.holds) == (1.5, True)
    assert not agreement([*rows, {"error_in_standard_errors": -11.0}]).holds


def test_forms_are_known_by_their_settings_and_the_exact_trace_comes_last() -> None:
    settings = [("sde", 1), ("ode_step", 0), ("ode_step", 16), ("ode_step", 1), ("cfm", 10)]
    records = [
        record(f"{form} {probes}", group="ratio", overrides={"train.ratio": form, "train.ratio_probes": probes})
        for form, probes in settings
    ]
    titles = [form.title for form in by_form(study_of(records))]
    assert titles == ["sde", "ode_step, 1 probe", "ode_step, 16 probes", "ode_step, exact trace", "cfm, 10 draws"]
    assert Form("ode_path", 4).title == "ode_path, 4 probes"


def test_the_frontier_has_every_seed_and_where_drtune_would_have_been_stopped() -> None:
    whole = study_of(
        [
            record(vendi=(4, 3, 1), rke=(4, 3, 1), accuracy=(0.8, 0.9, 0.7)),
            record("GRPO", reward=(0.5, 0.75), seconds=(0, 20), vendi=(4, 3.5), rke=(4, 3.5), accuracy=(0.8, 0.9)),
            record("DRTune beta 1", group="frontier", reward=(0.5, 0.7), seconds=(0, 20), vendi=(4, 2.5)),
        ]
    )
    scales = [
        {"label": "DRTune", "method": "DRTune", "seed": 0, "scale": 0.5, "seconds": 20.0}
        | {REWARD: 0.7, VENDI: 3.2, RKE: 3.0, ACCURACY: 0.9}
    ]
    points = {point.label: point for point in frontier(whole, scales)}
    stopped = points["DRTune stopped at GRPO's reward"]
    assert (stopped.seconds, stopped.reward, stopped.vendi) == pytest.approx((15, 0.75, 2.0))
    assert points["DRTune LoRA scaled by 0.5"].vendi == 3.2
    assert len(points) == 5
    base = {REWARD: 0.5, VENDI: 4.0}
    undone, kept = shares_kept(list(points.values()), "DRTune beta 1", base)
    assert (undone.mean, kept.mean) == pytest.approx((0.5, 0.5))  # 1 -> 2.5 of 1 -> 4; 0.2 of 0.4


def test_what_another_beats_in_both_is_dominated() -> None:
    assert undominated({"a": (1, 1), "b": (2, 2), "c": (3, 0), "d": (0, 3), "e": (1, 2)}) == ["b", "c", "d", "e"]


def test_the_committed_grids_are_base_equal_reward_and_ends() -> None:
    whole = study_of([record(), record("GRPO", reward=(0.5, 0.55), seconds=(0, 20))])
    assert [(sample.title, sample.step, sample.reward) for sample in samples(whole)] == [
        ("base", 0, 0.5),
        ("DRTune at GRPO's reward, 10 s", 10, 0.6),
        ("DRTune, 20 s", 20, 0.9),
        ("GRPO, 20 s", 10, 0.55),
    ]


# --- quick runs -----------------------------------------------------------------------------------------


def quick_and_whole(shift: float) -> tuple[Study, Study]:
    """Four committed seeds of 20 s, and a quick one of 10 s, with DRTune's reward off by `shift`."""
    numbers = {"vendi": (4, 3, 2), "rke": (4, 3, 2), "accuracy": (0.8, 0.8, 0.8), "nats": (1, 2, 3)}
    flat = {"spread": (1, 1, 1)}
    whole = []
    for seed in range(4):
        wobble = 0.01 * seed
        columns = {name: [v + wobble for v in values] for name, values in (numbers | flat).items()}
        whole.append(record("DRTune", seed, (0.5, 0.7 + wobble, 0.9), **columns))
        whole.append(record("GRPO", seed, (0.5, 0.55 + wobble, 0.6), **columns))
    halves = {name: values[:2] for name, values in (numbers | flat).items()}
    quick = [
        record("DRTune", 0, (0.5, 0.71 + shift), (0, 5), "quick", forwards=200, **halves),  # a machine twice as fast
        record("GRPO", 0, (0.5, 0.56), (0, 5), "quick", forwards=200, **halves),
    ]
    for one in (*whole, *quick):
        one.evaluations["modes/entropy"] = one.evaluations[VENDI]
    return study_of(quick), study_of(whole)


def test_quick_runs_are_held_against_the_whole_at_equal_network_evaluations() -> None:
    comparisons = compare_quick(*quick_and_whole(0.0))
    assert all(item.within for item in comparisons)
    rewards = [item for item in comparisons if item.quantity == f"DRTune seed 0: {REWARD}"]
    seeds = [0.7, 0.71, 0.72, 0.73]  # the committed ones at 1,000 network evaluations, 10 s of theirs
    level = 1 - 0.05 / len(comparisons)
    half = stats.t.ppf((1 + level) / 2, 3) * np.std(seeds, ddof=1) * math.sqrt(1.25)
    assert rewards[0].expected.mean == pytest.approx(0.715)
    assert rewards[0].expected.high == pytest.approx(0.715 + half)
    speed = next(item for item in comparisons if "until GRPO" in item.quantity)
    assert speed.value == pytest.approx(1000 * 0.06 / 0.21 / 1000)


def test_a_quick_run_that_is_off_is_noticed() -> None:
    outside = [item.quantity for item in compare_quick(*quick_and_whole(0.2)) if not item.within]
    assert f"DRTune seed 0: {REWARD}" in outside
    quick, whole = quick_and_whole(0.0)
    with pytest.raises(ConfigError, match="1 seeds of quick runs and 1 committed"):
        compare_quick(quick, study_of(whole.records[:2]))
