"""`fme sample`: images of a prompt."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

from flow_grpo.commands import check
from flow_grpo.commands.main import main
from flow_grpo.evaluators.base import SampleRequest
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.launcher import Launched
from flow_grpo.prompts import PromptDataset
from flow_grpo.training.checkpoint import Saver
from tests.lora_writers import kohya, random_lora


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def sample(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> list[np.ndarray]:
    """The images at the paths that are printed."""
    assert main(["sample", *map(str, arguments)]) == 0
    return [np.asarray(Image.open(path)) for path in capsys.readouterr().out.splitlines()]


def test_a_runs_images_are_those_of_its_own_settings(config, build, capsys) -> None:
    parts = build(config)
    Saver(parts.policy, parts.run, parts.settings).save(None)
    prompts = PromptDataset(("a bag",), ({},))
    expected = draw_samples(parts.policy, prompts, parts.settings, parts.run, [SampleRequest(("a bag",), 2)]).images
    found = sample(parts.run.folder, "a bag", "-n", "2", capsys=capsys)
    assert [image.shape for image in found] == [(32, 32, 3)] * 2
    for image, reference in zip(found, expected, strict=True):
        assert np.abs(image.astype(float) - 255 * reference.permute(1, 2, 0).numpy()).max() <= 1


def test_a_negative_prompt_is_the_runs_or_the_one_that_is_given(config, build, random_models, capsys) -> None:
    config.eval.guidance_scale, config.negative_prompt = 3.0, "a sandal"
    parts = build(config)
    Saver(parts.policy, parts.run, parts.settings).save(None)
    few = ("a bag", "-n", "1")
    (own,) = sample(parts.run.folder, *few, capsys=capsys)
    (given,) = sample(parts.run.folder, *few, "--negative", "a boot", capsys=capsys)
    pipeline = (random_models / "sd3", *few, "--steps", "4", "--guidance", "3")
    for negative, expected in (("a sandal", own), ("a boot", given)):
        assert np.array_equal(sample(*pipeline, "--negative", negative, capsys=capsys)[0], expected)
    assert not np.array_equal(own, given)
    sample(parts.run.folder, *few, "--guidance", "1", capsys=capsys)  # where the run's has no effect


def test_a_prompt_of_the_runs_files_has_the_negative_prompt_of_its_line(config, build, tmp_path, capsys) -> None:
    config.eval.guidance_scale, config.negative_prompt = 3.0, "a sandal"
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "a bag", "negative_prompt": "a boot"}')
    config.prompts.train = str(path)
    parts = build(config)
    Saver(parts.policy, parts.run, parts.settings).save(None)
    few = (parts.run.folder, "a bag", "-n", "1")
    (own,), (given,) = sample(*few, capsys=capsys), sample(*few, "--negative", "a boot", capsys=capsys)
    assert np.array_equal(own, given)
    path.unlink()
    assert main(["sample", *map(str, few)]) == 0
    said = capsys.readouterr()
    assert "lines.jsonl', config.prompts.train of the run, is not here" in said.err
    assert not np.array_equal(np.asarray(Image.open(said.out.splitlines()[0])), own)


def test_a_negative_prompt_without_guidance_is_one_sentence(random_models, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(random_models / "sd3"), "a bag", "--negative", "a boot"])
    said = capsys.readouterr().err
    assert said.startswith("error: --negative 'a boot' is what guidance leads away from, and there is none; --guidance")


def test_a_lora_changes_the_pipelines_images(random_models, tmp_path, capsys) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    lora, model = kohya(tmp_path, random_lora(transformer)), random_models / "sd3"
    (plain,) = sample(model, "a bag", "-n", "1", "--steps", "2", capsys=capsys)
    (changed,) = sample(lora, "a bag", "-n", "1", "--steps", "2", "--base", model, capsys=capsys)
    (same,) = sample(model, "a bag", "-n", "1", "--steps", "2", "--lora", lora, capsys=capsys)
    assert not np.array_equal(plain, changed)
    assert np.array_equal(changed, same)


def test_a_loras_velocity_is_blended_with_the_pipelines(random_models, tmp_path, capsys) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    lora, model = kohya(tmp_path, random_lora(transformer)), random_models / "sd3"
    few = ("a bag", "-n", "1", "--steps", "2")
    (plain,) = sample(model, *few, capsys=capsys)
    shares = {
        share: sample(lora, *few, "--base", model, "--tuned-share", share, capsys=capsys)[0]
        for share in ("0", "0.5", "1", "1,0")
    }
    (whole,) = sample(lora, *few, "--base", model, capsys=capsys)
    assert np.array_equal(shares["0"], plain)
    assert np.array_equal(shares["1"], whole)
    assert len({image.tobytes() for image in shares.values()}) == 4


def test_a_fully_tuned_run_is_blended_with_its_base(config, build, random_models, capsys) -> None:
    config.use_lora = False
    parts = build(config)
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter += 0.05
    Saver(parts.policy, parts.run, parts.settings).save(None)
    few = ("a bag", "-n", "1")
    none, half, whole = (
        sample(parts.run.folder, *few, "--tuned-share", share, capsys=capsys)[0] for share in ("0", "0.5", "1")
    )
    (plain,) = sample(random_models / "sd3", *few, "--steps", "4", capsys=capsys)
    assert np.array_equal(none, plain)
    assert not np.array_equal(half, none)
    assert not np.array_equal(half, whole)


@pytest.mark.parametrize("share", ["2", "x", "1,2,3", "nan"])
def test_a_share_that_is_none_is_one_sentence(random_models, capsys, share) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(random_models / "sd3"), "a bag", "--tuned-share", share])
    assert stopped.value.code == 2
    assert "takes one or two numbers from 0 to 1" in capsys.readouterr().err


def test_a_seed_is_other_noise_and_nothing_is_overwritten(random_models, capsys) -> None:
    model, few = random_models / "sd3", ("a bag", "-n", "1", "--steps", "2")
    first = sample(model, *few, capsys=capsys)
    again = sample(model, *few, capsys=capsys)
    other = sample(model, *few, "--seed", "1", capsys=capsys)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert sorted(path.name for path in Path("logs/sample").iterdir()) == ["sd3", "sd3-2", "sd3-3"]


@pytest.mark.parametrize("prompt", ["", "  ", "a\0b"])
def test_a_prompt_that_is_none_is_one_sentence(random_models, capsys, prompt) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(random_models / "sd3"), prompt])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the prompt ") or "the argument number 2 is empty" in said
    assert not Path("logs").exists()


def test_images_do_not_draw(tmp_path, capsys) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "work" / "a.png")
    with pytest.raises(SystemExit):
        main(["sample", ".", "a bag"])
    assert "holds images" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("sample", "assets/tiny_sd3", "a bag"), ("check", "assets/tiny_sd3")])
def test_several_processes_are_refused(command, monkeypatch, capsys) -> None:
    """Each would write results of its own."""
    monkeypatch.setattr(check, "read_launcher", lambda: Launched(2, 2, True))
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "is one process; start it without a launcher" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(random_models, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(random_models / "sd3"), "a bag", "-n", "1", "--steps", "1"])
    assert stopped.value.code == 2
    assert "error: logs/sample/sd3 cannot be read or written (No space left on device)." in capsys.readouterr().err
    assert not Path("logs/sample/sd3").exists()
