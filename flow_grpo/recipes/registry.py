"""Which recipes there are, under which names, and the configuration of one."""

from __future__ import annotations

from difflib import get_close_matches
from functools import wraps

from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods.base import Method, Recipe
from flow_grpo.methods.registry import METHODS
from flow_grpo.recipes import base, families, scenes, sd3


def _of_method(method: Method, changes: Recipe, start: Recipe) -> Recipe:
    """A method's recipe as a whole: those of its family that it starts from, and what it changes in them."""

    @wraps(changes)
    def recipe(config: ConfigDict) -> None:
        start(config)
        config.train.method = method.name
        changes(config)

    return recipe


def _of_methods() -> dict[str, Recipe]:
    """tiny_sd3_<method> and pickscore_sd3_<method> of the methods that bring their recipes."""
    recipes = {}
    for method in METHODS.values():
        tiny, large = (sd3.tiny_sd3_use_gradient, sd3.pickscore_sd3_1batch_size_use_gradient)
        if not method.reward_gradient:
            tiny, large = sd3.tiny_sd3, sd3.pickscore_sd3
        if method.tiny is not None:
            recipes[f"tiny_sd3_{method.name}"] = _of_method(method, method.tiny, tiny)
        if method.sd35 is not None:
            recipes[f"pickscore_sd3_{method.name}"] = _of_method(method, method.sd35, large)
    return recipes


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        sd3.tiny_sd3,
        sd3.tiny_sd3_use_gradient,
        sd3.tiny_sd3_nsr,
        sd3.tiny_sd3_ode_step,
        sd3.tiny_sd3_ode_path,
        sd3.tiny_sd3_cfm,
        sd3.compressibility,
        sd3.pickscore_sd3,
        sd3.pickscore_sd3_4gpu,
        sd3.pickscore_sd3_4gpu_nsr,
        sd3.pickscore_sd3_4gpu_ode_logprob,
        sd3.pickscore_sd3_1batch_size,
        sd3.pickscore_sd3_1batch_size_use_gradient,
        sd3.pickscore_sd3_fast,
        sd3.pickscore_sd3_fast_4gpu,
        sd3.pickscore_sd3_fast_nocfg,
        sd3.clipscore_sd3,
        *families.RECIPES,
        *scenes.RECIPES,
    )
} | _of_methods()

# Processes (GPUs, for SD3.5) a recipe is meant for; the batch arithmetic adapts to others, except in `_4gpu`.
INTENDED_PROCESSES: dict[str, int] = {
    "tiny_sd3": 1,
    "tiny_sd3_use_gradient": 1,
    "tiny_sd3_nsr": 1,
    "tiny_sd3_ode_step": 1,
    "tiny_sd3_ode_path": 1,
    "tiny_sd3_cfm": 1,
    "compressibility": 8,
    "pickscore_sd3": 32,
    "pickscore_sd3_4gpu": 4,
    "pickscore_sd3_4gpu_nsr": 4,
    "pickscore_sd3_4gpu_ode_logprob": 4,
    "pickscore_sd3_1batch_size": 1,
    "pickscore_sd3_1batch_size_use_gradient": 1,
    "pickscore_sd3_fast": 32,
    "pickscore_sd3_fast_4gpu": 4,
    "pickscore_sd3_fast_nocfg": 32,
    "clipscore_sd3": 32,
    **{recipe.__name__: 1 for recipe in scenes.RECIPES},
    **{recipe.__name__: 8 if recipe.__name__.endswith("_grpo") else 1 for recipe in families.RECIPES},
    **{
        name: 1 if METHODS[name.split("_sd3_")[1]].reward_gradient or name[:4] == "tiny" else 32
        for name in _of_methods()
    },
}

# The names to type, and the recipes' first names, which run folders and published commands have. Both stay.
NAMES: dict[str, str] = {
    "tiny_grpo": "tiny_sd3",
    "tiny_drtune": "tiny_sd3_use_gradient",
    "tiny_nsr": "tiny_sd3_nsr",
    "tiny_grpo_ode_step": "tiny_sd3_ode_step",
    "tiny_grpo_ode_path": "tiny_sd3_ode_path",
    "tiny_grpo_cfm": "tiny_sd3_cfm",
    "sd35_grpo": "pickscore_sd3",
    "sd35_grpo_4gpu": "pickscore_sd3_4gpu",
    "sd35_grpo_1gpu": "pickscore_sd3_1batch_size",
    "sd35_grpo_fast": "pickscore_sd3_fast",
    "sd35_grpo_fast_4gpu": "pickscore_sd3_fast_4gpu",
    "sd35_grpo_fast_nocfg": "pickscore_sd3_fast_nocfg",
    "sd35_grpo_ode_step_4gpu": "pickscore_sd3_4gpu_ode_logprob",
    "sd35_grpo_clipscore": "clipscore_sd3",
    "sd35_grpo_jpeg": "compressibility",
    "sd35_drtune": "pickscore_sd3_1batch_size_use_gradient",
    "sd35_nsr_4gpu": "pickscore_sd3_4gpu_nsr",
    **{recipe.__name__.removeprefix("pickscore_"): recipe.__name__ for recipe in families.RECIPES},
    **{recipe.__name__: recipe.__name__ for recipe in scenes.RECIPES},
    **{name.replace("_sd3", "", 1).replace("pickscore_", "sd35_"): name for name in _of_methods()},
}

# What the recipes of the first two methods would be called by the rule that the others' follow.
BY_RULE: dict[str, str] = {
    "tiny_sd3_grpo": "tiny_sd3",
    "tiny_sd3_drtune": "tiny_sd3_use_gradient",
    "pickscore_sd3_grpo": "pickscore_sd3",
    "pickscore_sd3_drtune": "pickscore_sd3_1batch_size_use_gradient",
}


def first_name(name: str) -> str:
    """The key in RECIPES of a recipe under any of its names; of others, the name itself."""
    return (NAMES | BY_RULE).get(name, name)


def nearest_recipes(name: str) -> list[str]:
    """Up to three names that are spelt alike."""
    return get_close_matches(name, [*NAMES, *RECIPES], n=3, cutoff=0.6)


def get_config(name: str = "") -> ConfigDict:
    """Return the locked configuration of a recipe, under either name; raises ConfigError for a name that is none."""
    if first_name(name) not in RECIPES:
        nearest = nearest_recipes(name) or list(RECIPES)
        given = f"{name!r} is not a recipe of config/grpo.py" if name else "config/grpo.py needs the name of a recipe"
        raise ConfigError(f"{given}; choose {', '.join(nearest)}, as in --config config/grpo.py:{nearest[0]}.")
    config = base.get_config()
    RECIPES[first_name(name)](config)
    config.recipe = name
    return config
