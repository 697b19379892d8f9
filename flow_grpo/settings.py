"""From a configuration to the loops of a run: `resolve` checks every value, and adds the batch arithmetic.

Every mistake is a ConfigError of one sentence, raised before anything loads: the key, its value, what is allowed.
Nothing heavy is imported at the top of this module.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.batching import BatchPlan, plan_batches
from flow_grpo.errors import ConfigError
from flow_grpo.files import LIMITS, read_object
from flow_grpo.models.files import CLIP_NEEDS, MODEL_NEEDS, PART_NEEDS, Needs, check_files
from flow_grpo.paths import find
from flow_grpo.rewards.registry import REWARDS, check_checkpoint, reward_names, validate_rewards
from flow_grpo.runs.folder import run_folder_of
from flow_grpo.runs.lock import in_use, is_locked
from flow_grpo.runs.saved import checkpoint_state, find_checkpoint

PIPELINE = "config.pretrained.model: "  # what sentences about its files begin with
WITHOUT_T5 = ("text_encoder_3", "tokenizer_3")  # the parts that a pipeline may lack
HUB_PIXELS_PER_TOKEN = 16  # SD3's VAE shrinks an image by 8, its transformer takes patches of 2
LAUNCH_HINT = "`accelerate launch --num_processes N` on GPUs, `torchrun --nproc-per-node N` on CPUs: see README.md"


@dataclass(frozen=True)
class Settings:
    """A configuration that was checked, and what follows from it on this number of processes."""

    config: FrozenConfigDict
    plan: BatchPlan
    num_processes: int


def resolve(config: ConfigDict, num_processes: int, cuda: bool) -> Settings:
    """Check everything that can be checked before a model loads, and derive the batch arithmetic.

    Args:
        config: every key of config/base.py.
        num_processes: processes that were started.
        cuda: whether they run on GPUs.

    Raises:
        ConfigError: for the first mistake found.
    """
    config = _with_home_expanded(config)
    _check_values(config)
    _check_launch(config, num_processes, cuda)
    validate_rewards(config)
    _check_sampler(config)
    _check_loop(config)
    plan = plan_batches(
        groups=config.sample.groups_per_epoch,
        group_size=config.sample.num_image_per_prompt,
        updates=config.train.updates_per_epoch,
        num_processes=num_processes,
    )
    _check_model(config)
    _check_scorers(config)
    _check_prompts(config)
    if config.eval.modes:
        read_modes(Path(config.eval.modes), "config.eval.modes: ")
    if config.resume_from:
        _check_resume(config, _checkpoint_to_resume(config.resume_from))
    return Settings(FrozenConfigDict(config), plan, num_processes)


# --- one value at a time --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What one key may be."""

    accepts: Callable[[Any], bool]
    allowed: str  # completes "it takes ..."


def _whole(low: int, high: int | None = None) -> Rule:
    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    return Rule(accepts, f"a whole number of at least {low}" if high is None else f"a whole number, {low} to {high}")


def _number(allowed: str, within: Callable[[float], bool]) -> Rule:
    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and within(value)

    return Rule(accepts, allowed)


def _choice(*names: str) -> Rule:
    return Rule(lambda value: value in names, " or ".join(f'"{name}"' for name in names))


def _each(rule: Rule, allowed: str, low: int = 0, high: int | None = None) -> Rule:
    """A tuple of low ... high values of one kind."""

    def accepts(value: Any) -> bool:
        fits = isinstance(value, tuple | list) and len(value) >= low and (high is None or len(value) <= high)
        return fits and all(map(rule.accepts, value))

    return Rule(accepts, allowed)


def _or_null(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.allowed}, or null")


def _only(value: Any, why: str) -> Rule:
    return Rule(lambda given: given == value, why)


def text_fault(text: str) -> str:
    """What makes a text unfit for tokenizers and files, as the end of a sentence about it; "": nothing."""
    if "\0" in text:
        return "has a null character"
    try:
        length = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return f"has \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character"
    return f"is longer than {LIMITS['prompt']}" if length > LIMITS["prompt"].value else ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not text_fault(value)


def _folder(allowed: str, longest: int = 255) -> Rule:
    """A path whose folders have names of at most so many bytes, without control characters."""

    def accepts(value: Any) -> bool:
        fits = _is_text(value) and not any(unicodedata.category(letter) == "Cc" for letter in value)
        return fits and all(len(part.encode()) <= longest for part in value.split("/")) and len(value.encode()) < 2048

    return Rule(accepts, f"{allowed}, of names of at most {longest} bytes without control characters")


