"""Folders of models: what is missing, damaged or not ours is one sentence; what diffusers can use, works."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from ml_collections import ConfigDict
from peft import LoraConfig

from flow_grpo.errors import ConfigError
from flow_grpo.launch import _check_pipeline
from flow_grpo.policy import load_pretrained
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.digest import base_digest
from flow_grpo.settings import resolve

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def model(config: ConfigDict, random_models: Path, tmp_path: Path) -> Path:
    """A copy of the random tiny SD3, which the configuration names."""
    config.pretrained.model = str(tmp_path / "sd3")
    return Path(shutil.copytree(random_models / "sd3", tmp_path / "sd3"))


@pytest.fixture
def clip(config: ConfigDict, random_models: Path, tmp_path: Path) -> Path:
    """A copy of the random tiny CLIP, which the configuration names as reward."""
    config.reward_model.pickscore = str(tmp_path / "clip")
    return Path(shutil.copytree(random_models / "clip", tmp_path / "clip"))


def refusal(config: ConfigDict) -> str:
    """The sentence with which the configuration is refused before a model loads."""
    with pytest.raises(ConfigError) as error:
        _check_pipeline(resolve(config, 1, False))
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- settings -------------------------------------------------------------------------------------------

TEXTS = {
    "is not JSON": b'{"a": ',
    "is not UTF-8 text": b'{"a": "\xff"}',
    "nested too deep": b"[" * 100_000 + b"]" * 100_000,
    "too many digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "is not a JSON object": b"[1]",
}
FILES = ("model_index.json", SCHEDULER, "transformer/config.json", "vae/config.json", "text_encoder_3/config.json",
         "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer.json")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("message", TEXTS)
def test_a_file_of_a_pipeline_that_is_no_json_object_is_named(config, model, file, message):
    (model / file).write_bytes(TEXTS[message])
    text = refusal(config)
    assert text.startswith("config.pretrained.model: ")
    assert str(model / file) in text
    assert message in text


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", SCHEDULER])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(config, model, file):
    (model / file).unlink()
    os.mkfifo(model / file)
    assert "is not a regular file" in refusal(config)


@pytest.mark.parametrize("part", ["scheduler", "transformer", "vae", "text_encoder", "text_encoder_3", "tokenizer_2"])
def test_a_part_of_a_pipeline_that_is_missing_is_named(config, model, part):
    shutil.rmtree(model / part)
    assert f"{model / part} has no " in refusal(config)


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", SCHEDULER])
def test_a_file_that_loading_needs_and_that_is_missing_is_named(config, model, file):
    (model / file).unlink()
    assert f"has no {Path(file).name}" in refusal(config)


VALUES = [
    ("vae/config.json", "block_out_channels", "x"),
    ("vae/config.json", "block_out_channels", []),
    ("vae/config.json", "shift_factor", None),
    ("vae/config.json", "latent_channels", 16),
    ("transformer/config.json", "patch_size", None),
    ("transformer/config.json", "pos_embed_max_size", "8"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 10**30),
    (SCHEDULER, "invert_sigmas", True),
    (SCHEDULER, "stochastic_sampling", True),
    (SCHEDULER, "num_train_timesteps", 100),
    (SCHEDULER, "shift", "3"),
    (SCHEDULER, "shift", 0),
    (SCHEDULER, "use_dynamic_shifting", "yes"),
    (SCHEDULER, "shift_terminal", 1),
    (SCHEDULER, "time_shift_type", "cubic"),
]


@pytest.mark.parametrize(("file", "key", "value"), VALUES)
def test_a_setting_of_a_pipeline_that_cannot_be_used_is_named(config, model, file, key, value):
    change(model / file, **{key: value})
    text = refusal(config)
    assert f'"{key}"' in text or "in_channels" in text
    assert "it takes " in text


def test_settings_that_make_no_transformer_are_one_sentence(config, model):
    change(model / "transformer/config.json", num_layers="x")
    assert "has settings that make no model" in refusal(config)


@pytest.mark.parametrize("part", [["diffusers"], "diffusers", ["diffusers", 3], [None, "X"]])
def test_an_entry_of_the_index_that_is_no_class_is_named(config, model, part):
    change(model / "model_index.json", vae=part)
    assert "says 'vae'" in refusal(config)


# --- schedulers -----------------------------------------------------------------------------------------


def test_a_scheduler_of_another_class_is_refused(config, model):
    change(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert "its scheduler is a DPMSolverMultistepScheduler" in refusal(config)


def test_a_scheduler_is_checked_when_the_pipeline_loads_too(config, model):
    """As for a model of the hub."""
    settings = resolve(config, 1, False)
    change(model / SCHEDULER, invert_sigmas=True)
    with pytest.raises(ConfigError, match='"invert_sigmas": True'):
        load_pretrained(settings)


def test_noise_levels_that_are_no_numbers_are_refused(config, model):
    change(model / SCHEDULER, shift_terminal=0.1)
    config.eval.num_steps = 1  # its one level is 1, which cannot be stretched to end at 0.1
    assert "do not fall from 1 to 0 in 1 steps" in refusal(config)


USABLE = [
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 1.0, "max_shift": 3.0, "base_image_seq_len": 4},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"shift_terminal": 0.1},
]


@pytest.mark.parametrize("changes", USABLE)
def test_our_samples_equal_stock_diffusers_for_every_scheduler(config, model, build, changes):
    change(model / SCHEDULER, **changes)
    policy = build(config).policy
    assert samples_differ(policy, model) < 1e-4


def samples_differ(policy, model: Path, **parts) -> float:
    """The largest difference of our evaluation's images from those of the library's pipeline."""
    prompts, generators = ["a bag", "a red coat"], [keyed_generator(0, "test", i) for i in range(2)]
    x_1 = policy.noise([keyed_generator(0, "test", i) for i in range(2)])
    with torch.no_grad():
        ours = policy.decode(policy.sample_ode(prompts, generators).final_latents)
    stock = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32, **parts)
    theirs = stock(
        prompts, latents=x_1, num_inference_steps=4, guidance_scale=1.0, height=32, width=32, max_sequence_length=8,
        output_type="pt",
    ).images  # fmt: skip
    return (ours - theirs).abs().max().item()


# --- without the T5 -------------------------------------------------------------------------------------


def test_a_pipeline_without_the_t5_runs_as_in_diffusers(config, model, build):
    for part in ("text_encoder_3", "tokenizer_3"):
        change(model / "model_index.json", **{part: [None, None]})
        shutil.rmtree(model / part)
    policy = build(config).policy
    assert policy.pipeline.text_encoder_3 is None
    assert samples_differ(policy, model, text_encoder_3=None, tokenizer_3=None) < 1e-4


def test_a_pipeline_without_another_part_is_refused(config, model):
    change(model / "model_index.json", text_encoder_2=[None, None])
    assert "has no text_encoder_2; only the T5" in refusal(config)


def test_a_pipeline_can_be_used_without_its_t5_whose_files_are_not_read(config, model, build):
    with_t5 = build(config).policy.encode(["a bag"])
    config.pretrained.skip = ("text_encoder_3",)
    shutil.rmtree(model / "text_encoder_3")
    (model / "tokenizer_3/tokenizer.json").write_text("not JSON")
    config.run_name = "without"
    policy = build(config).policy
    assert policy.pipeline.text_encoder_3 is None
    assert policy.pipeline.tokenizer_3 is None
    assert samples_differ(policy, model, text_encoder_3=None, tokenizer_3=None) < 1e-4
    embeds = policy.encode(["a bag"])
    assert embeds.prompt_embeds.shape == with_t5.prompt_embeds.shape
    assert (embeds.prompt_embeds[:, -8:] == 0).all()
    assert (with_t5.prompt_embeds[:, -8:] != 0).any()


def test_the_digest_of_a_base_without_its_t5_is_of_the_other_parts(config, model):
    whole = base_digest(config.pretrained)
    config.pretrained.skip = ("text_encoder_3",)
    without = base_digest(config.pretrained)
    shutil.rmtree(model / "text_encoder_3")
    assert base_digest(config.pretrained) == without != whole
    change(model / "text_encoder/config.json", hidden_size=8)
    assert base_digest(config.pretrained) != without


@pytest.mark.parametrize("name", ["text_encoder_2", "vae", "tokenizer_3"])
def test_other_parts_cannot_be_skipped(config, model, name):
    config.pretrained.skip = (name,)
    said = refusal(config)
    assert f"config.pretrained.skip = ('{name}',)" in said
    assert "it takes 'text_encoder_3'" in said


# --- weights --------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "header":
        content[7] = 255  # of the header's length
    if how == "name":
        content[content.index(b"weight")] = ord("W")
    path.write_bytes(
        {"cut": content[: len(content) // 2], "zeros": bytes(len(content)), "empty": b""}.get(how, content)
    )


@pytest.mark.parametrize("how", ["cut", "zeros", "empty", "header"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_damaged_weights_of_a_pipeline_are_named_before_it_loads(config, model, part, how):
    weights = next((model / part).glob("*.safetensors"))
    damage(weights, how)
    assert f"config.pretrained.model: {weights} is damaged" in refusal(config)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_a_weight_whose_name_is_damaged_is_not_replaced_by_random_numbers(config, model, part):
    damage(next((model / part).glob("*.safetensors")), "name")
    with pytest.raises(ConfigError, match=rf"is not whole: {part}\.\S+ is the first of 1 weights"):
        load_pretrained(resolve(config, 1, False))


def test_settings_that_do_not_fit_the_weights_are_one_sentence(config, model):
    change(model / "text_encoder/config.json", hidden_size=8)
    with pytest.raises(ConfigError, match="cannot be loaded as an SD3 pipeline"):
        load_pretrained(resolve(config, 1, False))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_file_of_a_clip_that_is_missing_is_named(config, clip, file):
    (clip / file).unlink()
    text = refusal(config)
    assert text.startswith("config.reward_model.pickscore: ")
    assert file.split(".")[0] in text or "*.safetensors" in text


@pytest.mark.parametrize("how", ["cut", "zeros", "empty", "header"])
@pytest.mark.parametrize("key", ["reward_model.pickscore", "eval.judge", "diversity.model"])
def test_damaged_weights_of_a_clip_are_named_before_it_loads(config, clip, key, how):
    config.update_from_flattened_dict({key: str(clip), "eval_diversity": True})
    damage(clip / "model.safetensors", how)
    assert f"{clip / 'model.safetensors'} is damaged" in refusal(config)


@pytest.mark.parametrize("content", [b"", bytes(99), b"version https://git-lfs.github.com/spec/v1"])
def test_damaged_weights_of_the_older_kind_are_one_sentence(config, clip, content):
    (clip / "model.safetensors").unlink()
    (clip / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.reward_model\.pickscore.* cannot be loaded"):
        build_reward(resolve(config, 1, False).config, "cpu")


def test_a_clip_whose_settings_do_not_fit_its_weights_is_one_sentence(config, clip):
    change(clip / "config.json", projection_dim=3)
    with pytest.raises(ConfigError, match=r"config\.reward_model\.pickscore.* cannot be loaded"):
        build_reward(resolve(config, 1, False).config, "cpu")


# --- LoRA -----------------------------------------------------------------------------------------------


def test_a_lora_target_that_matches_nothing_is_named_before_anything_loads(config):
    config.lora.target_modules = ("attn.to_k", "attn.to_kk")
    text = refusal(config)
    assert "'attn.to_kk' is the end of no module's name" in text
    assert "attn.to_k" in text.split("nearest")[1]


def test_a_lora_target_that_matches_nothing_is_named_when_the_model_loads_too(config, build):
    config.lora.target_modules = ("attn.to_k", "to_kk")
    with pytest.raises(ConfigError, match="'to_kk' is the end of no module's name"):
        build(config)


def test_a_lora_target_whose_modules_are_all_without_effect_counts_as_found(config, build):
    config.lora.target_modules = ("attn.to_k", "transformer_blocks.1.attn.add_q_proj")
    names = {name for name, p in build(config).policy.transformer.named_parameters() if p.requires_grad}
    assert names
    assert all("attn.to_k" in name for name in names)


@pytest.mark.parametrize(("alpha", "written"), [(24.5, 24.5), (8, 8), (8.0, 8)])
def test_alpha_may_be_any_number_above_0(config, build, tmp_path, alpha, written):
    config.lora.alpha = alpha
    transformer = build(config).policy.transformer
    assert transformer.transformer_blocks[0].attn.to_k.scaling == {"default": alpha / 4}
    transformer.peft_config["default"].save_pretrained(tmp_path / "adapter")
    assert repr(LoraConfig.from_pretrained(tmp_path / "adapter").lora_alpha) == repr(written)
