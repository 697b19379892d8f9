"""What a method cannot be combined with is one sentence that names both keys, and what would work."""

from __future__ import annotations

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.methods.registry import METHODS, check_method, check_read, readers
from flow_grpo.recipes.base import KEYS, SECTIONS
from flow_grpo.recipes.registry import get_config

CONTRADICTIONS = [
    ("tiny_drtune", {"flowbp.bias": 2.0}, ["flowbp.bias = 2.0", "'flowbp' or 'flowbp_lagrange'", "it takes 1.0"]),
    ("tiny_grpo", {"anchored.strength": 5.0}, ["anchored.strength = 5.0", "'anchored'", "'grpo' it takes 100.0"]),
    ("tiny_drtune", {"drtune.detach_unconditional": True}, ["detach_unconditional = True", "guidance_scale = 1"]),
    ("tiny_refl", {"drtune.early_stop": 0}, ["early_stop = 0", '"refl"', "1 to config.sample.num_steps = 10"]),
    ("tiny_draft_k", {"drtune.early_stop": 2}, ["early_stop = 2", '"draft_k"', "takes 0"]),
    ("tiny_draft_k", {"drtune.num_train_steps": 11}, ["num_train_steps = 11", "num_steps = 10", "1 to 10"]),
    ("tiny_draft_lv", {"drtune.two_pass": True}, ["two_pass = True", '"draft_lv"', "takes False"]),
    ("tiny_alignprop", {"drtune.two_pass": True}, ["two_pass = True", '"alignprop"', "takes False"]),
    ("tiny_leapalign", {"sample.sde_type": "sde"}, ['sde_type = "sde"', '"leapalign"', 'takes "ode"']),
    ("tiny_leapalign", {"sample.num_steps": 1}, ["num_steps = 1", '"leapalign"', "at least 2"]),
    ("tiny_flowbp_lagrange", {"flowbp.num_supports": 11}, ["num_supports = 11", "num_steps = 10", "1 to 10"]),
    ("tiny_flowbp_lagrange", {"drtune.num_train_steps": 4}, ["num_train_steps = 4", "num_supports = 3", "1 to 3"]),
    ("tiny_flowbp_lagrange", {"sample.sde_type": "sde"}, ['sde_type = "sde"', '"flowbp_lagrange"', 'takes "ode"']),
    ("tiny_anchored", {"anchored.variance": 0.5, "anchored.weight": "1"}, ["variance = 0.5", '"kappa"', "0.0"]),
    ("tiny_adjoint_matching", {"drtune.two_pass": True}, ["two_pass = True", '"adjoint_matching"', "takes False"]),
    (
        "tiny_adjoint_matching",
        {"sample.num_steps": 1, "drtune.num_train_steps": 1},
        ["num_steps = 1", '"adjoint_matching"', "at least 2"],
    ),
    ("tiny_anchored", {"train.beta": 0.1}, ["train.beta = 0.1", '"anchored"', "takes 0.0"]),
    (
        "tiny_anchored",
        {"anchored.target_kl": 0.5, "anchored.target_diversity": 0.9},
        ["target_kl = 0.5", "target_diversity = 0.9", "one of them takes 0"],
    ),
    ("tiny_anchored", {"anchored.target_kl": 4.0}, ["target_kl = 4.0", "base_images = 64", "2.55 nats", "273 images"]),
    ("tiny_adjoint_matching", {"sample.sde_type": "ode"}, ['sde_type = "ode"', '"adjoint_matching"', '"memoryless"']),
    ("tiny_adjoint_matching", {"sample.guidance_scale": 4.5}, ["guidance_scale = 4.5", '"adjoint_matching"', "1.0"]),
    ("tiny_adjoint_matching", {"train.beta": 0.1}, ["train.beta = 0.1", '"adjoint_matching"', "takes 0.0"]),
    ("tiny_adjoint_matching", {"drtune.early_stop": 1}, ["early_stop = 1", '"adjoint_matching"', "takes 0"]),
    ("tiny_fdfo", {"sample.num_steps": 1}, ["num_steps = 1", '"fdfo"', "at least 2"]),
    ("tiny_drtune", {"train.ratio": "cfm"}, ['ratio = "cfm"', "use_reward_gradient = True", '"sde"']),
    ("tiny_drtune", {"sample.sde_window_size": 2}, ["sde_window_size = 2", "use_reward_gradient = True", "takes 0"]),
    ("tiny_nft", {"train.kl_space": "velocity"}, ["kl_space = 'velocity'", "train.method = 'grpo'; with 'nft'"]),
    ("tiny_nft", {"forward.strength": 2.0}, ["strength = 2.0", "'pepg' or 'par'; with 'nft' it takes 1.0"]),
    ("tiny_awm", {"forward.beta": 2.0}, ["beta = 2.0", "is for config.train.method = 'nft'; with 'awm' it takes 1.0"]),
    (
        "tiny_fdfo", {"train.advantage_std": "none"},
        ["advantage_std = 'none'", "'grpo' or 'nft' or 'awm' or 'pepg' or 'par'; with 'fdfo' it takes 'group'"],
    ),
    ("tiny_grpo", {"train.method": "refl"}, ["'refl' is of the other family", "use_reward_gradient = False", "'grpo'"]),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "changes", "parts"), CONTRADICTIONS)