_POSITIVE = _number("a number above 0", lambda x: x > 0)
_NOT_NEGATIVE = _number("a number of at least 0", lambda x: x >= 0)
_BELOW_ONE = _number("a number from 0 to below 1", lambda x: 0 <= x < 1)
_FINITE = _number("a finite number", lambda x: True)
_YES_OR_NO = Rule(lambda value: isinstance(value, bool), "True or False")
_TEXT = Rule(_is_text, "text")
_FILLED = Rule(lambda value: _is_text(value) and value.strip() != "", "text that is not empty")

RULES: Mapping[str, Rule] = {
    "run_name": _folder("a folder under config.logdir"),
    "recipe": _folder("a name", 200),  # with the time of day, it names a run's folder
    "logdir": _folder("a folder"),
    "project": _FILLED,
    "trackers": _each(_choice("wandb", "tensorboard"), 'a tuple of "wandb" and "tensorboard", or ()'),
    "seed": _whole(0),
    "num_epochs": _whole(1),
    "max_seconds": _NOT_NEGATIVE,
    "num_processes": _whole(0),
    "num_threads": _whole(0),
    "resume_from": _TEXT,
    "eval_freq": _whole(0),
    "save_freq": _whole(0),
    "num_checkpoint_limit": _whole(0),
    "pretrained.model": _FILLED,
    "pretrained.revision": _TEXT,
    "resolution": _whole(1),
    "max_sequence_length": _whole(1, 512),
    "mixed_precision": _choice("no", "bf16", "fp16"),
    "allow_tf32": _YES_OR_NO,
    "gradient_checkpointing": _YES_OR_NO,
    "prompt_cache_size": _whole(1),
    "use_lora": _YES_OR_NO,
    "lora.rank": _whole(1),
    "lora.alpha": _POSITIVE,
    "lora.target_modules": _each(_FILLED, "a tuple of one or more names of modules", low=1),
    "prompts.train": _FILLED,
    "prompts.test": _FILLED,
    "use_reward_gradient": _YES_OR_NO,
    "sample.num_steps": _whole(1, 10_000),
    "sample.guidance_scale": _NOT_NEGATIVE,
    "sample.sde_type": _choice("ode", "sde", "dance", "cps"),
    "sample.noise_level": _NOT_NEGATIVE,
    "sample.sde_window_size": _whole(0),
    "sample.sde_window_range": _each(_whole(0), "two whole numbers, (first, one past the last)", low=2, high=2),
    "sample.groups_per_epoch": _whole(1),
    "sample.num_image_per_prompt": _whole(1),
    "sample.batch_size": _whole(1),
    "train.batch_size": _whole(1),
    "train.updates_per_epoch": _whole(1),
    "train.learning_rate": _POSITIVE,
    "train.adam_beta1": _BELOW_ONE,
    "train.adam_beta2": _BELOW_ONE,
    "train.adam_weight_decay": _NOT_NEGATIVE,
    "train.adam_epsilon": _POSITIVE,
    "train.max_grad_norm": _POSITIVE,
    "train.beta": _NOT_NEGATIVE,
    "train.ema": _YES_OR_NO,
    "train.ema_decay": _BELOW_ONE,
    "train.max_nonfinite_updates": _whole(1),
    "train.num_inner_epochs": _whole(1, 1_000_000),
    "train.clip_range": _number("a number above 0 and below 1", lambda x: 0 < x < 1),
    "train.adv_clip_max": _POSITIVE,
    "train.advantage_mode": _choice("all", "positive", "negative", "weighted"),
    "train.global_std": _YES_OR_NO,
    "train.timestep_fraction": _number("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "train.kl_space": _choice("gaussian", "velocity"),
    "train.ratio_normalization": _YES_OR_NO,
    "train.ratio": _choice("sde", "ode_step", "ode_path", "cfm"),
    "train.ratio_probes": _whole(0, 100_000),
    "train.max_ratio_error": _POSITIVE,
    "drtune.num_train_steps": _whole(1),
    "drtune.early_stop": _whole(0),
    "drtune.two_pass": _YES_OR_NO,
    "drtune.hinge": _NOT_NEGATIVE,
    "eval_ode_log_prob": _YES_OR_NO,
    "eval_ode_log_prob_freq": _whole(0),
    "eval_diversity": _YES_OR_NO,
    "eval_diversity_freq": _whole(0),
    "num_seeds": _whole(4, 1_000_000),
    "prompts.eval_diversity": _FILLED,
    "diversity.extractor": _choice("clip", "dinov2", "open_clip"),
    "diversity.model": _FILLED,
    "diversity.pretrained": _TEXT,
    "diversity.num_prompts": _whole(0),
    "diversity.order": _NOT_NEGATIVE,
    "diversity.bandwidth": _NOT_NEGATIVE,
    "diversity.num_draws": _whole(50, 1_000_000),
    "diversity.batch_size": _whole(1),
    "visualize_steps": _YES_OR_NO,
    "visualize_steps_freq": _whole(0),
    "entropy.num_prompts": _whole(1),
    "entropy.num_image_per_prompt": _whole(2, 1_000_000),
    "entropy.num_probes": _whole(1, 100_000),
    "entropy.distribution": _choice("rademacher", "gaussian", "orthogonal"),
    "entropy.solver": _choice("euler", "heun", "rk4"),
    "entropy.batch_size": _whole(1),
    "entropy.num_strip_prompts": _whole(1),
    "eval.seed": _whole(0),
    "eval.num_steps": _whole(1, 10_000),
    "eval.guidance_scale": _NOT_NEGATIVE,
    "eval.num_prompts": _whole(0),
    "eval.num_image_per_prompt": _whole(1, 1_000_000),
    "eval.batch_size": _whole(1),
    "eval.ema": _YES_OR_NO,
    "eval.rewards": _each(_FILLED, "a tuple of names of rewards, or ()"),
    "eval.judge": _TEXT,
    "eval.modes": _TEXT,
    "eval.num_grid_prompts": _whole(1),
    "eval.num_grid_images": _whole(1),
}

# Groups of keys named after the rewards; `validate_rewards` checks the names.
OPEN_GROUPS: Mapping[str, Rule] = {"reward_fn": _FINITE, "reward_model": _TEXT}


SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULER_RULES: Mapping[str, Rule] = {  # of a pipeline's; others have no effect, or are the scheduler's to check
    "num_train_timesteps": _only(1000, "1000, the unit of SD3's noise levels"),
    "invert_sigmas": _only(False, "false, as the noise must go down"),
    "stochastic_sampling": _only(False, "false, as config.sample.sde_type is what draws noise"),
    "shift": _POSITIVE,
    "use_dynamic_shifting": _YES_OR_NO,
    "use_karras_sigmas": _or_null(_YES_OR_NO),
    "use_exponential_sigmas": _or_null(_YES_OR_NO),
    "use_beta_sigmas": _or_null(_YES_OR_NO),
    "shift_terminal": _or_null(_number("a number from 0 to below 1", lambda x: 0 <= x < 1)),
    "time_shift_type": _choice("exponential", "linear"),
}
DYNAMIC_SHIFT_RULES: Mapping[str, Rule] = {  # besides, with use_dynamic_shifting
    "base_shift": _FINITE,
    "max_shift": _FINITE,
    "base_image_seq_len": _whole(1),
    "max_image_seq_len": _whole(1),
}


def _check_values(config: ConfigDict) -> None:
    """Every key of config/base.py is there, has a value of its kind and in its range; there are no others."""
    values = dict(leaves(config))
    missing = [key for key in RULES if key not in values]
    if missing:
        raise ConfigError(f"config.{missing[0]} is missing; start from a recipe of config/grpo.py or config/base.py.")
    for key, value in values.items():
        rule = RULES.get(key) or OPEN_GROUPS.get(key.split(".")[0])
        if rule is None:
            raise ConfigError(f"config.{key} = {value!r} is not a key; `fme ls keys` lists all there are.")
        if not rule.accepts(value):
            raise ConfigError(f"config.{key} = {value!r} is not allowed; it takes {rule.allowed}.")


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key by its full name, and its value: ("train.beta", 0.0), ..."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _with_home_expanded(config: ConfigDict) -> ConfigDict:
    """A copy in which "~/..." is written out, since the libraries that are given the paths do not do it."""
    copied = ConfigDict(config.to_dict())
    for key, value in list(leaves(copied)):
        if isinstance(value, str) and value.startswith("~/"):
            copied.update_from_flattened_dict({key: os.path.expanduser(value)})
    return copied


# --- values that must agree -----------------------------------------------------------------------------


def _check_launch(config: ConfigDict, num_processes: int, cuda: bool) -> None:
    if config.num_processes not in (0, num_processes):
        raise ConfigError(
            f"config.num_processes = {config.num_processes}, but {num_processes} started; start "
            f"{config.num_processes} ({LAUNCH_HINT}), or take what is started with config.num_processes = 0."
        )
    if config.mixed_precision == "fp16" and not cuda:
        raise ConfigError('config.mixed_precision = "fp16" needs a GPU; it takes "no" or "bf16" on a CPU.')


def _check_sampler(config: ConfigDict) -> None:
    sample = config.sample
    if sample.sde_type == "cps" and sample.noise_level > 1:
        raise ConfigError(
            f"config.sample.noise_level = {sample.noise_level} is not allowed with config.sample.sde_type = "
            '"cps"; it takes a number from 0 to 1.'
        )
    size, (first, end) = sample.sde_window_size, sample.sde_window_range
    if size > sample.num_steps:
        raise ConfigError(
            f"config.sample.sde_window_size = {size} is more than config.sample.num_steps = {sample.num_steps}; it "
            "takes at most as many, or 0 for all steps."
        )
    if (first, end) == (0, 0):
        return
    if size == 0:
        raise ConfigError(
            f"config.sample.sde_window_range = {(first, end)} has no window to place; set "
            "config.sample.sde_window_size, or the range to (0, 0)."
        )
    if not first + size <= end <= sample.num_steps:
        raise ConfigError(
            f"config.sample.sde_window_range = {(first, end)} must hold a window of {size} steps (sde_window_size) and "
            f"end by step {sample.num_steps} (num_steps); (0, {sample.num_steps}) would."
        )


def _check_loop(config: ConfigDict) -> None:
    """What only the chosen loop asks for."""
    if config.use_reward_gradient:
        _check_drtune(config)
    else:
        _check_grpo(config)


def _check_grpo(config: ConfigDict) -> None:
    sample, train = config.sample, config.train
    if sample.sde_type == "ode":
        raise ConfigError(
            'config.sample.sde_type = "ode" has no log-probability, which GRPO needs; it takes "sde", "dance" or '
            '"cps", unless config.use_reward_gradient = True.'
        )
    if sample.noise_level == 0:
        raise ConfigError(
            f"config.sample.noise_level = {sample.noise_level} has no log-probability, which GRPO needs; it takes a "
            "number above 0."
        )
    if sample.num_image_per_prompt < 2:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {sample.num_image_per_prompt} leaves GRPO nothing to compare within "
            "a group; it takes at least 2."
        )
    _check_cps_window(config)
    if train.ratio_normalization and sample.sde_type == "cps":
        raise ConfigError(
            "config.train.ratio_normalization = True undoes a variance that the log-probability of "
            'config.sample.sde_type = "cps" leaves out; it takes "sde" or "dance".'
        )
    if train.ratio != "sde":
        _check_ratio(config)


