"""The plans, the damage and the counts of the fault benchmark."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from random import Random

import pytest

from scripts.bench import faults, faults_damage
from scripts.bench.faults_processes import OTHER, SAVING, Calls, Result, Session, free_port
from scripts.bench.faults_runs import Reference, litter, other_metrics
from scripts.bench.faults_stops import children_of, is_alive, moment


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("part", faults.PARTS)
def test_a_plan_depends_on_the_seed_alone(part, quick):
    plan = faults.PARTS[part].plan
    assert plan(Random("1"), quick) == plan(Random("1"), quick)
    assert plan(Random("1"), quick) != plan(Random("2"), quick)


@pytest.mark.parametrize("quick", [True, False])
def test_half_of_more_than_a_hundred_kills_come_while_a_checkpoint_is_written(quick):
    kills = faults.PARTS["kills"].plan(Random("kills 0"), quick)
    blows = [blow for kill in kills for blow in kill.blows if blow.where != "stopped"]
    assert len(blows) >= 128
    assert sum(blow.where == "saving" for blow in blows) == len(blows) / 2
    assert {(kill.kind.loop, kill.kind.processes) for kill in kills} == {
        (loop, n) for loop in ("grpo", "drtune") for n in (1, 2)
    }


def test_two_hundred_damages_take_every_way_in_both_kinds_of_training():
    plan = faults.PARTS["damage"].plan(Random("damage 0"), False)
    assert len(plan) == 200
    ways = {(damage.kind.lora, damage.way) for damage in plan}
    assert ways == {(lora, way) for lora in (True, False) for way in faults_damage.WAYS}


@pytest.mark.parametrize("way", faults_damage.WAYS)
@pytest.mark.parametrize("content", [b"", b"x", bytes(range(1, 200))])
def test_damage_changes_a_file_always(tmp_path, way, content):
    for seed in range(20):
        file = tmp_path / f"{way}-{seed}"
        file.write_bytes(content)
        faults_damage.spoil(file, way, Random(seed))
        assert not file.exists() or file.read_bytes() != content
        assert file.exists() == (way != "delete")


def test_a_flip_changes_one_bit(tmp_path):
    file, content = tmp_path / "file", os.urandom(100)
    file.write_bytes(content)
    faults_damage.spoil(file, "flip", Random(0))
    changed = int.from_bytes(file.read_bytes(), "big") ^ int.from_bytes(content, "big")
    assert changed.bit_count() == 1


def test_the_newest_checkpoints_files_are_kinds_of_their_own(tmp_path):
    for epoch in (1, 2):
        folder = tmp_path / "checkpoints" / f"checkpoint-{epoch:06d}"
        (folder / "lora").mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        (folder / "lora" / "adapter_config.json").write_text("{}")
    for name in (
        "config.json",
        "images/a.png",
        "images/b.png",
        "diversity/bandwidth.json",
        "diversity/eval_000000.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    kinds = faults_damage.files_by_kind(tmp_path)
    assert {name: len(files) for name, files in kinds.items()} == {
        "config.json": 1, "images/*": 2, "diversity/bandwidth.json": 1, "diversity/*": 1, "newest/state.json": 1,
        "older/state.json": 1, "newest/lora/adapter_config.json": 1, "older/lora/adapter_config.json": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "said", "counted"), [(2, "error: one.\n", 0), (2, "", 1), (2, "error: a\nerror: b\n", 1), (1, "", 1)]
)
def test_a_refusal_is_one_sentence_and_exit_code_2(tmp_path, code, said, counted):
    result = Result("damage", 0, "")
    faults_damage.judge(code, "config.json", "config.json", tmp_path, tmp_path, said, result)
    assert result.faults == [OTHER] * counted


def test_counts_are_of_trials_and_reach_the_table_and_the_exit_code(tmp_path, capsys):
    good, bad = Result("kills", 0, "plan", Counter(a=3)), Result("kills", 1, "plan", Counter(b=2))
    bad.add("lost", "gone")
    bad.add("lost", "gone again")
    args = faults.parse(["--out", str(tmp_path), "--quick"])
    assert faults.write({"races": [good]}, args) == 0
    assert faults.write({"kills": [good, bad]}, args) == 1
    table = capsys.readouterr().out
    assert "| kills | 2 | 5 SIGKILLs: 3 a, 2 b | 1 | 0 |" in table
    assert table.index("| kills |", table.rindex("| part |")) < table.rindex("| races |")  # kept from before
    parts = json.loads((tmp_path / "faults.json").read_text())["parts"]
    kills = {name: parts["kills"][name] for name in ("trials", "done", *faults.FAULTS)}
    assert kills == {"trials": 2, "done": {"a": 3, "b": 2}} | dict.fromkeys(faults.FAULTS, 0) | {"lost": 1}
    assert [failed["number"] for failed in parts["kills"]["failed"]] == [1]


def test_an_unknown_part_is_one_sentence(capsys):
    assert faults.main(["--only", "kills,kisses"]) == 2
    assert "'kisses' is no part" in capsys.readouterr().err


def test_a_forked_process_says_what_it_says_and_ends_with_its_code(tmp_path):
    result = Result("races", 0, "")
    codes = Session(["--config.nothing=1"], tmp_path / "log").ends(result)
    assert codes == [2]
    assert result.log.startswith("error: --config is missing")
    assert not result.faults


def test_a_traceback_is_counted(tmp_path):
    def broken() -> None:
        raise RuntimeError("broken")

    result = Result("races", 0, "")
    assert Session([], tmp_path / "log", before=broken).ends(result) == [1]
    assert result.faults == ["tracebacks"]


def test_a_call_on_the_file_system_can_be_the_last(tmp_path):
    class Writer:
        def write(self) -> None:
            for name in "abc":
                (tmp_path / name).write_text(name)

    def before() -> None:
        Calls(((Writer, "write"),), lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 3 else None)
        (tmp_path / "outside").write_text("")
        Writer().write()

    assert Session([], tmp_path / "log", before=before).ends(Result("kills", 0, "")) == [-signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "log", "outside"]


def test_litter_moments_ports_and_processes(tmp_path):
    (tmp_path / "checkpoints" / ".partial-checkpoint-000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl.tmp").write_text("")
    assert litter(tmp_path) == ["checkpoints/.partial-checkpoint-000001", "metrics.jsonl.tmp"]
    reference = Reference(tmp_path, 2.0, 30)
    assert moment(0.5, reference, -1) == pytest.approx(1.0)
    assert moment(0.5, reference, 4) == pytest.approx(0.3)
    assert free_port() > 1024
    child = os.fork()
    if child == 0:
        signal.pause()
    assert child in children_of(os.getpid())
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_alive(child)


def test_the_scope_of_saving_is_there_to_be_counted():
    assert all(callable(getattr(owner, name)) for owner, name in SAVING)


def test_a_word_is_about_the_file_that_it_names():
    assert faults_damage.is_told("the checkpoint x/checkpoint-000003 is damaged (state.json is missing)", "000003")
    assert not faults_damage.is_told("config.json is damaged\ngoing on from metrics.jsonl", "metrics.jsonl")


def test_metrics_that_were_logged_twice_are_named(tmp_path):
    lines = [{"step": 1, "seconds": 1.0}, {"step": 1, "eval/x": 2.0}, {"step": 2, "seconds": 2.0}]
    for name, kept in (("once", lines), ("twice", [*lines[:2], *lines[1:]]), ("further", [*lines, {"step": 3}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    once = tmp_path / "once"
    assert other_metrics(once, once) == []
    assert other_metrics(tmp_path / "twice", once) == ["other metrics: 1 1e 1e 2 instead of 1 1e 2"]
    assert other_metrics(tmp_path / "further", once, prefix=True) == []
    assert other_metrics(tmp_path / "further", once)
