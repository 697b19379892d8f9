"""Whether the folder of a pipeline fits the code of its family, told from its small files. Torch is not imported."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.models.files import PART_NEEDS, Needs, check_files
from flow_grpo.models.registry import FAMILIES, Family, published_family
from flow_grpo.rules import (
    FINITE,
    POSITIVE,
    YES_OR_NO,
    Rule,
    choice,
    each,
    is_text,
    number,
    only,
    or_null,
    whole,
)

INDEX = "model_index.json"
PIPELINE = "config.pretrained.model: "  # what sentences about its files begin with
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULER_RULES: Mapping[str, Rule] = {  # of a pipeline's; others have no effect, or are the scheduler's to check
    "num_train_timesteps": only(1000, "1000, in which the pipelines count time"),
    "invert_sigmas": only(False, "false, as the noise must go down"),
    "stochastic_sampling": only(False, "false, as config.sample.sde_type is what draws noise"),
    "shift": POSITIVE,
    "use_dynamic_shifting": YES_OR_NO,
    "use_karras_sigmas": or_null(YES_OR_NO),
    "use_exponential_sigmas": or_null(YES_OR_NO),
    "use_beta_sigmas": or_null(YES_OR_NO),
    "shift_terminal": or_null(number("a number from 0 to below 1", lambda x: 0 <= x < 1)),
    "time_shift_type": choice("exponential", "linear"),
}
DYNAMIC_SHIFT_RULES: Mapping[str, Rule] = {  # besides, with use_dynamic_shifting
    "base_shift": FINITE,
    "max_shift": FINITE,
    "base_image_seq_len": whole(1),
    "max_image_seq_len": whole(1),
}


def check_pipeline(model: Path, skip: Sequence[str] = ()) -> None:
    """The folder is a pipeline's of a known family, with all the parts it names, whole, and a scheduler that is ours.

    Args:
        skip: text encoders that are done without, as `check_skip` allows.

    Raises:
        ConfigError: for the first thing that is not so.
    """
    family = family_of(model)
    index = {name: part for name, part in pipeline_index(model).items() if name not in family.without(skip)}
    for name, part in index.items():
        if (needs := PART_NEEDS.get(name.split("_")[0])) is not None:
            _check_part(model, name, part, needs, family)
    for tokenizer, encoder in family.clips.items():
        if tokenizer in index:
            _check_length(model, tokenizer, encoder)
    for encoder, tokenizer in family.optional.items():
        if not index.get(tokenizer, [None])[0] and index.get(encoder, [None])[0]:
            raise ConfigError(f"{PIPELINE}{model} has a {encoder} without a {tokenizer}.")
    if "scheduler" in index:
        check_scheduler(read_object(model / "scheduler/scheduler_config.json", PIPELINE), index["scheduler"][1])
    _check_latents(model, family)


def family_of(model: Path) -> Family:
    """The family of a pipeline's folder, by its class; ConfigError for a class of none."""
    kind = pipeline_index(model).get("_class_name")
    if kind not in FAMILIES:
        raise ConfigError(
            f"config.pretrained.model = {str(model)!r} is a {kind!s:.80}; it takes a {' or '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def check_skip(model: Path, skip: Sequence[str]) -> None:
    """ConfigError for a name that is none of the text encoders which a family can do without."""
    family = expected_family(str(model))
    for name in skip:
        if name not in family.optional:
            others = " or ".join(map(repr, family.optional)) or "none"
            raise ConfigError(
                f"config.pretrained.skip = {tuple(skip)}: {name!r} is no text encoder that {family.words} can do "
                f"without; it takes {others}."
            )


def expected_family(model: str) -> Family:
    """The family of a folder; of a hub id whose index is in the cache, or which is known; else SD3.

    Raises:
        ConfigError: the folder's, or the index's, class is of none.
    """
    folder = _known_folder(model)
    return published_family(model) if folder is None else family_of(folder)


def takes_guidance(model: str) -> bool:
    """Whether classifier-free guidance has an effect; True of a hub id whose index is not in the cache."""
    folder = _known_folder(model)
    if folder is None:
        return True
    key = family_of(folder).unguided_key
    return not (key and pipeline_index(folder).get(key))


def takes_distilled_guidance(model: str) -> bool:
    """Whether the transformer of a folder, or of a hub id as far as it is known, takes a guidance scale as an input."""
    key, folder = expected_family(model).guidance_key, Path(model)
    if not key or not folder.is_dir():
        return bool(key)
    return _setting(folder / "transformer/config.json", key, YES_OR_NO, default=False)


def _known_folder(model: str) -> Path | None:
    """The folder of a pipeline, or the one in the cache with the index of a hub id."""
    from huggingface_hub import try_to_load_from_cache  # models are mostly folders

    if os.path.isdir(model):
        return Path(model)
    try:
        index = try_to_load_from_cache(model, INDEX)
    except (OSError, ValueError):  # no name that the hub or the disk could have
        return None
    return Path(index).parent if isinstance(index, str) else None


def image_sides(model: Path) -> tuple[int, float]:
    """Images have sides that are multiples of the first number of pixels, and at most the second.

    Of a hub id, whose files are not here, what its family's published models have.
    """
    if not model.is_dir():
        return expected_family(str(model)).pixels_per_token, math.inf
    pixels, key = pixels_per_token(model), family_of(model).side_key
    if not key:
        return pixels, math.inf
    return pixels, pixels * _setting(Path(model, "transformer/config.json"), key, whole(1), default=96)


def _check_latents(model: Path, family: Family) -> None:
    """The VAE's latents are those of the transformer, and their scale is known."""
    vae, transformer = (model / part / "config.json" for part in ("vae", "transformer"))
    for key in family.scale_keys:
        _setting(vae, key, FINITE, default=0.0)
    latents = _setting(vae, family.channels_key, whole(1), default=16)
    for key, rule in family.per_channel.items():
        _setting(vae, key, each(rule, f"a list of {latents}, each {rule.allowed}", latents, latents), default=None)
    taken, given = latents * family.packing**2, latents * (family.out_packing or family.packing) ** 2
    _setting(transformer, "in_channels", only(taken, f"{taken}, as the VAE's latents have"), default=taken)
    rule = only(given, f"{given}")
    _setting(transformer, "out_channels", or_null(rule) if given == taken else rule, default=given)
    for key in family.fixed.keys() & read_object(transformer, PIPELINE).keys():
        _setting(transformer, key, family.fixed[key], default=None)


def pixels_per_token(model: Path) -> int:
    """The side of the square of pixels that is one token of a pipeline's transformer."""
    return vae_factor(model) * token_side(model)


def vae_factor(model: Path) -> int:
    """The side of the square of pixels that is one latent of a pipeline's VAE."""
    family = family_of(model)
    stages = _setting(Path(model, "vae/config.json"), family.stages_key, family.stages, family.default_stages)
    return 2 ** (len(stages) + family.halvings)


def token_side(model: Path) -> int:
    """The side of the square of latents that is one token of a pipeline's transformer."""
    side = family_of(model).token_side
    return side or _setting(Path(model, "transformer/config.json"), "patch_size", whole(1), default=2)


def _setting(path: Path, key: str, rule: Rule, default: Any) -> Any:
    """A value of a file of settings; `default`, which is the library's, where the file does not say."""
    value = read_object(path, PIPELINE).get(key, default)
    if not rule.accepts(value):
        raise ConfigError(f'{PIPELINE}{path} says "{key}": {value!r:.200}; it takes {rule.allowed}.')
    return value


def pipeline_index(model: Path) -> dict[str, Any]:
    """What model_index.json says: the class of the pipeline, and name: [library, class] of its parts."""
    if not os.path.lexists(model / "model_index.json"):
        raise ConfigError(
            f"config.pretrained.model = {str(model)!r} has no model_index.json; it takes the folder of a "
            f"{' or '.join(FAMILIES)}."
        )
    return read_object(model / "model_index.json", PIPELINE)


def _check_length(model: Path, tokenizer: str, encoder: str) -> None:
    """A CLIP's tokenizer cuts prompts to what its text encoder takes."""
    longest = _setting(model / encoder / "config.json", "max_position_embeddings", whole(1), default=77)
    _setting(model / tokenizer / "tokenizer_config.json", "model_max_length", whole(1, longest), default=None)


def _check_part(model: Path, name: str, part: Any, needs: Needs, family: Family) -> None:
    """One entry of model_index.json: [library, class], or [null, null] for none."""
    if not (isinstance(part, list) and len(part) == 2 and (part == [None, None] or all(map(is_text, part)))):
        raise ConfigError(f"{PIPELINE}{model / 'model_index.json'} says {name!r}: {part!r:.200}; it takes two texts.")
    if part != [None, None]:
        check_files(model / name, PIPELINE, needs)
    elif name not in (*family.optional, *family.optional.values()):
        others = f"only {family.optional_words} may be missing" if family.optional else "no part may be missing"
        raise ConfigError(f"{PIPELINE}{model} has no {name}; {others}.")


def check_scheduler(settings: Mapping[str, Any], kind: str) -> None:
    """ConfigError unless a pipeline's scheduler, of the class `kind`, gives noise levels that our samplers take."""
    if kind != SCHEDULER:
        raise ConfigError(f"{PIPELINE}its scheduler is a {kind}, whose steps are not ours; it takes a {SCHEDULER}.")
    dynamic = settings.get("use_dynamic_shifting")
    rules = {**SCHEDULER_RULES, **(DYNAMIC_SHIFT_RULES if dynamic else {})}
    for key, rule in rules.items():
        if key in settings and not rule.accepts(settings[key]):
            raise ConfigError(f'{PIPELINE}its scheduler says "{key}": {settings[key]!r:.200}; it takes {rule.allowed}.')
    if dynamic and settings.get("base_image_seq_len", 256) == settings.get("max_image_seq_len", 4096):
        raise ConfigError(f"{PIPELINE}its scheduler's base_image_seq_len and max_image_seq_len must differ.")