def _check_ratio(config: ConfigDict) -> None:
    """What the likelihoods that are no Gaussian step cannot be combined with."""
    train, form = config.train, f'config.train.ratio = "{config.train.ratio}"'
    if train.beta > 0:
        raise ConfigError(
            f"config.train.beta = {train.beta} weighs a KL divergence of Gaussian steps, which {form} has not; it "
            "takes 0."
        )
    if train.ratio_normalization:
        raise ConfigError(
            f"config.train.ratio_normalization = True normalises the ratio of Gaussian steps, which {form} has not; "
            "it takes False."
        )
    if train.ratio == "cfm":
        if train.ratio_probes == 0:
            raise ConfigError(
                f"config.train.ratio_probes = 0 asks for an exact trace, which {form} has not; it takes at least 1 "
                "draw of noise and time."
            )
    elif config.gradient_checkpointing:
        raise ConfigError(
            f"config.gradient_checkpointing = True saves nothing with {form}, whose second derivatives keep every "
            "activation; it takes False, and config.train.batch_size = 1 needs the least memory."
        )
    if train.ratio != "ode_step" and train.timestep_fraction != 1:
        raise ConfigError(
            f"config.train.timestep_fraction = {train.timestep_fraction} chooses among steps, but {form} has one "
            "likelihood of the whole image; it takes 1."
        )


