"""Evaluation samples and the evaluators that share them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flow_grpo.evaluation import (
    JudgeEvaluator,
    ModeEvaluator,
    RewardEvaluator,
    draw_samples,
    image_grid,
    sample_evaluators,
)
from flow_grpo.types import Samples
from tests.conftest import PROMPTS


class ColourScorer:
    """A scorer that knows one thing: the mean colour of an image and the colour a text names."""

    COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}  # noqa: RUF012

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)

    def text_features(self, texts):
        return torch.tensor([self.COLOURS[text.split()[1]] for text in texts])


def painted(colours, prompts):
    values = torch.tensor([ColourScorer.COLOURS[c] for c in colours])
    images = values[:, :, None, None].expand(-1, -1, 4, 4).clone()
    order = list(dict.fromkeys(prompts))
    return Samples(
        images, torch.zeros(len(images), 1, 1, 1), tuple(prompts), ({},) * len(prompts),
        torch.tensor([order.index(p) for p in prompts]), torch.arange(len(prompts)),
    )  # fmt: skip


def test_judge_accuracy_counts_images_nearest_their_own_prompt():
    samples = painted(["red", "green", "red", "green"], ["a red bag", "a red bag", "a green bag", "a green bag"])
    metrics = JudgeEvaluator(ColourScorer(), batch_size=3).evaluate(samples)
    assert metrics == {"judge/accuracy": 0.5, "judge/similarity": 0.5}


def test_modes_are_counted_among_the_prompts_that_have_them():
    samples = painted(["red", "red", "red", "blue", "green"], ["a bag"] * 4 + ["a green boot"])
    modes = {"a bag": {"red": "a red bag", "green": "a green bag", "blue": "a blue bag"}}
    metrics = ModeEvaluator(ColourScorer(), modes, batch_size=2).evaluate(samples)
    shares = {"modes/red": 0.75, "modes/green": 0.0, "modes/blue": 0.25}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics == pytest.approx(shares | {"modes/entropy": entropy})


def test_without_known_modes_nothing_is_claimed():
    assert ModeEvaluator(ColourScorer(), {}, 2).evaluate(painted(["red"], ["a red bag"])) == {}


def test_rewards_are_means_over_all_samples_whatever_the_batch(config, build):
    config.eval.rewards = ("jpeg_compressibility",)
    parts = build(config)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    whole = parts.reward.evaluate(samples.images, samples.prompts, samples.metadata)
    for batch_size in (3, 8):
        metrics = RewardEvaluator(parts.reward, batch_size, torch.device("cpu")).evaluate(samples)
        assert set(metrics) == {"reward/total", "reward/pickscore", "reward/jpeg_compressibility"}
        for name, values in {"total": whole.total, **whole.terms}.items():
            assert metrics[f"reward/{name}"] == pytest.approx(values.mean().item(), rel=1e-5)


def test_samples_are_exactly_those_asked_for_in_order(config, build):
    config.eval.num_prompts, config.eval.num_image_per_prompt, config.eval.batch_size = 3, 3, 4
    parts = build(config)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    assert samples.prompts == tuple(p for p in PROMPTS[:3] for _ in range(3))
    assert samples.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples.images.shape == (9, 3, 32, 32)
    assert len(torch.unique(samples.latents.flatten(1), dim=0)) == 9


def test_the_noise_is_fixed_across_training_seeds_and_epochs(config, build):
    drawn = []
    for seed in (1, 2):
        config.seed, config.run_name = seed, f"run-{seed}"
        parts = build(config)
        parts.run.counters.epoch = seed
        drawn.append(draw_samples(parts.policy, parts.prompts, parts.settings, parts.run).latents)
    assert torch.equal(drawn[0], drawn[1])


def test_the_grid_has_a_row_for_each_prompt(config, build):
    config.eval.num_grid_prompts, config.eval.num_grid_images = 2, 2
    parts = build(config)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    grid = torch.from_numpy(np.array(image_grid(samples, parts.settings.config)))
    expected = (samples.images[2].permute(1, 2, 0) * 255).round()  # second prompt, first image
    torch.testing.assert_close(grid[34:66, 1:33].float(), expected)


def test_evaluators_are_those_configured(config, build):
    parts = build(config)
    assert [e.name for e in sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))] == [
        "reward", "judge", "modes",
    ]  # fmt: skip
    config.eval.judge, config.eval.modes, config.run_name = "", "", "other"
    parts = build(config)
    assert [e.name for e in sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))] == ["reward"]
