"""The study's pages say what its committed results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from scripts.study import plan
from scripts.study.records import RKE, VENDI
from scripts.study.results import (
    NATS,
    SPREAD,
    Estimate,
    Form,
    RankCorrelation,
    SeedCrossing,
    Study,
    read_study,
    write_study,
)
from scripts.study.sections import (
    NOT_RUN,
    Results,
    diversity_verdict,
    entropy_section,
    frontier_section,
    gradient_sentences,
    hacking_section,
    proxy_words,
    ratio_verdict,
    sections,
    speed_section,
    speed_verdict,
    undoing_verdict,
    untuned,
)
from scripts.study.summarise import BEGIN, END, ROOT, main, outdated, read_results
from tests.scripts.test_study_results import record, study_of, write_study_run

LOWER, HIGHER, UNCLEAR, ONE = (
    Estimate(-1, -2, -0.5, 5),
    Estimate(1, 0.5, 2, 5),
    Estimate(0, -1, 1, 5),
    Estimate(1, float("nan"), float("nan"), 1),
)
SECONDS, EPOCHS = 40.0, 48
GAINS = {"sde": 0.03, "ode_step": 0.0, "ode_path": 0.01, "cfm": 0.02}


class Place:
    """Where a test's results and pages are, and the command line that says so."""

    def __init__(self, folder: Path) -> None:
        self.out, self.page = folder / "assets/study", folder / "docs/study.md"
        self.readme = folder / "README.md"
        self.arguments = ["--out", str(self.out), "--page", str(self.page), "--readme", str(self.readme)]

    def outdated(self) -> list[Path]:
        return outdated(self.out, self.page, self.readme)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A study of which two runs are missing, collected and summarised once."""
    folder = tmp_path_factory.mktemp("study")
    runs = [*plan.search(), *plan.claims(range(3), SECONDS), *plan.ratios(range(2), EPOCHS)]
    runs += plan.frontier(range(2), SECONDS)
    stale = Place(folder).out / "grids/claims-drtune-seed0_000007.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier study")
    for run in runs[:-1]:
        gradient, beta = "use_gradient" in run.recipe, run.overrides.get("train.beta", 0.0)
        gain = GAINS[run.overrides["train.ratio"]] if run.group == "ratio" else 0.1 if gradient else 0.03
        seconds = SECONDS / 2 if run is runs[-2] else None  # cut short
        collapse = (0.9 if gradient else 0.3) / (1 + beta)
        write_study_run(run, folder / "logs", gain / (1 + beta), seconds, collapse, wobble=0.2)
    place = Place(folder)
    place.readme.write_text(f"# Title\n{BEGIN}\nout of date\n{END}\nthe rest\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "whole", lambda: runs)
        assert main(["--logs", str(folder / "logs"), *place.arguments]) == 0
    shutil.rmtree(folder / "logs")  # nothing below may need it
    assert not stale.exists()
    assert len(list(stale.parent.iterdir())) == 4
    return place


@pytest.fixture
def place(committed: Place, tmp_path: Path) -> Place:
    """A copy to damage."""
    shutil.copytree(committed.readme.parent, tmp_path / "copy")
    return Place(tmp_path / "copy")


# --- the pages ------------------------------------------------------------------------------------------


def test_the_committed_pages_are_what_the_committed_results_give() -> None:
    """Every number of docs/study.md and of the README's part is traced to assets/study by making both again."""
    assert outdated() == []


def test_pages_and_figures_are_made_again_from_the_results_alone(place: Place) -> None:
    before = {path: path.read_bytes() for path in place.readme.parent.rglob("*") if path.is_file()}
    assert main(place.arguments) == 0
    assert {path: path.read_bytes() for path in place.readme.parent.rglob("*") if path.is_file()} == before
    assert main(["--check", *place.arguments]) == 0
    text = place.readme.read_text()
    assert text.startswith(f"# Title\n{BEGIN}\n")
    assert text.endswith(f"{END}\nthe rest\n")
    assert "out of date" not in text


