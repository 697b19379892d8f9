"""The exact law read off base images: against closed forms, against the law itself, and with intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flow_grpo.diversity.rke import median_bandwidth, rke_score
from flow_grpo.diversity.vendi import vendi_of_spectra, vendi_score
from flow_grpo.evaluators.scenes import scene_modes
from flow_grpo.scenes.captions import Garment
from scripts.study import exact_law
from scripts.study.base_images import EMPTY, BaseImages
from scripts.study.exact_law import LEAST_EFFECTIVE, can_be_right, curve, draw_sets, set_figures, strengths_of

DIRECTIONS = np.eye(6)


def images_of(reward: np.ndarray, right: np.ndarray | None = None, features: np.ndarray | None = None) -> BaseImages:
    prompts = tuple(f"prompt {number}" for number in range(len(reward)))
    generator = np.random.default_rng(0)
    return BaseImages(
        prompts,
        reward,
        reward > 0 if right is None else right,
        generator.normal(size=(*reward.shape, 5)) if features is None else features,
    )


def modes(generator: np.random.Generator, shares: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Which of the six modes each image shows."""
    return generator.choice(6, size, p=shares / shares.sum())


def features_of(mode: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return DIRECTIONS[mode] + 0.2 * generator.normal(size=(*mode.shape, 6))


def vendi_of_law(shares: np.ndarray, generator: np.random.Generator, sets: int) -> float:
    """The mean Vendi score of sets of 16 images that are drawn from a law itself."""
    features = features_of(modes(generator, shares, (sets, 16)), generator)
    unit = features / np.linalg.norm(features, axis=2, keepdims=True)
    return float(vendi_of_spectra(np.linalg.eigvalsh(unit @ unit.transpose(0, 2, 1)), 1.0).mean())


# --- closed forms ---------------------------------------------------------------------------------------


def test_the_law_of_a_gaussian_with_a_linear_reward_is_shifted():
    """p_base = N(0, 1) and R = x: the law is N(lambda, 1), its mean reward lambda, its KL lambda^2 / 2."""
    reward = np.random.default_rng(1).normal(size=(30, 1000))
    for point in curve(images_of(reward), [0.0, 0.5, 1.0], repeats=4):
        strength = point.strength
        assert point.figures["reward"].images.holds(strength)
        assert point.figures["kl"].images.holds(strength**2 / 2) or strength == 0
        assert point.figures["reward"].estimate == pytest.approx(strength, abs=0.03)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_intervals_of_the_mean_reward_cover(strength):
    """Over 120 repetitions of 4 prompts with 200 images each: 95 % less three standard errors of 2 %."""
    generator, covered = np.random.default_rng(2), 0
    for _ in range(120):
        images = images_of(generator.normal(size=(4, 200)))
        covered += exact_law.figures_at(images, strength, {}, 0, 2)["reward"].images.holds(strength)
    assert covered / 120 >= 0.89


def test_the_vendi_score_of_the_law_is_that_of_images_drawn_from_the_law_itself():
    """Six modes whose rewards differ: the law has them in known shares, and sets of it can be drawn without weights."""
    generator, strength = np.random.default_rng(3), 1.0
    of_mode = np.linspace(0, 1, 6)
    shown = modes(generator, np.ones(6), (8, 400))
    images = images_of(of_mode[shown], features=features_of(shown, generator))
    (point,) = curve(images, [strength])
    law = np.exp(strength * of_mode)
    found = point.figures["vendi"].images
    assert found.holds(vendi_of_law(law, generator, 4000))
    assert found.high - found.low < 0.3
    assert not found.holds(vendi_of_law(np.ones(6), generator, 4000))  # the broken twin: without weights


def test_intervals_of_the_vendi_score_cover():
    """Over 60 repetitions: 95 % less three standard errors of 2.8 %."""
    generator, strength, covered = np.random.default_rng(4), 1.0, 0
    of_mode = np.linspace(0, 1, 6)
    law = np.exp(strength * of_mode)
    truth = vendi_of_law(law, generator, 20_000)
    for _ in range(60):
        shown = modes(generator, np.ones(6), (2, 150))
        images = images_of(of_mode[shown], features=features_of(shown, generator))
        figures = {"vendi": set_figures(images)["vendi"]}
        covered += exact_law.figures_at(images, strength, figures, 0, 60)["vendi"].images.holds(truth)
    assert covered >= 52


# --- rewards of 0 and 1 ---------------------------------------------------------------------------------


def test_the_end_of_a_reward_of_0_or_1_is_the_right_images_alone():
    generator = np.random.default_rng(5)
    reward = (generator.random((3, 400)) < 0.4).astype(float)
    features = generator.normal(size=(3, 400, 5))
    point = curve(images_of(reward, features=features), [math.inf])[0]
    assert point.figures["reward"].estimate == 1
    assert point.figures["kl"].estimate == pytest.approx(np.log(1 / reward.mean(1)).mean())
    assert point.effective == pytest.approx(reward.sum(1).min())
    right = [features[p][reward[p] == 1] for p in range(3)]
    direct = np.mean([vendi_score(r[generator.permutation(len(r))[:16]]) for r in right for _ in range(500)])
    assert point.figures["vendi"].estimate == pytest.approx(direct, abs=0.1)


def test_between_it_is_a_mixture_of_right_and_wrong_images():
    reward = np.array([[1.0] * 20 + [0.0] * 80])
    strength = math.log(6.0)  # pi = p e^lambda / (1 - p + p e^lambda) = .6
    point = curve(images_of(reward, reward > 0), [0.0, strength], repeats=4)
    pi = 0.2 * 6 / (0.8 + 0.2 * 6)
    found = exact_law.figures_at(images_of(reward, reward > 0), strength, {}, 0, 2)
    assert found["reward"].estimate == pytest.approx(pi)
    assert found["judge"].estimate == pytest.approx(pi)
    assert found["kl"].estimate == pytest.approx(pi * math.log(pi / 0.2) + (1 - pi) * math.log((1 - pi) / 0.8))
    assert len(point) == 1 + (point[-1].strength > 0)


def test_prompts_without_enough_right_images_are_named():
    reward = np.zeros((2, 200))
    reward[0, : LEAST_EFFECTIVE + 1], reward[1, :LEAST_EFFECTIVE] = 1, 1
    assert can_be_right(images_of(reward)).tolist() == [True, False]
    (point,) = curve(images_of(reward[:1]), [math.inf], repeats=4)
    assert point.figures["reward"].estimate == 1
    assert can_be_right(images_of(reward - 0.5)).all()  # no reward of 0 or 1: all


# --- where it ends, and sets ----------------------------------------------------------------------------


def test_strengths_rise_to_where_the_least_images_remain():
    reward = np.random.default_rng(6).normal(size=(4, 500))
    strengths = strengths_of(reward, 5)
    assert strengths[0] == 0
    assert len(strengths) == 5
    assert strengths == sorted(strengths)
    points = curve(images_of(reward), strengths, repeats=4)
    assert points[-1].effective == pytest.approx(LEAST_EFFECTIVE, rel=1e-6)
    steps = np.diff([point.figures["reward"].estimate for point in points])
    assert steps == pytest.approx([steps.mean()] * 4, rel=1e-3)
    assert strengths_of((reward > 0).astype(float), 5)[-1] == math.inf


def test_strengths_that_leave_too_few_images_are_left_out():
    reward = np.random.default_rng(7).normal(size=(2, 200))
    assert [point.strength for point in curve(images_of(reward), [0.0, 50.0], repeats=4)] == [0.0]


def test_a_set_holds_no_image_twice_and_images_come_by_their_weights():
    generator = np.random.default_rng(8)
    w = np.array([0.5, 0.25, 0.125, 0.125])
    first = draw_sets(w, generator.gumbel(size=(20_000, 4)), 1)[:, 0]
    assert np.bincount(first) / 20_000 == pytest.approx(w, abs=0.015)
    sets = draw_sets(np.full(30, 1 / 30), generator.gumbel(size=(50, 30)), 16)
    assert all(len(set(row)) == 16 for row in sets.tolist())


def test_figures_of_sets_are_the_packages_own():
    generator = np.random.default_rng(9)
    images = images_of(generator.normal(size=(2, 40)))
    figures, sets = set_figures(images), np.array([np.arange(16), np.arange(20, 36)])
    bandwidth = median_bandwidth(list(images.features))
    unit = images.features[1] / np.linalg.norm(images.features[1], axis=1, keepdims=True)
    for row, chosen in enumerate(sets):
        assert figures["vendi"](1, sets)[row] == pytest.approx(vendi_score(unit[chosen]), rel=1e-12)
        assert figures["rke"](1, sets)[row] == pytest.approx(rke_score(unit[chosen], bandwidth), rel=1e-9)


@pytest.mark.parametrize(("prompt", "kind"), [("a dress", "single"), ("a red dress", "colour")])
def test_modes_of_sets_are_those_of_the_evaluator(prompt, kind):
    generator = np.random.default_rng(10)
    labels = generator.choice([3, EMPTY], (1, 30, 4))
    colours = generator.integers(8, size=(1, 30, 4))
    blank = np.zeros((1, 30))
    images = BaseImages((prompt,), blank, blank > 0, generator.normal(size=(1, 30, 5)), labels, colours)
    chosen = generator.permutation(30)[:16]
    scenes = [
        tuple(None if label == EMPTY else Garment(label, colour) for label, colour in zip(*cells, strict=True))
        for cells in zip(labels[0, chosen].tolist(), colours[0, chosen].tolist(), strict=True)
    ]
    expected, figures = scene_modes(kind, scenes), set_figures(images)
    assert figures["modes"](0, chosen[None])[0] == pytest.approx(expected["entropy"])
    assert figures["cells"](0, chosen[None])[0] == pytest.approx(expected["cell_entropy"])
    assert figures["layouts"](0, chosen[None])[0] == pytest.approx(expected["layout_entropy"])