def _check_cps_window(config: ConfigDict) -> None:
    """The last step of `cps` draws no noise: every window must hold another step."""
    sample = config.sample
    size = sample.sde_window_size or sample.num_steps
    end = sample.sde_window_range[1] or sample.num_steps
    if sample.sde_type == "cps" and size == 1 and end == sample.num_steps:
        key = "sde_window_size" if sample.num_steps > 1 else "num_steps"
        raise ConfigError(
            f'config.sample.{key} = 1 may leave no step to train, as the last step of sde_type = "cps" draws no noise; '
            "it takes at least 2."
        )


def _check_drtune(config: ConfigDict) -> None:
    if config.train.ratio != "sde":
        raise ConfigError(
            f'config.train.ratio = "{config.train.ratio}" is for GRPO; with config.use_reward_gradient = True it takes '
            '"sde".'
        )
    steps, trained, early_stop = config.sample.num_steps, config.drtune.num_train_steps, config.drtune.early_stop
    if early_stop > steps:
        raise ConfigError(
            f"config.drtune.early_stop = {early_stop} is more than config.sample.num_steps = {steps}; it takes 0 to "
            f"{steps}."
        )
    if config.sample.sde_window_size:
        raise ConfigError(
            f"config.sample.sde_window_size = {config.sample.sde_window_size} is for GRPO; with "
            "config.use_reward_gradient = True it takes 0."
        )
    certain = steps - max(early_stop - 1, 0)
    if trained > certain:
        raise ConfigError(
            f"config.drtune.num_train_steps = {trained} is more than the {certain} steps that are always executed "
            f"(num_steps = {steps}, early_stop = {early_stop}); it takes 1 to {certain}."
        )


