"""From a configuration to the loops of a run: `resolve` checks every value, and adds the batch arithmetic.

Every mistake is a ConfigError of one sentence, raised before anything loads: the key, its value, what is allowed.
Nothing heavy is imported at the top of this module.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.batching import BatchPlan, plan_batches
from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.methods.base import takes_only
from flow_grpo.methods.registry import check_method, method_of
from flow_grpo.model_checks import (
    check_attention,
    check_model,
    check_scorers,
    check_start,
    choose_lora_targets,
    fetch_small_files,
)
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.paths import find
from flow_grpo.places import check_packages
from flow_grpo.prompts import PromptDataset, own_negatives, training_prompts
from flow_grpo.recipes.base import DECAYING, ENDLESS, KEYS, leaves
from flow_grpo.rewards.checks import check_checkpoint, check_readable, check_sides, validate_rewards
from flow_grpo.rewards.chosen import constraint_rates, find_announced, reward_names
from flow_grpo.rewards.own_files import in_full
from flow_grpo.rules import FILLED, FINITE, NOT_NEGATIVE, TEXT, Rule, each
from flow_grpo.runs.guards import check_guards
from flow_grpo.runs.resuming import check_resume, checkpoint_to_resume
from flow_grpo.shaping_checks import DIFFERENTIABLE, check_gate, check_shaping, check_whole_groups

LAUNCH_HINT = "`accelerate launch --num_processes N` on GPUs, `torchrun --nproc-per-node N` on CPUs: see README.md"
POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' "polynomial" ends


@dataclass(frozen=True)
class Settings:
    """A configuration that was checked, and what follows from it on this number of processes."""

    config: FrozenConfigDict
    plan: BatchPlan
    num_processes: int

    @property
    def total_updates(self) -> int:
        """Optimizer updates to the end of the learning rate's schedule."""
        return _total_updates(self.config, self.plan)

    @property
    def can_compile(self) -> bool:
        """Whether nothing stands against compiling the transformer."""
        return not _against_compiling(self.config)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return image_size(self.config)


def resolve(
    config: ConfigDict,
    num_processes: int,
    cuda: bool,
    fetch: bool = False,
    rewarded: Sequence[str] = ("train", "test"),
) -> Settings:
    """Check everything that can be checked before a model loads, and derive the batch arithmetic.

    Args:
        config: every key of config/base.py.
        num_processes: processes that were started.
        cuda: whether they run on GPUs.
        fetch: models of the hub are looked for there, and their small files fetched to be checked as a folder's are;
            else nobody is asked, and only what is in the hub's cache is checked.
        rewarded: the groups of `config.prompts` whose images are rewarded, all by a training.

    Raises:
        ConfigError: for the first mistake found.
    """
    config = _with_paths_in_full(config)
    _check_values(config)
    find_announced(config)
    _check_launch(config, num_processes, cuda)
    _check_sharding(config)
    _check_compile(config)
    _check_optimizer(config)
    validate_rewards(config)
    _check_sampler(config)
    check_method(config)
    plan = plan_batches(
        groups=config.sample.groups_per_epoch,
        group_size=config.sample.num_image_per_prompt,
        updates=config.train.updates_per_epoch,
        num_processes=num_processes,
    )
    _check_schedule(config, plan)
    if config.shaping.kind in DIFFERENTIABLE:
        check_whole_groups(config, plan)
    check_shaping(config)
    check_gate(config)
    _check_composition(config)
    _check_forward_kl(config)
    _check_prompts(config)
    _check_rewarded(config, rewarded)
    if config.eval.modes:
        read_modes(Path(config.eval.modes), "config.eval.modes: ")
    if config.eval.curve:
        _check_curve(config)
    check_guards(config)
    checkpoint = checkpoint_to_resume(config.resume_from) if config.resume_from else None
    check_checkpoint("config.pretrained.model", config.pretrained.model)
    if fetch:  # once nothing else is wrong: the hub may take its time
        fetch_small_files(config)
    choose_lora_targets(config)
    check_model(config)
    check_attention(config)
    check_start(config)
    check_scorers(config)
    if checkpoint is not None:
        check_resume(config, checkpoint)
    return Settings(FrozenConfigDict(config), plan, num_processes)


# --- one value at a time --------------------------------------------------------------------------------

