"""How a thing is looked at: which models draw, with which settings. Settled from files alone, before torch is imported.

What belongs to a run is drawn, rewarded and judged as its own configuration says; other models as their pipeline draws
by itself (SD3 with 28 steps and guidance 7), or, up to SMALL pixels, as the embedded tiny SD3 is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.inspection.things import HUB_ID, INDEX, Thing, find_out
from flow_grpo.messages import say
from flow_grpo.models import hub
from flow_grpo.models.lora_files import PEFT_CONFIG, read_lora
from flow_grpo.models.lora_places import match, transformer_shapes
from flow_grpo.models.pipeline_files import (
    family_of,
    fetch_pipeline,
    image_size,
    takes_guidance,
    vae_factor,
    whole_folder,
)
from flow_grpo.paths import find
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes import sd3
from flow_grpo.recipes.base import declare, get_config, leaves
from flow_grpo.rewards.chosen import known_rewards, split_models
from flow_grpo.rewards.own_files import Asked, read_option
from flow_grpo.rewards.registry import CLIP_SCORER, REWARDS
from flow_grpo.runs.config import config_from, settings_of
from flow_grpo.runs.digest import base_digest, base_mismatch
from flow_grpo.runs.folder import flatten
from flow_grpo.runs.saved import CHECKPOINT_STATE, checkpoint_state, choose_checkpoint
from flow_grpo.runs.sprite import SMALL
from flow_grpo.settings import resolve

# What a look takes of a run's configuration; the rest, of its training, has the default.
TAKEN = ("pretrained.", "resolution", "height", "width", "max_sequence_length", "mixed_precision", "allow_tf32",
         "use_lora", "lora.", "prompts.test", "negative_prompt", "reward_fn.", "reward_model.", "reward_files.",
         "reward_range.", "reward_ensemble", "eval.", "diversity.", "targets.", "chat.", "remote.")  # fmt: skip
LARGE_BATCH = 4  # images at once, of more than SMALL pixels
LEAST_IMAGES = 5  # of a prompt, for every interval
FREE_REWARD = "jpeg_compressibility"  # in the place of a reward where none is measured: a configuration has one
MOST_TOKENS = 512  # of a prompt: more is a tokenizer without a limit
KINDS = ("clip", "dinov2", "open_clip", "scenes")
OPEN_CLIP_SOURCES = ("hf-hub:", "local-dir:")

FLAGS = {  # key -> the option that sets it, and its name in Options
    "pretrained.model": ("--base", "base"),
    "prompts.test": ("--prompts", "prompts"),
    "num_seeds": ("-n", "images"),
    "eval.num_image_per_prompt": ("-n", "images"),
    "diversity.model": ("--features", "features"),
    "diversity.pretrained": ("--features", "features"),
    "eval.judge": ("--judge", "judge"),
    "eval.num_steps": ("--steps", "steps"),
    "eval.guidance_scale": ("--guidance", "guidance"),
    "eval.tuned_share": ("--tuned-share", "tuned_share"),
    "resolution": ("--size", "size"),
    "eval.seed": ("--seed", "seed"),
    "eval.batch_size": ("--batch-size", "batch_size"),
}


@dataclass(frozen=True)
class Options:
    """What the command line may say; empty and None: as the thing's own settings have it."""

    base: str = ""
    loras: tuple[str, ...] = ()
    prompts: str = ""
    images: int = 16  # of each prompt
    features: str = ""
    reward: str = ""
    judge: str = ""
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    tuned_share: tuple[float, float] | None = None
    size: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    ema: bool = False
    measured: bool = True  # False: nothing is, and neither features, reward nor judge are asked for
    prompt: str = ""  # that is drawn, where nothing is measured


@dataclass(frozen=True)
class Model:
    """Something that draws: a pipeline, with LoRAs, or with another transformer."""

    name: str
    pipeline: str
    revision: str = ""
    loras: tuple[Path, ...] = ()
    transformer: Path | None = None  # of a checkpoint of full fine-tuning
    merged: str = ""  # config.pretrained.lora
    skip: tuple[str, ...] = ()  # config.pretrained.skip

    @property
    def base(self) -> Model:
        """What it draws with, and nothing added."""
        name = f"base model {Path(self.pipeline).name}"
        return replace(self, name=name, loras=(), transformer=None)


