"""From a configuration to the loops of a run: `resolve` checks every value, and adds the batch arithmetic.

Every mistake is a ConfigError of one sentence, raised before anything loads: the key, its value, what is allowed.
Nothing heavy is imported at the top of this module.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.batching import BatchPlan, plan_batches
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.methods.base import takes_only
from flow_grpo.methods.registry import check_method, method_of
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
    takes_distilled_guidance,
    takes_guidance,
    whole_folder,
)
from flow_grpo.models.registry import ATTENTIONS, UNMASKED
from flow_grpo.paths import find, identity
from flow_grpo.prompts import PromptDataset, own_negatives, training_prompts
from flow_grpo.recipes.base import DECAYING, ENDLESS, KEYS, leaves
from flow_grpo.rewards.checks import check_checkpoint, validate_rewards
from flow_grpo.rewards.chosen import (
    checkpoints_in_use,
    checkpoints_of,
    constraint_rates,
    find_announced,
    trained_rewards,
)
from flow_grpo.rewards.own_files import in_full
from flow_grpo.rewards.registry import spec_of_key
from flow_grpo.rules import FILLED, FINITE, NOT_NEGATIVE, TEXT, Rule, each
from flow_grpo.runs.guards import check_guards
from flow_grpo.runs.resuming import check_resume, checkpoint_to_resume

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


def image_size(config: ConfigDict | FrozenConfigDict) -> tuple[int, int]:
    """Height and width of the images, in pixels: `resolution`, but where they are given apart."""
    return config.height or config.resolution, config.width or config.resolution


def resolve(config: ConfigDict, num_processes: int, cuda: bool, fetch: bool = False) -> Settings:
    """Check everything that can be checked before a model loads, and derive the batch arithmetic.

    Args:
        config: every key of config/base.py.
        num_processes: processes that were started.
        cuda: whether they run on GPUs.
        fetch: models of the hub are looked for there, and their small files fetched to be checked as a folder's are;
            else nobody is asked, and only what is in the hub's cache is checked.

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
        _check_whole_groups(config, plan)
    _check_shaping(config)
    _check_gate(config)
    _check_composition(config)
    _check_forward_kl(config)
    _check_prompts(config)
    if config.eval.modes:
        read_modes(Path(config.eval.modes), "config.eval.modes: ")
    check_guards(config)
    checkpoint = checkpoint_to_resume(config.resume_from) if config.resume_from else None
    check_checkpoint("config.pretrained.model", config.pretrained.model)
    if fetch:  # once nothing else is wrong: the hub may take its time
        _fetch(config)
    choose_lora_targets(config)
    _check_model(config)
    _check_attention(config)
    _check_start(config)
    _check_scorers(config)
    if checkpoint is not None:
        check_resume(config, checkpoint)
    return Settings(FrozenConfigDict(config), plan, num_processes)


# --- one value at a time --------------------------------------------------------------------------------

BONUSES, DIFFERENTIABLE = ("cluster", "entropy", "vendi", "density"), ("log_vendi", "log_rke")  # of shaping.kind
TWICE_DIFFERENTIATED = ("ode_step", "ode_path")  # of train.ratio
PAIRS_ARE_ALIKE = ("distance", "cluster", "entropy", "vendi")  # of two images, either is as far from the other

FEATURES = ("distance", "cluster", "entropy", "vendi", *DIFFERENTIABLE)  # compare features of images
READ_BY_KINDS = {
    "shaping.bandwidth": ("entropy", "log_rke"), "shaping.cluster_distance": ("cluster",),
    "shaping.probes": ("density",), "shaping.extractor": FEATURES, "shaping.model": FEATURES,
    "shaping.pretrained": FEATURES,
}  # fmt: skip

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


def choose_lora_targets(config: ConfigDict) -> None:
    """Where none are named, those of the model's family."""
    if not config.lora.target_modules:
        family = expected_family(config.pretrained.model, config.pretrained.revision)
        with config.unlocked():
            config.lora.target_modules = family.lora_targets


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
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            'config.train.optimizer = "adamw_8bit" needs bitsandbytes, which is not installed: `pip install '
            "'flow-matching-entropy[8bit]'`; without it, it takes \"adamw\"."
        )


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


