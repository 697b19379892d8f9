"""Which families of models there are, and what is known of each before it loads. Torch is not imported.

To add one: a file with its class (see `flow_grpo.models.base.ModelFamily`), and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A family of flow-matching models, as its published pipelines are."""

    words: str  # what its pipelines are called in a sentence
    pipeline: str  # diffusers' class, as model_index.json names it
    place: str  # "module:attribute" of the ModelFamily, imported when a model loads
    pixels_per_token: int  # of a hub id: the VAE's factor times the transformer's patch
    clips: Mapping[str, str] = field(default_factory=dict)  # tokenizer -> its CLIP text encoder
    optional: Mapping[str, str] = field(default_factory=dict)  # text encoder that may be missing -> its tokenizer
    optional_words: str = ""  # the same in words
    packing: int = 1  # the transformer's channels are the latents' times this squared
    side_key: str = ""  # of the transformer: the most tokens along a side; empty: no limit

    def without(self, skip: Sequence[str]) -> set[str]:
        """The parts that are not read without these text encoders: they and their tokenizers."""
        return {*skip, *(self.optional[encoder] for encoder in skip)}


SD3 = Family(
    words="an SD3 pipeline",
    pipeline="StableDiffusion3Pipeline",
    place="flow_grpo.models.sd3:SD3",
    pixels_per_token=16,
    clips={"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"},
    optional={"text_encoder_3": "tokenizer_3"},
    optional_words="the T5, text_encoder_3,",
    side_key="pos_embed_max_size",
)

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (SD3,)}


def default_family() -> Family:
    """That of a hub id, until its index is here."""
    return SD3
