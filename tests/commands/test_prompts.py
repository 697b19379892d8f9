"""fme prompts, and its first name scripts/train/fetch_prompts.py, on local files."""

import argparse
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from flow_grpo.commands.main import COMMANDS
from flow_grpo.commands.prompts import add_arguments, distinct, divide, main, read_captions, usable, write_lines
from flow_grpo.errors import ConfigError
from flow_grpo.prompts import FETCH_COMMAND, PromptDataset

ROOT = Path(__file__).parents[2]
CAPTIONS = [f"prompt\t{i % 30}  of\nmany " for i in range(90)] + ["", "  ", None]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def write_dataset(folder: Path, suffix: str) -> str:
    path = folder / f"data{suffix}"
    table = pandas.DataFrame({"caption": CAPTIONS, "number": range(len(CAPTIONS))})
    if suffix == ".csv":
        table.to_csv(path, index=False)
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"caption": text}) + "\n" for text in CAPTIONS))
    return str(path)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def fetch(dataset: str, out: Path, *arguments: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    main(parse(["--dataset", dataset, "--out", str(out), *arguments]))
    return PromptDataset.load(str(out / "train.txt")).prompts, PromptDataset.load(str(out / "test.txt")).prompts


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_files_are_distinct_disjoint_and_complete(tmp_path, suffix):
    train, test = fetch(write_dataset(tmp_path, suffix), tmp_path / "out", "--num-test", "8")
    assert (len(train), len(test)) == (22, 8)
    assert set(train) | set(test) == {f"prompt {i} of many" for i in range(30)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.txt", "train.txt"]


def test_the_same_seed_gives_the_same_files_and_another_others(tmp_path):
    data = write_dataset(tmp_path, ".jsonl")
    arguments = ("--num-test", "5", "--num-train", "10")
    first = fetch(data, tmp_path / "a", *arguments)
    assert [len(part) for part in first] == [10, 5]
    assert fetch(data, tmp_path / "b", *arguments) == first
    assert fetch(data, tmp_path / "c", *arguments, "--seed", "1") != first


def test_the_number_of_training_prompts_does_not_change_the_test_prompts():
    prompts = [str(i) for i in range(100)]
    assert divide(prompts, 10, 20, seed=0)[1] == divide(prompts, 0, 20, seed=0)[1]
    assert set(divide(prompts, 0, 20, seed=0)[0]).isdisjoint(divide(prompts, 0, 20, seed=0)[1])


def test_white_space_and_repetitions_are_removed_in_order():
    assert distinct(["b ", " a\n\ta", None, "b", "", " "]) == ["b", "a a"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.txt"
    write_lines(path, ["old"])

    def interrupted():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(path, interrupted())  # type: ignore[arg-type]
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.txt"]


def test_the_files_are_as_readable_as_the_umask_lets_them_be(tmp_path):
    before = os.umask(0o022)
    try:
        write_lines(tmp_path / "p.txt", ["a prompt"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "p.txt").stat().st_mode) == 0o644


def test_captions_that_no_prompt_file_can_hold_are_left_out_and_counted(capsys):
    assert usable(["a cat", "a\0b", "c" * 70_000, "\ud800"]) == ["a cat"]
    assert "left out: 3 captions that no prompt file can hold, the first of which has a null" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*p\.txt cannot be written"):
        write_lines(tmp_path / "file" / "p.txt", ["a"])


MISTAKES = [
    (("--column", "text"), "--column text is not in .*; there are caption"),
    (("--column", "number"), "--column number of .* is not text"),
    (("--num-test", "40"), "need 41 distinct prompts, but the dataset has 30"),
    (("--num-test", "-1"), "take whole numbers"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_refused_and_writes_nothing(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        fetch(write_dataset(tmp_path, ".csv"), tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.csv", b"\xff\xfe"), ("a.parquet", b"PAR1"), ("a.jsonl", b"[" * 9999)]
)
def test_a_damaged_dataset_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--dataset .*{name}.* cannot be read"):
        list(read_captions(str(tmp_path / name), "caption", "train"))


def test_a_missing_file_ends_the_process_with_one_sentence(tmp_path):
    command = ["scripts/train/fetch_prompts.py", "--dataset", str(tmp_path / "no.csv"), "--out", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --dataset {tmp_path / 'no.csv'} does not exist; give a file or a hub id.\n"


def test_the_command_that_missing_prompts_name_is_understood():
    program, command, *arguments = FETCH_COMMAND.split()
    assert program == "fme"
    assert command in COMMANDS
    args = parse(arguments)
    assert (args.dataset, args.column) == ("yuvalkirstain/pickapic_v1_no_images", "caption")
    assert args.out == "assets/prompts/pickscore"
