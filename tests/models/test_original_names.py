"""LoRAs of every family, in every spelling: what each layer means is what diffusers' converters make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file

from flow_grpo.errors import ConfigError
from flow_grpo.models.lora_files import read_lora
from flow_grpo.models.lora_places import match, weight_matrices
from flow_grpo.models.loras import read_parts
from tests.models.families import CASES

WIDTH = 3072  # which diffusers' converter of FLUX.1 has built in
OUTSIDE = {"img_in": (64, 1), "txt_in": (4096, 1), "final_layer.linear": (WIDTH, 0), "time_in.in_layer": (256, 1),
           "time_in.out_layer": (WIDTH, 1), "guidance_in.in_layer": (256, 1), "guidance_in.out_layer": (WIDTH, 1),
           "final_layer.adaLN_modulation.1": (WIDTH, 2)}  # fmt: skip
ATTENTION = {"double_blocks.0.img_attn.qkv": (WIDTH, 3), "double_blocks.0.img_attn.proj": (WIDTH, 1),
             "double_blocks.0.txt_attn.qkv": (WIDTH, 3), "double_blocks.0.txt_attn.proj": (WIDTH, 1)}  # fmt: skip
# FLUX.1's layers: inputs, and outputs in widths; 0 stands for the 64 channels of latents.
FLUX = OUTSIDE | ATTENTION | {
    "vector_in.in_layer": (768, 1), "vector_in.out_layer": (WIDTH, 1),
    "double_blocks.0.img_mod.lin": (WIDTH, 6), "double_blocks.0.txt_mod.lin": (WIDTH, 6),
    "double_blocks.0.img_mlp.0": (WIDTH, 4), "double_blocks.0.img_mlp.2": (4 * WIDTH, 1),
    "double_blocks.0.txt_mlp.0": (WIDTH, 4), "double_blocks.0.txt_mlp.2": (4 * WIDTH, 1),
    "single_blocks.0.linear1": (WIDTH, 7), "single_blocks.0.linear2": (5 * WIDTH, 1),
    "single_blocks.0.modulation.lin": (WIDTH, 3),
}  # fmt: skip
# FLUX.2's, at the same sizes.
FLUX2 = OUTSIDE | ATTENTION | {
    "double_stream_modulation_img.lin": (WIDTH, 6), "double_stream_modulation_txt.lin": (WIDTH, 6),
    "single_stream_modulation.lin": (WIDTH, 3),
    "double_blocks.0.img_mlp.0": (WIDTH, 6), "double_blocks.0.img_mlp.2": (3 * WIDTH, 1),
    "double_blocks.0.txt_mlp.0": (WIDTH, 6), "double_blocks.0.txt_mlp.2": (3 * WIDTH, 1),
    "single_blocks.0.linear1": (WIDTH, 9), "single_blocks.0.linear2": (4 * WIDTH, 1),
}  # fmt: skip
NORMS = ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm")
SMALL = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128,
         "in_channels": 64, "joint_attention_dim": 4096, "guidance_embeds": True}  # fmt: skip


def shapes_of(transformer) -> dict[str, tuple[int, ...]]:
    return weight_matrices({name: tuple(p.shape) for name, p in transformer.named_parameters()})


@pytest.mark.parametrize("spelling", ["diffusion_model.{}", "lora_unet_{}"])
@pytest.mark.parametrize(
    ("model", "layers", "convert"),
    [
        (FluxTransformer2DModel, FLUX, convert_flux_transformer_checkpoint_to_diffusers),
        (Flux2Transformer2DModel, FLUX2, convert_flux2_transformer_checkpoint_to_diffusers),
    ],
    ids=["flux", "flux2"],
)
def test_the_rows_of_each_layer_go_where_diffusers_converter_puts_them(tmp_path, model, layers, convert, spelling):
    """The converter is given one column of every weight, which is also B of a LoRA of rank 1."""
    with torch.device("meta"):
        shapes = shapes_of(model(**SMALL))
    draw, checkpoint, lora = torch.Generator().manual_seed(0), {}, {}
    for name, (inputs, widths) in layers.items():
        column = torch.randn(widths * WIDTH or 64, 1, generator=draw)
        checkpoint |= {f"{name}.weight": column, f"{name}.bias": torch.zeros(len(column))}
        spelt = spelling.format(name.replace(".", "_") if spelling.startswith("lora_unet") else name)
        lora |= {f"{spelt}.lora_up.weight": column, f"{spelt}.lora_down.weight": torch.ones(1, inputs)}
    for norm in NORMS:
        checkpoint |= {f"{norm}.{which}_norm.scale": torch.ones(128) for which in ("query", "key")}
    save_file(lora, tmp_path / "lora.safetensors")
    plan = match(read_lora(tmp_path / "lora.safetensors"), shapes)
    assert (plan.layers, plan.unknown) == (len(layers), ())
    converted, found = convert(dict(checkpoint)), read_parts(plan)
    assert found.keys() == shapes.keys()
    for module, parts in found.items():
        torch.testing.assert_close(parts.b, converted[f"{module}.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "spelling", ["transformer.{}", "base_model.model.{}", "diffusion_model.{}", "lora_unet_{}", "lora_transformer_{}"]
)
def test_every_linear_module_of_every_family_is_found_under_diffusers_names(case, tmp_path, spelling):
    shapes = shapes_of(case.build().transformer)
    tensors = {}
    for module, (out, *inputs) in shapes.items():
        name = spelling.format(module.replace(".", "_") if spelling.startswith("lora_") else module)
        tensors |= {f"{name}.lora_A.weight": torch.ones(1, *inputs),
                    f"{name}.lora_B.weight": torch.ones(out, *[1] * len(inputs))}  # fmt: skip
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    plan = match(read_lora(path), shapes)
    assert sorted(placement.target.module for placement in plan.placements) == sorted(shapes)
    assert not plan.unknown


def test_names_of_another_family_are_none(tmp_path):
    """FLUX.1's layer in an SD3 transformer."""
    shapes = shapes_of(CASES[0].build().transformer)
    path: Path = tmp_path / "lora.safetensors"
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(96, 1)}, path)
    with pytest.raises(ConfigError, match="none of its 1 layers is one of this transformer's"):
        match(read_lora(path), shapes)
