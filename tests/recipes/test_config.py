"""config/: every recipe resolves for its number of processes, and its docstring counts what it costs."""

import inspect
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from config import base
from config.grpo import INTENDED_PROCESSES, RECIPES, get_config
from flow_grpo.commands.cli import parse_config
from flow_grpo.errors import ConfigError
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.recipes import sd3
from flow_grpo.recipes.base import leaves
from flow_grpo.settings import resolve

ROOT = Path(__file__).parents[2]
TINY = [name for name in RECIPES if name.startswith(("tiny", "scenes"))]  # whose models are embedded
LARGE = [name for name in RECIPES if name not in TINY]
FIRST = ("grpo", "drtune")  # whose recipes have names of their own
OTHER_MODELS = ("flux", "flux2_klein", "qwen_image", "z_image")
ASKED_FOR = {
    "tiny_sd3",
    "tiny_sd3_use_gradient",
    "tiny_sd3_nsr",
    "tiny_sd3_ode_step",
    "tiny_sd3_ode_path",
    "tiny_sd3_cfm",
    "compressibility",
    "pickscore_sd3",
    "pickscore_sd3_4gpu",
    "pickscore_sd3_4gpu_nsr",
    "pickscore_sd3_4gpu_ode_logprob",
    "pickscore_sd3_1batch_size",
    "pickscore_sd3_1batch_size_use_gradient",
    "pickscore_sd3_fast",
    "pickscore_sd3_fast_4gpu",
    "pickscore_sd3_fast_nocfg",
    "clipscore_sd3",
    *(f"{model}_sd3_{method}" for model in ("tiny", "pickscore") for method in METHODS if method not in FIRST),
    *(f"scenes_{method}" for method in METHODS),
    *(f"pickscore_{model}_{method}" for model in OTHER_MODELS for method in ("grpo", "drtune", "anchored")),
}


def with_prompts(config: ConfigDict, folder: Path) -> ConfigDict:
    """The same recipe with a stub of the fetched prompts."""
    for name in ("train", "test"):
        path = folder / f"{name}.txt"
        path.write_text("".join(f"prompt {i}\n" for i in range(128)))
        config.prompts[name] = str(path)
    config.prompts.eval_diversity = config.prompts.test
    return config


def test_the_recipes_that_were_asked_for_exist_and_say_how_many_processes_they_want():
    assert set(RECIPES) == ASKED_FOR == set(INTENDED_PROCESSES)


@pytest.mark.parametrize("name", LARGE)
def test_every_large_recipe_resolves_for_its_number_of_processes(name, tmp_path):
    config = with_prompts(get_config(name), tmp_path)
    settings = resolve(config, INTENDED_PROCESSES[name], cuda=True)
    assert settings.config.recipe == name
    is_sd3 = settings.config.pretrained.model == "stabilityai/stable-diffusion-3.5-medium"
    assert is_sd3 == (not name.startswith(tuple(f"pickscore_{model}" for model in OTHER_MODELS)))
    assert settings.plan.images_per_update * settings.plan.updates * INTENDED_PROCESSES[name] == settings.plan.images


@pytest.mark.parametrize("name", [name for name in LARGE if "4gpu" in name])
def test_a_recipe_for_four_gpus_refuses_to_start_on_one(name, tmp_path):
    with pytest.raises(ConfigError, match="num_processes = 4, but 1 started"):
        resolve(with_prompts(get_config(name), tmp_path), 1, cuda=True)


@pytest.mark.parametrize("name", [name for name in LARGE if INTENDED_PROCESSES[name] > 4])
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_the_other_recipes_adapt_to_the_number_of_processes(name, processes, tmp_path):
    settings = resolve(with_prompts(get_config(name), tmp_path), processes, cuda=True)
    assert settings.plan.images_per_process * processes == (512 if "qwen" in name else 1152)
    assert settings.plan.updates == 2


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_without_its_prompts_names_the_command_that_fetches_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing was fetched
    config = get_config(name)
    with pytest.raises(ConfigError) as error:
        resolve(config, INTENDED_PROCESSES[name], cuda=True)
    command = "fme prompts --dataset yuvalkirstain/pickapic_v1_no_images --column caption"
    assert config.prompts.train in str(error.value)
    assert f"{command} --out assets/prompts/pickscore" in str(error.value)
    assert command in " ".join((inspect.getdoc(sd3) or "").split())


