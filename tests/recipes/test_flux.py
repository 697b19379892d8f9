"""The settings that FLUX recipes share are allowed ones, and fit the families' published models."""

from __future__ import annotations

import pytest

from flow_grpo.models.registry import FAMILIES, published_family
from flow_grpo.recipes.flux import flux
from flow_grpo.recipes.flux2_klein import flux2_klein
from flow_grpo.settings import resolve


@pytest.mark.parametrize(
    ("recipe", "pipeline"), [(flux, "FluxPipeline"), (flux2_klein, "Flux2KleinPipeline")], ids=["flux", "flux2_klein"]
)
def test_the_settings_are_allowed_and_the_model_is_of_the_family(config, recipe, pipeline):
    recipe(config)
    config.pretrained.revision = ""
    settings = resolve(config, num_processes=1, cuda=True)
    assert published_family(config.pretrained.model) is FAMILIES[pipeline]
    assert set(FAMILIES[pipeline].lora_targets) <= set(settings.config.lora.target_modules)
