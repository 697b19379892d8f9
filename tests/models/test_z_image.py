"""Z-Image's own: time, sign, prompts of lists, noise levels, and files that its pipeline cannot use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flow_grpo.errors import ConfigError
from flow_grpo.models.pipeline_files import check_pipeline, image_sides
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.models.z_image import ZImage
from flow_grpo.types import PromptEmbeds
from tests.models.families import shake
from tests.models.tiny_z_image import build_z_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of its tiny pipeline."""
    path = tmp_path_factory.mktemp("z_image")
    build_z_image().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def family() -> ZImage:
    """Not changed by tests."""
    pipeline = build_z_image()
    shake(pipeline.transformer)
    return ZImage(pipeline)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Echo(torch.nn.Module):
    """A network that predicts its own input, and keeps what it was given."""

    def forward(self, x, t, captions, return_dict):
        self.time, self.captions = t, captions
        return (x,)


@torch.no_grad()
def test_the_network_is_told_1_minus_sigma_and_its_sign_is_turned(family):
    network, x = Echo(), noise(2, 4, 8, 8)
    embeds = PromptEmbeds.cat([family.encode(prompt, 64) for prompt in ("a", "a red coat and a bag")])
    assert torch.equal(family.velocity(network, x, 0.3, embeds), -x)
    torch.testing.assert_close(network.time, torch.tensor([0.7, 0.7]))


@torch.no_grad()
def test_the_network_gets_each_prompt_without_padding(family):
    network, prompts = Echo(), ("a", "a red coat and a bag")
    parts = [family.encode(prompt, 64) for prompt in prompts]
    family.velocity(network, noise(2, 4, 8, 8), 0.3, PromptEmbeds.cat(parts))
    for caption, part in zip(network.captions, parts, strict=True):
        assert torch.equal(caption, part.prompt_embeds[0])
    assert [len(caption) for caption in network.captions] == [20, 39]


def test_the_scale_of_the_pipeline_is_ours_minus_1(family):
    v_uncond, v_cond = noise(2, 2, 4, 8, 8).double()
    torch.testing.assert_close(family.guide(v_uncond, v_cond, 6.0), v_cond + 5.0 * (v_cond - v_uncond))


def test_noise_levels_are_even_steps_shifted_and_not_the_schedulers_own(family):
    even = torch.linspace(1, 0, 6)
    torch.testing.assert_close(family.sigmas(5, 32, 32), 6 * even / (1 + 5 * even))
    assert (family.sigmas(5, 32, 32) - noise_levels(family.pipeline.scheduler, 5, tokens=16)).abs().max() > 1e-3


# --- files ---------------------------------------------------------------------------------------------


def check(model: Path) -> int:
    """Of what images' sides are multiples."""
    check_pipeline(model)
    return image_sides(model)[0]


def test_its_sides_are_multiples_of_a_token(folder):
    assert check(folder) == 8


BAD = [
    ("vae", "scaling_factor", None, "it takes a finite number"),
    ("transformer", "in_channels", 16, "it takes 4, as the VAE's latents have"),
    ("transformer", "all_patch_size", [2, 4], "it takes [2], the side of its tokens"),
    ("transformer", "all_f_patch_size", [2], "it takes [1], as an image is one frame"),
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
