"""The distance of the mean colour, or of the brightness, to a target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flow_grpo.recipes.base import KEYS
from flow_grpo.rewards.building import build_reward
from flow_grpo.rewards.targets import TargetBrightness, TargetColour
from tests.pictures import make_images, to_pil
from tests.rewards.scoring import NO_METADATA, make_config


def flat(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8).clone()


def test_a_colour_is_the_one_named_in_the_prompt_or_the_target() -> None:
    red, prompts = flat(1.0, 0.0, 0.0), ["A Red bag, and a blue one"]
    assert TargetColour("")(red, prompts, [{}]).item() == 0
    assert TargetColour("blue")(red, prompts, [{}]).item() == pytest.approx(-math.sqrt(2))
    assert TargetColour("#ff0080")(red, prompts, [{}]).item() == pytest.approx(-128 / 255)
    with pytest.raises(ValueError, match=r"there is none in 'a bored bag'"):  # "red" is only a part of a word
        TargetColour("")(red, ["a bored bag"], [{}])


def test_brightness_is_pillows_grey() -> None:
    images = make_images(16, 16)
    grey = [np.asarray(picture.convert("L")).mean() / 255 for picture in to_pil(images)]
    scores = TargetBrightness(0.25)(images, [""] * 4, NO_METADATA * 4)
    torch.testing.assert_close(scores, -(torch.tensor(grey, dtype=torch.float32) - 0.25).abs(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("reward", [TargetColour("skyblue"), TargetBrightness(0.9)], ids=lambda r: r.name)
def test_every_pixel_has_a_gradient_and_it_is_finite_at_the_target(reward: TargetColour | TargetBrightness) -> None:
    images = make_images(16, 24).double().requires_grad_()
    torch.autograd.gradcheck(
        lambda x: reward(x, [""], [{}]), (0.1 + 0.8 * images[:1, :, :4, :4]).detach().requires_grad_()
    )
    (gradient,) = torch.autograd.grad(reward(images, [""] * 4, NO_METADATA * 4).sum(), images)
    assert gradient.abs().min() > 0
    reached = flat(135 / 255, 206 / 255, 235 / 255) if reward.name == "target_colour" else flat(0.9, 0.9, 0.9)
    reached.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(reached, [""], [{}]).sum(), reached)
    assert gradient.isfinite().all()


def test_the_target_is_a_setting() -> None:
    config = make_config("", target_brightness=1.0, target_colour=1.0)
    config.targets.colour, config.targets.brightness = "red", 1.0
    terms = build_reward(config, "cpu")(flat(1.0, 1.0, 1.0), ["a bag"], [{}]).terms
    assert terms["target_brightness"].item() == pytest.approx(0, abs=1e-6)
    assert terms["target_colour"].item() == pytest.approx(-math.sqrt(2))


def test_what_a_target_may_be() -> None:
    rule = KEYS["targets.colour"].rule
    assert all(map(rule.accepts, ("", "red", "skyblue", "#00fF00")))
    assert not any(map(rule.accepts, ("redd", "#00ff0", "rgb(1,2,3)", 3, None)))
    rule = KEYS["targets.brightness"].rule
    assert all(map(rule.accepts, (0, 0.5, 1)))
    assert not any(map(rule.accepts, (-0.1, 1.1, math.nan)))
