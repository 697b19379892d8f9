"""What a family's own code calls the modules of its transformer, which files of LoRAs may go by.

Read from `convert_*_transformer_checkpoint_to_diffusers` in diffusers.loaders.single_file_utils (diffusers 0.42). A
family that is not here has no names but diffusers'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A layer of the family's own, and which of its rows are a module's: chunks of so many equal ones, in order."""

    layer: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1


@dataclass(frozen=True)
class Target:
    """A module of the transformer, and which parts of a file's rows are its own: (0,) of 1 is all."""

    module: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1


@dataclass(frozen=True)
class Names:
    """Those of one family."""

    known_by: str  # a module that no other family has
    blocks: Mapping[str, str]  # list of blocks -> what it is called
    inside: Mapping[str, Mapping[str, Part]]  # list of blocks -> module of a block -> layer
    outside: Mapping[str, Part]  # module outside of blocks -> layer
    last: Mapping[str, Part] = field(default_factory=dict)  # in the last of `transformer_blocks`, before `inside`


def original_names(modules: Collection[str]) -> Iterator[tuple[str, Target]]:
    """The layer of the family's own code that each module of a transformer was, or was a part of."""
    names = next((names for names in FAMILIES if names.known_by in modules), None)
    if names is None:
        return
    last = max((int(name.split(".")[1]) for name in modules if name.startswith("transformer_blocks.")), default=-1)
    for module in modules:
        blocks, _, rest = module.partition(".")
        number, _, within = rest.partition(".")
        if module in names.outside:
            part = names.outside[module]
            yield part.layer, Target(module, part.chunks, part.of)
        elif within in names.inside.get(blocks, {}):
            ends = blocks == "transformer_blocks" and number == str(last)
            part = (names.last if ends else {}).get(within, names.inside[blocks][within])
            yield f"{names.blocks[blocks]}.{number}.{part.layer}", Target(module, part.chunks, part.of)


def _thirds(layer: str, *modules: str) -> dict[str, Part]:
    """Queries, keys and values that are one layer."""
    return {module: Part(layer, (i,), 3) for i, module in enumerate(modules)}


def _swapped(layer: str) -> Part:
    """Scale and shift stand in the other order in the norms that end a stream."""
    return Part(layer, (1, 0), 2)


def _embedder(module: str, layer: str) -> dict[str, Part]:
    return {f"{module}.linear_1": Part(f"{layer}.in_layer"), f"{module}.linear_2": Part(f"{layer}.out_layer")}


SD3 = Names(
    known_by="pos_embed.proj",
    blocks={"transformer_blocks": "joint_blocks"},
    inside={
        "transformer_blocks": {
            **_thirds("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.to_out.0": Part("x_block.attn.proj"),
            **_thirds("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "attn2.to_out.0": Part("x_block.attn2.proj"),
            **_thirds("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.to_add_out": Part("context_block.attn.proj"),
            "norm1.linear": Part("x_block.adaLN_modulation.1"),
            "norm1_context.linear": Part("context_block.adaLN_modulation.1"),
            "ff.net.0.proj": Part("x_block.mlp.fc1"),
            "ff.net.2": Part("x_block.mlp.fc2"),
            "ff_context.net.0.proj": Part("context_block.mlp.fc1"),
            "ff_context.net.2": Part("context_block.mlp.fc2"),
        }
    },
    last={"norm1_context.linear": _swapped("context_block.adaLN_modulation.1")},
    outside={
        "pos_embed.proj": Part("x_embedder.proj"),
        "time_text_embed.timestep_embedder.linear_1": Part("t_embedder.mlp.0"),
        "time_text_embed.timestep_embedder.linear_2": Part("t_embedder.mlp.2"),
        "time_text_embed.text_embedder.linear_1": Part("y_embedder.mlp.0"),
        "time_text_embed.text_embedder.linear_2": Part("y_embedder.mlp.2"),
        "proj_out": Part("final_layer.linear"),
        "norm_out.linear": _swapped("final_layer.adaLN_modulation.1"),
    },
)

FLUX_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
FLUX_ATTENTION = {
    **_thirds("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_out.0": Part("img_attn.proj"),
    **_thirds("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_add_out": Part("txt_attn.proj"),
}
FLUX_OUTSIDE = {
    "x_embedder": Part("img_in"),
    "context_embedder": Part("txt_in"),
    "proj_out": Part("final_layer.linear"),
    "norm_out.linear": _swapped("final_layer.adaLN_modulation.1"),
}

FLUX = Names(
    known_by="single_transformer_blocks.0.proj_mlp",
    blocks=FLUX_BLOCKS,
    inside={
        "transformer_blocks": {
            **FLUX_ATTENTION,
            "norm1.linear": Part("img_mod.lin"),
            "norm1_context.linear": Part("txt_mod.lin"),
            "ff.net.0.proj": Part("img_mlp.0"),
            "ff.net.2": Part("img_mlp.2"),
            "ff_context.net.0.proj": Part("txt_mlp.0"),
            "ff_context.net.2": Part("txt_mlp.2"),
        },
        "single_transformer_blocks": {
            "attn.to_q": Part("linear1", (0,), 7),
            "attn.to_k": Part("linear1", (1,), 7),
            "attn.to_v": Part("linear1", (2,), 7),
            "proj_mlp": Part("linear1", (3, 4, 5, 6), 7),  # four times as wide as the others
            "proj_out": Part("linear2"),
            "norm.linear": Part("modulation.lin"),
        },
    },
    outside={
        **FLUX_OUTSIDE,
        **_embedder("time_text_embed.timestep_embedder", "time_in"),
        **_embedder("time_text_embed.guidance_embedder", "guidance_in"),
        **_embedder("time_text_embed.text_embedder", "vector_in"),
    },
)

FLUX2 = Names(
    known_by="single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    blocks=FLUX_BLOCKS,
    inside={
        "transformer_blocks": {
            **FLUX_ATTENTION,
            "ff.linear_in": Part("img_mlp.0"),
            "ff.linear_out": Part("img_mlp.2"),
            "ff_context.linear_in": Part("txt_mlp.0"),
            "ff_context.linear_out": Part("txt_mlp.2"),
        },
        "single_transformer_blocks": {"attn.to_qkv_mlp_proj": Part("linear1"), "attn.to_out": Part("linear2")},
    },
    outside={
        **FLUX_OUTSIDE,
        **_embedder("time_guidance_embed.timestep_embedder", "time_in"),
        **_embedder("time_guidance_embed.guidance_embedder", "guidance_in"),
        "double_stream_modulation_img.linear": Part("double_stream_modulation_img.lin"),
        "double_stream_modulation_txt.linear": Part("double_stream_modulation_txt.lin"),
        "single_stream_modulation.linear": Part("single_stream_modulation.lin"),
    },
)

Z_LISTS = ("layers", "noise_refiner", "context_refiner")
Z_ATTENTION = {
    **_thirds("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_out.0": Part("attention.out"),
}

Z_IMAGE = Names(
    known_by="all_x_embedder.2-1",
    blocks={name: name for name in Z_LISTS},
    inside=dict.fromkeys(Z_LISTS, Z_ATTENTION),
    outside={
        "all_x_embedder.2-1": Part("x_embedder"),
        "all_final_layer.2-1.linear": Part("final_layer.linear"),
        "all_final_layer.2-1.adaLN_modulation.1": Part("final_layer.adaLN_modulation.1"),
    },
)

FAMILIES = (SD3, FLUX, FLUX2, Z_IMAGE)