def _fetch(config: ConfigDict) -> None:
    """The small files of models of the hub; ConfigError for one that is neither there nor in its cache."""
    pretrained = config.pretrained
    fetch_pipeline(pretrained.model, pretrained.revision, pretrained.skip)
    for key, model, _, file in _scorers(config):
        hub.require(f"config.{key} = ", model, file)


def _check_model(config: ConfigDict) -> None:
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


def _check_attention(config: ConfigDict) -> None:
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


def _check_start(config: ConfigDict) -> None:
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


def _check_scorers(config: ConfigDict) -> None:
    """The folders of the models that look at images are whole."""
    for key, model, needs, _ in _scorers(config):
        if os.path.isdir(found := find(model)):
            check_files(Path(found), f"config.{key}: ", needs)


def _scorers(config: ConfigDict) -> list[tuple[str, str, Needs, str]]:
    """The models that look at images: key, model, what a folder of it needs, and a file that it has on the hub."""
    models: list[tuple[str, str, Needs, str]] = []
    for key, model in checkpoints_in_use(config):
        spec = spec_of_key(key)
        models.append((key, model, spec.needs, spec.hub_file))
    if config.eval.judge:
        models.append(("eval.judge", config.eval.judge, CLIP_NEEDS, hub.SETTINGS))
    if config.eval_diversity and config.diversity.extractor != "open_clip":
        models.append(("diversity.model", config.diversity.model, MODEL_NEEDS, hub.SETTINGS))
    if config.shaping.kind in FEATURES and config.shaping.extractor not in ("pixels", "open_clip"):
        models.append(("shaping.model", config.shaping.model, MODEL_NEEDS, hub.SETTINGS))
    return models


def _check_shaping(config: ConfigDict) -> None:
    """Diversity in the objective is of the family that the run trains by, and its encoder measures nothing else."""
    shaping, kind = config.shaping, f'config.shaping.kind = "{config.shaping.kind}"'
    if shaping.kind and config.use_reward_gradient != (shaping.kind in DIFFERENTIABLE):
        kinds = DIFFERENTIABLE if config.use_reward_gradient else (*BONUSES, "distance")
        raise ConfigError(
            f"{kind} is not for config.use_reward_gradient = {config.use_reward_gradient}; it takes "
            f"{' or '.join(map(repr, kinds))}."
        )
    if bool(shaping.weight) != (shaping.kind in BONUSES + DIFFERENTIABLE):
        takes = "a number above 0" if shaping.kind in BONUSES + DIFFERENTIABLE else "0"
        raise ConfigError(f"config.shaping.weight = {shaping.weight} weighs the bonus of {kind}; it takes {takes}.")
    if shaping.kind in PAIRS_ARE_ALIKE and config.sample.num_image_per_prompt < 3:
        raise ConfigError(
            f"config.sample.num_image_per_prompt = {config.sample.num_image_per_prompt} gives the images of a group "
            f"the same bonus, by which {kind} changes nothing; it takes at least 3."
        )
    for key, readers in READ_BY_KINDS.items():
        if shaping.kind not in readers:
            takes_only(config, key, KEYS[key].default, f"is for {_either(readers)}, not for {kind}")
    if shaping.kind in FEATURES:
        _check_encoder(config)


def _check_forward_kl(config: ConfigDict) -> None:
    """What only the forward KL reads, in training or in evaluation, is left alone where there is none."""
    if config.train.forward_kl > 0:
        return
    because = "is read where config.train.forward_kl is above 0, which is 0.0"
    takes_only(config, "forward_kl.images", KEYS["forward_kl.images"].default, because)
    if not config.eval_forward_kl:
        because = "is read with config.eval_forward_kl = True, which is False, or config.train.forward_kl above 0"
        takes_only(config, "forward_kl.draws", KEYS["forward_kl.draws"].default, because)


