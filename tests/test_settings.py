"""flow_grpo/settings.py: batch arithmetic, and one sentence for every mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from config.base import get_config as base_config
from flow_grpo.batching import BatchPlan, plan_batches
from flow_grpo.errors import ConfigError
from flow_grpo.models.registry import SD3
from flow_grpo.recipes.base import KEYS, leaves
from flow_grpo.runs.saved import find_checkpoint
from flow_grpo.settings import Settings, resolve

GRID = [
    (groups, size, updates, processes)
    for groups in (1, 2, 3, 5, 10, 48)
    for size in (1, 2, 7, 8, 24)
    for updates in (1, 2, 3, 5)
    for processes in (1, 2, 3, 4, 32)
]


STUB_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a file of no tensors
STUB_TOKENIZER = '{"added_tokens": []}'


def write_model(folder: Path) -> str:
    """A pipeline with the shape of the tiny SD3, without T5; its weights and vocabularies are stubs."""
    files = {
        "scheduler/scheduler_config.json": {},
        "transformer/config.json": {"patch_size": 2, "pos_embed_max_size": 16},
        "vae/config.json": {"block_out_channels": [16, 32, 64]},
        "text_encoder/config.json": {},
        "text_encoder_2/config.json": {},
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        "tokenizer_2/tokenizer_config.json": {"model_max_length": 77},
    }
    parts = {Path(name).parts[0]: ["library", "Class"] for name in files}
    parts["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    files["model_index.json"] = {"_class_name": "StableDiffusion3Pipeline", **parts}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for part in parts:
        (folder / part / "model.safetensors").write_bytes(STUB_WEIGHTS)
        (folder / part / "tokenizer.json").write_text(STUB_TOKENIZER)
    return str(folder)


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    """A configuration without a mistake, whose files are stubs."""
    config = base_config()
    config.pretrained.model = write_model(tmp_path / "model")
    clip = tmp_path / "clip"
    clip.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        (clip / name).write_text(STUB_TOKENIZER)
    (clip / "model.safetensors").write_bytes(STUB_WEIGHTS)
    config.reward_model.pickscore = config.reward_model.clipscore = config.eval.judge = str(clip)
    config.reward_fn.pickscore = 1.0
    for name in ("train", "test"):
        path = tmp_path / f"{name}.txt"
        path.write_text("a sneaker\na bag\na coat\n")
        config.prompts[name] = str(path)
    modes = tmp_path / "modes.json"
    modes.write_text("{}")
    config.eval.modes = str(modes)
    return config


def resolved(config: ConfigDict, changes: dict | None = None, processes: int = 1, cuda: bool = False) -> Settings:
    config.update_from_flattened_dict(changes or {})
    return resolve(config, processes, cuda)


def sentence(error: pytest.ExceptionInfo[ConfigError]) -> str:
    """The message, which is one sentence."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


# --- batch arithmetic -----------------------------------------------------------------------------------


def pieces(plan: BatchPlan, processes: int) -> list[list[list[int]]]:
    """Sample ids by process and update."""
    ids = list(range(plan.images))
    return [
        [
            [ids[plan.process_slice(rank)][i] for i in plan.update_indices(update).tolist()]
            for update in range(plan.updates)
        ]
        for rank in range(processes)
    ]


@pytest.mark.parametrize(("groups", "size", "updates", "processes"), GRID)
def test_a_plan_covers_every_image_exactly_once_or_names_values_that_work(groups, size, updates, processes):
    try:
        plan = plan_batches(groups, size, updates, processes)
    except ConfigError as error:
        assert groups * size % (processes * updates) != 0
        text = str(error)
        works = re.search(r"groups_per_epoch = (\d+)(?: or (\d+))? would work", text)
        assert works is not None
        for number in filter(None, works.groups()):
            plan_batches(int(number), size, updates, processes)
        fewer = re.search(r"and so would config.train.updates_per_epoch = (\d+)", text)
        assert (fewer is not None) == (groups * size % processes == 0)
        if fewer:
            plan_batches(groups, size, int(fewer[1]), processes)
        return
    parts = pieces(plan, processes)
    assert all(len(part) == plan.images_per_update for process in parts for part in process)
    assert sorted(i for process in parts for part in process for i in part) == list(range(groups * size))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_an_update_trains_the_same_images_on_any_number_of_processes(processes):
    alone, shared = plan_batches(6, 8, 2, 1), plan_batches(6, 8, 2, processes)
    for update in range(2):
        together = [i for process in pieces(shared, processes) for i in process[update]]
        assert sorted(together) == sorted(pieces(alone, 1)[0][update])


