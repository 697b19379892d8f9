"""The evaluator that holds a training against the exact curve of its base and reward."""

from __future__ import annotations

import json
import math

import pytest

from flow_grpo.diversity.features import NonFiniteFeatures
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators import exact_curve
from flow_grpo.evaluators.evaluation import draw_samples, evaluate
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.prompts import PromptDataset
from flow_grpo.settings import resolve
from scripts.study import base_images, curve, exact_law
from tests.conftest import PROMPTS


@pytest.fixture
def curve_of(config, tmp_path, monkeypatch):
    """A curve of the configuration's base model, written as the command writes it."""
    monkeypatch.setattr(base_images, "CHUNK", 60)
    monkeypatch.setattr(exact_law, "SET_SIZE", 4)
    monkeypatch.setattr(exact_law, "LEAST_EFFECTIVE", 20)

    def write():
        images = base_images.base_images(config, 60, tmp_path / "base")
        found = curve.results(images) | {"rewards": {"pickscore": 1.0}, "features": base_images.features_name(config)}
        found["drawing"] = json.loads((tmp_path / "base/question.json").read_text())["drawing"]
        path = tmp_path / "curve.json"
        path.write_text(json.dumps(found))
        return path

    return write


def test_the_base_model_keeps_all_of_the_law(config, build, curve_of, tmp_path):
    config.eval_diversity, config.eval_freq, config.num_seeds = True, 1, 4
    config.eval.curve = str(curve_of())
    parts = build(config)
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    prompts = PromptDataset.load(config.prompts.test)
    found = evaluate(parts.policy, prompts, evaluators, parts.settings, parts.run, "eval")
    assert found.metrics["eval/diversity/kept_of_exact"] == pytest.approx(1, abs=1e-3)
    assert found.metrics["eval/diversity/kept_of_exact_rke"] == pytest.approx(1, abs=1e-3)
    low, high = (found.metrics[f"eval/diversity/kept_of_exact_{end}"] for end in ("low", "high"))
    assert low <= 1 <= high
    assert found.metrics["eval/diversity/lost_beside_exact"] == pytest.approx(0, abs=1e-2)
    assert found.metrics["eval/diversity/off_support"] == 0
    assert found.record.extra["diversity/kept_of_exact"] == found.metrics["eval/diversity/kept_of_exact"]
    (exact,) = [evaluator for evaluator in evaluators if evaluator.name == "exact curve"]
    assert exact.request.prompts == PROMPTS
    assert exact.request.num_image_per_prompt == 4
    assert (parts.run.folder / "curve.json").read_bytes() == (tmp_path / "curve.json").read_bytes()


def test_prompts_are_held_against_themselves_in_whatever_order_the_curve_has_them(config, build, curve_of, tmp_path):
    config.eval_diversity, config.eval_freq, config.num_seeds = True, 1, 4
    path = curve_of()
    found = json.loads(path.read_text())
    found["prompts"].reverse()
    found["first"] = {name: values[::-1] for name, values in found["first"].items()}
    path.write_text(json.dumps(found))
    config.eval.curve = str(path)
    parts = build(config)
    (exact,) = [
        evaluator
        for evaluator in build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
        if evaluator.name == "exact curve"
    ]
    prompts = PromptDataset.load(config.prompts.test)
    samples = draw_samples(parts.policy, prompts, parts.settings, parts.run, [exact.request])
    figures = exact.figures(samples)
    for name, values in found["first"].items():
        assert figures[name] == pytest.approx(values, rel=2e-3)  # features are kept in float16
        assert figures[name] != pytest.approx(values[::-1], rel=2e-3)


def test_a_curve_of_another_reward_or_without_diversity_is_refused_at_once(config, curve_of):
    config.eval_diversity, config.eval_freq = True, 1
    config.eval.curve = str(curve_of())
    config.reward_fn.pickscore, config.reward_fn.clipscore = 0.0, 1.0
    with pytest.raises(ConfigError, match=r"is of the reward pickscore, which the run does not measure; add it to"):
        resolve(config, 1, cuda=False)
    config.eval.rewards = ("pickscore",)
    resolve(config, 1, cuda=False)
    config.eval_diversity = False
    with pytest.raises(ConfigError, match=r"config\.eval_diversity = False leaves out"):
        resolve(config, 1, cuda=False)


def test_a_curve_of_other_features_is_refused(config, build, curve_of):
    config.eval_diversity, config.eval_freq = True, 1
    config.eval.curve = str(curve_of())
    config.diversity.model = config.reward_model.pickscore
    parts = build(config)
    with pytest.raises(ConfigError, match=r"is of the features .*judge', not 'clip:.*clip'"):
        build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)


def test_a_curve_of_images_that_are_drawn_otherwise_is_refused(config, build, curve_of):
    config.eval_diversity, config.eval_freq = True, 1
    config.eval.curve = str(curve_of())
    config.eval.num_steps += 1
    parts = build(config)
    with pytest.raises(ConfigError, match=r"is of images that were drawn otherwise than this run's"):
        build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)


def test_images_without_finite_features_do_not_end_the_run(config, build, curve_of, monkeypatch):
    config.eval_diversity, config.eval_freq, config.num_seeds = True, 1, 4
    config.eval.curve = str(curve_of())
    parts = build(config)
    exact = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)[-1]

    def no_features(*_):
        raise NonFiniteFeatures("an image is not finite")

    monkeypatch.setattr(exact_curve, "features_by_prompt", no_features)
    samples = draw_samples(
        parts.policy, PromptDataset.load(config.prompts.test), parts.settings, parts.run, [exact.request]
    )
    with pytest.warns(UserWarning, match="nothing is held against the exact curve: an image is not finite"):
        found = exact.evaluate(samples).metrics
    assert math.isnan(found["diversity/kept_of_exact"])
    assert math.isnan(found["exact_curve/reward"])


def test_a_file_that_is_no_curve_is_named_before_anything_loads(config, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    config.eval.curve = str(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"^config\.eval\.curve: .*x\.json is no curve\.json"):
        resolve(config, 1, cuda=False)