def test_a_page_edited_by_hand_is_noticed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    text = place.page.read_text()
    number = re.search(r"0\.6\d\d\d", text)
    assert number is not None
    place.page.write_text(text.replace(number[0], "0.9999", 1))
    assert main(["--check", *place.arguments]) == 1
    assert f"{place.page} is not what" in capsys.readouterr().err
    place.page.write_text(text)
    place.readme.write_text(place.readme.read_text().replace("**Holds", "**Fails", 1))
    assert place.outdated() == [place.readme]


@pytest.mark.parametrize("group", ["search", "claims", "ratio", "frontier"])
def test_a_changed_number_changes_the_page(place: Place, group: str) -> None:
    study = read_study(place.out / "runs.json")
    changed = next(record for record in study.records if record.group == group)
    columns = {**changed.evaluations, "reward/total": [v * 1.01 for v in changed.evaluations["reward/total"]]}
    records = [replace(one, evaluations=columns) if one is changed else one for one in study.records]
    write_study(replace(study, records=tuple(records)), place.out / "runs.json")
    assert place.page in place.outdated()


def test_what_is_missing_is_said(committed: Place) -> None:
    study, text = read_study(committed.out / "runs.json"), committed.page.read_text()
    assert list(study.missing.values()) == ["not finished", "not run"]
    for name, reason in study.missing.items():
        assert f"{name} ({reason})" in text
    assert f"LoRA scaled at sampling time: {NOT_RUN}" in text
    assert f"Signal-to-noise of the gradient: {NOT_RUN}" in text
    assert "with the exact trace it was not run" in text


def test_every_figure_that_a_page_shows_is_there_and_legible(committed: Place) -> None:
    for path in (committed.page, committed.readme):
        links = re.findall(r"\[[^]]*\]\(([^)]+\.png)\)", path.read_text())
        assert len(links) >= (8 if path == committed.page else 1)
        for link in links:
            file = path.parent / link
            if "entropy_validation" in link:  # of another command
                file = ROOT / "assets/figures/entropy_validation" / Path(link).name
            assert min(Image.open(file).size) >= 400, link
    names = {path.stem for path in committed.out.glob("*.png")}
    assert names == {
        "reward", "diversity_vs_seconds", "diversity_vs_reward", "judge_vs_reward", "proxies", "ratios",
        "ratio_statistics", "frontier", "samples",
    }  # fmt: skip


NUMBERS = ("value", "low", "high")


def noise_rows(**changes: object) -> list[dict[str, object]]:
    """As gradient_noise.py writes them."""
    row = {"form": "ode_step", "batches": 9, "value": 0.123, "low": 0.1, "high": 0.2}
    sources = {1: ("probes", "batches", "uphill", "over_sde"), 0: ("batches", "uphill", "over_sde")}
    found = [{**row, "probes": probes, "source": source} for probes, names in sources.items() for source in names]
    return [*found, {**row, "probes": 0, "source": "cosine"} | dict.fromkeys(NUMBERS), *([changes] if changes else [])]


def scaled(place: Place, **changes: object) -> list[dict[str, object]]:
    """As lora_scales.py writes them, of a run that is there."""
    run = next(record for record in read_study(place.out / "runs.json").of("claims") if record.method == "DRTune")
    entry = {"label": "DRTune", "method": "DRTune", "seed": run.seed, "scale": 0.5, "seconds": run.final("seconds")}
    return [entry | {"reward/total": 0.55, VENDI: 2.71, RKE: 3.0, "judge/accuracy": 0.8} | changes]


def test_optional_results_are_shown_where_they_are(place: Place) -> None:
    (place.out / "gradient_noise.json").write_text(json.dumps(noise_rows()))
    (place.out / "lora_scales.json").write_text(json.dumps(scaled(place)))
    assert main(place.arguments) == 0
    text = place.page.read_text()
    shown, signed = "0.123 (0.1 to 0.2)", "+0.123 (+0.100 to +0.200)"
    assert f"| ode_step, 1 probe | 9 | {shown} | {shown} | {signed} | {signed} |  |" in text
    assert f"| ode_step, exact trace | 9 |  | {shown} | {signed} | {signed} | not told from 0 |" in text
    assert "squared length of `ode_step`'s gradient on a group: 89% (83% to 91%) with 1" in text  # 1 / (1 + snr)
    assert f"that of ode_step, exact trace points up the reward ({signed} of its length)" in text
    assert re.search(r"\| DRTune LoRA scaled by 0\.5 \| 1 \| \d+ \(one seed\) \| 0\.5500 \(one seed\) \| 2\.71", text)
    assert (place.out / "gradient_noise.png").is_file()


def refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("gradient_noise.json", "[{", "gradient_noise.json is not JSON"),
        ("gradient_noise.json", '[{"form": "sde"}]', "an entry lacks one of form, probes, source"),
        ("gradient_noise.json", 100_000 * "[", "gradient_noise.json is JSON nested too deep"),
        ("gradient_noise.json", "[" + 10_000 * "9" + "]", "is JSON with a number of too many digits"),
        ("lora_scales.json", "[3]", "lora_scales.json is not what scripts/study/lora_scales.py writes"),
        ("lora_scales.json", None, "trained for 1.5 s, which is no run of"),
    ],
)
def test_damaged_or_stale_optional_results_are_one_sentence(
    place: Place, name: str, text: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.out / name).write_text(text or json.dumps(scaled(place, seconds=1.5)))
    before = place.page.read_bytes()
    refused(place.arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert place.page.read_bytes() == before


def test_a_folder_without_runs_does_not_replace_what_is_committed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (place.out / "runs.json").read_bytes()
    refused(["--logs", str(tmp_path / "typo"), *place.arguments])
    assert "typo holds no finished run of the study" in capsys.readouterr().err
    assert (place.out / "runs.json").read_bytes() == before


def test_a_study_without_runs_says_so_everywhere() -> None:
    validation = read_results_rows()
    found = sections(Results(Study((), {"a-run": "not run"}, ()), [], [], validation, []))
    assert {section.anchor for section in found if section.verdict != NOT_RUN} == {"claim-3"}


def test_a_readme_without_a_place_is_one_sentence(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.readme.write_text("# Title\n")
    refused(place.arguments)
    assert capsys.readouterr().err.count("\n") == 1
    assert place.readme.read_text() == "# Title\n"
    (place.out / "runs.json").unlink()
    refused(place.arguments)
    assert "runs.json is missing" in capsys.readouterr().err


# --- the verdicts follow the numbers --------------------------------------------------------------------


def read_results_rows() -> list[dict[str, object]]:
    return json.loads((ROOT / "assets/figures/entropy_validation/results.json").read_text())["rows"]


def fractions(*values: float, meaningful: bool = True) -> list[SeedCrossing]:
    return [SeedCrossing(seed, 0.6, meaningful, value, value, 10.0) for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("crossings", "verdict"),
    [
        (fractions(0.05, 0.06, 0.07), "holds"),
        (fractions(0.05, 0.06, 0.30), "holds in part: faster"),  # the interval ends above 20 %
        (fractions(0.5, 0.9, 1.6), "not shown"),
        (fractions(1.4, 1.5, 1.6), "does not hold"),
        (fractions(0.05, 0.06, float("nan")), "does not hold: DRTune reached GRPO's final reward in 2 of 3 seeds"),
        (fractions(0.05), "cannot be said: one seed"),
        (fractions(float("nan"), meaningful=False), "cannot be said: GRPO's reward did not rise"),
    ],
)
def test_the_verdict_on_speed(crossings: list[SeedCrossing], verdict: str) -> None:
    assert speed_verdict(crossings).startswith(verdict)


@pytest.mark.parametrize(
    ("at_time", "at_reward", "verdict"),
    [
        ((LOWER,) * 3, (LOWER,) * 3, "holds, at equal time and at equal reward"),
        ((LOWER,) * 3, (UNCLEAR,) * 3, "holds at equal time; at equal reward DRTune's diversity is not lower by any"),
        ((LOWER, LOWER, UNCLEAR), (HIGHER, LOWER, UNCLEAR), "at equal time it holds by Vendi score and RKE; at equal"),
        ((UNCLEAR,) * 3, (UNCLEAR,) * 3, "does not hold"),
        ((HIGHER,) * 3, (HIGHER,) * 3, "does not hold"),
        ((LOWER,) * 3, (ONE,) * 3, "holds at equal time; too few seeds"),
        ((ONE,) * 3, (ONE,) * 3, "cannot be said"),
    ],
)
def test_the_verdict_on_diversity(at_time: list[Estimate], at_reward: list[Estimate], verdict: str) -> None:
    names = (VENDI, RKE, SPREAD)
    found = diversity_verdict(dict(zip(names, at_time, strict=True)), dict(zip(names, at_reward, strict=True)))
    assert found.startswith(verdict)
    assert ("higher by Vendi score" in found) == (at_reward[0] is HIGHER and at_time[0] is LOWER)


@pytest.mark.parametrize(("slowly", "depends"), [(HIGHER, True), (UNCLEAR, True), (LOWER, False)])
def test_what_holds_at_one_learning_rate_only_is_not_the_methods(slowly: Estimate, depends: bool) -> None:
    lower = dict.fromkeys((VENDI, RKE, SPREAD), LOWER)
    found = diversity_verdict(lower, lower, {VENDI: slowly})
    assert found.endswith("it depends on DRTune's learning rate" if depends else "at equal time and at equal reward")


SDE, ONE_PROBE, FOUR, SIXTEEN, EXACT = Form("sde", 1), *(Form("ode_step", probes) for probes in (1, 4, 16, 0))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({SDE: HIGHER, ONE_PROBE: HIGHER, EXACT: HIGHER}, "does not hold: ode_step trains with one probe"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, EXACT: HIGHER}, "not settled: ode_step is not shown to train with one "
         "probe, and trains with the exact trace, but the two are not told apart"),
        ({SDE: HIGHER, ONE_PROBE: LOWER, EXACT: UNCLEAR}, "holds in part: ode_step lowers the reward with one "
         "probe, and is not shown to train with the exact trace, where no probe adds variance"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, FOUR: HIGHER, SIXTEEN: UNCLEAR}, "not settled: ode_step is not shown to "
         "train with one probe, and is not shown to train with 16 probes, yet it trains with 4 probes"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: UNCLEAR}, "holds in part: ode_step is not shown to train with one "
         "probe, and is not shown to train with 16 probes; the exact trace is not yet run"),
        ({SDE: HIGHER, ONE_PROBE: LOWER}, "not settled: ode_step lowers the reward with one probe; more"),
        ({SDE: HIGHER, ONE_PROBE: ONE}, "cannot be settled: ode_step with one probe needs"),
        ({SDE: UNCLEAR, ONE_PROBE: UNCLEAR}, "cannot be settled: the control, sde, is not shown to train"),
        ({ONE_PROBE: UNCLEAR}, "cannot be settled: the control, sde, needs"),
    ],
)  # fmt: skip
def test_the_verdict_on_the_ratio(gains: dict[Form, Estimate], verdict: str) -> None:
    assert ratio_verdict(gains).startswith(verdict)


