"""The report says what the run folders hold, and says so when it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flow_grpo.errors import ConfigError
from scripts.study.figures import COLOURS, samples_figure, states, vendi_rke_figure
from scripts.study.records import compare, crossing, first_crossing, load_runs
from scripts.study.report import build_report, main, notes
from tests.synthetic_runs import write_demo_pair, write_run

ROOT = Path(__file__).parents[1]
FIGURES = (
    "reward_vs_seconds",
    "reward_vs_network_evaluations",
    "judge_accuracy",
    "modes",
    "diversity_vs_reward",
    "samples",
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Rewards by hand: DRTune 0.5, 0.6, 0.9 at 0, 10, 20 s; GRPO 0.5, 0.65, 0.75 at 0, 50, 100 s."""
    drtune = write_run(tmp_path / "drtune", [0.5, 0.6, 0.9], [0, 10, 20], gradient=True, forwards_per_second=100)
    grpo = write_run(tmp_path / "grpo", [0.5, 0.65, 0.75], [0, 50, 100], gradient=False, forwards_per_second=200)
    return drtune, grpo


@pytest.fixture(scope="module")
def demo_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of two runs like the demo's."""
    folder = tmp_path_factory.mktemp("demo")
    return build_report(write_demo_pair(folder), folder / "out").path.parent


# --- crossings ------------------------------------------------------------------------------------------


def test_the_crossing_is_interpolated_linearly_between_evaluations(pair: tuple[Path, Path]) -> None:
    drtune, grpo = load_runs(pair)
    found = crossing(drtune, grpo)
    assert found.seconds == pytest.approx(15.0, abs=1e-12)  # half way from 0.6 at 10 s to 0.9 at 20 s
    assert found.network_evaluations == pytest.approx(1500.0, abs=1e-9)
    assert found.fraction("seconds") == pytest.approx(0.15, abs=1e-12)
    assert found.fraction("network_evaluations") == pytest.approx(0.075, abs=1e-12)
    evaluation = found.evaluation
    assert evaluation is not None
    assert evaluation.seconds == 20
    assert found.sentence() == (
        "DRTune reached GRPO's final reward (0.7500) after 15.0 s of training, 15.0% of GRPO's 100 s, "
        "and after 1,500 network evaluations, 7.5% of GRPO's 20,000."
    )


@pytest.mark.parametrize(
    ("rewards", "level", "expected"),
    [
        ([0.0, 1.0, 0.0, 1.0], 0.5, 5.0),  # the first of several
        ([0.0, 0.5, 0.5], 0.5, 10.0),  # at an evaluation exactly
        ([0.7, 0.8, 0.9], 0.5, 0.0),  # above it from the start
        ([0.0, 0.4, 0.2], 0.5, None),
    ],
)
def test_the_first_crossing_is_taken(rewards: list[float], level: float, expected: float | None) -> None:
    assert first_crossing(10.0 * np.arange(len(rewards)), np.array(rewards), level) == expected


def test_a_reward_that_is_never_reached_is_reported_as_such(tmp_path: Path) -> None:
    drtune = write_run(tmp_path / "drtune", [0.5, 0.58, 0.55], [0, 10, 20], gradient=True)
    grpo = write_run(tmp_path / "grpo", [0.5, 0.65], [0, 100], gradient=False)
    report = build_report([drtune, grpo], tmp_path / "out")
    sentence = "DRTune did not reach GRPO's final reward (0.6500) in 20 s: its best was 0.5800."
    assert report.crossings[0].sentence() == sentence
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["crossings"][0]["seconds"] is None
    assert summary["crossings"][0]["fraction_of_seconds"] is None


def test_a_run_that_did_not_rise_is_no_target(tmp_path: Path) -> None:
    drtune = write_run(tmp_path / "drtune", [0.5, 0.6], [0, 10], gradient=True)
    grpo = write_run(tmp_path / "grpo", [0.5, 0.45], [0, 100], gradient=False)
    found = crossing(*load_runs([drtune, grpo]))
    assert not found.reached
    assert found.sentence() == (
        "GRPO ended at 0.4500, not above the base model's 0.5000: there is nothing for DRTune to reach."
    )