@dataclass(frozen=True)
class Look:
    """What will be drawn and measured."""

    config: ConfigDict
    models: tuple[Model, ...]  # the base, if there is one, then what is looked at
    rewarded: bool  # whether config.reward_fn is meant
    own: bool  # whether the settings are a run's: they keep their precision


def look_at(thing: Thing, against: Thing | None, options: Options) -> Look:
    """Settle what a look at a thing that draws takes.

    Raises:
        ConfigError: an option, a file or a setting does not fit, in one sentence.
    """
    values = _values_of(thing)
    config = _config(thing, values, options)
    guidance = config.eval.guidance_scale if options.guidance is None else options.guidance
    if values is not None and options.prompt and options.negative is None and guidance != 1:
        config.negative_prompt = _own_negative(values, options.prompt, config.negative_prompt)
    _set_options(config, options)
    _settle_negative(config, options)
    rewarded = _set_reward(config, values, options)
    resolve(config, 1, cuda=True, fetch=True, rewarded=("test",) if options.measured else ())
    model = _model_of(thing, config, options)
    _check_loras(model)
    base = _base_of(thing, against, model, config, options)
    if base and replace(base[0], name="") == replace(model, name=""):
        raise ConfigError(f"{thing.text} is compared with itself; --against takes another model.")
    return Look(config, (*base, model), rewarded, values is not None)