def test_more_probes_are_the_cure_only_if_they_do_better_than_one() -> None:
    gains = {SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: HIGHER}
    assert ratio_verdict(gains, advantage=HIGHER).startswith(
        "holds: ode_step is not shown to train with one probe, and"
    )
    assert ratio_verdict(gains, advantage=UNCLEAR).startswith("not settled")


def test_probes_whose_noise_is_small_stand_in_for_the_exact_trace() -> None:
    row = {"form": "ode_step", "batches": 9, "low": 0.1, "high": 0.2}
    rows = [{**row, "probes": 16, "source": source, "value": 0.15} for source in ("uphill", "over_sde")]

    def said(snr: float) -> str:
        probes = {**row, "probes": 16, "source": "probes", "value": snr, "low": 0.8 * snr, "high": 1.2 * snr}
        return gradient_sentences([*rows, probes])[0]

    assert said(60.0).endswith("2% (1% to 2%) with 16. So a run with the exact trace would follow nearly the gradients "
                               "of one with 16.")  # fmt: skip
    assert said(9.0).endswith("10% (8% to 12%) with 16.")


@pytest.mark.parametrize(
    ("uphill", "words"),
    [
        ((-0.2, -0.3, -0.1), "its exact gradient points down the reward"),
        ((0.2, 0.1, 0.3), "its exact gradient points up the reward"),
        ((0.1, -0.1, 0.3), "its exact gradient is not shown to point up the reward"),
    ],
)
def test_without_a_run_of_the_exact_trace_the_verdict_tells_of_its_gradient(
    uphill: tuple[float, ...], words: str
) -> None:
    row = {"form": "ode_step", "probes": 0, "source": "uphill", "batches": 9, **dict(zip(NUMBERS, uphill, strict=True))}
    found = ratio_verdict({SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: UNCLEAR}, [row])
    assert found.startswith("holds in part: ode_step is not shown to train with one probe, and is not shown to train")
    assert found.endswith(f"so not for a single probe's variance alone; {words}")