# --- files ----------------------------------------------------------------------------------------------


def _check_model(config: ConfigDict) -> None:
    """The model is a hub id, or a folder with an SD3 pipeline that can make images of this size."""
    check_checkpoint("config.pretrained.model", config.pretrained.model)
    model = find(config.pretrained.model)
    pixels, largest = HUB_PIXELS_PER_TOKEN, math.inf
    if os.path.isdir(model):
        _check_pipeline(Path(model))
        pixels = pixels_per_token(Path(model))
        side = _setting(Path(model, "transformer/config.json"), "pos_embed_max_size", _whole(1), default=96)
        largest = pixels * side
        _check_latents(Path(model))
    if config.resolution % pixels or config.resolution > largest:
        limit = "" if largest == math.inf else f", at most {largest}"
        raise ConfigError(
            f"config.resolution = {config.resolution} does not fit the model "
            f"{config.pretrained.model}; it takes a multiple of "
            f"{pixels}{limit}."
        )


def _check_latents(model: Path) -> None:
    """The VAE's latents are those of the transformer, and their scale is known."""
    vae, transformer = (model / part / "config.json" for part in ("vae", "transformer"))
    for key in ("scaling_factor", "shift_factor"):
        _setting(vae, key, _FINITE, default=0.0)
    channels = _setting(vae, "latent_channels", _whole(1), default=16)
    _setting(transformer, "in_channels", _only(channels, f"{channels}, as the VAE's latents have"), default=channels)
    _setting(transformer, "out_channels", _or_null(_only(channels, f"{channels}, or null")), default=None)


def pixels_per_token(model: Path) -> int:
    """The side of the square of pixels that is one token of a pipeline's transformer."""
    channels = _each(_whole(1), "a list of one or more whole numbers", low=1)
    stages = _setting(Path(model, "vae/config.json"), "block_out_channels", channels, default=(64,))
    patch = _setting(Path(model, "transformer/config.json"), "patch_size", _whole(1), default=2)
    return 2 ** (len(stages) - 1) * patch


def _setting(path: Path, key: str, rule: Rule, default: Any) -> Any:
    """A value of a file of settings; `default`, which is the library's, where the file does not say."""
    value = read_object(path, PIPELINE).get(key, default)
    if not rule.accepts(value):
        raise ConfigError(f'{PIPELINE}{path} says "{key}": {value!r:.200}; it takes {rule.allowed}.')
    return value