@contextmanager
def told_as_given(options: Options) -> Iterator[None]:
    """A mistake in a setting is told of the option that set it."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for key, (flag, name) in FLAGS.items():
            if getattr(options, name) not in ("", None):
                text = text.replace(f"config.{key} = ", f"{flag} ").replace(f"config.{key}: ", f"{flag}: ")
        if options.reward:
            text = re.sub(r"config\.reward_(?:model|files)\.(\w+) = '([^']*)'", r"--reward \1=\2", text)
            text = re.sub(r"config\.reward_(?:files|fn)\.(\w+)", r"--reward \1", text)
        raise ConfigError(text) from error


def _base_of(
    thing: Thing, against: Thing | None, model: Model, config: ConfigDict, options: Options
) -> tuple[Model, ...]:
    """What a model is compared with; nothing for a pipeline alone."""
    if against is None and (thing.kind != "pipeline" or model.loras):
        return (model.base,)
    if against is None and not options.base:
        return ()
    if against is None:
        against = _pipeline(options.base)
    values = _values_of(against)
    theirs = _config(against, values, options)
    with theirs.unlocked():
        theirs.resolution, theirs.height, theirs.width = config.resolution, config.height, config.width
    _settle_negative(theirs, options)
    _set_reward(theirs, values, options)
    resolve(theirs, 1, cuda=True, fetch=True, rewarded=("test",))
    base = _model_of(against, theirs, Options(ema=options.ema))
    _check_loras(base)
    return (base,)


def folder_config(options: Options, side: int) -> tuple[ConfigDict, bool]:
    """The settings for images of this side (the longer one) that are there already, and whether a reward is meant.

    Raises:
        ConfigError: an option is not allowed, or is for what draws.
    """
    for name, value in (("--base", options.base), ("--lora", options.loras), ("--prompts", options.prompts)):
        if value:
            raise ConfigError(f"{name} is for models, and there is nothing to draw from a folder of images.")
    config = get_config()
    config.eval.judge, config.eval.modes = options.judge, ""
    config.eval_diversity = True
    if options.features:
        set_features(config, options.features)
    check_features(config, side)
    rewarded = _set_reward(config, None, options, side)
    resolve(config, 1, cuda=True, fetch=True, rewarded=())
    return config, rewarded


# --- settings -------------------------------------------------------------------------------------------


def _values_of(thing: Thing) -> dict[str, Any] | None:
    """The settings of the run that a thing belongs to, or that a checkpoint away from it carries; None: of no run."""
    if thing.run is not None:
        return settings_of(thing.run)
    if thing.kind != "checkpoint" or thing.path is None:
        return None
    kept = checkpoint_state(thing.path).get("config")
    if not isinstance(kept, dict):
        raise ConfigError(f"{thing.text} lies in no run's folder, and its {CHECKPOINT_STATE} has no settings.")
    return flatten(kept)


def _config(thing: Thing, values: Mapping[str, Any] | None, options: Options) -> ConfigDict:
    """Of its run, or as its pipeline has it."""
    if values is None:
        return _foreign(_pipeline_of(thing, options))
    known = dict(leaves(get_config())) | {f"reward_fn.{name}": 0.0 for name in own_names(values)}
    taken = {
        key: value
        for key, value in values.items()
        if key.startswith(TAKEN) and (key in known or not key.startswith(("reward_fn.", "reward_model.")))
    }
    where = (thing.path if thing.run is None else thing.run) or Path()
    other = {"pretrained.model": options.base, "pretrained.revision": ""} if options.base else {}
    config = config_from(taken, where, other)
    config.eval.curve = ""  # of the run's own prompts and noises
    known_here = known_rewards(config)
    config.eval.rewards = tuple(name for name in config.eval.rewards if name in known_here)
    return config


def _foreign(pipeline: str) -> ConfigDict:
    """As the pipeline itself draws; as the tiny SD3 is drawn where it is that small."""
    fetch_pipeline(pipeline, subject="")
    folder = hub.folder_of(pipeline)
    assert folder is not None, "it was fetched"
    config = get_config()
    config.pretrained.model, config.eval.judge = pipeline, ""
    config.eval.modes = ""
    with hub.told_by_id(pipeline, folder):
        config.resolution, family, guided = _side_of(folder), family_of(folder), takes_guidance(folder)
    if config.resolution > SMALL:
        config.eval.num_steps, config.eval.guidance_scale = family.num_steps, family.guidance_scale if guided else 1.0
        config.max_sequence_length, config.eval.batch_size = family.max_sequence_length, LARGE_BATCH
    else:
        config.max_sequence_length = _tokens_of(folder) or config.max_sequence_length
    return config


def _tokens_of(folder: Path) -> int:
    """The most tokens of a prompt that a small pipeline's last tokenizer takes; 0: it does not say."""
    found = sorted(folder.glob("tokenizer*/tokenizer_config.json"))
    most = read_object(found[-1]).get("model_max_length") if found else 0
    return most if type(most) is int and 0 < most <= MOST_TOKENS else 0


def _side_of(folder: Path) -> int:
    """The images' side in pixels."""
    transformer = read_object(folder / "transformer/config.json", "config.pretrained.model: ")
    side = transformer.get("sample_size", 128)
    if type(side) is not int or side < 1:
        raise ConfigError(f"{folder}/transformer/config.json says sample_size: {side!r:.60}, not a whole number.")
    return vae_factor(folder) * side


def _set_options(config: ConfigDict, options: Options) -> None:
    chosen = {
        "eval.num_steps": options.steps,
        "eval.guidance_scale": options.guidance,
        "negative_prompt": options.negative,
        "eval.tuned_share": options.tuned_share,
        "resolution": options.size,
        "eval.seed": options.seed,
        "eval.batch_size": options.batch_size,
        "prompts.test": options.prompts or None,
        "eval.num_prompts": 0 if options.prompts else None,
        "eval.judge": options.judge or None,
    }
    if options.size is not None:
        config.height = config.width = 0
    config.update_from_flattened_dict({key: value for key, value in chosen.items() if value is not None})
    if not options.measured:
        config.eval.judge = config.eval.modes = ""
        config.prompts.test, config.eval.num_prompts = config.prompts.train, 0
        return
    config.eval.num_image_per_prompt = config.num_seeds = options.images
    config.eval_diversity, config.prompts.eval_diversity, config.diversity.num_prompts = True, config.prompts.test, 0
    if options.features:
        set_features(config, options.features)
    check_features(config, max(image_size(config)))


