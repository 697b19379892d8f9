"""Whether a pipeline fits the code of its family, told from its small files. Torch is not imported.

Of a hub id these are fetched first, into the hub's cache: `fetch_pipeline`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.models import hub
from flow_grpo.models.files import PART_NEEDS, WEIGHTS, Needs, check_files, small
from flow_grpo.models.hub import INDEX
from flow_grpo.models.registry import FAMILIES, Family, published_family
from flow_grpo.paths import find
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

KEY = "config.pretrained.model"
PIPELINE = f"{KEY}: "  # what sentences about its files begin with
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
NONE = [None, None]  # in the index: a part that is missing
DYNAMIC_SHIFT_RULES: Mapping[str, Rule] = {  # besides, with use_dynamic_shifting
    "base_shift": FINITE,
    "max_shift": FINITE,
    "base_image_seq_len": whole(1),
    "max_image_seq_len": whole(1),
}


def fetch_pipeline(model: str, revision: str = "", skip: Sequence[str] = (), subject: str = f"{KEY} = ") -> None:
    """Have the small files of a hub id in the hub's cache, but for parts in `skip`; nobody is asked for a whole one.

    Raises:
        ConfigError: it is neither on the hub nor, whole, in its cache, begun by `subject`; or of no known family.
    """
    if whole_folder(model, revision, skip) is not None:
        return
    folder = hub.fetch(subject, model, revision)
    with hub.told_by_id(model, folder):
        needs = _needs(folder, skip)
    hub.fetch_more(subject, model, folder, [f"{name}/{file}" for name in needs for file in small(needs[name])])


def whole_folder(model: str, revision: str = "", skip: Sequence[str] = ()) -> Path | None:
    """A pipeline's folder, or that of the hub's cache, where that has all that loads, and not the small files alone."""
    folder = hub.folder_of(model, revision)
    if folder is None or os.path.isdir(find(model)):
        return folder
    with hub.told_by_id(model, folder):
        needs = _needs(folder, skip)
    files = all((folder / name / file).is_file() for name in needs for file in small(needs[name]))
    weights = (hub.has_weights(folder / name) for name in needs if WEIGHTS in needs[name])
    return folder if files and all(weights) else None


def _needs(folder: Path, skip: Sequence[str]) -> dict[str, Needs]:
    """Of each part that loads, the files."""
    family, index = family_of(folder), pipeline_index(folder)
    names = [name for name in family.parts if name not in family.without(skip) and index.get(name, NONE) != NONE]
    return {name: PART_NEEDS[name.split("_")[0]] for name in names}


def check_pipeline(model: Path, skip: Sequence[str] = (), whole: bool = True) -> None:
    """The folder is a pipeline's of a known family, with all the parts it takes, and a scheduler that is ours.

    Args:
        skip: text encoders that are done without, as `check_skip` allows.
        whole: every file is looked for; else, of a hub id, the small ones.

    Raises:
        ConfigError: for the first thing that is not so.
    """
    family, index = family_of(model), pipeline_index(model)
    without = family.without(skip)
    for name in family.parts:
        if name not in without:
            _check_part(model, name, index.get(name, NONE), family, whole)
    for tokenizer, encoder in family.clips.items():
        _check_length(model, tokenizer, encoder)
    for encoder, tokenizer in family.optional.items():
        if encoder not in without and not index.get(tokenizer, NONE)[0] and index.get(encoder, NONE)[0]:
            raise ConfigError(f"{PIPELINE}{model} has a {encoder} without a {tokenizer}.")
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


def check_skip(model: str, skip: Sequence[str], revision: str = "") -> None:
    """ConfigError for a name that is none of the text encoders which a family can do without."""
    family = expected_family(model, revision)
    for name in skip:
        if name not in family.optional:
            others = " or ".join(map(repr, family.optional)) or "none"
            raise ConfigError(
                f"config.pretrained.skip = {tuple(skip)}: {name!r} is no text encoder that {family.words} can do "
                f"without; it takes {others}."
            )


def expected_family(model: str, revision: str = "") -> Family:
    """The family of a folder, or of a hub id; of one that `fetch_pipeline` was not asked for, by its name, or SD3.

    Raises:
        ConfigError: the class in its index is of none.
    """
    folder = hub.folder_of(model, revision)
    return published_family(model) if folder is None else family_of(folder)


def takes_guidance(folder: Path) -> bool:
    """Whether classifier-free guidance has an effect."""
    key = family_of(folder).unguided_key
    return not (key and pipeline_index(folder).get(key))


def takes_distilled_guidance(folder: Path) -> bool:
    """Whether the transformer takes a guidance scale as an input."""
    key = family_of(folder).guidance_key
    return bool(key) and _setting(folder / "transformer/config.json", key, YES_OR_NO, default=False)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images, in pixels: `resolution`, but where they are given apart."""
    return config.height or config.resolution, config.width or config.resolution


def image_sides(model: Path) -> tuple[int, float]:
    """Images have sides that are multiples of the first number of pixels, and at most the second."""
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
    if not os.path.lexists(model / INDEX):
        raise ConfigError(
            f"config.pretrained.model = {str(model)!r} has no model_index.json; it takes the folder of a "
            f"{' or '.join(FAMILIES)}."
        )
    return read_object(model / INDEX, PIPELINE)


def _check_length(model: Path, tokenizer: str, encoder: str) -> None:
    """A CLIP's tokenizer cuts prompts to what its text encoder takes."""
    longest = _setting(model / encoder / "config.json", "max_position_embeddings", whole(1), default=77)
    _setting(model / tokenizer / "tokenizer_config.json", "model_max_length", whole(1, longest), default=None)


def _check_part(model: Path, name: str, part: Any, family: Family, whole: bool) -> None:
    """One entry of model_index.json: [library, class], or [null, null] for none."""
    if not (isinstance(part, list) and len(part) == 2 and (part == NONE or all(map(is_text, part)))):
        raise ConfigError(f"{PIPELINE}{model / INDEX} says {name!r}: {part!r:.200}; it takes two texts.")
    if part != NONE:
        needs = PART_NEEDS[name.split("_")[0]]
        check_files(model / name, PIPELINE, needs if whole else [[file] for file in small(needs)])
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
