"""Which families of models there are, and what is known of each before it loads. Torch is not imported.

To add one: a file with its class (see `flow_grpo.models.base.ModelFamily`), and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flow_grpo.rules import FINITE, POSITIVE, YES_OR_NO, Rule, each, only, whole

# Of diffusers' names for what computes attention those that have a backward pass; "": torch chooses.
ATTENTIONS = (
    "", "native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "flash", "_flash_3",
    "xformers",
)  # fmt: skip
UNMASKED = ("_native_flash", "flash", "_flash_3")  # of those, what takes no mask
TEXT_PARTS = ("text_encoder", "tokenizer")
CHANNELS = each(whole(1), "a list of one or more whole numbers", low=1)


BOTH_STREAMS = (  # the attention of blocks with a stream of the image and one of the prompt
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


@dataclass(frozen=True)
class Family:
    """A family of flow-matching models, as its published pipelines are."""

    words: str  # what its pipelines are called in a sentence
    pipeline: str  # diffusers' class, as model_index.json names it
    place: str  # "module:attribute" of the ModelFamily, imported when a model loads
    lora_targets: tuple[str, ...]  # ends of names of modules, where the configuration names none
    published: tuple[str, ...] = ()  # beginnings of the hub ids of its models
    encoders: int = 1  # text encoders, each with its tokenizer
    clips: Mapping[str, str] = field(default_factory=dict)  # tokenizer -> its CLIP text encoder
    optional: Mapping[str, str] = field(default_factory=dict)  # text encoder that may be missing -> its tokenizer
    optional_words: str = ""  # the same in words
    packing: int = 1  # the transformer's channels are the latents' times this squared
    token_side: int = 0  # in latents; 0: the transformer's patch_size
    stages_key: str = "block_out_channels"  # of the VAE: a list
    stages: Rule = CHANNELS  # what that list is
    default_stages: tuple[Any, ...] = (64,)  # the library's
    halvings: int = -1  # of the image's side by the VAE, beyond the length of that list
    channels_key: str = "latent_channels"  # of the VAE
    scale_keys: tuple[str, ...] = ("scaling_factor", "shift_factor")  # of the VAE: numbers
    per_channel: Mapping[str, Rule] = field(default_factory=dict)  # of the VAE: a number for each channel of latents
    out_packing: int = 0  # as packing, of the channels that the transformer puts out; 0: as packing
    side_key: str = ""  # of the transformer: the most tokens along a side; empty: no limit
    num_steps: int = 28  # with the next two: of the stock pipeline's own call
    guidance_scale: float = 7.0
    max_sequence_length: int = 256
    vae_checkpoints: bool = True  # whether diffusers' VAE can run its decoder again in the backward pass
    guidance_key: str = ""  # of the transformer: whether it takes a guidance scale as an input; empty: it takes none
    chat: Mapping[str, Any] | None = None  # arguments of the chat template, whose words max_sequence_length counts
    unguided_key: str = ""  # of model_index.json: true where classifier-free guidance has no effect; empty: nowhere
    attention: bool = True  # whether its attention can be computed by another library than torch
    masks: bool = False  # whether its attention has a mask, as prompts differ in length
    fixed: Mapping[str, Rule] = field(default_factory=dict)  # settings of the transformer that its pipeline needs so

    @property
    def parts(self) -> tuple[str, ...]:
        """What its pipelines are made of."""
        numbered = [f"{part}{f'_{i}' if i else ''}" for i in (0, *range(2, self.encoders + 1)) for part in TEXT_PARTS]
        return ("scheduler", "transformer", "vae", *numbered)

    def without(self, skip: Sequence[str]) -> set[str]:
        """The parts that are not read without these text encoders: they and their tokenizers."""
        return {*skip, *(self.optional[encoder] for encoder in skip if encoder in self.optional)}


SD3 = Family(
    words="an SD3 pipeline",
    published=("stabilityai/stable-diffusion-3",),
    pipeline="StableDiffusion3Pipeline",
    place="flow_grpo.models.sd3:SD3",
    lora_targets=BOTH_STREAMS,
    encoders=3,
    clips={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    optional={"text_encoder_3": "tokenizer_3"},
    optional_words="the T5, text_encoder_3,",
    attention=False,
    side_key="pos_embed_max_size",
)

FLUX = Family(
    words="a FLUX.1 pipeline",
    published=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-Krea"),
    pipeline="FluxPipeline",
    place="flow_grpo.models.flux:Flux",
    lora_targets=BOTH_STREAMS,  # the single blocks' queries, keys and values among them
    encoders=2,
    clips={"tokenizer": "text_encoder"},
    packing=2,
    token_side=2,
    guidance_scale=1.0,
    guidance_key="guidance_embeds",
    max_sequence_length=512,
)

FLUX2_KLEIN = Family(
    words="a FLUX.2-klein pipeline",
    published=("black-forest-labs/FLUX.2-klein",),
    pipeline="Flux2KleinPipeline",
    place="flow_grpo.models.flux2_klein:Flux2Klein",
    lora_targets=(*BOTH_STREAMS, "attn.to_qkv_mlp_proj"),  # the last, of the single blocks
    packing=2,
    token_side=2,
    scale_keys=(),
    num_steps=50,
    guidance_scale=4.0,
    max_sequence_length=512,
    chat={"enable_thinking": False},
    unguided_key="is_distilled",
)

QWEN_IMAGE = Family(
    words="a Qwen-Image pipeline",
    published=("Qwen/Qwen-Image",),
    pipeline="QwenImagePipeline",
    place="flow_grpo.models.qwen_image:QwenImage",
    lora_targets=(  # Flow-GRPO's
        *BOTH_STREAMS,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    ),
    packing=2,
    out_packing=1,
    token_side=2,
    stages_key="temperal_downsample",
    stages=each(YES_OR_NO, "a list of one or more of true and false", low=1),
    default_stages=(False, True, True),
    halvings=0,
    channels_key="z_dim",
    scale_keys=(),
    per_channel={"latents_mean": FINITE, "latents_std": POSITIVE},
    masks=True,
    num_steps=50,
    guidance_scale=4.0,
    vae_checkpoints=False,
    max_sequence_length=512,
    fixed={
        "patch_size": only(2, "2, the side of its tokens"),
        "guidance_embeds": only(False, "false, as the transformer of diffusers 0.42 cannot run with it"),
        "use_additional_t_cond": only(False, "false, as QwenImagePipeline gives no second time"),
        "use_layer3d_rope": only(False, "false, as an image is one layer"),
    },
)

Z_IMAGE = Family(
    words="a Z-Image pipeline",
    published=("Tongyi-MAI/Z-Image",),
    pipeline="ZImagePipeline",
    place="flow_grpo.models.z_image:ZImage",
    lora_targets=("attention.to_k", "attention.to_out.0", "attention.to_q", "attention.to_v"),  # of diffusers' example
    token_side=2,
    masks=True,
    num_steps=50,
    guidance_scale=6.0,  # the stock one, 5, plus 1
    max_sequence_length=512,
    chat={"enable_thinking": True},
    fixed={
        "all_patch_size": only([2], "[2], the side of its tokens"),
        "all_f_patch_size": only([1], "[1], as an image is one frame"),
    },
)

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (SD3, FLUX, FLUX2_KLEIN, QWEN_IMAGE, Z_IMAGE)}


def published_family(model: str) -> Family:
    """That of a hub id whose index is not here, and was not asked for: by its name, or SD3."""
    return next((family for family in FAMILIES.values() if model.startswith(family.published)), SD3)
