"""FLUX.1: the distilled guidance, the shift by the number of tokens, FLUX.1-schnell."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from flow_grpo.errors import ConfigError
from flow_grpo.models.flux import Flux, image_positions
from flow_grpo.models.packing import pack, unpack
from tests.models.families import shake
from tests.models.test_families import EXACTLY_AS_STOCK, PROMPTS, draw, our_images
from tests.models.tiny_flux import build_flux


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines with and without distilled guidance, as FLUX.1-dev and FLUX.1-schnell."""
    folder = tmp_path_factory.mktemp("flux")
    for name, guidance_embeds in (("dev", True), ("schnell", False)):
        pipeline = build_flux(guidance_embeds)
        shake(pipeline.transformer)
        pipeline.save_pretrained(folder / name)
    return folder


def images_of_both(config, build, folder, ours: float, theirs: float):
    """Of our sampler and of the stock pipeline, each with its distilled guidance."""
    config.pretrained.model, config.pretrained.distilled_guidance = str(folder), ours
    config.eval.num_steps = 3
    stock = FluxPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    images = stock(
        PROMPTS, guidance_scale=theirs, generator=draw(2), num_inference_steps=3, height=32, width=32,
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip
    return our_images(build(config).policy), images


def test_the_distilled_guidance_is_the_stock_pipelines(config, build, folders):
    ours, theirs = images_of_both(config, build, folders / "dev", 1.5, 1.5)
    assert (ours - theirs).abs().max() < EXACTLY_AS_STOCK


def test_another_distilled_guidance_gives_other_images(config, build, folders):
    ours, theirs = images_of_both(config, build, folders / "dev", 1.5, 3.5)
    assert (ours - theirs).abs().max() > 1e-4


def test_a_model_without_distilled_guidance_ignores_it(config, build, folders):
    ours, theirs = images_of_both(config, build, folders / "schnell", 3.5, 1.5)
    assert (ours - theirs).abs().max() < EXACTLY_AS_STOCK


def test_a_distilled_scale_that_a_model_does_not_take_is_refused(config, build, folders):
    config.pretrained.model, config.pretrained.distilled_guidance = str(folders / "schnell"), 1.5
    with pytest.raises(ConfigError, match=r"distilled_guidance = 1\.5 is no input of .*schnell; it takes 3\.5"):
        build(config)


def test_larger_images_have_a_larger_shift():
    family = Flux(build_flux())
    small, large = family.sigmas(5, 32, 32), family.sigmas(5, 512, 512)
    assert (small[1:-1] < large[1:-1]).all()
    assert small[0] == large[0] == 1


def test_tokens_are_squares_of_latents_row_by_row_and_unpack_undoes_pack():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert (tokens[:, 4] == latents[:, :, 2:4, 2:4].flatten(1)).all()  # the fifth: row 1, column 1
    assert image_positions(4, 6, torch.device("cpu"))[4].tolist() == [0, 1, 1]
    assert (unpack(tokens, 4, 6) == latents).all()