def _check_pipeline(model: Path) -> None:
    """The folder is a StableDiffusion3Pipeline's, with all the parts it names, whole, and a scheduler that is ours."""
    index = _pipeline_index(model)
    for name, part in index.items():
        if (needs := PART_NEEDS.get(name.split("_")[0])) is not None:
            _check_part(model, name, part, needs, optional=name in WITHOUT_T5)
    for clip in ("", "_2"):
        if f"tokenizer{clip}" in index:
            _check_length(model, f"tokenizer{clip}", f"text_encoder{clip}")
    if not index.get("tokenizer_3", [None])[0] and index.get("text_encoder_3", [None])[0]:
        raise ConfigError(f"{PIPELINE}{model} has a text_encoder_3 without a tokenizer_3.")
    if "scheduler" in index:
        check_scheduler(read_object(model / "scheduler/scheduler_config.json", PIPELINE), index["scheduler"][1])


def _pipeline_index(model: Path) -> dict[str, Any]:
    """What model_index.json says: the class of the pipeline, and name: [library, class] of its parts."""
    if not os.path.lexists(model / "model_index.json"):
        raise ConfigError(
            f"config.pretrained.model = {str(model)!r} has no model_index.json; it takes the folder of a "
            "StableDiffusion3Pipeline."
        )
    index = read_object(model / "model_index.json", PIPELINE)
    kind = index.get("_class_name")
    if kind != "StableDiffusion3Pipeline":
        raise ConfigError(
            f"config.pretrained.model = {str(model)!r} is a {kind!s:.80}; it takes a StableDiffusion3Pipeline."
        )
    return index


def _check_length(model: Path, tokenizer: str, encoder: str) -> None:
    """A CLIP's tokenizer cuts prompts to what its text encoder takes."""
    longest = _setting(model / encoder / "config.json", "max_position_embeddings", _whole(1), default=77)
    _setting(model / tokenizer / "tokenizer_config.json", "model_max_length", _whole(1, longest), default=None)


def _check_part(model: Path, name: str, part: Any, needs: Needs, optional: bool) -> None:
    """One entry of model_index.json: [library, class], or [null, null] for none."""
    if not (isinstance(part, list) and len(part) == 2 and (part == [None, None] or all(map(_is_text, part)))):
        raise ConfigError(f"{PIPELINE}{model / 'model_index.json'} says {name!r}: {part!r:.200}; it takes two texts.")
    if part != [None, None]:
        check_files(model / name, PIPELINE, needs)
    elif not optional:
        raise ConfigError(f"{PIPELINE}{model} has no {name}; only the T5, text_encoder_3, may be missing.")


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


def _check_scorers(config: ConfigDict) -> None:
    """The folders of the CLIPs, and of the extractor of features, are whole."""
    models = {
        f"reward_model.{name}": config.reward_model[name] for name in reward_names(config) if REWARDS[name].scorer
    }
    models |= {"eval.judge": config.eval.judge} if config.eval.judge else {}
    for key, model in models.items():
        _check_folder(key, model, CLIP_NEEDS)
    if config.eval_diversity and config.diversity.extractor != "open_clip":
        _check_folder("diversity.model", config.diversity.model, MODEL_NEEDS)


def _check_folder(key: str, model: str, needs: Needs) -> None:
    """A folder has what it needs; a hub id is asked for when the processes start."""
    if os.path.isdir(found := find(model)):
        check_files(Path(found), f"config.{key}: ", needs)


def read_modes(path: Path, subject: str = "") -> dict[str, dict[str, str]]:
    """The known modes of prompts, {prompt: {mode: caption}}; ConfigError, beginning with `subject`, for other files.

    A file without a prompt, {}, is allowed: nothing is counted then.
    """
    modes = read_object(Path(find(str(path))), subject)
    for prompt, captions in modes.items():
        if not isinstance(captions, dict) or not captions:
            raise ConfigError(
                f"{subject}{path}: {prompt!r} must have an object of one or more modes, with a caption each."
            )
        for text in (prompt, *captions, *captions.values()):
            if not _FILLED.accepts(text):
                raise ConfigError(f"{subject}{path}: {text!r:.80}, of {prompt!r:.80}, must be {_FILLED.allowed}.")
    return modes


def _check_prompts(config: ConfigDict) -> None:
    from flow_grpo.prompts import PromptDataset

    PromptDataset.load(config.prompts.train)
    found = len(PromptDataset.load(config.prompts.test))
    if config.eval.num_prompts > found:
        raise ConfigError(
            f"config.eval.num_prompts = {config.eval.num_prompts} is more than the {found} prompts of "
            f"{config.prompts.test}; it takes 1 to {found}, or 0 for all."
        )
    if config.eval_diversity:
        _check_diversity(config, len(PromptDataset.load(config.prompts.eval_diversity)))