@pytest.mark.parametrize(
    ("low", "high", "within", "words"),
    [
        (0.8, 0.9, Estimate(0.8, 0.75, 0.9, 9), "follows diversity closely"),
        (0.8, 0.9, Estimate(0.5, 0.3, 0.7, 9), "follows diversity loosely"),
        (0.8, 0.9, Estimate(0.1, -0.2, 0.4, 9), "is not shown to follow diversity"),
        (0.8, 0.9, Estimate(-0.5, -0.7, -0.3, 9), "goes with diversity between runs, and against it within them"),
        (-0.2, 0.9, Estimate(-0.5, -0.7, -0.3, 9), "runs against diversity"),
        (-0.9, -0.8, Estimate(0.8, 0.75, 0.9, 9), "runs against diversity"),
    ],
)
def test_the_verdict_on_a_proxy(low: float, high: float, within: Estimate, words: str) -> None:
    assert proxy_words(RankCorrelation((low + high) / 2, low, high, 100, 9, within)) == words


def test_a_method_that_never_has_grpos_reward_is_said_not_to_reach_it() -> None:
    diversity = {"vendi": (4.0, 3.0, 1.0), "rke": (4.0, 3.0, 1.0), "accuracy": (0.8, 0.9, 0.7)}
    runs = [record(**diversity), record("GRPO", reward=(0.5, 0.6, 0.75), **diversity)]
    runs += [record("DRTune beta 1", reward=(0.5, 0.55, 0.6), group="frontier", **diversity)]
    runs += [record("DRTune beta 0.1", reward=(0.5, 0.6, 0.8), group="frontier", **diversity)]
    rows = frontier_section(Results(study_of(runs), [], [], [], [])).tables[0].rows
    last = {row[0]: row[-1] for row in rows}
    assert last["DRTune beta 1"] == "not reached"
    assert last["DRTune beta 0.1"] == "+0.50 (one seed)"  # 0.75 lies three quarters of the way from 3 to 1


def test_the_verdict_on_what_undoes_the_collapse() -> None:
    assert undoing_verdict({"beta 1": HIGHER, "beta 0.1": UNCLEAR}) == "shown to undo some of it: beta 1"
    assert undoing_verdict({"beta 1": LOWER}) == "shown to undo some of it: none"
    assert undoing_verdict({"beta 1": ONE}).startswith("cannot be said")
    assert undoing_verdict({}).startswith("cannot be said")


def test_the_verdict_on_the_entropy_estimator() -> None:
    rows = read_results_rows()
    assert entropy_section(rows).verdict == "holds"
    rows[0] = rows[0] | {"error_in_standard_errors": 9.0}
    section = entropy_section(rows)
    assert section.verdict == "does not hold"
    assert "9.00 standard errors" in section.summary