def _settle_negative(config: ConfigDict, options: Options) -> None:
    """A run that is guided in training alone has a negative prompt that is not read here; one that is given must be."""
    if config.eval.guidance_scale != 1:
        return
    if options.negative:
        raise ConfigError(
            f"--negative {options.negative!r} is what guidance leads away from, and there is none; --guidance takes "
            "another number than 1."
        )
    config.negative_prompt = ""


def _own_negative(values: Mapping[str, Any], prompt: str, default: str) -> str:
    """That of a prompt's own line in the prompt files of a run, as far as they are still there; else the default."""
    for key in ("prompts.train", "prompts.test", "prompts.eval_diversity"):
        path = str(values.get(key, ""))
        if not os.path.exists(find(path)):
            say(f"{path!r}, config.{key} of the run, is not here: the negative prompts of its lines are not known.")
        elif prompt in (negatives := PromptDataset.load(path).negatives):
            return negatives[prompt]
    return default


def set_features(config: ConfigDict, text: str) -> None:
    """Take the features that --features names: [clip:]MODEL, dinov2:MODEL, scenes:MODEL or open_clip:NAME:TAG."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        kind, rest = "clip", text
    model, pretrained = rest, ""
    if kind == "open_clip" and not rest.startswith(OPEN_CLIP_SOURCES):
        model, _, pretrained = rest.partition(":")
    if not model:
        raise ConfigError(
            f"--features {text} names no model; it takes [clip:]MODEL, dinov2:MODEL, scenes:MODEL or "
            "open_clip:NAME:TAG."
        )
    config.diversity.extractor, config.diversity.model, config.diversity.pretrained = kind, model, pretrained


def check_features(config: ConfigDict, side: int) -> None:
    """ConfigError, with what to type, for features of images much smaller than these."""
    path = Path(find(config.diversity.model)) / "config.json"
    if side <= SMALL or config.diversity.extractor == "open_clip" or not path.is_file():
        return
    content = read_object(path)
    vision = content.get("vision_config")
    sees = (vision if isinstance(vision, dict) else content).get("image_size", SMALL + 1)
    if isinstance(sees, int) and sees <= SMALL:
        raise ConfigError(
            f"the features {config.diversity.model} see {sees} x {sees} pixels, and these images have {side}: add "
            f"`--features {sd3.CLIP}` or `--features dinov2:{sd3.DINOV2}`."
        )


def _set_reward(config: ConfigDict, values: Mapping[str, Any] | None, options: Options, side: int = 0) -> bool:
    """Take the reward that is asked for, or the run's; whether there is one. `side`: of the images; 0: those drawn."""
    if options.measured and not options.reward and _has_reward(config, values):
        return True
    names = dict.fromkeys(config.reward_fn, 0.0)
    if options.reward:
        asked = reward_of(options.reward, side or max(image_size(config)))
        if asked.place:
            declare(config, [f"reward_files.{asked.name}"])
            config.reward_files[asked.name] = asked.place
        config.reward_fn.update(names | {asked.name: 1.0})
        config.eval.rewards = ()
        if asked.model:
            config.reward_model[asked.name] = asked.model
            config.reward_ensemble = config.reward_ensemble if len(split_models(asked.model)) > 1 else "mean"
        return True
    config.reward_fn.update(names | {FREE_REWARD: 1.0})
    config.eval.rewards = ()
    return False


def _has_reward(config: ConfigDict, values: Mapping[str, Any] | None) -> bool:
    """Whether the run's own reward can be measured here."""
    weights = {key.removeprefix("reward_fn."): w for key, w in (values or {}).items() if key.startswith("reward_fn.")}
    unknown = [name for name, weight in weights.items() if weight and name not in known_rewards(config)]
    if unknown:
        say(f"the run's reward {unknown[0]!r} is not known here: no reward is measured.")
    return not unknown and any(config.reward_fn.values())


