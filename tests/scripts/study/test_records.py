"""What the study reads of run folders, and how it refuses what it cannot read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flow_grpo.errors import ConfigError
from scripts.study.records import load_runs
from scripts.study.report import main
from tests.synthetic_runs import write_run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Rewards by hand: DRTune 0.5, 0.6, 0.9 at 0, 10, 20 s; GRPO 0.5, 0.65, 0.75 at 0, 50, 100 s."""
    drtune = write_run(tmp_path / "drtune", [0.5, 0.6, 0.9], [0, 10, 20], gradient=True, forwards_per_second=100)
    grpo = write_run(tmp_path / "grpo", [0.5, 0.65, 0.75], [0, 50, 100], gradient=False, forwards_per_second=200)
    return drtune, grpo


def test_runs_of_one_method_are_told_apart_by_their_folders(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_run(tmp_path / "grpo_again", [0.5, 0.7], [0, 100], gradient=False)
    assert [run.label for run in load_runs([*pair, third])] == ["DRTune", "GRPO grpo", "GRPO grpo_again"]


def test_runs_of_the_same_name_are_told_apart_by_their_parents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / parent / "tb", [0.5, 0.7], [0, 100], gradient=False) for parent in ("a", "b"))
    assert [run.label for run in load_runs([pair[0], one, two])] == ["DRTune", "GRPO a/tb", "GRPO b/tb"]


def test_evaluations_that_are_not_finite_and_skipped_updates_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.5, None, 0.6], [0, 10, 20], gradient=True)
    edit_lines(run, lambda line: line | ({"train/skipped_updates": 0.5} if "train/skipped_updates" in line else {}))
    found = load_runs([run])[0]
    assert (found.dropped, found.skipped_epochs, len(found.evaluations)) == (1, 3, 2)


def test_a_folder_given_twice_is_refused(pair: tuple[Path, Path]) -> None:
    (pair[0].parent / "link").symlink_to(pair[0])
    with pytest.raises(ConfigError, match="was given twice"):
        load_runs([pair[0], pair[0].parent / "link"])


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
def test_a_damaged_folder_is_one_sentence(
    pair: tuple[Path, Path], damage: Callable[[Path], None], sentence: str
) -> None:
    damage(pair[0])
    with pytest.raises(ConfigError) as error:
        load_runs(pair[:1])
    assert re.search(sentence, str(error.value))
    assert "\n" not in str(error.value)


def test_runs_that_were_rewarded_or_evaluated_differently_are_not_compared(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", [0.5, 0.6], [0, 10], gradient=False, overrides={"eval.num_steps": 40})
    with pytest.raises(ConfigError, match=r"eval\.num_steps is 10 and 40"):
        load_runs([pair[0], other])
    batch = write_run(tmp_path / "batch", [0.5, 0.6], [0, 10], gradient=False, overrides={"eval.batch_size": 1})
    load_runs([pair[0], batch])  # of no effect on what is measured


def test_the_report_is_the_page(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*map(str, pair), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"page: {tmp_path / 'out/page.html'}\n"
    assert "</html>" in (tmp_path / "out/page.html").read_text(encoding="utf-8")
