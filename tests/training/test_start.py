"""A run that starts from a LoRA: what its base is, what it exports, and what it goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from flow_grpo.commands.main import main
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.inspection.looking import Options, look_at
from flow_grpo.inspection.things import find_out
from flow_grpo.randomness import keyed_generator
from flow_grpo.runs.saved import find_checkpoint
from flow_grpo.settings import resolve
from tests.lora_writers import Layer, keyed, kohya, random_lora, save, stock_diffusers
from tests.saved_runs import edit_state, read_state
from tests.training.saving import train, weights

PROMPTS = ["a bag", "a red coat"]


@pytest.fixture
def lora(random_models: Path, tmp_path: Path) -> Path:
    """By diffusers' own writer."""
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    (tmp_path / "first").mkdir()
    return stock_diffusers(tmp_path / "first", random_lora(transformer))


@pytest.fixture
def start(config, lora):
    """A configuration of such a run, of two epochs and a checkpoint of each."""
    config.pretrained.lora, config.save_freq = str(lora), 1
    config.use_reward_gradient, config.train.learning_rate = True, 2e-2
    return config


def noise(policy) -> torch.Tensor:
    return policy.noise(generators())


def generators() -> list[torch.Generator]:
    return [keyed_generator(0, "test", i) for i in range(len(PROMPTS))]


@torch.no_grad()
def ours(policy) -> torch.Tensor:
    return policy.decode(policy.sample_ode(PROMPTS, generators()).final_latents)


def theirs(policy, model: Path, *loras: Path) -> torch.Tensor:
    """Of the stock pipeline, with LoRAs of weight 1 each."""
    stock = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    for number, path in enumerate(loras):
        stock.load_lora_weights(path, adapter_name=f"n{number}")
    if loras:
        stock.set_adapters([f"n{number}" for number in range(len(loras))])
    return stock(
        PROMPTS, latents=noise(policy), num_inference_steps=4, guidance_scale=1.0, height=32, width=32,
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("use_lora", [True, False])
def test_the_base_of_a_run_that_starts_from_a_lora_has_it(start, build, random_models, lora, use_lora):
    start.use_lora, start.train.beta = use_lora, 0.1
    policy = build(start).policy
    assert differ(ours(policy), theirs(policy, random_models / "sd3", lora)) < 1e-4
    assert differ(ours(policy), theirs(policy, random_models / "sd3")) > 1e-2
    embeds, x = policy.encode(PROMPTS), noise(policy)
    before = policy.velocity(embeds, 1.0)(x, 0.5).detach()
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.05
    torch.testing.assert_close(policy.reference_velocity(embeds, 1.0)(x, 0.5), before, rtol=1e-5, atol=1e-5)
    assert differ(policy.velocity(embeds, 1.0)(x, 0.5), before) > 1e-2


def test_what_is_exported_goes_on_top_of_the_lora_it_started_from(start, build, random_models, lora):
    policy = (parts := train(start, build)).policy
    new = find_checkpoint(str(parts.run.folder)) / "lora"
    assert differ(ours(policy), theirs(policy, random_models / "sd3", lora, new)) < 1e-4
    for wrong in ((lora,), (new,)):
        assert differ(ours(policy), theirs(policy, random_models / "sd3", *wrong)) > 1e-3


def test_a_resumed_run_is_the_unbroken_one(start, build):
    start.num_epochs, start.run_name = 3, "unbroken"
    unbroken = train(start, build)
    start.num_epochs, start.run_name = 2, "broken"
    broken = train(start, build)
    start.num_epochs, start.resume_from = 3, str(broken.run.folder)
    assert all(torch.equal(a, b) for a, b in zip(weights(train(start, build)), weights(unbroken), strict=True))


def test_a_run_does_not_go_on_from_another_lora_or_from_none(start, build, lora, random_models, tmp_path):
    start.resume_from = str(train(start, build).run.folder)
    start.num_epochs = 3
    for other in ("", str(shutil.copytree(lora, tmp_path / "second"))):
        start.pretrained.lora = other
        with pytest.raises(ConfigError, match=r"pretrained\.lora = .* was made with 'first'; resume with the same"):
            build(start)
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    (tmp_path / "elsewhere" / "first").mkdir(parents=True)
    start.pretrained.lora = str(stock_diffusers(tmp_path / "elsewhere" / "first", random_lora(transformer, alpha=7.0)))
    with pytest.raises(ConfigError, match=r"with config\.pretrained\.lora = .* holds other weights"):
        build(start)
    start.pretrained.lora = str(shutil.copytree(lora, tmp_path / "moved" / "first"))
    assert build(start).run.checkpoint is not None


def test_a_run_of_before_there_was_the_key_goes_on(config, build):
    config.save_freq = 1
    folder = train(config, build).run.folder
    newest = find_checkpoint(str(folder))
    kept = {k: v for k, v in read_state(newest)["weights"].items() if k not in ("pretrained.lora", "pretrained.skip")}
    edit_state(newest, weights=kept)
    config.resume_from, config.num_epochs = str(folder), 3
    assert build(config).run.checkpoint == newest


def test_how_much_of_the_lora_was_merged_is_told(start, build, capsys):
    build(start)
    assert "pretrained.lora, first: 7 of 7 layers loaded" in capsys.readouterr().err


def test_another_models_lora_is_refused_before_anything_loads(config, tmp_path):
    wrong = {"transformer_blocks.0.attn.to_q": Layer(torch.zeros(4, 1536), torch.zeros(1536, 4), 4.0)}
    config.pretrained.lora = str(
        save(tmp_path, keyed(wrong, lambda name, matrix: f"transformer.{name}.{matrix}.weight"))
    )
    with pytest.raises(ConfigError, match=r"^config\.pretrained\.lora: .*the LoRA of another model"):
        resolve(config, 1, False)


def test_a_runs_samples_and_its_base_have_the_lora(start, build, capsys, tmp_path, monkeypatch):
    parts = train(start, build)
    images = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run).images
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["sample", str(parts.run.folder), "a bag", "-n", "2"]) == 0
    for path, expected in zip(capsys.readouterr().out.splitlines(), images[:2], strict=True):
        found = np.asarray(Image.open(path)).astype(float)
        assert np.abs(found - 255 * expected.permute(1, 2, 0).numpy()).max() <= 1
    checkpoint = find_checkpoint(str(parts.run.folder))
    for thing in (parts.run.folder, checkpoint, checkpoint / "lora"):
        base, tuned = look_at(find_out(str(thing)), None, Options()).models
        assert base.merged == tuned.merged == start.pretrained.lora
        assert (base.loras, len(tuned.loras)) == ((), 1)


def test_a_kohya_file_will_do(config, build, random_models, tmp_path):
    transformer = SD3Transformer2DModel.from_pretrained(random_models / "sd3" / "transformer")
    config.pretrained.lora = str(path := kohya(tmp_path, random_lora(transformer)))
    policy = build(config).policy
    (tmp_path / "same").mkdir()
    same = stock_diffusers(tmp_path / "same", random_lora(transformer))
    assert path.suffix == ".safetensors"
    assert differ(ours(policy), theirs(policy, random_models / "sd3", same)) < 1e-4
