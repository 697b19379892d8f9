"""Recipes on scenes: one of each family trains and is evaluated; all can be started."""

from __future__ import annotations

import math

import pytest

from flow_grpo.evaluators.evaluation import evaluate
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.methods.registry import METHODS, method_of
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.registry import RECIPES, get_config
from flow_grpo.settings import resolve

SCENES = [name for name in RECIPES if name.startswith("scenes_")]


@pytest.mark.parametrize("name", SCENES)
def test_a_recipe_is_of_its_method_and_can_be_started(name):
    config = resolve(get_config(name), 1, cuda=False).config
    assert method_of(config) is METHODS[name.removeprefix("scenes_")]
    assert config.use_reward_gradient == METHODS[name.removeprefix("scenes_")].reward_gradient
    assert dict(config.reward_fn)["scenes_soft" if config.use_reward_gradient else "scenes"] == 1


@pytest.mark.parametrize("name", ["scenes_nft", "scenes_drtune"])
def test_one_of_each_family_trains_and_is_judged(name, build, tmp_path):
    config = get_config(name)
    config.logdir, config.run_name, config.trackers, config.diversity.num_draws = str(tmp_path), "run", (), 50
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt, config.sample.num_steps = 2, 2, 2
    config.train.updates_per_epoch, config.drtune.num_train_steps = 1, 1
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.num_steps = 3, 2, 2
    config.diversity.num_prompts, config.num_seeds, config.lora.rank = 2, 4, 2
    parts = build(config)
    trained = parts.train()
    assert math.isfinite(trained["reward"])
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    tested = PromptDataset.load(config.prompts.test)
    metrics = evaluate(parts.policy, tested, evaluators, parts.settings, parts.run, "eval").metrics
    assert 0 <= metrics["eval/judge/accuracy"] <= 1
    assert 0 <= metrics["eval/modes/layout_entropy"] <= math.log(16)
    assert metrics["eval/diversity/vendi"] >= 1