def test_a_flipped_number_flips_a_section() -> None:
    columns = {
        "vendi": (4, 3, 1),
        "rke": (4, 3, 1),
        "accuracy": (0.8, 0.9, 0.6),
        "nats": (3, 2, 1),
        "spread": (3, 2, 1),
    }
    rising = {**columns, "accuracy": (0.8, 0.85, 0.9)}
    drtunes = [record(seed=seed, reward=(0.5, 0.7 + 0.01 * seed, 0.9), **columns) for seed in range(3)]
    grpos = [record("GRPO", seed, (0.5, 0.52, 0.54), (0, 50, 100), **columns) for seed in range(3)]
    study = study_of([*drtunes, *grpos])
    assert speed_section(study).verdict == "holds"
    assert hacking_section(study).verdict == "yes, of DRTune and GRPO"
    slow = [record(seed=seed, reward=(0.5, 0.51, 0.53), **rising) for seed in range(3)]
    study = study_of([*slow, *grpos])
    assert speed_section(study).verdict == "does not hold: DRTune reached GRPO's final reward in 0 of 3 seeds"
    assert hacking_section(study).verdict == "yes, of GRPO"


def test_measures_that_are_absent_are_named_and_not_guessed(committed: Place) -> None:
    results = read_results(committed.out)
    bare = [
        replace(one, evaluations={k: v for k, v in one.evaluations.items() if k not in (NATS, SPREAD)})
        for one in results.study.records
    ]
    found = sections(replace(results, study=replace(results.study, records=tuple(bare))))
    assert "not measured" in str(next(section for section in found if section.anchor == "claim-2").tables)


# --- quick runs -----------------------------------------------------------------------------------------


def test_quick_runs_are_held_against_the_committed_ones(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [replace(run, group="quick") for run in plan.claims(range(1), SECONDS)]
    monkeypatch.setattr(plan, "quick", lambda: runs)
    before = place.page.read_bytes()
    for run, gain, collapse in zip(runs, (0.1, 0.03), (0.9, 0.3), strict=True):
        write_study_run(run, tmp_path / "logs", gain, None, collapse, wobble=0.2)
    assert main(["--quick", str(tmp_path / "logs"), *place.arguments]) == 0
    assert "15 of 15 quantities lie within the committed intervals" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "logs")
    write_study_run(runs[0], tmp_path / "logs", 0.05, None, 0.1, wobble=0.2)
    write_study_run(runs[1], tmp_path / "logs", 0.03, None, 0.3, wobble=0.2)
    assert main(["--quick", str(tmp_path / "logs"), *place.arguments]) == 1
    assert "OUTSIDE  DRTune seed 0: reward/total" in capsys.readouterr().out
    assert place.page.read_bytes() == before
    shutil.rmtree(tmp_path / "logs")
    refused(["--quick", str(tmp_path / "logs"), *place.arguments])


def test_claims_that_did_not_take_the_searchs_best_settings_say_so() -> None:
    def tried(label: str, rate: float | None, reward: float) -> SimpleNamespace:
        overrides = {} if rate is None else {"train.learning_rate": rate}
        kinds = {"method": "GRPO", "recipe": "tiny_sd3", "label": label, "overrides": overrides}
        return SimpleNamespace(**kinds, final=lambda name: reward)

    def warning(claimed: float | None, *search: SimpleNamespace) -> str:
        groups = {"claims": [tried("GRPO", claimed, 0.6)], "search": list(search)}
        return untuned(SimpleNamespace(of=groups.get))  # type: ignore[arg-type]

    default, faster = tried("GRPO lr 0.001", 1e-3, 0.5), tried("GRPO lr 0.003", 3e-3, 0.55)
    assert "has been tuned yet" in warning(None)
    assert "GRPO (best: GRPO lr 0.003)" in warning(None, default, faster)
    assert warning(3e-3, default, faster) == ""
    assert warning(None, default) == ""  # the recipe's own rate
    more = tried("GRPO", 3e-3, 0.6)
    more.overrides = {**more.overrides, "train.updates_per_epoch": 4}  # what the search did not find best
    late = {"claims": [more], "search": [faster]}
    assert "GRPO (best: GRPO lr 0.003)" in untuned(SimpleNamespace(of=late.get))  # type: ignore[arg-type]
