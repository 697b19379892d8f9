"""fme ls: recipes, keys, rewards and runs."""

from __future__ import annotations

import pytest

from flow_grpo.commands import ls
from flow_grpo.recipes.base import KEYS
from flow_grpo.recipes.registry import NAMES
from tests.commands.lines import fme, refusal
from tests.synthetic_runs import write_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def listed(capsys, *arguments: str) -> str:
    assert fme("ls", *arguments) == 0
    return capsys.readouterr().out


def test_every_recipe_is_listed_with_its_cost_and_first_name(capsys):
    out = listed(capsys, "recipes")
    for name, first in NAMES.items():
        assert f"{name}: " in out
        assert (f"also called {first}\n" in out) == (name != first)
    assert "not counted" not in out
    assert "an epoch, on 4 GPUs: 1,152 images; 23,040 sampling" in out


def test_every_key_is_listed_with_its_default_and_meaning(capsys):
    out = listed(capsys, "keys")
    assert all(key.meaning and key.meaning in out for key in KEYS.values())
    assert all(f"\n{name} " in out for name in KEYS)


def test_a_name_narrows_by_its_beginning_or_as_a_pattern(capsys):
    assert listed(capsys, "keys", "train.beta").splitlines()[1:] == [
        "train.beta  0.0  weight of the KL divergence to the reference model",
        "    takes 0, or a number from 1e-15 to 1e+12",
    ]  # fmt: skip
    assert listed(capsys, "keys", "*.batch_size").count("takes a whole number of at least 1") == 6
    assert listed(capsys, "recipes", "pickscore_sd3").startswith("sd35_grpo: ")


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [("keys", "beta", "train.beta"), ("recipes", "tiny_gpro", "tiny_grpo"), ("rewards", "pikscore", "pickscore")],
)
def test_an_unknown_name_is_told_the_nearest(kind, name, nearest, capsys):
    assert f"did you mean {nearest}" in refusal(capsys, "ls", kind, name)


def test_rewards_say_how_to_train_on_them(capsys):
    lines = {line.split()[0]: line.split() for line in listed(capsys, "rewards").splitlines()}
    assert lines["pickscore"] == [
        "pickscore",
        "yes",
        "reward_model.pickscore=assets/tiny_pickscore",
        "reward_fn.pickscore=1",
    ]
    assert lines["jpeg_compressibility"][1:3] == ["no", "none"]


def rows(capsys, *arguments: str) -> dict[str, str]:
    return {line.split("  ")[0]: line for line in listed(capsys, "runs", *arguments).splitlines()[1:]}


def test_runs_are_listed_with_what_they_have_come_to(capsys, tmp_path):
    write_run(tmp_path / "logs/done", [0.5, 0.6], [0, 10], gradient=True, diversity=True, overrides={"num_epochs": 10})
    write_run(tmp_path / "logs/pair/cut", [0.5, 0.7], [0, 10], gradient=True, overrides={"max_seconds": 9.0})
    write_run(tmp_path / "logs/pair/on", [0.5, 0.8], [0, 10], gradient=True)
    (tmp_path / "logs/none").mkdir()
    found = rows(capsys, str(tmp_path / "logs"))
    assert list(found) == ["done", "pair/cut", "pair/on"]
    assert "finished  " in found["done"]
    assert "10 of 10   0.6000  3.50   " in found["done"]
    assert "cut by the clock" in found["pair/cut"]
    assert "stopped" in found["pair/on"]
    assert "10 of 100  0.8000" in found["pair/on"]
    assert list(rows(capsys, str(tmp_path / "logs/done"))) == ["done"]


def test_a_damaged_run_and_a_foreign_name_spoil_nothing(capsys, tmp_path):
    for name in ("a\x1b[31m\nb", "damaged"):
        write_run(tmp_path / "logs" / name, [0.5, 0.6], [0, 10], gradient=True)
    (tmp_path / "logs/damaged/config.json").write_text("{")
    with (tmp_path / "logs/damaged/metrics.jsonl").open("a") as file:
        file.write("no JSON\n{}\n")
    lines = listed(capsys, "runs", str(tmp_path / "logs")).splitlines()
    assert len(lines) == 3
    assert not any("\x1b" in line for line in lines)
    assert "damaged" in lines[2].split()[1]


def test_a_folder_without_runs_is_said(capsys):
    assert "holds no run" in refusal(capsys, "ls", "runs")


def test_a_table_is_as_wide_as_its_cells():
    assert ls.table([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]