def _check_diversity(config: ConfigDict, found: int) -> None:
    """Of `found` prompts in the file."""
    if config.diversity.extractor != "open_clip":  # whose models have other names
        check_checkpoint("config.diversity.model", config.diversity.model)
        if config.diversity.pretrained:
            raise ConfigError(
                f"config.diversity.pretrained = {config.diversity.pretrained!r} is for config.diversity.extractor = "
                f'"open_clip"; with {config.diversity.extractor!r} it takes "".'
            )
    if config.diversity.num_prompts > found:
        raise ConfigError(
            f"config.diversity.num_prompts = {config.diversity.num_prompts} is more than the {found} prompts of "
            f"{config.prompts.eval_diversity}; it takes 1 to {found}, or 0 for all."
        )


# On resuming a run, a change of these would change what is drawn or measured from there on.
SEEN = (
    "seed", "num_seeds", "pretrained.", "resolution", "max_sequence_length", "mixed_precision", "use_lora", "lora.",
    "prompts.", "reward_fn.", "reward_model.", "use_reward_gradient", "sample.", "train.updates_per_epoch",
    "train.num_inner_epochs", "train.ratio", "train.timestep_fraction", "drtune.", "eval.", "entropy.", "diversity.",
)  # fmt: skip
NOT_SEEN = ("batch_size", "num_grid_prompts", "num_grid_images", "num_strip_prompts")  # last parts of names


def decides_what_is_seen(key: str) -> bool:
    """Whether a key decides which images are drawn, what they are rewarded for, or what is measured of them."""
    return key.startswith(SEEN) and key.split(".")[-1] not in NOT_SEEN


def is_over(config: ConfigDict | FrozenConfigDict, epochs: int, seconds: float) -> bool:
    """Whether a run has come to its configured number of epochs, or of seconds of training."""
    return epochs >= config.num_epochs or 0 < config.max_seconds <= seconds


def weights_record(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """The keys that decide whether a checkpoint's weights fit a run, with their values; plain data for state.json."""
    record: dict[str, Any] = {
        "pretrained.model": Path(config.pretrained.model).name,  # the folder may have moved
        "mixed_precision": config.mixed_precision,
        "train.ema": config.train.ema,
        "use_lora": config.use_lora,
    }
    if config.use_lora:
        record |= {"lora.rank": config.lora.rank, "lora.alpha": config.lora.alpha}
        record["lora.target_modules"] = list(config.lora.target_modules)
    return record


def weights_mismatch(config: ConfigDict | FrozenConfigDict, state: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key whose value, and the value that a checkpoint was made with, differ; None: its weights fit."""
    made_with = state["weights"]
    differing = ((k, v, made_with.get(k)) for k, v in weights_record(config).items() if made_with.get(k) != v)
    return next(differing, None)


def _checkpoint_to_resume(resume_from: str) -> Path:
    """The checkpoint; where there is none because the run has only begun, the sentence says who is writing it."""
    try:
        return find_checkpoint(resume_from)
    except ConfigError:
        folder = run_folder_of(resume_from)
        if folder is not None and is_locked(folder):
            raise ConfigError(in_use(folder)) from None
        raise


def _check_resume(config: ConfigDict, checkpoint: Path) -> None:
    """The checkpoint is whole, of the same weights, and not yet at the configured end."""
    state = checkpoint_state(checkpoint, "config.resume_from: ")
    if mismatch := weights_mismatch(config, state):
        key, value, made_with = mismatch
        raise ConfigError(
            f"config.{key} = {value!r}, but the checkpoint {checkpoint} of config.resume_from was made with "
            f"{made_with!r}; resume with the same."
        )
    counters = state["counters"]
    epochs, seconds = counters["epoch"], counters["seconds"]
    if is_over(config, epochs, seconds) and state.get("evaluated", True):
        limit = "num_epochs" if epochs >= config.num_epochs else "max_seconds"
        raise ConfigError(
            f"config.resume_from: {checkpoint} has {epochs} epochs and {seconds:.0f} s of training behind it; to go "
            f"on, raise config.{limit} = {config[limit]}."
        )
