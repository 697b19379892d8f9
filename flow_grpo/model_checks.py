"""Whether the model, and the models that look at its images, fit a configuration, told from their files.

Every mistake is a ConfigError of one sentence. Torch is not imported.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.methods.base import takes_only
from flow_grpo.models import hub
from flow_grpo.models.files import CLIP_NEEDS, MODEL_NEEDS, Needs, check_files
from flow_grpo.models.lora_files import read_lora
from flow_grpo.models.lora_places import check_lora_targets, match, modules_of, transformer_shapes
from flow_grpo.models.pipeline_files import (
    check_pipeline,
    check_skip,
    expected_family,
    fetch_pipeline,
    image_sides,
    image_size,
    takes_distilled_guidance,
    takes_guidance,
    whole_folder,
)
from flow_grpo.models.registry import ATTENTIONS, UNMASKED
from flow_grpo.paths import find
from flow_grpo.recipes.base import KEYS, leaves
from flow_grpo.rewards.chosen import checkpoints_in_use
from flow_grpo.rewards.registry import spec_of_key
from flow_grpo.scenes.files import DETECTOR_NEEDS, check_detector, is_detector
from flow_grpo.shaping_checks import FEATURES


def choose_lora_targets(config: ConfigDict) -> None:
    """Where none are named, those of the model's family."""
    if not config.lora.target_modules:
        family = expected_family(config.pretrained.model, config.pretrained.revision)
        with config.unlocked():
            config.lora.target_modules = family.lora_targets


def fetch_small_files(config: ConfigDict) -> None:
    """The small files of models of the hub; ConfigError for one that is neither there nor in its cache."""
    pretrained = config.pretrained
    fetch_pipeline(pretrained.model, pretrained.revision, pretrained.skip)
    for key, model, _, file in _scorers(config):
        hub.require(f"config.{key} = ", model, file)


def check_model(config: ConfigDict) -> None:
    """The model is a pipeline of a known family that can make images of this size, as far as its files are here."""
    pretrained = config.pretrained
    check_skip(pretrained.model, pretrained.skip, pretrained.revision)
    if pretrained.vae_checkpointing and not expected_family(pretrained.model, pretrained.revision).vae_checkpoints:
        raise ConfigError(
            f"config.pretrained.vae_checkpointing = True: the VAE of {pretrained.model} keeps its activations; it "
            "takes False."
        )
    folder = hub.folder_of(pretrained.model, pretrained.revision)
    if folder is None:
        return
    whole = whole_folder(pretrained.model, pretrained.revision, pretrained.skip) is not None
    with hub.told_by_id(pretrained.model, folder):
        check_pipeline(folder, pretrained.skip, whole)
        if config.use_lora and whole and (shapes := transformer_shapes(folder)):
            check_lora_targets(modules_of(shapes), config.lora.target_modules)
        _check_sides(config, folder)
        _check_guidance(config, folder)


def _check_sides(config: ConfigDict, folder: Path) -> None:
    pixels, largest = image_sides(folder)
    for side, pixels_along in zip(("height", "width"), image_size(config), strict=True):
        if pixels_along % pixels or pixels_along > largest:
            limit = "" if largest == math.inf else f", at most {largest}"
            raise ConfigError(
                f"config.{side if config[side] else 'resolution'} = {pixels_along} does not fit the model "
                f"{config.pretrained.model}; it takes a multiple of {pixels}{limit}."
            )


def check_attention(config: ConfigDict) -> None:
    """The family's attention can be computed in another way, where one is asked for."""
    pretrained = config.pretrained
    chosen, family = pretrained.attention, expected_family(pretrained.model, pretrained.revision)
    if chosen and not family.attention:
        raise ConfigError(
            f"config.pretrained.attention = {chosen!r} has no effect on {family.words}, whose attention is torch's; it "
            'takes "".'
        )
    if chosen in UNMASKED and family.masks:
        others = ", ".join(f'"{name}"' for name in ATTENTIONS if name not in UNMASKED)
        raise ConfigError(
            f"config.pretrained.attention = {chosen!r} takes no mask, which {family.words} has for prompts of "
            f"different lengths; it takes {others}."
        )


def _check_guidance(config: ConfigDict, folder: Path) -> None:
    """A distilled pipeline draws without classifier-free guidance, and others take no scale as an input."""
    if not takes_distilled_guidance(folder):
        takes_only(
            config, "pretrained.distilled_guidance", KEYS["pretrained.distilled_guidance"].default,
            f"is no input of {config.pretrained.model}",
        )  # fmt: skip
    if takes_guidance(folder):
        return
    for key, value in leaves(config):
        if key.endswith(".guidance_scale") and value != 1:
            raise ConfigError(
                f"config.{key} = {value} has no effect on {config.pretrained.model}, which is distilled; it takes 1.0."
            )


def check_start(config: ConfigDict) -> None:
    """The LoRA that is merged into the model can be read, and is of this transformer, where that is here."""
    if not config.pretrained.lora:
        return
    path = Path(find(config.pretrained.lora))
    if not path.exists():
        raise ConfigError(
            f"config.pretrained.lora = {config.pretrained.lora!r} does not exist; it takes a .safetensors file, or the "
            "folder of a LoRA."
        )
    try:
        pretrained = config.pretrained
        file, folder = read_lora(path), whole_folder(pretrained.model, pretrained.revision, pretrained.skip)
        if folder is not None and (shapes := transformer_shapes(folder)):
            match(file, shapes)
    except ConfigError as error:
        raise ConfigError(f"config.pretrained.lora: {error}") from None


def check_scorers(config: ConfigDict) -> None:
    """The folders of the models that look at images are whole."""
    for key, model, needs, _ in _scorers(config):
        if os.path.isdir(found := find(model)):
            check_files(Path(found), f"config.{key}: ", needs)
            if needs is DETECTOR_NEEDS:
                check_detector(f"config.{key} = {model!r}", read_object(Path(found) / "config.json"))


def _scorers(config: ConfigDict) -> list[tuple[str, str, Needs, str]]:
    """The models that look at images: key, model, what a folder of it needs, and a file that it has on the hub."""
    models: list[tuple[str, str, Needs, str]] = []
    for key, model in checkpoints_in_use(config):
        spec = spec_of_key(key)
        models.append((key, model, spec.needs, spec.hub_file))
    if config.eval.judge:
        needs = DETECTOR_NEEDS if is_detector(config.eval.judge) else CLIP_NEEDS
        models.append(("eval.judge", config.eval.judge, needs, hub.SETTINGS))
    if config.eval_diversity and config.diversity.extractor != "open_clip":
        needs = DETECTOR_NEEDS if config.diversity.extractor == "scenes" else MODEL_NEEDS
        models.append(("diversity.model", config.diversity.model, needs, hub.SETTINGS))
    if config.shaping.kind in FEATURES and config.shaping.extractor not in ("pixels", "open_clip"):
        models.append(("shaping.model", config.shaping.model, MODEL_NEEDS, hub.SETTINGS))
    return models
