"""FLUX.2-klein: distilled pipelines, latents that are normalised channel by channel, the shift by steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline

from flow_grpo.errors import ConfigError
from flow_grpo.inspection.looking import Options, look_at
from flow_grpo.inspection.things import find_out
from flow_grpo.models.flux2_klein import Flux2Klein
from flow_grpo.settings import resolve
from tests.models.families import shake
from tests.models.test_families import EXACTLY_AS_STOCK, PROMPTS, draw, our_images
from tests.models.tiny_flux2_klein import build_flux2_klein


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The folder of a pipeline that says so of itself."""
    folder = tmp_path_factory.mktemp("distilled")
    pipeline = build_flux2_klein(is_distilled=True)
    shake(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["sample.guidance_scale", "eval.guidance_scale"])
def test_guidance_of_a_distilled_pipeline_is_refused_before_anything_loads(config, distilled, key):
    config.pretrained.model = str(distilled)
    config.update_from_flattened_dict({key: 4.0})
    with pytest.raises(ConfigError, match=rf"config\.{key} = 4\.0 has no effect on .*; it takes 1\.0\.$"):
        resolve(config, num_processes=1, cuda=False)


def test_guidance_of_a_distilled_pipeline_from_the_hub_is_refused_when_it_would_be_used():
    family, v = Flux2Klein(build_flux2_klein(is_distilled=True)), torch.zeros(1, 16, 4, 4)
    with pytest.raises(ConfigError, match=r"guidance_scale = 4\.0 has no effect"):
        family.guide(v, v, 4.0)


def test_a_distilled_pipeline_draws_as_the_stock_one_whose_guidance_is_ignored(config, build, distilled):
    config.pretrained.model, config.eval.num_steps = str(distilled), 3
    stock = Flux2KleinPipeline.from_pretrained(distilled)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt=PROMPTS, guidance_scale=4.0, generator=draw(2), num_inference_steps=3, height=32, width=32,
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip
    assert (our_images(build(config).policy) - theirs).abs().max() < EXACTLY_AS_STOCK


def test_it_is_looked_at_as_the_stock_pipeline_draws_and_without_guidance_where_that_has_no_effect(distilled, tmp_path):
    build_flux2_klein().save_pretrained(tmp_path / "base")
    for folder, guidance in ((tmp_path / "base", 4.0), (distilled, 1.0)):
        config = look_at(find_out(str(folder)), None, Options(measured=False)).config
        assert (config.eval.num_steps, config.eval.guidance_scale, config.max_sequence_length) == (50, guidance, 512)


def test_each_channel_of_encoded_images_is_normalised_by_the_autoencoders_statistics():
    family = Flux2Klein(build_flux2_klein())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = family.pipeline._patchify_latents(family.vae.encode(images * 2 - 1).latent_dist.mode())
        found, bn = family.encode_image(images), family.vae.bn
    for c in range(16):
        expected = (plain[:, c] - bn.running_mean[c]) / (bn.running_var[c] + 1e-4).sqrt()
        torch.testing.assert_close(found[:, c], expected, rtol=1e-5, atol=1e-5)


def test_the_shift_depends_on_the_number_of_steps():
    """The middle of 4 steps and of 100: the same level but for the shift."""
    family = Flux2Klein(build_flux2_klein())
    assert family.sigmas(4, 32, 32)[2] != pytest.approx(family.sigmas(100, 32, 32)[50].item(), rel=0.05)
