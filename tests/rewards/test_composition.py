"""What training makes of several rewards, against closed forms; each with a broken twin that fails."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch import Tensor

from config.base import get_config
from flow_grpo.errors import ConfigError
from flow_grpo.randomness import keyed_generator
from flow_grpo.recipes.base import declare
from flow_grpo.rewards.augmentation import augmented
from flow_grpo.rewards.building import Ensemble, WeightedReward, build_reward
from flow_grpo.rewards.chosen import split_models, trained_models
from flow_grpo.rewards.composition import Composition, Moments, gradient_shares
from flow_grpo.settings import resolve

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(50, generator=GENERATOR) + 3, 0.01 * torch.randn(50, generator=GENERATOR)


def composition(**changes: object) -> Composition:
    config = get_config()
    declare(config, changes)
    config.update_from_flattened_dict({"reward_fn.pickscore": 2.0, "reward_fn.clipscore": -3.0, **changes})
    return Composition(config)


# --- the running standard deviation -----------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole():
    moments = Moments()
    for part in (A[:7], A[7:8], A[8:8], A[8:]):
        moments.add(part)
    assert moments.count == 50
    assert moments.mean == pytest.approx(A.double().mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(A.double().std(correction=0).item(), rel=1e-12)
    means_left_out = sum(p.double().var(correction=0).item() * len(p) for p in (A[:7], A[7:8], A[8:])) / 50
    assert moments.std != pytest.approx(math.sqrt(means_left_out), rel=1e-3)


def test_moments_leave_out_what_is_not_finite_and_a_constant_divides_by_1():
    moments = Moments()
    moments.add(torch.tensor([1.0, math.nan, 3.0, math.inf]))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)
    constant = Moments()
    assert constant.std == 1.0
    constant.add(torch.full((9,), 0.1))
    assert constant.std == 1.0


def test_each_term_is_divided_by_its_own_deviation_before_it_is_weighted():
    terms, made = {"pickscore": A, "clipscore": B}, composition(reward_normalise=True)
    made.see({"pickscore": A[:20], "clipscore": B[:20]})
    made.see({"pickscore": A[20:], "clipscore": B[20:]})
    expected = 2 * A / A.std(correction=0) - 3 * B / B.std(correction=0)
    torch.testing.assert_close(made.total(terms), expected, rtol=1e-5, atol=1e-5)
    broken = (2 * A - 3 * B) / (2 * A - 3 * B).std(correction=0)
    assert (made.total(terms) - broken).abs().max() > 0.1


def test_the_deviation_is_a_constant_of_the_gradient():
    made, x = composition(reward_normalise=True), B.clone().requires_grad_()
    made.see({"pickscore": A, "clipscore": x})
    made.total({"pickscore": A, "clipscore": x}).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((50,), -3 / B.std(correction=0).item()), rtol=1e-5, atol=0)


def test_what_a_checkpoint_keeps_goes_on_exactly():
    made = composition(reward_normalise=True, **{"reward_constraint.clipscore": 0.3})
    made.see({"pickscore": A, "clipscore": B})
    made.hold({"clipscore": B + 0.01}, {"clipscore": B})
    other = composition(reward_normalise=True, **{"reward_constraint.clipscore": 0.3})
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other.factors() == made.factors()
    assert other.state_dict() == made.state_dict()
    other.load_state_dict({})  # of a checkpoint of before
    assert other.state_dict() == made.state_dict()


# --- constraints ------------------------------------------------------------------------------------------


def test_a_multiplier_ascends_while_the_mean_is_below_the_bases_and_never_falls_below_0():
    made = composition(**{"reward_fn.clipscore": 0.0, "reward_constraint.clipscore": 0.5})
    made.see({"pickscore": A, "clipscore": B})
    s, expected = B.std(correction=0).item(), 0.0
    for gap in (0.02, 0.01, -0.2, -0.1, 0.005):
        logged = made.hold({"clipscore": B + gap}, {"clipscore": B})
        expected = max(0.0, expected + 0.5 * gap / s)
        assert made.multipliers["clipscore"] == pytest.approx(expected, rel=1e-4)
        assert logged["reward/clipscore/below_base"] == pytest.approx(gap, rel=1e-4)
    torch.testing.assert_close(
        made.total({"pickscore": A, "clipscore": B}), 2 * A + expected * B / s, rtol=1e-4, atol=0
    )


def test_the_ascent_ends_where_the_constraint_is_met():
    """Maximise -(x - 1)^2 with x >= 2, x by gradient: the multiplier comes to 2, and x to the bound."""
    made, x = composition(**{"reward_fn.clipscore": 0.0, "reward_constraint.clipscore": 0.2}), 1.0
    made.see({"pickscore": A, "clipscore": torch.tensor([-1.0, 1.0])})  # of deviation 1
    for _ in range(200):
        x += 0.2 * (-2 * (x - 1) + made.multipliers["clipscore"])
        made.hold({"clipscore": torch.tensor([2.0])}, {"clipscore": torch.tensor([x])})
    assert x == pytest.approx(2, abs=1e-3)
    assert made.multipliers["clipscore"] == pytest.approx(2, abs=1e-2)


def test_what_is_held_is_trained_on(checkpoint):
    config = get_config()
    declare(config, ["reward_constraint.clipscore"])
    config.update_from_flattened_dict({"reward_fn.jpeg_compressibility": 1.0, "reward_constraint.clipscore": 1.0})
    assert len(trained_models(config)) == 1
    config.use_reward_gradient, config.reward_fn.jpeg_compressibility, config.reward_fn.pickscore = True, 0.0, 1.0
    declare(config, ["reward_constraint.jpeg_compressibility"])
    config.reward_constraint.jpeg_compressibility = 0.5
    with pytest.raises(ConfigError, match=r"config.reward_constraint.jpeg_compressibility = 0.5 has no gradient"):
        resolve(config, 1, cuda=False)


@pytest.mark.parametrize("change", [{"reward_normalise": True}, {"reward_constraint.clipscore": 1.0}])
def test_methods_that_aim_at_a_law_of_the_reward_refuse_one_that_changes(change):
    config = get_config()
    declare(config, change)
    config.update_from_flattened_dict({"reward_fn.pickscore": 1.0, "use_reward_gradient": True, **change})
    config.train.method, config.sample.sde_type = "anchored", "ode"
    with pytest.raises(ConfigError, match="changes the reward as training goes on"):
        resolve(config, 1, cuda=False)


# --- ensembles --------------------------------------------------------------------------------------------


class Scaled:
    """factor times the mean of the pixels, plus an offset."""

    name, differentiable = "scaled", True

    def __init__(self, factor: float, offset: float) -> None:
        self.factor, self.offset = factor, offset

    def __call__(self, images: Tensor, *_: object) -> Tensor:
        return self.factor * images.flatten(1).mean(1) + self.offset


def test_an_ensemble_has_the_gradient_of_what_it_returns():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.8)]).requires_grad_()
    members = [Scaled(1.0, 0.0), Scaled(-1.0, 1.0)]  # at 0.2 the first is lower, at 0.8 the second
    for kind, scores, slopes in (("min", [0.2, 0.2], [1.0, -1.0]), ("mean", [0.5, 0.5], [0.0, 0.0])):
        found = Ensemble("scaled", members, kind)(images, ["a"] * 2, [{}] * 2)
        torch.testing.assert_close(found, torch.tensor(scores))
        (gradient,) = torch.autograd.grad(found.sum(), images)
        torch.testing.assert_close(gradient, torch.tensor(slopes).view(2, 1, 1, 1).expand(2, 3, 4, 4) / 48)


def test_several_checkpoints_of_one_reward_are_an_ensemble(checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = get_config()
    config.reward_fn.pickscore, config.reward_model.pickscore = 1.0, f"{checkpoint}, {other}"
    config.reward_ensemble = "min"
    reward = build_reward(resolve(config, 1, cuda=False).config, "cpu").models["pickscore"]
    assert isinstance(reward, Ensemble)
    assert (len(reward.members), reward.kind, reward.differentiable) == (2, "min", True)
    assert len(trained_models(config)) == 2
    config.reward_model.pickscore = f"{checkpoint}, {tmp_path / 'none'}"
    with pytest.raises(ConfigError, match=r"none' is not a directory"):
        resolve(config, 1, cuda=False)
    config.reward_model.pickscore = checkpoint
    with pytest.raises(ConfigError, match="has no several checkpoints of one reward to join"):
        resolve(config, 1, cuda=False)
    assert split_models("a, b") == split_models("a,b") == ("a", "b")


# --- augmentation -----------------------------------------------------------------------------------------


def generators(*keys: int) -> list[torch.Generator]:
    return [keyed_generator(0, "augment", key) for key in keys]


def test_an_images_changes_depend_on_its_key_alone():
    images = torch.rand(3, 3, 16, 12, generator=GENERATOR)
    together = augmented(images, generators(5, 6, 7), 0.2)
    assert together.shape == images.shape
    assert together.min() >= 0
    assert together.max() <= 1
    for i, key in enumerate((5, 6, 7)):
        assert torch.equal(augmented(images[i : i + 1], generators(key), 0.2)[0], together[i])
    assert (together - augmented(images, generators(6, 5, 7), 0.2))[:2].abs().max() > 0.01
    assert (together - images).abs().max() > 0.01


def test_changes_of_strength_0_are_none():
    images = torch.rand(2, 3, 16, 12, generator=GENERATOR)
    torch.testing.assert_close(augmented(images, generators(1, 2), 0.0), images, rtol=0, atol=1e-6)


def test_the_gradient_through_the_changes_is_that_of_finite_differences():
    images = 0.3 + 0.4 * torch.rand(1, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)
    weights = torch.randn(1, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return (weights * augmented(x, generators(3), 0.1)).sum()

    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    direction, h = torch.randn(images.shape, generator=GENERATOR, dtype=torch.float64), 1e-6
    difference = (value(images + h * direction) - value(images - h * direction)) / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_training_scores_changed_images_and_evaluation_those_that_are_there():
    made, images = composition(**{"reward_fn.clipscore": 0.0, "reward_augment": 0.3}), torch.rand(2, 3, 8, 8)
    reward = WeightedReward({"pickscore": Scaled(1.0, 0.0)}, {"pickscore": 2.0})
    arguments = (["a bag"] * 2, [{}] * 2)
    found = [made.score(reward, images, *arguments, 4, torch.tensor([8, 9])).total for _ in range(2)]
    assert torch.equal(*found)
    seed = get_config().seed
    changed = augmented(images, [keyed_generator(seed, "augment", 4, i) for i in (8, 9)], 0.3)
    torch.testing.assert_close(found[0], 2 * changed.flatten(1).mean(1))
    assert (made.score(reward, images, *arguments, 5, torch.tensor([8, 9])).total - found[0]).abs().max() > 1e-4
    torch.testing.assert_close(reward.evaluate(images, *arguments).total, 2 * images.flatten(1).mean(1))


# --- what is logged ---------------------------------------------------------------------------------------


def test_the_shares_of_the_gradient_are_those_of_its_norms():
    images = torch.rand(2, 3, 4, 4, generator=GENERATOR).requires_grad_()
    terms = {"a": 3 * images.flatten(1).sum(1), "b": images.flatten(1)[:, 0], "c": images.flatten(1).sum(1)}
    shares = gradient_shares(images, terms, {"a": -2.0, "b": 6.0, "c": 0.0})
    a, b = 6 * math.sqrt(48), 6.0
    assert shares["a"].item() == pytest.approx(a / (a + b), rel=1e-5)
    assert shares["b"].item() == pytest.approx(b / (a + b), rel=1e-5)
    assert shares["c"].item() == 0