def test_every_update_has_its_share_of_every_group():
    plan = plan_batches(groups=6, group_size=8, updates=2, num_processes=1)
    for update in range(2):
        counts = torch.bincount(plan.update_indices(update) // plan.group_size)
        assert counts.tolist() == [4] * 6


def test_the_sentence_about_an_impossible_epoch_names_the_keys_and_numbers(config):
    with pytest.raises(ConfigError) as error:
        resolved(config, processes=3)
    text = sentence(error)
    for part in ("groups_per_epoch = 10", "80 images", "updates_per_epoch = 2", "3 processes", "9 or 12 would work"):
        assert part in text


# --- resolve --------------------------------------------------------------------------------------------


def test_a_correct_configuration_resolves_to_its_plan_and_cannot_be_changed(config):
    settings = resolved(config, processes=2)
    assert settings.num_processes == 2
    assert settings.plan == BatchPlan(
        groups=10, group_size=8, images=80, images_per_process=40, images_per_update=20, updates=2
    )
    config.lora.target_modules = SD3.lora_targets
    assert settings.config.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        settings.config.seed = 1


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_default_is_allowed_by_its_own_rule(key):
    assert key.rule.accepts(key.default)


def test_resolving_leaves_the_given_configuration_alone_and_expands_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = resolved(config, {"pretrained.model": "~/model"})
    assert settings.config.pretrained.model == str(tmp_path / "model")
    assert config.pretrained.model == "~/model"


def test_importing_settings_loads_no_torch():
    code = "import sys, flow_grpo.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


BAD_VALUES = [
    ("run_name", "n" * 256),
    ("run_name", "ü" * 128),
    ("run_name", "a/" + "n" * 256),
    ("run_name", "a\0b"),
    ("run_name", "a\nb"),
    ("run_name", "\ud800"),
    ("recipe", "n" * 201),
    ("logdir", "logs/" + "n" * 256),
    ("project", "a\0b"),
    ("prompts.train", "\udcff.txt"),
    ("seed", -1),
    ("max_seconds", float("nan")),
    ("trackers", ("mlflow",)),
    ("resolution", 0),
    ("max_sequence_length", 513),
    ("compile", "yes"),
    ("pretrained.attention", "sage"),
    ("mixed_precision", "fp8"),
    ("lora.rank", 0),
    ("lora.target_modules", ("",)),
    ("sample.num_steps", 0),
    ("sample.guidance_scale", -1.0),
    ("sample.sde_type", "sdf"),
    ("sample.noise_level", -0.1),
    ("sample.sde_window_range", (0, 1, 2)),
    ("sample.sde_window_range", (0.5, 1)),
    ("sample.groups_per_epoch", 0),
    ("sample.num_image_per_prompt", 0),
    ("sample.batch_size", 0),
    ("train.batch_size", 0),
    ("train.updates_per_epoch", 0),
    ("train.learning_rate", 0.0),
    ("train.adam_beta1", 1.0),
    ("train.max_grad_norm", 0.0),
    ("train.beta", -0.01),
    ("train.ema_decay", 1.0),
    ("train.clip_range", 0.0),
    ("train.clip_range", 1.0),
    ("train.adv_clip_max", 0.0),
    ("train.adv_clip_max", 1e-300),
    ("train.adam_epsilon", 1e-300),
    ("train.adam_weight_decay", 1e12),
    ("train.beta", 1e300),
    ("train.learning_rate", 2.0),
    ("fdfo.epsilon", 1e-300),
    ("forward.beta", 1e300),
    ("anchored.strength", 1e300),
    ("adjoint.strength", 1e300),
    ("train.advantage_mode", "both"),
    ("train.timestep_fraction", 0.0),
    ("train.timestep_fraction", 1.01),
    ("train.kl_space", "latent"),
    ("train.ratio", "ode"),
    ("train.ratio_probes", -1),
    ("train.learning_rate", float("inf")),
    ("drtune.num_train_steps", 0),
    ("drtune.early_stop", -1),
    ("eval.num_prompts", -1),
    ("eval.rewards", ("",)),
    ("reward_fn.pickscore", float("nan")),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_key_and_value(config, key, value):
    with pytest.raises(ConfigError) as error:
        resolved(config, {key: value})
    assert sentence(error).startswith(f"config.{key} = {value!r} is not allowed; it takes ")


ODE_FORMS = ("ode_step", "ode_path")

COMBINATIONS = [
    ({"sharding": "half"}, ["sharding", "half", "none", "full"]),
    ({"sharding": "full", "train.ratio": "ode_step"}, ["train.ratio", "ode_step", "sharding", "cfm", "none"]),
    ({"sharding": "full", "train.optimizer": "adamw_8bit"}, ["train.optimizer", "adamw_8bit", "sharding", '"none"']),
    ({"mixed_precision": "fp16"}, ["mixed_precision", "fp16", "GPU", "bf16"]),
    ({"num_processes": 2}, ["num_processes = 2", "but 1 started", "torchrun"]),
    ({"sample.sde_type": "ode"}, ['sde_type = "ode"', "log-probability", '"sde"']),
    ({"sample.noise_level": 0.0}, ["noise_level = 0.0", "above 0"]),
    ({"sample.noise_level": 1.1, "sample.sde_type": "cps"}, ["noise_level = 1.1", "cps", "0 to 1"]),
    ({"sample.num_image_per_prompt": 1}, ["num_image_per_prompt = 1", "at least 2"]),
    ({"sample.sde_window_size": 11}, ["sde_window_size = 11", "num_steps = 10"]),
    ({"sample.sde_window_range": (0, 5)}, ["sde_window_range = (0, 5)", "sde_window_size", "(0, 0)"]),
    ({"sample.sde_window_size": 3, "sample.sde_window_range": (4, 6)}, ["(4, 6)", "window of 3", "(0, 10)"]),
    ({"sample.sde_window_size": 3, "sample.sde_window_range": (8, 11)}, ["(8, 11)", "step 10"]),
    (
        {"sample.sde_window_placement": "sliding"},
        ['sde_window_placement = "sliding"', "sde_window_size = 0", "at least 1"],
    ),
    ({"sample.sde_window_epochs": 5}, ["sde_window_epochs = 5", 'sde_window_placement = "random"', "takes 25"]),
    ({"sample.sde_window_stride": 2}, ["sde_window_stride = 2", 'sde_window_placement = "random"', "takes 1"]),
    ({"sample.sde_window_size": 1, "sample.sde_type": "cps"}, ["sde_window_size = 1", "cps", "at least 2"]),
    ({"train.ratio_normalization": True, "sample.sde_type": "cps"}, ["ratio_normalization", "cps", '"dance"']),
    *[({"train.ratio": form, "train.beta": 0.1}, ["train.beta = 0.1", f'"{form}"', "takes 0"]) for form in ODE_FORMS],
    ({"train.ratio": "cfm", "train.beta": 0.1}, ["train.beta = 0.1", '"cfm"', "takes 0"]),
    ({"train.ratio": "ode_step", "train.ratio_normalization": True}, ["ratio_normalization = True", "takes False"]),
    ({"train.ratio": "cfm", "train.ratio_probes": 0}, ["ratio_probes = 0", '"cfm"', "at least 1"]),
    *[
        ({"train.ratio": form, "gradient_checkpointing": True}, ["gradient_checkpointing = True", f'"{form}"', "False"])
        for form in ODE_FORMS
    ],
    *[
        ({"train.ratio": form, "train.timestep_fraction": 0.5}, ["timestep_fraction = 0.5", f'"{form}"', "takes 1"])
        for form in ("ode_path", "cfm")
    ],
    ({"train.ratio": "ode_path", "use_reward_gradient": True}, ['ratio = "ode_path"', "use_reward_gradient", '"sde"']),
    ({"use_reward_gradient": True, "drtune.num_train_steps": 11}, ["num_train_steps = 11", "1 to 10"]),
    (
        {"use_reward_gradient": True, "drtune.num_train_steps": 8, "drtune.early_stop": 4},
        ["num_train_steps = 8", "early_stop = 4", "1 to 7"],
    ),
    ({"use_reward_gradient": True, "drtune.early_stop": 11}, ["early_stop = 11", "0 to 10"]),
    (
        {"use_reward_gradient": True, "reward_fn.jpeg_compressibility": 1.0},
        ["jpeg_compressibility", "no gradient", "pickscore"],
    ),
    (
        {"train.lr_warmup_steps": 5},
        ["lr_warmup_steps = 5", 'lr_scheduler = "constant"', "constant_with_warmup", "takes 0"],
    ),
    ({"train.lr_total_steps": 5}, ["lr_total_steps = 5", 'lr_scheduler = "constant"', "takes 0"]),
    (
        {"train.lr_scheduler": "cosine", "num_epochs": 100_000},
        ['lr_scheduler = "cosine"', "num_epochs = 100000", "takes config.train.lr_total_steps"],
    ),
    (
        {"train.lr_scheduler": "linear", "train.lr_warmup_steps": 20, "num_epochs": 10},
        ["lr_warmup_steps = 20", "20 updates", "num_epochs"],
    ),
    (
        {"train.lr_scheduler": "constant_with_warmup", "train.lr_warmup_steps": 20, "num_epochs": 10},
        ["lr_warmup_steps = 20", "20 updates", "num_epochs"],
    ),
    (
        {"train.lr_scheduler": "cosine", "train.lr_warmup_steps": 7, "train.lr_total_steps": 7},
        ["lr_warmup_steps = 7", "7 updates", "lr_total_steps"],
    ),
    ({"train.lr_scheduler": "linear", "train.lr_num_cycles": 2}, ["lr_num_cycles = 2", "restarts", "takes 1"]),
    ({"train.lr_scheduler": "linear", "train.lr_power": 2.0}, ["lr_power = 2.0", "polynomial", "takes 1.0"]),
    ({"train.lr_scheduler": "polynomial", "train.learning_rate": 1e-8}, ["learning_rate = 1e-08", "not above 1e-07"]),
    ({"train.kl_min_sigma": 0.5}, ["kl_min_sigma = 0.5", "train.beta = 0.0", "above 0"]),
    ({"reward_fn.pickscore": 0.0}, ["reward_fn", "pickscore"]),
    ({"eval.rewards": ("clipscor",)}, ["eval.rewards", "clipscore"]),
    ({"resolution": 36}, ["resolution = 36", "multiple of 8", "at most 128"]),
    ({"resolution": 136}, ["resolution = 136", "at most 128"]),
    ({"eval.num_prompts": 4}, ["eval.num_prompts = 4", "3 prompts", "1 to 3"]),
    ({"eval.modes": "nowhere.json"}, ["eval.modes", "nowhere.json"]),
    ({"pretrained.model": "assets/nowhere"}, ["pretrained.model", "assets/nowhere", "directory"]),
    ({"pretrained.model": "./nowhere"}, ["pretrained.model", "./nowhere", "directory"]),
    (
        {"negative_prompt": "blurry"},
        ["negative_prompt = 'blurry'", 'takes ""', "sample.guidance_scale", "eval.guidance_scale"],
    ),
    ({"sample.prompt_category": "tag"}, ['prompt_category = "tag"', "balanced", "uniform", 'takes "category"']),
    ({"sample.prompt_sampling": "weighted"}, ["config.prompts.train: ", 'prompt_sampling = "weighted"', "uniform"]),
    ({"pretrained.lora": "nowhere"}, ["pretrained.lora = 'nowhere'", "does not exist", ".safetensors"]),
    ({"pretrained.lora": "docs"}, ["config.pretrained.lora: docs is no LoRA", "adapter_config.json"]),
    ({"pretrained.skip": ("vae",)}, ["pretrained.skip = ('vae',)", "an SD3 pipeline", "takes 'text_encoder_3'"]),
    (
        {"pretrained.skip": ("vae",), "pretrained.model": "org/name", "resolution": 512},
        ["pretrained.skip = ('vae',)", "takes 'text_encoder_3'"],
    ),
    ({"prompts.train": "nowhere.txt"}, ["nowhere.txt", "does not exist"]),
    ({"prompts.test": "assets/prompts/pickscore/none.txt"}, ["does not exist", "fme prompts --dataset", "--out"]),
    ({"resume_from": "nowhere"}, ["resume_from = 'nowhere'", "no checkpoint", "state.json"]),
    (
        {"shaping.kind": "distance", "use_reward_gradient": True},
        ['shaping.kind = "distance"', "use_reward_gradient = True"],
    ),
    (
        {"eval.tuned_share": (0.5, 1.0), "eval_ode_log_prob": True},
        ["eval.tuned_share = (0.5, 1.0)", "config.eval_ode_log_prob = True", "(1.0, 1.0)"],
    ),
    (
        {"shaping.kind": "log_vendi", "shaping.weight": 0.1},
        ['shaping.kind = "log_vendi"', "use_reward_gradient = False", "'vendi'"],
    ),
    (
        {"shaping.kind": "log_rke", "shaping.weight": 0.1, "use_reward_gradient": True, "train.batch_size": 3},
        ['shaping.kind = "log_rke"', "train.batch_size = 3", "train.batch_size = 4, or a multiple"],
    ),
    (
        {"shaping.kind": "vendi", "shaping.weight": 0.1, "sample.num_image_per_prompt": 2},
        ["num_image_per_prompt = 2", 'shaping.kind = "vendi"', "at least 3"],
    ),
    (
        {
            "shaping.kind": "log_rke",
            "shaping.weight": 0.1,
            "use_reward_gradient": True,
            "sample.num_image_per_prompt": 2,
        },
        ['shaping.kind = "log_rke"', "num_image_per_prompt = 2", "at least 4"],
    ),
    ({"pretrained.distilled_guidance": 7.0}, ["distilled_guidance = 7.0", "is no input of", "it takes 3.5"]),
    (
        {"pretrained.offload_text": True, "prompt_cache_size": 19},
        ["prompt_cache_size = 19", "groups_per_epoch = 10", "offload_text = True", "at least 20"],
    ),
    ({"shaping.kind": "vendi"}, ["shaping.weight = 0.0", 'shaping.kind = "vendi"', "above 0"]),
    (
        {"shaping.kind": "distance", "shaping.weight": 0.1},
        ["shaping.weight = 0.1", 'shaping.kind = "distance"', "it takes 0."],
    ),
    ({"shaping.weight": 0.1}, ["shaping.weight = 0.1", 'shaping.kind = ""']),
    (
        {"shaping.gate_share": 0.1, "train.beta": 0.1},
        ["shaping.gate_share = 0.1", "shaping.gate_rewards = ()", "is no gate", "takes 0"],
    ),
    (
        {"shaping.gate_rewards": ("jpeg_compressibility",)},
        ["shaping.gate_share = 0.0", "or the rewards ()"],
    ),
    (
        {"shaping.gate_share": 0.1, "shaping.gate_rewards": ("jpeg_compressibility",)},
        ["shaping.gate_share = 0.1", "train.beta = 0.0", "above 0"],
    ),
    (
        {"shaping.gate_share": 0.1, "shaping.gate_rewards": ("clipscore",), "train.beta": 0.1},
        ["shaping.gate_rewards = ('clipscore',)", "config.reward_fn", "other models"],
    ),
    (
        {"shaping.gate_share": 0.1, "shaping.gate_rewards": ("jpeg_compressibility",), "use_reward_gradient": True},
        ["use_reward_gradient = True", "shaping.gate_share = 0.1"],
    ),
    ({"shaping.gate_rewards": ("clipscor",)}, ["shaping.gate_rewards", "clipscore"]),
    ({"shaping.kind": "density"}, ["shaping.weight = 0.0", 'shaping.kind = "density"', "above 0"]),
    (
        {"shaping.kind": "density", "shaping.weight": 0.1, "shaping.extractor": "clip"},
        ['shaping.extractor = "clip"', 'shaping.kind = "density"', 'it takes "pixels"'],
    ),
    ({"shaping.bandwidth": 0.5}, ["shaping.bandwidth = 0.5", '"entropy" or "log_rke"', 'kind = ""', "it takes 0.3"]),
    (
        {"shaping.kind": "vendi", "shaping.weight": 0.1, "shaping.cluster_distance": 0.2},
        ["shaping.cluster_distance = 0.2", '"cluster"', 'shaping.kind = "vendi"', "it takes 0.1"],
    ),
    (
        {"shaping.kind": "distance", "shaping.probes": 4},
        ["shaping.probes = 4", '"density"', 'shaping.kind = "distance"', "it takes 1"],
    ),
    ({"shaping.model": "org/name"}, ['shaping.model = "org/name"', '"distance"', 'shaping.kind = ""', 'takes ""']),
    (
        {"shaping.kind": "distance", "shaping.pretrained": "tag"},
        ['shaping.pretrained = "tag"', '"open_clip"', 'shaping.extractor = "pixels"', 'takes ""'],
    ),
    ({"forward_kl.images": 8}, ["forward_kl.images = 8", "train.forward_kl is above 0", "it takes 256"]),
    (
        {"forward_kl.images": 8, "eval_forward_kl": True},
        ["forward_kl.images = 8", "train.forward_kl is above 0", "it takes 256"],
    ),
    ({"forward_kl.draws": 8}, ["forward_kl.draws = 8", "eval_forward_kl = True", "train.forward_kl", "it takes 4"]),
    (
        {"shaping.kind": "distance", "shaping.extractor": "dinov2"},
        ["shaping.model = ''", 'shaping.extractor = "dinov2"', "a directory or hub id"],
    ),
    (
        {"shaping.kind": "distance", "shaping.model": "assets/tiny_features"},
        ["shaping.model = 'assets/tiny_features'", 'shaping.extractor = "pixels"', "no model"],
    ),
    (
        {"shaping.kind": "distance", "shaping.extractor": "clip", "shaping.model": "assets/tiny_features"},
        ["shaping.model = 'assets/tiny_features'", "config.diversity.model", "pixels"],
    ),
    ({"guard.patience": 2, "eval_freq": 0}, ["guard.patience = 2", "config.eval_freq = 0", "at least 1"]),
    (
        {"guard.patience": 2, "eval.judge": "", "eval.modes": "", "eval.rewards": ("pickscore",)},
        ["guard.patience = 2", "eval.judge = ''", "eval.rewards = ('pickscore',)", "it takes 0"],
    ),
    ({"guard.max_drop": 0.1}, ["guard.max_drop = 0.1", "eval.judge = ", "none that is trained on"]),  # judge is reward
    (
        {"guard.diversity_floor": 0.5, "eval_diversity": False},
        ["guard.diversity_floor = 0.5", "config.eval_diversity = False", "it takes 0", "config.eval_diversity = True"],
    ),
    (
        {"guard.diversity_floor": 0.5, "eval_freq": 0},
        ["guard.diversity_floor = 0.5", "config.eval_freq = 0", "at least 1"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), COMBINATIONS)
def test_values_that_contradict_each_other_or_the_disk_are_refused(config, changes, parts):
    with pytest.raises(ConfigError) as error:
        resolved(config, changes)
    text = sentence(error)
    assert [part for part in parts if part not in text] == []


POSSIBLE = [
    {"train.forward_kl": 0.1, "forward_kl.images": 8, "forward_kl.draws": 8},
    {"eval_forward_kl": True, "forward_kl.draws": 8},
    {"shaping.kind": "entropy", "shaping.weight": 0.1, "shaping.bandwidth": 0.5},
    {"run_name": "tiny/" + "n" * 255, "logdir": "/tmp/ü b", "recipe": "n" * 200},
    {"lora.alpha": 24.5},
    {"negative_prompt": "blurry", "sample.guidance_scale": 4.5},
    {"negative_prompt": "blurry", "eval.guidance_scale": 0.0},
    {"mixed_precision": "bf16"},
    {"sample.sde_type": "cps"},
    {"sample.sde_type": "dance", "sample.noise_level": 1.5},
    {"sample.sde_window_size": 2},
    {"sample.sde_window_size": 3, "sample.sde_window_range": (4, 7)},
    {"sample.sde_window_size": 1, "sample.sde_window_range": (0, 9), "sample.sde_type": "cps"},
    {"use_reward_gradient": True, "sample.num_image_per_prompt": 1},
    {"use_reward_gradient": True, "sample.sde_type": "ode"},
    {"use_reward_gradient": True, "drtune.num_train_steps": 7, "drtune.early_stop": 4},
    {"reward_fn.jpeg_compressibility": 0.5},
    {"resolution": 128},
    {"resolution": 256, "pretrained.model": "org/name"},
    {"train.lr_scheduler": "cosine", "num_epochs": 100_000, "train.lr_total_steps": 300},
    {"train.lr_scheduler": "constant_with_warmup", "num_epochs": 100_000, "train.lr_warmup_steps": 3},
    {"eval.modes": "", "eval.judge": "", "eval.num_prompts": 3, "trackers": ()},
    {"use_lora": False, "train.beta": 0.1, "train.kl_space": "velocity"},
    {"train.ratio": "ode_step", "train.ratio_probes": 0, "train.timestep_fraction": 0.5, "sample.sde_type": "cps"},
    {"train.ratio": "ode_path", "train.ratio_probes": 16, "sample.sde_window_size": 2},
    {"train.ratio": "cfm", "gradient_checkpointing": True, "mixed_precision": "bf16"},
]


@pytest.mark.parametrize("changes", POSSIBLE)
def test_what_can_work_is_accepted(config, changes):
    settings = resolved(config, changes)
    values = dict(leaves(ConfigDict(settings.config.to_dict())))
    assert {key: values[key] for key in changes} == changes


def test_fp16_is_refused_where_weights_are_sharded(config):
    with pytest.raises(ConfigError, match=r"config\.mixed_precision = \"fp16\" .* config\.sharding = \"full\" .*bf16"):
        resolved(config, {"mixed_precision": "fp16", "sharding": "full"}, cuda=True)


def test_8_bits_without_their_package_are_refused_and_the_extra_is_named(config, monkeypatch):
    monkeypatch.setattr("flow_grpo.places.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        resolved(config, {"train.optimizer": "adamw_8bit"})
    for part in ('config.train.optimizer = "adamw_8bit"', "bitsandbytes", "'flow-matching-entropy[8bit]'"):
        assert part in sentence(error)


def test_fp16_is_accepted_on_a_gpu(config):
    assert resolved(config, {"mixed_precision": "fp16"}, cuda=True).config.mixed_precision == "fp16"


def test_the_number_of_processes_that_was_asked_for_is_accepted(config):
    assert resolved(config, {"num_processes": 2}, processes=2).num_processes == 2


BAD_MODES = [
    ("[]", "is not a JSON object"),
    ('{"a bag": 3}', "'a bag' must have an object of one or more modes"),
    ('{"a bag": {}}', "'a bag' must have an object of one or more modes"),
    ('{"a bag": ["red"]}', "'a bag' must have an object of one or more modes"),
    ('{"a bag": {"red": 3}}', "3, of 'a bag', must be text"),
    ('{"a bag": {"red": " "}}', "' ', of 'a bag', must be text"),
    ('{"a bag": {"": "a red bag"}}', "'', of 'a bag', must be text"),
    ('{"a bag": {"red": "\\ud800"}}', "must be text"),
    ('{"a bag": {"red": "\\u0000"}}', "must be text"),
    ('{"a bag": {"red": "' + "a" * 70_000 + '"}}', "must be text"),
    ("[" * 100_000, "nested too deep"),
]


@pytest.mark.parametrize(("content", "message"), BAD_MODES)
def test_a_file_of_modes_of_another_shape_is_refused(config, content, message):
    Path(config.eval.modes).write_text(content)
    with pytest.raises(ConfigError) as error:
        resolved(config)
    assert f"config.eval.modes: {config.eval.modes}" in sentence(error)
    assert message in sentence(error)


def test_a_pipe_of_modes_is_refused_and_not_waited_for(config, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        resolved(config, {"eval.modes": str(tmp_path / "pipe.json")})


def test_a_name_of_the_hub_too_long_for_a_file_is_not_looked_for_on_the_disk(config):
    assert resolved(config, {"pretrained.model": "org/" + "n" * 300, "resolution": 512})


def test_a_folder_without_a_pipeline_or_with_another_one_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        resolved(config, {"pretrained.model": str(tmp_path / "empty")})
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ConfigError, match="is a PixArtAlphaPipeline"):
        resolved(config, {"pretrained.model": str(tmp_path / "model")})


def test_a_key_that_is_missing_or_not_declared_is_refused(config):
    unlocked = ConfigDict(config.to_dict())
    unlocked.train.lerning_rate = 1.0
    with pytest.raises(ConfigError, match=r"config\.train\.lerning_rate = 1\.0 is not a key"):
        resolve(unlocked, 1, False)
    del unlocked.train.lerning_rate
    del unlocked.train.beta
    with pytest.raises(ConfigError, match=r"config\.train\.beta is missing"):
        resolve(unlocked, 1, False)


# --- resuming -------------------------------------------------------------------------------------------


def test_the_latest_finished_checkpoint_is_found_from_the_run_its_folder_or_itself(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("checkpoint-000002", "checkpoint-000010", "checkpoint-000012", "checkpoint-tmp", "best"):
        (checkpoints / name).mkdir(parents=True)
    for name in ("checkpoint-000002", "checkpoint-000010", "checkpoint-tmp"):  # 12 was not finished
        (checkpoints / name / "state.json").write_text('{"weights": {}, "counters": {"epoch": 1, "seconds": 1}}')
        (checkpoints / name / "training_state.pt").write_bytes(b"")
    assert find_checkpoint(str(tmp_path / "run")) == checkpoints / "checkpoint-000010"
    assert find_checkpoint(str(checkpoints)) == checkpoints / "checkpoint-000010"
    assert find_checkpoint(str(checkpoints / "checkpoint-000002")) == checkpoints / "checkpoint-000002"
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(str(checkpoints / "checkpoint-000012"))


def test_a_vae_that_cannot_be_checkpointed_is_refused(config):
    config.pretrained.model, config.pretrained.vae_checkpointing = "Qwen/Qwen-Image", True
    with pytest.raises(ConfigError, match=r"vae_checkpointing = True: the VAE of Qwen/Qwen-Image .* takes False"):
        resolve(config, 1, cuda=True)
