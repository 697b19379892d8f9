"""The recipes of other families than SD3: they resolve, and what they say of their epochs is so."""

import pytest

from config.base import get_config
from flow_grpo.recipes.qwen_image import qwen_image
from flow_grpo.recipes.z_image import z_image
from flow_grpo.settings import resolve


def resolved(recipe, processes):
    config = get_config()
    recipe(config)
    config.reward_fn.jpeg_compressibility, config.eval_diversity = 1.0, False
    config.eval.judge = config.eval.modes = ""
    return resolve(config, processes, cuda=True)


@pytest.mark.parametrize("recipe", [qwen_image, z_image], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_an_epoch_is_the_same_on_any_number_of_processes(recipe, processes):
    alone, settings = resolved(recipe, 1), resolved(recipe, processes)
    assert settings.plan.images == alone.plan.images
    assert settings.plan.updates == alone.plan.updates


def test_an_epoch_of_qwen_image_is_flow_grpos():
    plan = resolved(qwen_image, 8).plan
    assert (plan.images, plan.updates, plan.images_per_update) == (512, 2, 32)


@pytest.mark.parametrize("recipe", [qwen_image, z_image], ids=lambda recipe: recipe.__name__)
def test_the_loras_are_of_the_family_of_the_hub_id(recipe):
    assert resolved(recipe, 1).config.lora.target_modules != resolved(lambda config: None, 1).config.lora.target_modules
