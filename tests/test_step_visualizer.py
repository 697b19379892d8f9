"""The film strip: its numbers, its files, and its history."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from flow_grpo import drtune
from flow_grpo.evaluation import draw_samples
from flow_grpo.ode_log_prob import sample_log_density
from flow_grpo.step_visualizer import StepVisualizer, film_strip
from tests.conftest import PROMPTS


@pytest.fixture
def parts(config, build):
    config.use_reward_gradient = config.visualize_steps = True
    config.entropy.num_strip_prompts = 2
    return build(config)


def test_the_last_values_are_those_of_the_entropy_evaluator(parts):
    strip = film_strip(parts.policy, PROMPTS[:2])
    density = sample_log_density(parts.policy, PROMPTS[:2], [(0, 0), (1, 0)])
    torch.testing.assert_close(strip.log_density[:, -1], density.log_prob, rtol=1e-5, atol=1e-2)
    widths = torch.tensor(strip.sigmas).diff().abs()
    torch.testing.assert_close(strip.divergence * widths, density.step_integrals, rtol=1e-4, atol=1e-3)


def test_the_last_frame_is_the_sample(parts):
    strip = film_strip(parts.policy, PROMPTS[:2])
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    torch.testing.assert_close(strip.images[0, -1], samples.images[0], rtol=0, atol=1e-4)
    assert strip.images.shape == (2, 4, 3, 32, 32)


def test_the_history_overlays_earlier_evaluations_and_forgets_later_ones(parts):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    for _ in range(3):
        assert visualizer.evaluate(samples) == {}
        parts.train(drtune)
    assert [record["step"] for record in visualizer._read(1)] == [0, 1]
    values = [json.loads(p.read_text())["log_density"] for p in sorted((parts.run.folder / "steps").iterdir())]
    assert values[0] != values[2]
    names = {p.name for p in (parts.run.folder / "images").iterdir()}
    assert {f"eval_{kind}_00000{i}.png" for kind in ("strip", "curves", "training") for i in range(3)} <= names
    assert Image.open(parts.run.folder / "images/eval_strip_000002.png").size == (4 * 33 + 1, 2 * 33 + 1)
