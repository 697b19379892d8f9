"""LoRAs of other trainers: every layer loaded, and to the letter."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from flow_grpo.errors import ConfigError
from flow_grpo.models.lora_files import read_lora
from flow_grpo.models.lora_places import match, transformer_shapes, weight_matrices
from flow_grpo.models.loras import load_lora, merge_lora
from tests.lora_writers import (
    MODULES,
    Layer,
    Lora,
    keyed,
    kohya,
    merge,
    random_lora,
    save,
    stock_diffusers,
    stock_peft,
    without_alpha,
)


@pytest.fixture(scope="module")
def stock(random_models: Path) -> StableDiffusion3Pipeline:
    """Never changed."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(random_models / "sd3")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(stock: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """To be changed."""
    return StableDiffusion3Pipeline(**stock.components | {"transformer": copy.deepcopy(stock.transformer)})


@torch.no_grad()
def velocity(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    """Of two latents and prompts: looks at every module."""
    config, draw = pipeline.transformer.config, torch.Generator().manual_seed(3)
    return pipeline.transformer(
        hidden_states=torch.randn(2, config.in_channels, 8, 8, generator=draw),
        timestep=torch.tensor([700.0, 200.0]),
        encoder_hidden_states=torch.randn(2, 16, config.joint_attention_dim, generator=draw),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=draw),
        return_dict=False,
    )[0]


def merged(stock: StableDiffusion3Pipeline, lora: Lora) -> StableDiffusion3Pipeline:
    transformer = copy.deepcopy(stock.transformer)
    merge(transformer, lora)
    return StableDiffusion3Pipeline(**stock.components | {"transformer": transformer})


def check(stock: StableDiffusion3Pipeline, pipeline: StableDiffusion3Pipeline, path: Path, lora: Lora) -> None:
    """Every layer is loaded and means the LoRA; one whose alphas were ignored would not pass."""
    loaded = load_lora(pipeline.transformer, path)
    assert (loaded.layers, loaded.of, loaded.text_encoder, loaded.unknown) == (len(lora), len(lora), 0, ())
    for name, layer in lora.items():
        if layer.magnitude is None:
            reference = layer.b.double() @ layer.a.double() * layer.alpha / len(layer.a)
            found = pipeline.transformer.get_submodule(name).get_delta_weight(loaded.adapter)
            torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)
    found, reference = velocity(pipeline), velocity(merged(stock, lora))
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, velocity(merged(stock, without_alpha(lora))), rtol=1e-2, atol=1e-3)


# --- what trainers write --------------------------------------------------------------------------------


def test_diffusers_own_folder(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    check(stock, pipeline, stock_diffusers(tmp_path, lora), lora)


def test_a_diffusers_file_without_settings_has_the_scale_1(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer, alpha=4.0)
    path = save(tmp_path, keyed(lora, lambda name, matrix: f"transformer.{name}.{matrix}.weight"))
    load_lora(pipeline.transformer, path)
    torch.testing.assert_close(velocity(pipeline), velocity(merged(stock, lora)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["transformer.{}.lora.{}.weight", "transformer.{}_lora.{}.weight"])
def test_diffusers_old_keys_with_alphas(stock, pipeline, tmp_path, style) -> None:
    lora = random_lora(stock.transformer)
    spelt = {name: name.replace(".attn.", ".attn.processor.").replace("to_out.0", "to_out") for name in lora}
    tensors = keyed(lora, lambda name, matrix: style.format(spelt[name], matrix), ("down", "up"))
    tensors |= {f"transformer.{spelt[name]}.alpha": torch.tensor(layer.alpha) for name, layer in lora.items()}
    check(stock, pipeline, save(tmp_path, tensors), lora)


def test_peft_folder(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    check(stock, pipeline, stock_peft(tmp_path, copy.deepcopy(stock.transformer), lora), lora)


def test_a_peft_file_of_another_name_has_its_folders_settings(stock, pipeline, tmp_path) -> None:
    """Its alpha stands nowhere else."""
    lora = random_lora(stock.transformer)
    path = stock_peft(tmp_path, copy.deepcopy(stock.transformer), lora)
    (path / "adapter_model.safetensors").rename(path / "mine.safetensors")
    check(stock, pipeline, path / "mine.safetensors", lora)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_can_become_part_of_the_weights(stock, pipeline, tmp_path, dora) -> None:
    lora = random_lora(stock.transformer, dora=dora)
    loaded = merge_lora(pipeline.transformer, kohya(tmp_path, lora, dora=dora))
    assert (loaded.layers, loaded.of) == (len(lora), len(lora))
    reference = merged(stock, lora).transformer.state_dict()
    found = pipeline.transformer.state_dict()
    assert found.keys() == reference.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)
    assert not pipeline.transformer._hf_peft_config_loaded


def test_a_file_of_two_adapters_is_refused(stock, tmp_path) -> None:
    """Their matrices would be mixed."""
    tensors = {}
    for adapter in ("one", "two"):
        tensors |= keyed(random_lora(stock.transformer), lambda name, part, a=adapter: f"{name}.{part}.{a}.weight")
    with pytest.raises(ConfigError, match="two adapters"):
        read_lora(save(tmp_path, tensors))


def test_peft_folder_with_rank_and_alpha_patterns(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer, rank=lambda number: 2 + number)
    alphas = {f"^{name}": 1.5 * (number + 1) for number, name in enumerate(lora)}
    path = stock_peft(tmp_path, copy.deepcopy(stock.transformer), lora, alpha_pattern=alphas)
    check(stock, pipeline, path, {name: replace(layer, alpha=alphas[f"^{name}"]) for name, layer in lora.items()})


def test_peft_patterns_are_of_the_files_own_names(stock, tmp_path) -> None:
    """SD3's own names, which become three modules of diffusers'."""
    width = stock.transformer.config.num_attention_heads * stock.transformer.config.attention_head_dim
    name = "joint_blocks.1.x_block.attn.qkv"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(4, width),
        f"base_model.model.{name}.lora_B.weight": torch.randn(3 * width, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 4, "alpha_pattern": {"x_block.attn.qkv": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {key: tuple(value.shape) for key, value in stock.transformer.named_parameters()}
    plan = match(read_lora(tmp_path), weight_matrices(shapes))
    assert {placement.scale for placement in plan.placements} == {0.5}


def test_peft_folder_with_rank_stabilised_scale(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    path = stock_peft(tmp_path, copy.deepcopy(stock.transformer), lora, use_rslora=True)
    check(stock, pipeline, path, {name: replace(layer, alpha=6.0 * math.sqrt(4)) for name, layer in lora.items()})


def test_peft_dora_folder(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer, dora=True)
    check(stock, pipeline, stock_peft(tmp_path, copy.deepcopy(stock.transformer), lora), lora)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_kohya_file(stock, pipeline, tmp_path, prefix) -> None:
    lora = random_lora(stock.transformer)
    check(stock, pipeline, kohya(tmp_path, lora, prefix), lora)


def test_kohya_file_with_dora_scales(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer, dora=True)
    check(stock, pipeline, kohya(tmp_path, lora, dora=True), lora)


def test_ai_toolkit_file(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    tensors = keyed(lora, lambda name, matrix: f"diffusion_model.{name}.{matrix}.weight")
    tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(layer.alpha) for name, layer in lora.items()}
    check(stock, pipeline, save(tmp_path, tensors), lora)


def test_half_precision_files_are_taken_exactly(stock, pipeline, tmp_path) -> None:
    lora = {
        name: replace(layer, a=layer.a.bfloat16(), b=layer.b.bfloat16())
        for name, layer in random_lora(stock.transformer).items()
    }
    check(stock, pipeline, kohya(tmp_path, lora), lora)


def test_a_lora_bias_is_added(stock, pipeline, tmp_path) -> None:
    name = MODULES[0]
    lora = {name: random_lora(stock.transformer, alpha=4.0)[name]}
    tensors = keyed(lora, lambda name, matrix: f"transformer.{name}.{matrix}.weight")
    bias = torch.linspace(-1, 1, len(lora[name].b))
    load_lora(pipeline.transformer, save(tmp_path, tensors | {f"transformer.{name}.lora_B.bias": bias}))
    reference = merged(stock, lora)
    with torch.no_grad():
        reference.transformer.get_submodule(name).bias += bias
    torch.testing.assert_close(velocity(pipeline), velocity(reference), rtol=1e-4, atol=1e-5)


# --- SD3's own names --------------------------------------------------------------------------------------


def original_checkpoint(transformer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random weights under SD3's own names, and what diffusers makes of them."""
    draw, width = torch.Generator().manual_seed(5), transformer.config.caption_projection_dim
    shapes = {name: tuple(p.shape) for name, p in transformer.named_parameters()}
    found = {"pos_embed": torch.zeros(1, 64, width), "context_embedder.bias": torch.zeros(width)}
    names = {"context_embedder.weight": shapes["context_embedder.weight"]}
    for ours, theirs in (
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("proj_out", "final_layer.linear"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ):
        names[f"{theirs}.weight"] = shapes[f"{ours}.weight"]
    last = transformer.config.num_layers - 1
    for i in range(last + 1):
        block, x, context = f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        names |= {f"{x}.attn.qkv.weight": (3 * width, width), f"{context}.attn.qkv.weight": (3 * width, width)}
        names |= {f"{x}.attn.proj.weight": (width, width)}
        names |= {f"{x}.adaLN_modulation.1.weight": shapes[f"{block}.norm1.linear.weight"]}
        names |= {f"{context}.adaLN_modulation.1.weight": shapes[f"{block}.norm1_context.linear.weight"]}
        names |= {f"{x}.mlp.fc1.weight": (4 * width, width), f"{x}.mlp.fc2.weight": (width, 4 * width)}
        if i < last:
            names |= {f"{context}.attn.proj.weight": (width, width)}
            names |= {f"{context}.mlp.fc1.weight": (4 * width, width), f"{context}.mlp.fc2.weight": (width, 4 * width)}
        if i == 0:
            names |= {f"{x}.attn2.qkv.weight": (3 * width, width), f"{x}.attn2.proj.weight": (width, width)}
    for name, shape in names.items():
        found[name] = torch.randn(shape, generator=draw)
        found.setdefault(name.replace(".weight", ".bias"), torch.zeros(shape[0]))
    weights = {name: value for name, value in found.items() if name.endswith(".weight")}
    return weights, convert_sd3_transformer_checkpoint_to_diffusers(dict(found))


@pytest.mark.parametrize(
    "key", [lambda name: f"diffusion_model.{name}", lambda name: "lora_unet_" + name.replace(".", "_")]
)
def test_layers_under_sd3s_own_names_mean_what_diffusers_converts(stock, pipeline, tmp_path, key) -> None:
    """B A = a weight of full rank: the difference must be what the library's converter makes of that weight."""
    weights, converted = original_checkpoint(stock.transformer)
    tensors = {}
    for name, weight in weights.items():
        spelt = key(name.removesuffix(".weight"))
        flat = weight.flatten(1)
        tensors[f"{spelt}.lora_down.weight"] = torch.eye(flat.shape[1]).reshape(-1, *weight.shape[1:])
        tensors[f"{spelt}.lora_up.weight"] = flat.reshape(*flat.shape, *(1,) * (weight.ndim - 2))
    loaded = load_lora(pipeline.transformer, save(tmp_path, tensors))
    assert (loaded.layers, loaded.of) == (len(weights), len(weights))
    for name, reference in converted.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in match_of(stock, tmp_path):
            found = pipeline.transformer.get_submodule(module).get_delta_weight(loaded.adapter)
            torch.testing.assert_close(found, reference.reshape(found.shape))


def match_of(stock: StableDiffusion3Pipeline, folder: Path) -> set[str]:
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in stock.transformer.named_parameters()}
    file = read_lora(folder / "somebodys.safetensors")
    return {placement.target.module for placement in match(file, shapes).placements}