# --- the report -----------------------------------------------------------------------------------------


def test_the_page_is_beside_the_figures(demo_report: Path) -> None:
    html = (demo_report / "page.html").read_text(encoding="utf-8")
    assert "python scripts/study/report.py" in html
    assert "data:image/" in html


def test_every_figure_is_there_as_a_png_of_legible_size(demo_report: Path) -> None:
    assert {path.stem for path in demo_report.glob("*.png")} == set(FIGURES)
    assert all(min(Image.open(demo_report / f"{name}.png").size) >= 600 for name in FIGURES)


def test_the_summary_holds_the_final_figures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    build_report(pair, tmp_path / "out")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["base"]["reward/total"] == 0.5
    assert {name: run["reward/total"] for name, run in summary["runs"].items()} == {"DRTune": 0.9, "GRPO": 0.75}


def test_entropy_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [0.5, 0.6, 0.7], [0, 10, 20], gradient, collapse=[0, 0.5, 1], density=True)
        for name, gradient in (("drtune", True), ("grpo", False))
    ]
    density = ("eval/entropy/", "eval/ode_log_prob/")
    edit_lines(runs[0], lambda x: {k: v for k, v in x.items() if x["step"] != 10 or not k.startswith(density)})
    build_report(runs, tmp_path / "out")
    assert (tmp_path / "out/entropy.png").is_file()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["runs"]["GRPO"]["entropy/nats"] == -70.0


def test_diversity_is_shown_with_its_intervals_where_it_was_measured(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [0.5, 0.6, 0.7], [0, 10, 20], gradient, collapse=[0, 0.5, 1], diversity=True)
        for name, gradient in (("drtune", True), ("grpo", False))
    ]
    edit_lines(runs[0], lambda x: {k: v for k, v in x.items() if x["step"] != 10 or "diversity" not in k})
    build_report(runs, tmp_path / "out")
    assert (tmp_path / "out/vendi_rke.png").is_file()
    drawn = vendi_rke_figure(load_runs(runs))
    bars, right = drawn.axes[0].containers[0], drawn.axes[1]
    low, high = bars[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((3.4, 3.6))
    assert len(bars[0].get_xdata()) == 2  # the evaluation without it is left out
    assert list(right.containers[0][0].get_xdata()) == [0.5, 0.7]


def test_without_it_there_is_no_entropy_figure(pair: tuple[Path, Path], tmp_path: Path) -> None:
    build_report(pair, tmp_path / "out")
    assert not (tmp_path / "out/entropy.png").exists()


def test_the_same_folders_give_the_same_report_wherever_they_are(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = build_report(pair, tmp_path / "one").path.read_text()
    moved = [Path(shutil.copytree(folder, tmp_path / "moved" / folder.name)) for folder in pair]
    again = build_report(moved, tmp_path / "two").path.read_text()
    assert again.replace(str(tmp_path / "moved"), str(tmp_path)) == first


def test_equal_reward_is_shown_beside_equal_time(tmp_path: Path) -> None:
    runs = load_runs(write_demo_pair(tmp_path))
    shown = states(runs, compare(runs))
    assert [state.label for state in shown] == ["base", "DRTune at GRPO's reward, 18 s", "DRTune, 180 s", "GRPO, 181 s"]
    assert shown[1].evaluation.reward == pytest.approx(runs[1].final.reward, abs=0.005)
    assert len(set(COLOURS.values())) == 2


def test_one_run_alone_and_three_runs_have_a_report(pair: tuple[Path, Path], tmp_path: Path) -> None:
    alone = build_report(pair[:1], tmp_path / "alone")
    assert alone.crossings == ()
    assert alone.path.is_file()
    third = write_run(tmp_path / "grpo_again", [0.5, 0.7], [0, 100], gradient=False)
    report = build_report([*pair, third], tmp_path / "three")
    assert [run.label for run in report.runs] == ["DRTune", "GRPO grpo", "GRPO grpo_again"]


def test_many_runs_have_figures_of_bounded_size(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run {i}", [0.5, 0.7], [0, 100], gradient=False) for i in range(12)]
    drawn = samples_figure(states(load_runs(runs), []))
    assert len(drawn.axes) == 8
    assert drawn.get_suptitle() == "the first 8 of 13; 5 are not shown"


def test_runs_of_the_same_name_are_told_apart_by_their_parents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / parent / "tb", [0.5, 0.7], [0, 100], gradient=False) for parent in ("a", "b"))
    report = build_report([pair[0], one, two], tmp_path / "out")
    assert [run.label for run in report.runs] == ["DRTune", "GRPO a/tb", "GRPO b/tb"]
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["runs"]) == ["DRTune", "GRPO a/tb", "GRPO b/tb"]


