"""What damage and a kill leave of checkpoints and records, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flow_grpo.errors import ConfigError
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.runs.history import read_history
from flow_grpo.runs.saved import checkpoint_damage, drop, find_checkpoint, finished_checkpoints
from flow_grpo.training import checkpoint
from tests.conftest import make_parts, small_config
from tests.saved_runs import edit_state, edit_tensors, make_old
from tests.training.saving import checkpoints, names, save, train, weights

# --- damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(random_models, tmp_path_factory):
    """The folder of a run of two epochs, a checkpoint each, that has ended."""
    config = small_config(random_models, tmp_path_factory.mktemp("ended"))
    config.save_freq = 1
    parts = train(config, lambda config: make_parts(config, []), grpo)
    parts.run.finish()
    return parts.run.folder


@pytest.fixture
def two_saved(ended, config):
    """A copy of it, and the configuration that goes on with it."""
    folder = Path(config.logdir) / "run"
    shutil.copytree(ended, folder)
    config.resume_from, config.num_epochs, config.save_freq = str(folder), 3, 1
    return SimpleNamespace(run=SimpleNamespace(folder=folder))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


FILES = ["state.json", "training_state.safetensors", "manifest.json", "lora/adapter_model.safetensors",
         "lora/adapter_config.json", "lora_ema/pytorch_lora_weights.safetensors"]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_set_aside_and_the_one_before_it_taken(
    two_saved, config, build, capsys, file, harm
):
    newest = checkpoints(two_saved) / "checkpoint-000002"
    path = newest / file
    size = path.stat().st_size
    if harm == "flip":
        flip(path, size // 2)
    elif harm == "delete":
        path.unlink()
    else:
        os.truncate(path, size // 2 if harm == "truncate" else 0)
    again = build(config)
    assert again.run.checkpoint == checkpoints(two_saved) / "checkpoint-000001"
    said = capsys.readouterr().err
    assert f"the checkpoint {newest} is damaged (" in said
    assert f"moved to {checkpoints(two_saved) / 'damaged' / newest.name}" in said
    assert names(again) == ["checkpoint-000001", "damaged"]


def test_without_the_digests_a_flipped_bit_goes_unnoticed(two_saved, config, build):
    """The broken twin: sizes alone."""
    newest = checkpoints(two_saved) / "checkpoint-000002"
    flip(newest / "training_state.safetensors", -2)
    assert checkpoint_damage(newest, deep=False) is None
    assert checkpoint_damage(newest, deep=True) == "the content of training_state.safetensors has changed"


def test_a_run_whose_checkpoints_are_all_damaged_is_one_sentence(two_saved, config, build):
    for folder in checkpoints(two_saved).iterdir():
        (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"only damaged checkpoints .the newest, .*checkpoint-000002: .*not JSON"):
        build(config)


def test_a_damaged_checkpoint_that_is_named_itself_is_refused(two_saved, config, build):
    newest = checkpoints(two_saved) / "checkpoint-000002"
    (newest / "state.json").write_text("[" * 100_000)
    config.resume_from = str(newest)
    with pytest.raises(ConfigError, match=r"checkpoint-000002' is damaged: .*state.json is JSON nested too deep"):
        build(config)


@pytest.mark.parametrize("counters", [{"epoch": "2"}, {"epoch": True}, {"epoch": -1}, {"epoch": 10**400}, [], None])
def test_counters_that_are_no_numbers_are_damage(two_saved, config, build, capsys, counters):
    newest = checkpoints(two_saved) / "checkpoint-000002"
    edit_state(newest, counters={"epoch": 2, "seconds": 1.0} | counters if isinstance(counters, dict) else counters)
    assert build(config).run.checkpoint.name == "checkpoint-000001"
    assert "is damaged" in capsys.readouterr().err


def test_a_tensor_of_another_shape_is_refused_and_not_broadcast(two_saved, config, build):
    newest = checkpoints(two_saved) / "checkpoint-000002"
    edit_tensors(newest, lambda name, value: value[:1].clone() if name.startswith("weights.") else value)
    parts = build(config)
    before = weights(parts)
    with pytest.raises(ConfigError, match=r"checkpoint-000002: weights\..* has the shape \(1, .*where the model has"):
        checkpoint.resume(parts.policy, parts.run, parts.settings)
    assert all(torch.equal(a, b) for a, b in zip(weights(parts), before, strict=True))


def test_other_base_weights_under_the_same_name_are_refused(two_saved, config, build, random_models, tmp_path):
    shutil.copytree(random_models / "sd3", tmp_path / "other" / "sd3")
    flip(tmp_path / "other" / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors", -3)
    config.pretrained.model = str(tmp_path / "other" / "sd3")
    with pytest.raises(ConfigError, match=r"pretrained.model = .* holds other weights .* than those that .*000002"):
        build(config)


def test_the_same_base_weights_in_a_folder_that_has_moved_are_taken(two_saved, config, build, random_models, tmp_path):
    shutil.copytree(random_models / "sd3", tmp_path / "other" / "sd3")
    config.pretrained.model = str(tmp_path / "other" / "sd3")
    assert build(config).run.checkpoint.name == "checkpoint-000002"


def test_a_checkpoint_of_before_the_manifest_goes_on_exactly_with_a_word(config, build, capsys):
    config.save_freq, config.run_name, config.num_epochs = 1, "unbroken", 3
    unbroken = train(config, build, grpo)
    config.run_name, config.num_epochs = "old", 2
    old = train(config, build, grpo)
    for folder in checkpoints(old).iterdir():
        make_old(folder, list(old.policy.named_trainable))
    config.resume_from, config.num_epochs = str(old.run.folder), 3
    again = train(config, build, grpo)
    assert "checkpoint-000002 is of before checkpoints had a manifest" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(unbroken), strict=True))
    assert again.run.counters.groups == unbroken.run.counters.groups


def test_a_damaged_older_checkpoint_never_stops_a_save(two_saved, config, build, capsys):
    (checkpoints(two_saved) / "checkpoint-000001" / "state.json").write_bytes(b"\xff")
    config.num_checkpoint_limit = 1
    again = train(config, build, grpo)
    assert names(again) == ["checkpoint-000001", "checkpoint-000003"]
    assert "checkpoint-000001 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_a_damaged_record_is_told_kept_and_written_anew(two_saved, config, build, capsys, name):
    folder = two_saved.run.folder
    run_id = json.loads((folder / "environment.json").read_text())["run_id"]
    (folder / name).write_bytes(b'{"torn')
    build(config)
    said = capsys.readouterr().err
    assert f"{folder / name} is not JSON" in said
    assert f"the old one is now {folder / name}.damaged" in said
    assert json.loads((folder / "environment.json").read_text())["run_id"] == run_id
    assert json.loads((folder / "config.json").read_text())["num_epochs"] == 3


def test_a_damaged_history_is_told_kept_and_what_can_be_read_goes_on(two_saved, config, build, capsys):
    path = two_saved.run.folder / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\xff" + first + second)
    again = train(config, build, grpo)
    assert [line["step"] for line in read_history(path)] == [2, 3]
    said = capsys.readouterr().err
    assert f"{path} is not what it was when the checkpoint was saved" in said
    assert "has 1 damaged lines" in said
    assert (again.run.folder / "metrics.jsonl.damaged").read_bytes() == b"\xff" + first + second


def test_a_manifest_that_lost_an_entry_is_damaged(two_saved, config, build):
    newest = checkpoints(two_saved) / "checkpoint-000002"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"]["training_state.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_damage(newest, deep=True) == "its manifest.json does not list training_state.safetensors"


def test_a_file_in_the_place_of_a_partial_checkpoint_does_not_stop_a_save(config, build):
    parts = build(config)
    checkpoints(parts).mkdir()
    (checkpoints(parts) / ".partial-checkpoint-000001").write_text("")
    assert save(parts, 1)


def test_later_checkpoints_that_cannot_be_set_aside_are_one_sentence(two_saved, config, build):
    (checkpoints(two_saved) / "abandoned").write_text("")
    config.resume_from = str(checkpoints(two_saved) / "checkpoint-000001")
    with pytest.raises(ConfigError, match=r"checkpoint-000002 cannot be moved to .*abandoned"):
        train(config, build, grpo)


def test_a_number_changed_in_the_history_is_noticed(two_saved, config, build, capsys):
    path = two_saved.run.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"images": 8', '"images": 9'))
    train(config, build, grpo)
    assert "is not what it was when the checkpoint was saved" in capsys.readouterr().err


# --- what a kill leaves ---------------------------------------------------------------------------------


def test_what_a_kill_left_of_writing_is_tidied_and_what_it_was_about_to_replace_comes_back(two_saved, config, build):
    folder = checkpoints(two_saved)
    (folder / "checkpoint-000002").rename(folder / ".stale-checkpoint-000002")
    for name in (".partial-checkpoint-000002", ".dropped-checkpoint-000000"):
        (folder / name / "lora").mkdir(parents=True)
    (two_saved.run.folder / "images").mkdir()
    torn = [two_saved.run.folder / name for name in ("config.json.tmp", "images/eval_000001.png.tmp")]
    for path in torn:
        path.write_text("")
    assert build(config).run.checkpoint == folder / "checkpoint-000002"
    assert not any(path.exists() for path in torn)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]


def test_a_checkpoint_is_dropped_under_another_name(config, build, monkeypatch):
    """A kill halfway through deleting leaves nothing that looks like a checkpoint."""
    parts = build(config)
    save(parts, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed at once
    drop(checkpoints(parts) / "checkpoint-000001")
    assert finished_checkpoints(checkpoints(parts)) == {}


def test_the_state_says_what_was_spent(config, build):
    config.save_freq = 1
    parts = train(config, build, grpo)
    state = json.loads((find_checkpoint(str(parts.run.folder)) / "state.json").read_text())
    assert state["counters"]["epoch"] == 2
    assert state["counters"]["images"] == 16
    assert state["counters"]["network_evaluations"] == 2 * 8 * 4 * 2  # 8 images, 4 steps, sampled and trained


def test_a_history_that_is_missing_is_told(two_saved, config, build, capsys):
    (two_saved.run.folder / "metrics.jsonl").unlink()
    again = train(config, build, grpo)
    assert [line["step"] for line in read_history(again.run.folder / "metrics.jsonl")] == [3]
    assert "metrics.jsonl is missing: the history of the epochs so far is lost" in capsys.readouterr().err
