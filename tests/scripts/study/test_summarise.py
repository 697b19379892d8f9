"""The study's pages say what its committed results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from scripts.study import plan
from scripts.study.committed import Results, read_results
from scripts.study.pages import BEGIN, END, not_run, outdated, sections
from scripts.study.paths import ROOT
from scripts.study.records import RKE, VENDI
from scripts.study.study_records import NATS, SPREAD, Study, read_study, write_study
from scripts.study.summarise import main
from tests.scripts.study.builders import validation_rows, write_study_run

SECONDS, EPOCHS = 40.0, 48
GAINS = {"sde": 0.03, "ode_step": 0.0, "ode_path": 0.01, "cfm": 0.02}
NUMBERS = ("value", "low", "high")


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
    assert f"LoRA scaled at sampling time: {not_run()}" in text
    assert f"Signal-to-noise of the gradient: {not_run()}" in text
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
    validation = validation_rows()
    found = sections(Results(Study((), {"a-run": "not run"}, ()), [], [], validation, []))
    assert {section.anchor for section in found if section.verdict != not_run()} == {"claim-3"}


def test_a_readme_without_a_place_is_one_sentence(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.readme.write_text("# Title\n")
    refused(place.arguments)
    assert capsys.readouterr().err.count("\n") == 1
    assert place.readme.read_text() == "# Title\n"
    (place.out / "runs.json").unlink()
    refused(place.arguments)
    assert "runs.json is missing" in capsys.readouterr().err


def test_measures_that_are_absent_are_named_and_not_guessed(committed: Place) -> None:
    results = read_results(committed.out)
    bare = [
        replace(one, evaluations={k: v for k, v in one.evaluations.items() if k not in (NATS, SPREAD)})
        for one in results.study.records
    ]
    found = sections(replace(results, study=replace(results.study, records=tuple(bare))))
    assert "not measured" in next(section for section in found if section.anchor == "claim-2").body


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