def cost(config: ConfigDict, processes: int) -> str:
    """The cost sentence of a recipe, from its numbers: evaluations of the transformer in one epoch."""
    sampled, trained, reference, old = evaluations(config)
    images = config.sample.groups_per_epoch * config.sample.num_image_per_prompt
    most = "at most " if config.train.method == "adjoint_matching" else ""
    return (
        f"Cost of an epoch, on {processes} process{'es' if processes > 1 else ''}: {images:,} images; "
        f"{sampled:,.0f} sampling, {trained:,.0f} training, {most}{reference:,.0f} reference"
        f"{f', {old:,.0f} old' if old else ''}"
    )


def evaluations(config: ConfigDict) -> tuple[float, float, float, float]:
    """Of one epoch: sampling, training, where the base model is compared with, and the old weights."""
    sample = config.sample
    images = sample.groups_per_epoch * sample.num_image_per_prompt
    per_step = images * (1 if sample.guidance_scale == 1 else 2)
    if config.use_reward_gradient:
        sampled, trained, compared = gradient_evaluations(config)
    else:
        compared = trained = trained_evaluations(config)
        sampled = sample.num_steps
    reference = compared if config.train.beta > 0 or method_of(config).needs_base else 0
    old = trained if config.train.ratio != "sde" or at_noised_images(config) else 0
    return sampled * per_step, trained * per_step, reference * per_step, old * per_step


def gradient_evaluations(config: ConfigDict) -> tuple[float, float, float]:
    """Of a reward gradient, for one image: sampling, training, and where the base model is compared with."""
    every, drtune, method = config.sample.num_steps, config.drtune, config.train.method
    trained = {"refl": 1, "alignprop": (every + 1) / 2}.get(method, drtune.num_train_steps)
    if method in ("draft_k", "alignprop"):  # checkpointed: forward twice
        return every - trained, 2 * trained, trained
    if method == "draft_lv":
        return every, config.draft.copies, config.draft.copies
    if method == "leapalign":
        return every, 4, 2
    if method == "adjoint_matching":
        return every, trained, every
    return every - (0 if drtune.two_pass else trained), trained, trained


def at_noised_images(config: ConfigDict) -> bool:
    """Whether the method compares two velocities at noised images."""
    return config.train.method in ("nft", "awm", "pepg", "par")


def trained_evaluations(config: ConfigDict) -> int:
    """Of black-box methods, for one image: the ODE's path takes every step, whatever the window, and cfm takes none."""
    if at_noised_images(config):
        return config.forward.draws
    every, window = config.sample.num_steps, config.sample.sde_window_size
    return {"cfm": config.train.ratio_probes, "ode_path": every}.get(config.train.ratio, window or every)


@pytest.mark.parametrize("name", RECIPES)
def test_the_cost_in_a_docstring_follows_from_the_recipe(name):
    expected = cost(get_config(name), INTENDED_PROCESSES[name])
    assert expected in " ".join((inspect.getdoc(RECIPES[name]) or "").split())
    dearer = get_config(name)
    dearer.sample.num_steps += 1  # the broken twin: the sentence depends on the numbers
    assert cost(dearer, INTENDED_PROCESSES[name]) != expected


def test_the_sd3_5_recipes_have_the_settings_of_flow_grpo():
    config = get_config("pickscore_sd3")
    assert (config.resolution, config.sample.num_steps, config.eval.num_steps) == (512, 10, 40)
    assert (config.sample.guidance_scale, config.eval.guidance_scale) == (4.5, 4.5)
    assert (config.sample.groups_per_epoch, config.sample.num_image_per_prompt) == (48, 24)
    assert (config.use_lora, config.lora.rank, config.lora.alpha, config.train.learning_rate) == (True, 32, 64, 3e-4)
    assert (config.train.beta, config.train.clip_range, config.train.ema_decay) == (0.01, 1e-4, 0.9)
    assert (config.sample.sde_type, config.sample.noise_level) == ("sde", 0.7)
    fast, nocfg = get_config("pickscore_sd3_fast"), get_config("pickscore_sd3_fast_nocfg")
    assert fast.sample.sde_window_size == nocfg.sample.sde_window_size == 2
    assert (nocfg.sample.guidance_scale, nocfg.sample.sde_type, nocfg.sample.noise_level) == (1.0, "cps", 0.8)
    assert (nocfg.train.clip_range, nocfg.train.beta) == (1e-5, 0.0)
    gradient = get_config("pickscore_sd3_1batch_size_use_gradient")
    assert (gradient.resolution, gradient.sample.num_image_per_prompt, gradient.train.learning_rate) == (256, 1, 1e-4)
    assert gradient.use_reward_gradient
    assert gradient.train.batch_size == gradient.sample.batch_size == 1


