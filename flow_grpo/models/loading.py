"""Load a pipeline whole, and hand it to the class of its family."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

from flow_grpo import places
from flow_grpo.errors import ConfigError
from flow_grpo.models.base import ModelFamily
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.models.pipeline_files import check_scheduler, expected_family, family_of, pipeline_index
from flow_grpo.models.registry import Family
from flow_grpo.paths import find

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARK = "prompt"  # a prompt, to be found in its chat
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # the parts that have weights


def class_of(family: Family) -> type[ModelFamily]:
    """The class that the registry names."""
    return places.load(family.place)


def load_model(pretrained: Any, precision: str) -> ModelFamily:
    """Load the pipeline of `config.pretrained`, each part in its dtype.

    Args:
        pretrained: `model`, a folder or hub id; `revision`; `skip`; `vae_dtype`; `text_dtype`; `distilled_guidance`;
            `attention`.
        precision: "no", "bf16" or "fp16": of the transformer, and of text encoders whose dtype is not given.

    Text encoders in `skip` are None then, as stock pipelines take them, and their files are neither fetched nor read.

    Raises:
        ConfigError: it is no pipeline of a known family, or is damaged, or lacks a part of its weights, which the
            library would fill with random numbers.
    """
    model, words = pretrained.model, "a pipeline"
    dtypes = {"transformer": DTYPES[precision], "vae": DTYPES[pretrained.vae_dtype]}
    text = DTYPES[pretrained.text_dtype or precision]
    try:
        with warnings.catch_warnings():  # diffusers 0.42 renames torch_dtype; this name works from 0.33 on
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            folder = find(model)
            if not os.path.isdir(folder):
                without = expected_family(model, pretrained.revision).without(pretrained.skip)
                nothing: dict[str, Any] = dict.fromkeys(without)
                folder = diffusers.DiffusionPipeline.download(folder, revision=pretrained.revision or None, **nothing)
            family = family_of(Path(folder))
            words = family.words
            pipeline, missing = _load_parts(folder, family, dtypes, text, pretrained.skip)
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        raise ConfigError(f"pretrained.model {model!r} cannot be loaded as {words}: {first_line(error)}") from error
    if missing:
        raise ConfigError(
            f"pretrained.model {model!r} is not whole: {missing[0]} is the first of {len(missing)} weights "
            "that it lacks."
        )
    if pretrained.attention:
        _choose_attention(pipeline.transformer, pretrained.attention)
    check_scheduler(pipeline.scheduler.config, type(pipeline.scheduler).__name__)
    return class_of(family)(pipeline, pretrained.distilled_guidance)


def check_prompt_length(model: str, folder: Path, length: int) -> None:
    """A chat template's words before the prompt leave some of the `length` tokens that a text encoder is given.

    Args:
        model: what the tokenizer is loaded from: a folder, or a hub id whose small files are in `folder`.

    Raises:
        ConfigError: they do not, or there is no such tokenizer.
    """
    family = family_of(folder)
    if family.chat is None:
        return
    library, kind = pipeline_index(folder)["tokenizer"]
    place = {} if os.path.isdir(find(model)) else {"revision": folder.name}
    try:
        tokenizer = getattr(import_module(library), kind).from_pretrained(find(model), subfolder="tokenizer", **place)
        chat = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **family.chat)
        before = len(tokenizer(text.partition(MARK)[0])["input_ids"])
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"config.pretrained.model = {model!r} has a tokenizer that cannot be used: {first_line(error)}"
        ) from error
    if length <= before:
        raise ConfigError(
            f"config.max_sequence_length = {length} leaves nothing of a prompt, which {family.words} reads after "
            f"{before} tokens of its chat template; it takes at least {before + 1}."
        )


def _choose_attention(transformer: Any, name: str) -> None:
    """By diffusers; ConfigError where the library or the GPU that it needs is missing."""
    try:
        transformer.set_attention_backend(name)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"config.pretrained.attention = {name!r} cannot be had here: {first_line(error)}") from None


def _load_parts(
    folder: str, family: Family, dtypes: dict[str, torch.dtype], text: torch.dtype, skip: Sequence[str]
) -> tuple[Any, list[str]]:
    """The pipeline in a folder, and the names of the weights that its files lack. Parts not in `dtypes` are `text`."""
    kind: Any = getattr(diffusers, family.pipeline)
    index = kind.load_config(folder)
    optional, left_out = (*family.optional, *family.optional.values()), family.without(skip)
    parts: dict[str, Any] = {name: None for name in optional if name in left_out or not index.get(name, [None])[0]}
    missing = []
    for name in [name for name in NETWORKS if name in index and name not in parts]:
        library, part = index[name]
        parts[name], found = getattr(import_module(library), part).from_pretrained(
            os.path.join(folder, name),
            torch_dtype=dtypes.get(name, text),
            output_loading_info=True,
        )
        missing += [f"{name}.{weight}" for weight in sorted(found["missing_keys"])]
    return kind.from_pretrained(folder, torch_dtype=text, **parts), missing
