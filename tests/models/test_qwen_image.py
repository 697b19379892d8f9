"""Qwen-Image's own: tokens, guidance, prompts, noise levels, and files that its pipeline cannot use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flow_grpo.errors import ConfigError
from flow_grpo.models.packing import pack, unpack
from flow_grpo.models.pipeline_files import check_pipeline, image_sides
from flow_grpo.models.qwen_image import QwenImage
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.types import PromptEmbeds
from tests.models.families import shake
from tests.models.tiny_qwen_image import build_qwen_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of its tiny pipeline."""
    path = tmp_path_factory.mktemp("qwen_image")
    build_qwen_image().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def family() -> QwenImage:
    """Not changed by tests."""
    pipeline = build_qwen_image()
    shake(pipeline.transformer)
    return QwenImage(pipeline)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_tokens_are_packed_as_the_pipeline_packs_them_and_unpacked_again(family):
    latents = noise(2, 4, 6, 8)
    tokens = pack(latents)
    assert torch.equal(tokens, family.pipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 6, 8), latents)


def test_a_guided_token_is_as_long_as_the_conditional_one_and_points_where_linear_guidance_does(family):
    v_uncond, v_cond = noise(2, 2, 4, 6, 8)
    guided, linear = pack(family.guide(v_uncond, v_cond, 4.0)), pack(v_uncond + 4.0 * (v_cond - v_uncond))
    torch.testing.assert_close(guided.norm(dim=-1), pack(v_cond).norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(guided / guided.norm(dim=-1, keepdim=True), linear / linear.norm(dim=-1, keepdim=True))
    assert (linear.norm(dim=-1) / pack(v_cond).norm(dim=-1)).min() > 1.5  # without it they are longer


def test_at_scale_1_guidance_changes_nothing(family):
    v_uncond, v_cond = noise(2, 2, 4, 6, 8)
    torch.testing.assert_close(family.guide(v_uncond, v_cond, 1.0), v_cond, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_words_of_the_template_are_no_tokens_of_a_prompt(family):
    empty, one = (family.encode(prompt, 32).prompt_embeds for prompt in ("", "a"))
    assert (empty.shape[1], one.shape[1]) == (5, 6)  # <|im_end|> \n <|im_start|> assistant \n
    assert family.encode("a a a", 4).prompt_embeds.shape[1] == 4


@torch.no_grad()
def test_padding_would_matter_but_for_the_mask(family):
    short, long = (family.encode(prompt, 32) for prompt in ("a", "a red coat and a bag"))
    padded, x = PromptEmbeds.cat([short, long])[:1], noise(1, 4, 8, 8).float()
    unmasked = PromptEmbeds(padded.prompt_embeds, mask=torch.ones_like(padded.mask))
    alone, with_mask, without = (
        family.velocity(family.transformer, x, 0.5, embeds) for embeds in (short, padded, unmasked)
    )
    assert (with_mask - alone).abs().max() < 1e-5
    assert (without - alone).abs().max() > 1e-3


def test_noise_levels_end_where_the_scheduler_says_and_are_not_its_own(family):
    levels = family.sigmas(5, 32, 32)
    assert (levels[0], levels[-2], levels[-1]) == (1, pytest.approx(0.02), 0)
    assert (levels - noise_levels(family.pipeline.scheduler, 5, tokens=16)).abs().max() > 1e-3


def test_the_shift_grows_with_the_image(family):
    assert family.sigmas(5, 1024, 1024)[2] > family.sigmas(5, 512, 512)[2]


# --- files ---------------------------------------------------------------------------------------------


def check(model: Path) -> int:
    """Of what images' sides are multiples."""
    check_pipeline(model)
    return image_sides(model)[0]


def test_its_sides_are_multiples_of_a_token(folder):
    assert check(folder) == 8


BAD = [
    ("vae", "latents_std", [1.0, 1.0, 1.0], "it takes a list of 4, each a number from 1e-15"),
    ("vae", "latents_std", [1.0, 1.0, 0.0, 1.0], "it takes a list of 4, each a number from 1e-15"),
    ("vae", "latents_mean", None, "it takes a list of 4, each a finite number"),
    ("vae", "temperal_downsample", [1, 1], "it takes a list of one or more of true and false"),
    ("transformer", "in_channels", 4, "it takes 16, as the VAE's latents have"),
    ("transformer", "out_channels", 16, "it takes 4."),
    ("transformer", "out_channels", None, "it takes 4."),
    ("transformer", "patch_size", 1, "it takes 2, the side of its tokens"),
    ("transformer", "guidance_embeds", True, "cannot run with it"),
    ("transformer", "use_additional_t_cond", True, "gives no second time"),
    ("transformer", "use_layer3d_rope", True, "an image is one layer"),
]


@pytest.mark.parametrize(("part", "key", "value", "words"), BAD)
def test_settings_that_its_pipeline_cannot_use_are_refused_in_a_sentence(folder, tmp_path, part, key, value, words):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError) as error:
        check(model)
    assert f'says "{key}"' in str(error.value)
    assert words in str(error.value)