def test_every_module_of_the_transformer_has_a_name_of_sd3s_own(stock, tmp_path, random_models) -> None:
    shapes = transformer_shapes(random_models / "sd3")
    weights, _ = original_checkpoint(stock.transformer)
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{name.removesuffix('.weight')}.lora_down.weight"] = torch.zeros(1, *weight.shape[1:])
        tensors[f"{name.removesuffix('.weight')}.lora_up.weight"] = torch.zeros(
            len(weight), 1, *(1,) * (weight.ndim - 2)
        )
    plan = match(read_lora(save(tmp_path, tensors)), shapes)
    assert {placement.target.module for placement in plan.placements} == set(shapes)


# --- images, and what is left alone -----------------------------------------------------------------------


def test_images_are_those_of_the_merged_weights(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    load_lora(pipeline.transformer, kohya(tmp_path, lora))

    def images(model: StableDiffusion3Pipeline) -> torch.Tensor:
        model.set_progress_bar_config(disable=True)
        drawn = model(
            "a bag",
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=8,
            output_type="pt",
        )
        return drawn.images

    found = images(pipeline)
    torch.testing.assert_close(found, images(merged(stock, lora)), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, images(stock), atol=1e-2)


def test_two_loras_add_up_and_nothing_is_trainable(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        load_lora(pipeline.transformer, kohya(folder, lora))
    twice = {name: replace(layer, alpha=2 * layer.alpha) for name, layer in lora.items()}
    torch.testing.assert_close(velocity(pipeline), velocity(merged(stock, twice)), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())


def test_the_base_comes_back_with_adapters_disabled(stock, pipeline, tmp_path) -> None:
    load_lora(pipeline.transformer, kohya(tmp_path, random_lora(stock.transformer)))
    pipeline.transformer.disable_adapters()
    assert torch.equal(velocity(pipeline), velocity(stock))


def test_layers_of_text_encoders_and_unknown_ones_are_counted(stock, pipeline, tmp_path) -> None:
    lora = random_lora(stock.transformer, alpha=4.0)
    tensors = keyed(lora, lambda name, matrix: f"transformer.{name}.{matrix}.weight")
    for name in ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "transformer.somewhere.else"):
        tensors |= keyed({name: Layer(torch.ones(2, 3), torch.ones(3, 2), 2.0)}, lambda n, m: f"{n}.{m}.weight")
    tensors["transformer.proj_out.diff"] = torch.zeros(3)
    loaded = load_lora(pipeline.transformer, save(tmp_path, tensors))
    assert (loaded.layers, loaded.of, loaded.text_encoder) == (7, 9, 1)
    assert set(loaded.unknown) == {"transformer.somewhere.else", "transformer.proj_out.diff"}
    assert str(loaded).startswith("7 of 9 layers loaded (left out: 1 of text encoders; 2 unknown")


# --- refusals ---------------------------------------------------------------------------------------------


def refusal(path: Path, pipeline: StableDiffusion3Pipeline | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        read_lora(path) if pipeline is None else load_lora(pipeline.transformer, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_which_no_layer_is_known_is_refused(stock, pipeline, tmp_path) -> None:
    lora = {"double_blocks.0.img_attn.qkv": random_lora(stock.transformer)[MODULES[0]]}
    path = save(tmp_path, keyed(lora, lambda name, matrix: f"{name}.{matrix}.weight"))
    said = refusal(path, pipeline)
    assert "'double_blocks.0.img_attn.qkv.lora_A.weight'" in said
    assert "kohya" in said


def test_another_models_width_names_the_layer_and_both_shapes(pipeline, tmp_path) -> None:
    lora = {MODULES[0]: Layer(torch.zeros(4, 1536), torch.zeros(1536, 4), 4.0)}
    said = refusal(save(tmp_path, keyed(lora, lambda name, matrix: f"transformer.{name}.{matrix}.weight")), pipeline)
    assert "another model" in said
    for text in (MODULES[0], "(4, 1536)", "(1536, 4)", "(32, 32)"):
        assert text in said


def test_a_file_of_weights_that_are_no_lora(tmp_path, random_models) -> None:
    path = next((random_models / "sd3" / "transformer").glob("*.safetensors"))
    assert "holds no LoRA layer" in refusal(path)


def test_half_a_layer_is_refused(stock, tmp_path) -> None:
    tensors = keyed(random_lora(stock.transformer), lambda name, matrix: f"transformer.{name}.{matrix}.weight")
    del tensors[f"transformer.{MODULES[2]}.lora_B.weight"]
    assert f"transformer.{MODULES[2]}.lora_A.weight, but no matrix B" in refusal(save(tmp_path, tensors))


def test_ranks_that_differ_are_refused(tmp_path) -> None:
    lora = {MODULES[0]: Layer(torch.zeros(4, 32), torch.zeros(32, 2), 4.0)}
    path = save(tmp_path, keyed(lora, lambda name, matrix: f"transformer.{name}.{matrix}.weight"))
    assert "the ranks of A (4, 32) and B (32, 2) differ" in refusal(path)


def test_a_rank_that_the_settings_deny_is_refused(stock, pipeline, tmp_path) -> None:
    path = stock_peft(tmp_path, copy.deepcopy(stock.transformer), random_lora(stock.transformer))
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {}, "r": 8}))
    assert "the rank 8, but A has shape (4, 32)" in refusal(path, pipeline)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin"])