TWICE_DIFFERENTIATED = ("ode_step", "ode_path")  # of train.ratio
# Groups of keys named after the rewards; `validate_rewards` checks the names.
OPEN_GROUPS: Mapping[str, Rule] = {
    "reward_fn": FINITE, "reward_model": TEXT, "reward_files": FILLED, "reward_constraint": NOT_NEGATIVE,
    "reward_range": each(FINITE, "two numbers, as in (0, 1)", 2, 2),
}  # fmt: skip


def _check_values(config: ConfigDict) -> None:
    """Every key of config/base.py is there, has a value of its kind and in its range; there are no others."""
    values = dict(leaves(config))
    missing = [key for key in KEYS if key not in values and key.split(".")[0] not in OPEN_GROUPS]
    if missing:
        raise ConfigError(f"config.{missing[0]} is missing; start from a recipe of config/grpo.py or config/base.py.")
    for key, value in values.items():
        rule = KEYS[key].rule if key in KEYS else OPEN_GROUPS.get(key.split(".")[0])
        if rule is None:
            raise ConfigError(f"config.{key} = {value!r} is not a key; `fme ls keys` lists all there are.")
        if not rule.accepts(value):
            raise ConfigError(f"config.{key} = {value!r} is not allowed; it takes {rule.allowed}.")


def _with_paths_in_full(config: ConfigDict) -> ConfigDict:
    """A copy in which "~/..." is written out, since the libraries that are given the paths do not do it.

    The files of one's own rewards have their whole paths: a run's are found from wherever it is looked at.
    """
    copied = ConfigDict(config.to_dict())
    for key, value in list(leaves(copied)):
        if isinstance(value, str) and value.startswith("~/"):
            copied.update_from_flattened_dict({key: os.path.expanduser(value)})
    for name, place in copied.reward_files.items():
        copied.reward_files[name] = in_full(place) if isinstance(place, str) else place
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


def _check_sharding(config: ConfigDict) -> None:
    """Gathered weights are gone after a backward pass, and a gradient's overflow is seen where its part is."""
    if config.sharding == "none":
        return
    if config.mixed_precision == "fp16":
        raise ConfigError(
            'config.mixed_precision = "fp16" has a loss scale that each process lowers by its own overflows, which '
            'config.sharding = "full" cannot follow; it takes "bf16" or "no", or config.sharding = "none".'
        )
    if config.train.ratio in TWICE_DIFFERENTIATED:
        raise ConfigError(
            f'config.train.ratio = "{config.train.ratio}" differentiates the network twice, for which '
            'config.sharding = "full" has given its weights away; it takes "sde" or "cfm", or config.sharding = "none".'
        )


def _check_compile(config: ConfigDict) -> None:
    if config.compile == "on" and (reason := _against_compiling(config)):
        raise ConfigError(f'config.compile = "on" {reason}, or config.compile = "off".')


def _check_optimizer(config: ConfigDict) -> None:
    """8 bits need their package, and whole weights: an absmax is of 256 values, which a cut would go through."""
    if config.train.optimizer != "adamw_8bit":
        return
    if config.sharding == "full":
        raise ConfigError(
            'config.train.optimizer = "adamw_8bit" is not for weights that config.sharding = "full" cuts into parts; '
            'it takes "adamw", whose moments are cut with them, or config.sharding = "none".'
        )
    check_packages('config.train.optimizer = "adamw_8bit"', ("bitsandbytes",), "8bit")