def test_the_tiny_recipes_have_the_settings_that_were_measured():
    config = get_config("tiny_sd3")
    assert (config.sample.groups_per_epoch, config.sample.num_image_per_prompt, config.sample.num_steps) == (10, 8, 10)
    assert (config.sample.noise_level, config.sample.guidance_scale, config.train.updates_per_epoch) == (0.7, 1.0, 2)
    assert (config.train.clip_range, config.train.learning_rate, config.train.beta) == (1e-3, 1e-3, 0.0)
    assert (config.lora.rank, config.lora.alpha, config.reward_fn.pickscore) == (16, 32, 1.0)
    gradient = get_config("tiny_sd3_use_gradient")
    images = gradient.sample.groups_per_epoch * gradient.sample.num_image_per_prompt
    assert images // gradient.train.updates_per_epoch == gradient.train.batch_size == 40
    assert (gradient.drtune.num_train_steps, gradient.sample.num_steps) == (5, 10)


def test_every_method_has_its_two_recipes_under_two_names_each():
    for method in METHODS:
        for new, first in ((f"tiny_{method}", f"tiny_sd3_{method}"), (f"sd35_{method}", f"pickscore_sd3_{method}")):
            chosen = get_config(first)
            assert method_of(chosen).name == method
            assert chosen.train == get_config(new).train


def difference(name: str, other: str) -> dict[str, object]:
    """The keys of two recipes that differ, with the first one's values."""
    a, b = dict(leaves(get_config(name))), dict(leaves(get_config(other)))
    return {key: a[key] for key in a if a[key] != b[key] and key != "recipe"}


def test_the_recipes_of_the_other_ratios_differ_from_theirs_in_the_ratio_alone():
    assert difference("tiny_sd3_ode_step", "tiny_sd3") == {"train.ratio": "ode_step"}
    assert difference("tiny_sd3_ode_path", "tiny_sd3") == {"train.ratio": "ode_path"}
    assert difference("tiny_sd3_cfm", "tiny_sd3") == {"train.ratio": "cfm", "train.ratio_probes": 10}
    assert difference("pickscore_sd3_4gpu_ode_logprob", "pickscore_sd3_4gpu") == {
        "train.ratio": "ode_step", "train.beta": 0.0, "train.batch_size": 1,
    }  # fmt: skip
    assert get_config("pickscore_sd3_4gpu_ode_logprob").train.ratio_probes == 1


def test_a_recipe_is_locked_and_has_exactly_the_declared_keys():
    for name in RECIPES:
        config = get_config(name)
        assert config.is_locked
        assert config.to_dict().keys() == base.get_config().to_dict().keys()


def test_recipes_do_not_share_state():
    get_config("pickscore_sd3").train.beta = 7.0
    assert get_config("pickscore_sd3").train.beta == 0.01
    assert base.get_config().train.beta == 0.0


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError) as error:
        get_config("pickscore_sd3_fsat")
    assert str(error.value).startswith("'pickscore_sd3_fsat' is not a recipe of config/grpo.py; choose ")
    assert "pickscore_sd3_fast" in str(error.value)
    with pytest.raises(ConfigError, match="needs the name of a recipe; choose tiny_sd3"):
        get_config()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_files_and_they_ask_for_plain_data_parallelism(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    distributed = path.stem.startswith(("multi", "fsdp2"))
    assert loaded.distributed_type == ("MULTI_GPU" if distributed else "NO")
    expected = {"cpu": 1, "single_gpu": 1, "multi_gpu": 8, "multi_node": 32, "fsdp2": 8, "fsdp2_multi_node": 32}
    assert loaded.num_processes == expected[path.stem]
    assert loaded.mixed_precision == "no"
    assert not loaded.fsdp_config
    assert not loaded.deepspeed_config


def test_lora_alpha_takes_any_number_on_the_command_line():
    config = parse_config(["train", "--config", "config/grpo.py:tiny_sd3", "--config.lora.alpha=24.5"], "")
    assert config.lora.alpha == 24.5