def test_a_pickle_is_never_opened(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a pickle" in refusal(tmp_path)


def test_a_cut_file_is_refused(stock, tmp_path) -> None:
    path = kohya(tmp_path, random_lora(stock.transformer))
    path.write_bytes(path.read_bytes()[:200])
    assert "is damaged" in refusal(path)


def test_numbers_that_are_not_finite_are_refused(stock, pipeline, tmp_path) -> None:
    path = kohya(tmp_path, random_lora(stock.transformer))
    tensors = load_file(path)
    key = sorted(name for name in tensors if name.endswith("lora_up.weight"))[0]
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, path)
    assert f"{key} holds numbers that are not finite" in refusal(path, pipeline)


def test_a_dora_without_all_magnitudes_is_refused(stock, pipeline, tmp_path) -> None:
    path = kohya(tmp_path, random_lora(stock.transformer, dora=True), dora=True)
    tensors = load_file(path)
    del tensors["lora_unet_proj_out.dora_scale"]
    save_file(tensors, path)
    assert "its layer lora_unet_proj_out has no magnitude" in refusal(path, pipeline)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "it takes LORA"),
        ({"init_lora_weights": "pissa"}, "changes the base model's own weights"),
        ({"lora_alpha": "many"}, "not a number above 0"),
        ({"alpha_pattern": {"(": 2}}, "is no pattern"),
        ({"rank_pattern": [1]}, "not an object"),
    ],
)
def test_settings_that_say_something_else(stock, tmp_path, changes, said) -> None:
    path = stock_peft(tmp_path, copy.deepcopy(stock.transformer), random_lora(stock.transformer))
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | changes))
    assert said in refusal(path)