def test_a_contradiction_names_both_keys_and_what_would_work(recipe, changes, parts):
    config = get_config(recipe)
    check_method(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        check_method(config)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_own_keys_are_documented_and_allow_their_defaults(name):
    for key in METHODS[name].keys:
        assert key.meaning
        assert key.rule.accepts(key.default)


UNREAD = [
    ("tiny_grpo", "drtune.hinge"),
    ("tiny_nft", "train.clip_range"),
    ("tiny_fdfo", "train.adv_clip_max"),
    ("tiny_drtune", "train.num_inner_epochs"),
    ("tiny_refl", "drtune.num_train_steps"),
    ("tiny_flowbp", "flowbp.num_supports"),
    ("tiny_flowbp_lagrange", "flowbp.gain"),
]


@pytest.mark.parametrize(("recipe", "key"), UNREAD)
def test_a_change_that_the_method_does_not_look_at_is_refused(recipe, key):
    with pytest.raises(ConfigError, match=f"config.{key} = .* is not read by config.train.method") as error:
        check_read(get_config(recipe), ["train.learning_rate", key])
    assert str(error.value).endswith(f"choose {' or '.join(map(repr, readers(key)))}.")
    check_read(get_config(recipe), ["train.learning_rate"])


@pytest.mark.parametrize(
    ("recipe", "changes", "other"),
    [
        ("tiny_grpo", {"train.ratio_probes": 4}, "train.ratio = 'sde'"),
        ("tiny_grpo", {"guard.diversity": "rke"}, "guard.diversity_floor = 0.0"),
        ("tiny_grpo", {"eval_forward_kl": True, "eval_freq": 0}, "eval_freq = 0"),
        ("tiny_drtune", {"sample.noise_level": 0.3}, "sample.sde_type = 'ode'"),
        ("tiny_anchored", {"anchored.strength": 50.0, "anchored.target_kl": 0.3}, "anchored.target_kl = 0.3"),
    ],
)
def test_a_change_that_another_setting_makes_moot_names_both(recipe, changes, other):
    config = get_config(recipe)
    config.update_from_flattened_dict(changes)
    key = next(iter(changes))
    with pytest.raises(ConfigError, match=f"config.{key} = .*config.{other}.* or leave config.{key} out"):
        check_read(config, changes)
    check_read(config, ["train.learning_rate"])


BY_REWARDS = next(keys for title, keys in SECTIONS.items() if title.startswith("by rewards alone"))


@pytest.mark.parametrize("key", BY_REWARDS, ids=lambda key: key.name)
def test_a_keys_meaning_names_the_methods_by_rewards_that_read_it(key):
    family = {name: method.title for name, method in METHODS.items() if not method.reward_gradient}
    head, colon, _ = key.meaning.partition(": ")
    told = set(family.values())
    if colon and head.startswith("all but "):
        told -= set(head.removeprefix("all but ").split(", "))
    elif colon:
        told = set(head.split(", "))
    assert told == {family[name] for name in readers(key.name)}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_does_not_look_at_are_keys_that_there_are(name):
    for unread in METHODS[name].unread:
        assert unread in KEYS or any(key.startswith(unread) for key in KEYS if unread.endswith("."))