def test_a_folder_given_twice_is_refused(pair: tuple[Path, Path]) -> None:
    (pair[0].parent / "link").symlink_to(pair[0])
    with pytest.raises(ConfigError, match="was given twice"):
        load_runs([pair[0], pair[0].parent / "link"])


@pytest.mark.parametrize("name", ["a $^$ run", r"$\frac{$", "红包", "x" * 160, "a\nb\x1b[31m"])
def test_names_of_any_kind_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    runs = [
        write_run(tmp_path / folder / name, [0.5, 0.7], [0, 100], gradient=False, density=True, diversity=True)
        for folder in "ab"
    ]
    for run in runs:  # a mode's name is anybody's too
        edit_lines(run, lambda line: {k.replace("modes/red", f"modes/{name}"): v for k, v in line.items()})
    build_report(runs, tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {*FIGURES, "entropy", "vendi_rke"}
    assert max(max(Image.open(path).size) for path in (tmp_path / "out").glob("*.png")) < 3000


def test_a_figure_that_cannot_be_drawn_loses_nothing_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in pair[0].glob("images/*.png"):
        path.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"samples\.png could not be drawn \(.* cannot be read as an image"):
        build_report(pair, tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {*FIGURES} - {"samples"}
    assert json.loads((tmp_path / "out/summary.json").read_text())["runs"]["GRPO"]["reward/total"] == 0.75
    assert (tmp_path / "out/page.html").is_file()


def test_the_report_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    run = write_run(tmp_path / "红包", [0.5, 0.7], [0, 100], gradient=False, density=True)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "scripts.study.report", os.fsencode(run), "--out", os.fsencode(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "</html>" in (tmp_path / "out/page.html").read_text(encoding="utf-8")


def test_a_run_without_judge_and_modes_has_a_report_without_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5, 0.6], [0, 10], gradient=False, overrides={"eval.judge": ""})
    edit_lines(
        run, lambda line: {key: value for key, value in line.items() if "judge" not in key and "modes" not in key}
    )
    build_report([run], tmp_path / "out")
    left_out = {"judge_accuracy", "modes", "diversity_vs_reward"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(FIGURES) - left_out


def test_what_weakens_the_comparison_is_said(tmp_path: Path) -> None:
    drtune = write_run(tmp_path / "drtune", [0.5, None, 0.6], [0, 10, 20], gradient=True)
    grpo = write_run(tmp_path / "grpo", [0.51, 0.6], [0, 10], gradient=False)
    edit_lines(grpo, lambda line: line | ({"train/skipped_updates": 0.5} if "train/skipped_updates" in line else {}))
    starts = "DRTune 0.5000, GRPO 0.5100"
    assert notes(load_runs([drtune, grpo])) == [
        f"The runs did not start from the same model: their rewards before training differ ({starts}).",
        "DRTune: 1 evaluations are left out because their reward was not finite.",
        "GRPO: updates were skipped in 2 epochs (loss or gradient not finite).",
    ]


# --- bad input ------------------------------------------------------------------------------------------


def edit_lines(run: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(json.dumps(edit(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


def remove(file: str) -> Callable[[Path], None]:
    return lambda run: (run / file).unlink()


def without(*names: str) -> Callable[[Path], None]:
    return lambda run: edit_lines(run, lambda line: {k: v for k, v in line.items() if k not in names})


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("metrics.jsonl"), r"metrics\.jsonl is missing"),
        (remove("config.json"), r"config\.json cannot be read \(No such file"),
        (remove("environment.json"), r"environment\.json cannot be read \(No such file"),
        (remove("images/eval_000020.png"), r"eval_000020\.png is missing"),
        (without("eval/reward/total"), "needs a finite eval/reward/total at step 0"),
        (without("eval/judge/accuracy"), "eval/judge/accuracy should be in every evaluation"),
        (without("network_evaluations"), "'network_evaluations' is None, a number is needed"),
        (lambda run: edit_lines(run, lambda line: line | {"seconds": "ten"}), "'seconds' is 'ten', a number"),
        (lambda run: edit_lines(run, lambda line: line | {"seconds": 10**400}), "'seconds' is '1000"),
        (lambda run: edit_lines(run, lambda line: line | {"step": 10**400}), "'step' is '1000"),
        (lambda run: edit_lines(run, lambda line: line | {"eval/x": "1"}), "'eval/x' is '1', a number or null"),
        (lambda run: edit_lines(run, lambda line: line | {"eval/x": True}), "'eval/x' is 'True', a number or null"),
        (lambda run: edit_lines(run, lambda line: line | {"train/skipped_updates": "1"}), "updates' is '1', a number"),
        (lambda run: edit_lines(run, lambda line: line | {"step": line["step"] + 1}), "at step 0 and at a later step"),
        (lambda run: (run / "config.json").write_text("{}"), "has no 'use_reward_gradient'"),
        (lambda run: (run / "config.json").write_text("{"), "is not JSON"),
        (lambda run: (run / "config.json").write_text(100_000 * "["), "JSON nested too deep"),
        (lambda run: (run / "config.json").write_text('{"a": ' + 10_000 * "9" + "}"), "number of too many digits"),
        (lambda run: (run / "config.json").write_bytes(b'{"a": "\xff"}'), "is not UTF-8"),
        (lambda run: (run / "config.json").unlink() or os.mkfifo(run / "config.json"), "is not a regular file"),
        (edit_json("config.json", use_reward_gradient="no"), "has use_reward_gradient = 'no'"),
        (edit_json("config.json", recipe=None), "has recipe = None"),
        (edit_json("environment.json", packages=["torch"]), "'packages' is \"\\['torch'\\]\", which is not what a run"),
        (edit_json("environment.json", earlier_sessions=3), "'earlier_sessions' is '3', which is not what a run"),
    ],
)
def test_a_damaged_folder_is_one_sentence_and_exit_code_2(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    damage(pair[0])
    with pytest.raises(SystemExit) as exit_code:
        main([str(pair[0]), "--out", str(tmp_path / "out")])
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error)
    assert error.count("\n") == 1


def test_runs_that_were_rewarded_or_evaluated_differently_are_not_compared(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", [0.5, 0.6], [0, 10], gradient=False, overrides={"eval.num_steps": 40})
    with pytest.raises(ConfigError, match=r"eval\.num_steps is 10 and 40"):
        load_runs([pair[0], other])
    batch = write_run(tmp_path / "batch", [0.5, 0.6], [0, 10], gradient=False, overrides={"eval.batch_size": 1})
    load_runs([pair[0], batch])  # of no effect on what is measured


def test_the_command_prints_where_the_report_is(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*map(str, pair), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DRTune reached GRPO's")
    assert lines[-1] == f"page: {tmp_path / 'out/page.html'}"
