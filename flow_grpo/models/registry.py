"""Which families of models there are, and what is known of each before it loads. Torch is not imported.

To add one: a file with its class (see `flow_grpo.models.base.ModelFamily`), and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flow_grpo.rules import Rule, each, whole

CHANNELS = each(whole(1), "a list of one or more whole numbers", low=1)


@dataclass(frozen=True)
class Family:
    """A family of flow-matching models, as its published pipelines are."""

    words: str  # what its pipelines are called in a sentence
    pipeline: str  # diffusers' class, as model_index.json names it
    place: str  # "module:attribute" of the ModelFamily, imported when a model loads
    pixels_per_token: int  # of a hub id: the VAE's factor times the side of a token in latents
    lora_targets: tuple[str, ...]  # ends of names of modules, where the configuration names none
    published: tuple[str, ...] = ()  # beginnings of the hub ids of its models
    clips: Mapping[str, str] = field(default_factory=dict)  # tokenizer -> its CLIP text encoder
    optional: Mapping[str, str] = field(default_factory=dict)  # text encoder that may be missing -> its tokenizer
    optional_words: str = ""  # the same in words
    packing: int = 1  # the transformer's channels are the latents' times this squared
    token_side: int = 0  # in latents; 0: the transformer's patch_size
    stages_key: str = "block_out_channels"  # of the VAE: a list
    stages: Rule = CHANNELS  # what that list is
    halvings: int = -1  # of the image's side by the VAE, beyond the length of that list
    channels_key: str = "latent_channels"  # of the VAE
    scale_keys: tuple[str, ...] = ("scaling_factor", "shift_factor")  # of the VAE: numbers
    out_packing: int = 0  # as packing, of the channels that the transformer puts out; 0: as packing
    side_key: str = ""  # of the transformer: the most tokens along a side; empty: no limit


SD3 = Family(
    words="an SD3 pipeline",
    published=("stabilityai/stable-diffusion-3",),
    pipeline="StableDiffusion3Pipeline",
    place="flow_grpo.models.sd3:SD3",
    pixels_per_token=16,
    lora_targets=(
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ),
    clips={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    optional={"text_encoder_3": "tokenizer_3"},
    optional_words="the T5, text_encoder_3,",
    side_key="pos_embed_max_size",
)

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (SD3,)}


def published_family(model: str) -> Family:
    """That of a hub id whose index is not here: by its name, or SD3."""
    return next((family for family in FAMILIES.values() if model.startswith(family.published)), SD3)
