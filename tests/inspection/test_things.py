"""What a path names is found out by looking."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flow_grpo.errors import ConfigError
from flow_grpo.inspection.things import find_out
from tests.lora_writers import keyed, kohya, random_lora, save, stock_diffusers, stock_peft
from tests.synthetic_runs import write_run


@pytest.fixture
def transformer(random_models):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")


def write_images(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def write_checkpoint(run: Path) -> Path:
    folder = run / "checkpoints" / "checkpoint-000010"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"counters": {"epoch": 10, "seconds": 1.0}, "weights": {}}))
    return folder


def refusal(text: Path | str) -> str:
    with pytest.raises(ConfigError) as error:
        find_out(str(text))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_its_checkpoints_and_a_checkpoint(tmp_path) -> None:
    run = write_run(tmp_path / "mine", [0.5], [0.0], gradient=False)
    checkpoint = write_checkpoint(run)
    found = find_out(str(run))
    assert (found.kind, found.path, found.run, found.name) == ("run", run, run, "mine")
    assert find_out(str(run / "checkpoints")).run == run
    found = find_out(str(checkpoint))
    assert (found.kind, found.path, found.run, found.name) == ("checkpoint", checkpoint, run, "mine-checkpoint-000010")


def test_a_checkpoint_away_from_its_run(tmp_path) -> None:
    checkpoint = write_checkpoint(write_run(tmp_path / "mine", [0.5], [0.0], gradient=False))
    moved = shutil.move(checkpoint, tmp_path / "moved")
    found = find_out(str(moved))
    assert (found.kind, found.run, found.name) == ("checkpoint", None, "moved")


def test_a_checkpoints_lora_belongs_to_the_run(tmp_path, transformer) -> None:
    run = write_run(tmp_path / "mine", [0.5], [0.0], gradient=False)
    folder = write_checkpoint(run) / "lora"
    stock_peft(folder, transformer, random_lora(transformer))
    found = find_out(str(folder))
    assert (found.kind, found.run, found.name) == ("lora", run, "mine-checkpoint-000010-lora")


def test_loras_of_any_trainer(tmp_path, transformer) -> None:
    lora = random_lora(transformer)
    folders = [tmp_path / name for name in ("diffusers", "kohya", "peft")]
    for folder in folders:
        folder.mkdir()
    stock_diffusers(folders[0], lora)
    file = kohya(folders[1], lora)
    stock_peft(folders[2], transformer, lora)
    for thing in (folders[0], folders[0] / "pytorch_lora_weights.safetensors", file, folders[2]):
        assert find_out(str(thing)).kind == "lora"
    assert find_out(str(file)).name == "somebodys"


def test_a_pipeline_with_images_beside_it_is_a_pipeline(tmp_path, random_models) -> None:
    shutil.copytree(random_models / "sd3", tmp_path / "sd3")
    write_images(tmp_path / "sd3")
    assert find_out(str(tmp_path / "sd3")).kind == "pipeline"


def test_an_asset_is_found_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_out("assets/tiny_sd3")
    assert (found.kind, found.text, found.name) == ("pipeline", "assets/tiny_sd3", "tiny_sd3")
    assert found.path is not None
    assert found.path.is_absolute()


def test_a_hub_id_is_a_pipeline(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_out("stabilityai/stable-diffusion-3.5-medium")
    assert (found.kind, found.path, found.place) == ("pipeline", None, "stabilityai/stable-diffusion-3.5-medium")


def test_images_and_folders_of_images(tmp_path) -> None:
    assert find_out(str(write_images(tmp_path / "flat"))).kind == "images"
    write_images(tmp_path / "deep" / "a bag")
    assert find_out(str(tmp_path / "deep")).kind == "images"


def test_images_are_known_by_content_not_by_name(tmp_path) -> None:
    folder = write_images(tmp_path / "odd", 1)
    (folder / "0.png").rename(folder / "picture")
    assert find_out(str(folder)).kind == "images"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "0.png").write_text("no image")
    assert "holds nothing that can be looked at" in refusal(tmp_path / "none")


def test_a_clip_is_no_run_though_it_has_a_config(random_models) -> None:
    said = refusal(random_models / "clip")
    for name in ("environment.json", "state.json", "model_index.json", "adapter_config.json", "images"):
        assert name in said


@pytest.mark.parametrize("text", ["", "no/such/folder", "nothing", "assets/nothing", "a\0b", "x" * 5000])
def test_what_does_not_exist(text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal(text)


def test_one_image_is_told_from_other_files(tmp_path) -> None:
    folder = write_images(tmp_path / "flat")
    assert "is one image" in refusal(folder / "0.png")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file, and no LoRA's" in refusal(tmp_path / "notes.txt")


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "lora.safetensors")
    assert "not a regular file" in refusal(tmp_path / "lora.safetensors")


def test_a_pickled_lora_is_refused(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in refusal(tmp_path)


def test_a_peft_folder_without_weights_is_refused(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no adapter_model.safetensors" in refusal(tmp_path)


def test_a_folder_with_one_lora_of_another_name_is_one(tmp_path, transformer) -> None:
    path = save(tmp_path, keyed(random_lora(transformer), lambda name, matrix: f"transformer.{name}.{matrix}.weight"))
    assert find_out(str(tmp_path)).path == path


def test_torch_is_not_imported_for_it(tmp_path) -> None:
    code = "import sys; import flow_grpo.commands.check, flow_grpo.commands.sample; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "False"
