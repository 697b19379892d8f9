"""The tiny models, built offline: every class is the library's own, only the sizes are ours.

`build_pipeline` is a whole `StableDiffusion3Pipeline` and `build_clip` a `CLIPModel` with its `CLIPProcessor`, both
with random weights. `scripts/tiny/pretrain.py` trains them; the tests use them as they are.

The tokenizers are fitted to the captions of `tiny_data` and can spell anything else. Token ids depend on the captions,
so a trained model must be used with the tokenizer files saved beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from scripts.tiny import data as tiny_data

PROMPT_LENGTH = 8  # tokens, all three encoders
VAE_FACTOR = 4  # pixels of an image's side to numbers of its latent's
END = "</w>"  # marks the last letter of a word in CLIP's BPE


# --- tokenizers ---------------------------------------------------------------------------------------


def build_clip_tokenizer(corpus: Sequence[str], length: int = PROMPT_LENGTH) -> CLIPTokenizer:
    """CLIP's byte-level BPE, merged until each word of `corpus` is one token; every byte is known, so any text is."""
    backend = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for line in corpus:
        pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(line))
        words.update(piece for piece, _ in pieces)
    merges: list[Any] = learn_merges(words)  # pairs, where the library's annotation says strings
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END for letter in letters), *map("".join, merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def learn_merges(words: Counter[str], end: str = END) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909) to its end: merge the commonest pair until each word is one token.

    Ties go to the alphabet, so that every build is the same; those of the `tokenizers` library are not.
    """
    spellings = {word: [*word[:-1], word[-1] + end] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, tokens in spellings.items():
            for pair in pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        spellings = {word: merge(tokens, merges[-1]) for word, tokens in spellings.items()}


def merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of `pair`, from left to right."""
    joined: list[str] = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def build_t5_tokenizer(corpus: Sequence[str], length: int = PROMPT_LENGTH) -> T5Tokenizer:
    """T5's unigram model: each word of `corpus` is one piece with its frequency, ASCII letters are the fallback."""
    counts = Counter("\u2581" + word for line in corpus for word in line.split())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    pieces |= {word: math.log(count / counts.total()) for word, count in counts.most_common()}
    for letter in ["\u2581", *map(chr, range(33, 127))]:
        pieces.setdefault(letter, -12.0)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=length)


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids a CLIP text configuration needs; it pools at the end-of-text token."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


# --- the parts of SD3 -----------------------------------------------------------------------------------


def build_vae(
    channels: Sequence[int] = (16, 32, 64),
    latent_channels: int = 4,
    layers: int = 1,
    groups: int = 8,
    resolution: int = tiny_data.RESOLUTION,
) -> AutoencoderKL:
    """A KL autoencoder that halves the image between stages: 32 x 32 pixels become a latent of 8 x 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        sample_size=resolution,
        scaling_factor=1.5305,  # SD3's own numbers, until training measures ours
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, activation: str, width: int = 64, layers: int = 2, heads: int = 2
) -> CLIPTextModelWithProjection:
    """A CLIP text encoder; SD3 has two, which differ in their activation."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            **_token_ids(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            hidden_act=activation,
        )
    )


def build_t5_encoder(tokenizer: T5Tokenizer, width: int = 128, layers: int = 2, heads: int = 4) -> T5EncoderModel:
    """The T5 encoder, as wide as the two CLIP encoders together."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=width,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
        )
    )


def build_transformer(
    latent_channels: int = 4, text_width: int = 64, width: int = 128, heads: int = 4, layers: int = 4, size: int = 8
) -> SD3Transformer2DModel:
    """SD3.5-medium in small: patches of 2 x 2, query and key norms, dual attention in the first block."""
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=size,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


# --- whole models ---------------------------------------------------------------------------------------


def build_pipeline(
    seed: int = 0,
    *,
    captions: Sequence[str] = tuple(tiny_data.all_captions()),
    length: int = PROMPT_LENGTH,
    resolution: int = tiny_data.RESOLUTION,
    shift: float = 1.0,
    vae_channels: Sequence[int] = (16, 32, 64),
    latent_channels: int = 4,
    text_width: int = 64,
    text_layers: int = 2,
    width: int = 128,
    heads: int = 4,
    layers: int = 4,
) -> StableDiffusion3Pipeline:
    """A whole SD3 pipeline with random weights that depend on `seed` only; 32 x 32 images, 3.6 M parameters.

    `captions` are the words of its tokenizers, `length` the tokens of its prompts, and `shift` its scheduler's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (build_clip_tokenizer(captions, length) for _ in range(2))
        tokenizer_3 = build_t5_tokenizer(captions, length)
        return StableDiffusion3Pipeline(
            transformer=build_transformer(latent_channels, text_width, width, heads, layers, resolution // VAE_FACTOR),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
            vae=build_vae(vae_channels, latent_channels, resolution=resolution),
            text_encoder=build_text_encoder(tokenizer, "quick_gelu", text_width, text_layers),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(tokenizer_2, "gelu", text_width, text_layers),
            tokenizer_2=tokenizer_2,
            text_encoder_3=build_t5_encoder(tokenizer_3, 2 * text_width, text_layers),
            tokenizer_3=tokenizer_3,
        )


def build_clip(
    seed: int = 0,
    *,
    captions: Sequence[str] = tuple(tiny_data.all_captions()),
    length: int = PROMPT_LENGTH,
    resolution: int = tiny_data.RESOLUTION,
    vision_width: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    patch: int = 4,
    text_width: int = 64,
    text_layers: int = 2,
    text_heads: int = 2,
    dim: int = 64,
) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP for 32 x 32 images with random weights that depend on `seed` only; 0.7 M parameters."""
    tokenizer = build_clip_tokenizer(captions, length)
    text: dict[str, Any] = {
        **_token_ids(tokenizer),
        "hidden_size": text_width,
        "intermediate_size": 2 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads,
        "max_position_embeddings": length,
        "projection_dim": dim,
    }
    vision: dict[str, Any] = {
        "hidden_size": vision_width,
        "intermediate_size": 2 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "image_size": resolution,
        "patch_size": patch,
        "projection_dim": dim,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
    images = CLIPImageProcessor(
        size={"shortest_edge": resolution},
        crop_size={"height": resolution, "width": resolution},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return model.eval(), CLIPProcessor(image_processor=images, tokenizer=tokenizer)