def own_names(values: Mapping[str, Any]) -> list[str]:
    """Of a run's settings by their full names: the rewards of its own."""
    return [key.partition(".")[2] for key in values if key.startswith("reward_files.")]


def reward_of(text: str, side: int) -> Asked:
    """The reward that --reward names; of a CLIP-type one, a model for images of this side."""
    asked = read_option(text, REWARDS)
    if asked.model or asked.place or REWARDS[asked.name].scorer != CLIP_SCORER:
        return asked
    large = sd3.PICKSCORE if asked.name == "pickscore" else sd3.CLIP
    return replace(asked, model=get_config().reward_model[asked.name] if side <= SMALL else large)


# --- models ---------------------------------------------------------------------------------------------


def _pipeline(text: str) -> Thing:
    """What --base names."""
    base = find_out(text)
    if base.kind != "pipeline":
        raise ConfigError(f"--base {text} is no pipeline, which has a {INDEX}; it was found to be: {base.kind}.")
    return base


def _pipeline_of(thing: Thing, options: Options) -> str:
    """The pipeline that a thing of no run draws with."""
    if thing.kind == "pipeline":
        return thing.place
    if options.base:
        return _pipeline(options.base).place
    if known := _trained_on(thing):
        return known
    default = get_config().pretrained.model
    say(f"{thing.text} does not say what it was trained on: {default} is taken; --base names another.")
    return default


def _trained_on(thing: Thing) -> str:
    """The pipeline that a peft folder says it was trained on, if it can be one; else empty."""
    if thing.path is None or not (thing.path / PEFT_CONFIG).is_file():
        return ""
    named = read_object(thing.path / PEFT_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    for folder in (Path(find(named)), Path(find(named)).parent):  # peft may name the transformer inside
        if (folder / INDEX).is_file():
            return str(folder)
    return named if HUB_ID.fullmatch(named) and not Path(named).parent.exists() else ""


def _model_of(thing: Thing, config: ConfigDict, options: Options) -> Model:
    start = config.pretrained
    more = tuple(Path(find_lora(text)) for text in options.loras)
    model = Model("", start.model, start.revision, more, merged=start.lora, skip=tuple(start.skip))
    if thing.kind == "pipeline":
        return replace(model, name=_with_loras(thing.name, more))
    if thing.kind == "lora" and thing.path is not None:
        return replace(model, name=_with_loras(thing.name, more), loras=(thing.path, *more))
    folder = choose_checkpoint(thing.place, deep=True, subject=thing.text).folder
    if problem := base_mismatch(folder, base_digest(start)):
        raise ConfigError(f"the base model {start.model} {problem}")
    weights = folder / (("lora" if config.use_lora else "transformer") + ("_ema" if options.ema else ""))
    if not weights.is_dir():
        raise ConfigError(f"{'--ema: ' if options.ema else ''}{folder} has no {weights.name}/.")
    name = _with_loras(f"{thing.name}-{folder.name}" if thing.kind == "run" else thing.name, more)
    if config.use_lora:
        return replace(model, name=name, loras=(weights, *more))
    return replace(model, name=name, transformer=weights)


def find_lora(text: str) -> str:
    """What --lora names."""
    thing = find_out(text)
    if thing.kind != "lora":
        raise ConfigError(f"--lora {text} is no LoRA; it was found to be: {thing.kind}.")
    return thing.place


def _with_loras(name: str, loras: tuple[Path, ...]) -> str:
    return " + ".join([name, *(path.name for path in loras)])


def _check_loras(model: Model) -> None:
    """Each fits the pipeline, where that is here; one that is still to be fetched is known when it is loaded."""
    folder = whole_folder(model.pipeline, model.revision, model.skip) if model.loras else None
    shapes = {} if folder is None else transformer_shapes(folder)
    for path in model.loras if shapes else ():
        try:
            match(read_lora(path), shapes)
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).rstrip('.')}; the base is {model.pipeline}, and --base names another."
            ) from None