def _either(names: Iterable[str]) -> str:
    """Such as "entropy" or "log_rke"."""
    return " or ".join(f'"{name}"' for name in names)


def _check_gate(config: ConfigDict) -> None:
    """A gate has a KL divergence to gate, and rewards to go by, none of which is trained on under another name."""
    shaping, rewards = config.shaping, tuple(config.shaping.gate_rewards)
    share = f"config.shaping.gate_share = {shaping.gate_share}"
    if bool(shaping.gate_share) != bool(rewards):
        takes = "0" if shaping.gate_share else "a share above 0"
        raise ConfigError(
            f"{share} with config.shaping.gate_rewards = {rewards} is no gate; the share takes {takes}, or the rewards "
            f"{'one that is not trained on' if shaping.gate_share else '()'}."
        )
    if not rewards:
        return
    takes_only(config, "use_reward_gradient", False, f"has no rewards of whole groups to compare, as {share} does")
    if config.train.beta == 0:
        raise ConfigError(
            f"{share} chooses images for a KL divergence, which config.train.beta = 0.0 leaves out; it takes 0, or "
            "config.train.beta a number above 0."
        )
    trained = trained_rewards(config)
    models = {identity(model) for name in trained for model in checkpoints_of(config, name)}
    for name in rewards:
        if name in trained or models & set(map(identity, checkpoints_of(config, name))):
            raise ConfigError(
                f"config.shaping.gate_rewards = {rewards}: {name!r} is trained on, by config.reward_fn; it takes "
                "rewards of other models."
            )


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


def _check_whole_groups(config: ConfigDict, plan: BatchPlan) -> None:
    """A set objective sees whole groups: every microbatch holds as many images of each as an update has."""
    size, share = plan.group_size, plan.group_size // plan.updates
    whole = size % plan.updates == 0 and share > 1 and plan.images_per_process % size == 0
    if whole and config.train.batch_size % share == 0:
        return
    if size < 2 * plan.updates:
        raise ConfigError(
            f'config.shaping.kind = "{config.shaping.kind}" needs two images of a group in every update, but '
            f"config.sample.num_image_per_prompt = {size} in {plan.updates} updates an epoch are fewer; it takes at "
            f"least {2 * plan.updates}."
        )
    takes = (
        f"config.train.batch_size = {share}, or a multiple"
        if whole
        else (
            f"config.train.updates_per_epoch = 1, with a number of groups that divides among the processes and "
            f"config.train.batch_size = {size}, or a multiple"
        )
    )
    raise ConfigError(
        f'config.shaping.kind = "{config.shaping.kind}" needs whole groups in a microbatch, but '
        f"config.train.batch_size = {config.train.batch_size} does not hold them, of groups of {size} in "
        f"{plan.updates} updates an epoch; it takes {takes}."
    )


def _check_encoder(config: ConfigDict) -> None:
    """It is given where it takes a model, whole, and none by which the run is rewarded, judged or measured."""
    extractor, model = config.shaping.extractor, config.shaping.model
    if bool(model) == (extractor == "pixels"):
        raise ConfigError(
            f'config.shaping.model = {model!r} is not for config.shaping.extractor = "{extractor}"; it takes '
            f"{'a directory or hub id' if extractor != 'pixels' else 'no model'}."
        )
    if extractor != "open_clip":
        because = f'is for "open_clip", not for config.shaping.extractor = "{extractor}"'
        takes_only(config, "shaping.pretrained", "", because)
    if extractor == "pixels":
        return
    if extractor != "open_clip":
        check_checkpoint("config.shaping.model", model)
    others = [*checkpoints_in_use(config), ("eval.judge", config.eval.judge)]
    others += [("diversity.model", config.diversity.model)] if config.eval_diversity else []
    for key, other in others:
        if other and identity(other) == identity(model):
            raise ConfigError(
                f"config.shaping.model = {model!r} is also config.{key}, by which the run is rewarded or measured; it "
                'takes another encoder, or "" with config.shaping.extractor = "pixels".'
            )


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