def _against_compiling(config: ConfigDict | FrozenConfigDict) -> str:
    """Why the transformer's blocks cannot be compiled, and what would work; empty: they can."""
    if config.sharding == "full":
        return 'is not for blocks whose weights come and go, by config.sharding = "full"; that takes "none"'
    if config.train.ratio in TWICE_DIFFERENTIATED:
        return (
            "has no second derivative, which "
            f'config.train.ratio = "{config.train.ratio}" takes of the network; that takes "sde" or "cfm"'
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, and there is no {compiler}; install one, or name it in the environment's CXX"
    return ""


def _check_sampler(config: ConfigDict) -> None:
    sample, train = config.sample, config.train
    if train.kl_min_sigma > 0 and train.beta == 0:
        raise ConfigError(
            f"config.train.kl_min_sigma = {train.kl_min_sigma} chooses the steps of a KL divergence, which "
            "config.train.beta = 0.0 leaves out; it takes 0.0"
            f"{'' if method_of(config).needs_base else ', or config.train.beta a number above 0'}."
        )
    if sample.sde_type == "cps" and sample.noise_level > 1:
        raise ConfigError(
            f"config.sample.noise_level = {sample.noise_level} is not allowed with config.sample.sde_type = "
            '"cps"; it takes a number from 0 to 1.'
        )
    _check_sliding(config)
    _check_tuned_share(config)
    _check_offload(config)
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


def _check_sliding(config: ConfigDict) -> None:
    """A window that slides is there, and only such a window has a pace."""
    sample = config.sample
    if sample.sde_window_placement == "sliding":
        if sample.sde_window_size == 0:
            raise ConfigError(
                'config.sample.sde_window_placement = "sliding" has no window to move with '
                "config.sample.sde_window_size = 0; it takes a size of at least 1."
            )
        return
    for key in ("sde_window_epochs", "sde_window_stride"):
        if sample[key] != KEYS[f"sample.{key}"].default:
            raise ConfigError(
                f"config.sample.{key} = {sample[key]} is the pace of a sliding window; with "
                'config.sample.sde_window_placement = "random" it takes '
                f"{KEYS[f'sample.{key}'].default}."
            )


def _check_tuned_share(config: ConfigDict) -> None:
    for key in ("eval_ode_log_prob", "visualize_steps"):
        if config[key] and tuple(config.eval.tuned_share) != (1.0, 1.0):
            raise ConfigError(
                f"config.eval.tuned_share = {tuple(config.eval.tuned_share)} draws images that the log-density of "
                f"config.{key} = True is not of; it takes (1.0, 1.0), or config.{key} = False."
            )


def _total_updates(config: ConfigDict | FrozenConfigDict, plan: BatchPlan) -> int:
    """`train.lr_total_steps`, or, where that is 0, the updates of all epochs, none of them skipped."""
    passes = 1 if config.use_reward_gradient else config.train.num_inner_epochs
    return config.train.lr_total_steps or config.num_epochs * passes * plan.updates


def _check_schedule(config: ConfigDict, plan: BatchPlan) -> None:
    """The learning rate's schedule has an end if it needs one, and a warm-up before that; nothing is set in vain."""
    train, name = config.train, f'config.train.lr_scheduler = "{config.train.lr_scheduler}"'
    if train.lr_scheduler == "constant":
        takes_only(config, "train.lr_warmup_steps", 0, f'is not read with {name}, but is with "constant_with_warmup"')
    if train.lr_scheduler not in DECAYING:
        takes_only(config, "train.lr_total_steps", 0, f"is the end of a schedule, and {name} has none")
    elif config.num_epochs >= ENDLESS and train.lr_total_steps == 0:
        raise ConfigError(
            f"{name} falls until the last update, which config.num_epochs = {config.num_epochs} does not tell of a run "
            "that the clock ends; it takes config.train.lr_total_steps, or fewer epochs."
        )
    total = _total_updates(config, plan)
    if train.lr_warmup_steps >= max(total, 1):
        raise ConfigError(
            f"config.train.lr_warmup_steps = {train.lr_warmup_steps} does not end before the {total} updates of "
            f"config.{'train.lr_total_steps' if train.lr_total_steps else 'num_epochs'}; it takes fewer."
        )
    if train.lr_scheduler != "cosine_with_restarts":
        takes_only(config, "train.lr_num_cycles", 1, f'is of "cosine_with_restarts", not of {name}')
    if train.lr_scheduler != "polynomial":
        takes_only(config, "train.lr_power", 1.0, f'is of "polynomial", not of {name}')
    elif train.learning_rate <= POLYNOMIAL_END:
        raise ConfigError(
            f"config.train.learning_rate = {train.learning_rate} is not above {POLYNOMIAL_END}, at which {name} ends; "
            "it takes more."
        )


def _check_offload(config: ConfigDict) -> None:
    """What an epoch embeds ahead must still be there when it is needed."""
    most, also = 2 * config.sample.groups_per_epoch, ""  # each may have its own negative prompt
    if config.train.forward_kl > 0:
        most += config.forward_kl.images
        also = f" and config.forward_kl.images = {config.forward_kl.images}"
    if config.pretrained.offload_text and config.prompt_cache_size < most:
        raise ConfigError(
            f"config.prompt_cache_size = {config.prompt_cache_size} keeps fewer prompts than an epoch of "
            f"config.sample.groups_per_epoch = {config.sample.groups_per_epoch}{also} may need, for which "
            f"config.pretrained.offload_text = True embeds them ahead; it takes at least {most}."
        )


# --- files ----------------------------------------------------------------------------------------------


def _check_forward_kl(config: ConfigDict) -> None:
    """What only the forward KL reads, in training or in evaluation, is left alone where there is none."""
    if config.train.forward_kl > 0:
        return
    because = "is read where config.train.forward_kl is above 0, which is 0.0"
    takes_only(config, "forward_kl.images", KEYS["forward_kl.images"].default, because)
    if not config.eval_forward_kl:
        because = "is read with config.eval_forward_kl = True, which is False, or config.train.forward_kl above 0"
        takes_only(config, "forward_kl.draws", KEYS["forward_kl.draws"].default, because)


FIXED = ("anchored", "adjoint_matching")  # methods that aim at p_base exp(lambda R) of one R


def _check_composition(config: ConfigDict) -> None:
    """A reward whose terms are weighed anew as training goes on is no target for those that aim at a law of it."""
    method = method_of(config).name
    if method not in FIXED:
        return
    because = f"changes the reward as training goes on, and config.train.method = {method!r} aims at a law of one"
    takes_only(config, "reward_normalise", False, because)
    for name, rate in constraint_rates(config).items():
        raise ConfigError(f"config.reward_constraint.{name} = {rate} {because}; it takes 0.0.")


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
            if not FILLED.accepts(text):
                raise ConfigError(f"{subject}{path}: {text!r:.80}, of {prompt!r:.80}, must be {FILLED.allowed}.")
    return modes


def _check_curve(config: ConfigDict) -> None:
    """The file is a curve, and what it is compared with is measured."""
    try:
        curve = Curve.read(Path(find(config.eval.curve)))
    except ConfigError as error:
        raise ConfigError(f"config.eval.curve: {error}") from None
    if not config.eval_diversity:
        raise ConfigError(
            f"config.eval.curve = {config.eval.curve!r} is compared with the diversity of the samples, which "
            'config.eval_diversity = False leaves out; it takes "".'
        )
    missing = [name for name in curve.rewards if name not in reward_names(config)]
    if missing:
        raise ConfigError(
            f"config.eval.curve = {config.eval.curve!r} is of the reward {missing[0]}, which the run does not measure; "
            f"add it to config.eval.rewards."
        )


def _check_prompts(config: ConfigDict) -> None:
    try:
        training_prompts(config)
    except ConfigError as error:
        raise ConfigError(f"config.prompts.train: {error}") from None
    if config.sample.prompt_sampling != "balanced":
        because = f'is of config.sample.prompt_sampling = "balanced", not "{config.sample.prompt_sampling}"'
        takes_only(config, "sample.prompt_category", KEYS["sample.prompt_category"].default, because)
    found = len(_prompts(config, "test"))
    if config.eval.num_prompts > found:
        raise ConfigError(
            f"config.eval.num_prompts = {config.eval.num_prompts} is more than the {found} prompts of "
            f"{config.prompts.test}; it takes 1 to {found}, or 0 for all."
        )
    if config.eval_diversity:
        _check_diversity(config, len(_prompts(config, "eval_diversity")))
    own_negatives(config)
    if config.negative_prompt and config.sample.guidance_scale == config.eval.guidance_scale == 1:
        raise ConfigError(
            f"config.negative_prompt = {config.negative_prompt!r} is what guidance leads away from, and there is none; "
            'it takes "", or config.sample.guidance_scale or config.eval.guidance_scale another number than 1.'
        )


def _check_rewarded(config: ConfigDict, groups: Sequence[str]) -> None:
    """The rewards in use and the judge can read the prompts, and look at images of this size."""
    for name in groups:
        check_readable(config, name, _prompts(config, name).prompts)
    if groups:
        check_sides(config, *image_size(config))


def _prompts(config: ConfigDict, name: str) -> PromptDataset:
    try:
        return PromptDataset.load(config.prompts[name])
    except ConfigError as error:
        raise ConfigError(f"config.prompts.{name}: {error}") from None


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
