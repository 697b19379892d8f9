"""Evaluation samples and the evaluators that share them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.diversity import build_diversity_evaluators
from flow_grpo.evaluators.evaluation import (
    JudgeEvaluator,
    Measured,
    ModeEvaluator,
    RewardEvaluator,
    SharedFeatures,
    draw_samples,
    evaluate,
    image_grid,
    sample_evaluators,
    setting_of,
)
from flow_grpo.paths import find
from flow_grpo.runs import evaluations
from flow_grpo.runs.evaluations import read_record, record_path, write_record
from flow_grpo.types import Samples
from tests.conftest import PROMPTS


class ColourScorer:
    """A scorer that knows one thing: the mean colour of an image and the colour a text names."""

    COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}  # noqa: RUF012

    logit_scale = torch.tensor(math.log(10.0))

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
    metrics = JudgeEvaluator(SharedFeatures(ColourScorer(), 3)).evaluate(samples).metrics
    assert metrics == {"judge/accuracy": 0.5, "judge/similarity": 0.5}


def test_modes_are_counted_among_the_prompts_that_have_them():
    samples = painted(["red", "red", "red", "blue", "green"], ["a bag"] * 4 + ["a green boot"])
    modes = {"a bag": {"red": "a red bag", "green": "a green bag", "blue": "a blue bag"}}
    metrics = ModeEvaluator(SharedFeatures(ColourScorer(), 2), modes).evaluate(samples).metrics
    shares = {"modes/red": 0.75, "modes/green": 0.0, "modes/blue": 0.25}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics == pytest.approx(shares | {"modes/entropy": entropy})


def test_without_known_modes_nothing_is_claimed():
    assert ModeEvaluator(SharedFeatures(ColourScorer(), 2), {}).evaluate(painted(["red"], ["a red bag"])) == Measured()


class CountingScorer(ColourScorer):
    """Which also counts the images that it was shown."""

    seen = 0

    def image_features(self, images):
        self.seen += len(images)
        return super().image_features(images)


def test_judge_and_modes_embed_an_image_once_in_an_evaluation_and_anew_in_the_next():
    scorer, modes = CountingScorer(), {"a red bag": {"red": "a red bag", "blue": "a blue bag"}}
    features = SharedFeatures(scorer, 2)
    evaluators = JudgeEvaluator(features), ModeEvaluator(features, modes)
    for colours, accuracy, blue, seen in ((["red"] * 3, 1.0, 0.0, 3), (["red", "red", "blue"], 2 / 3, 1 / 3, 6)):
        samples = painted(colours, ["a red bag", "a red bag", "a red bag"])
        metrics = {k: v for evaluator in evaluators for k, v in evaluator.evaluate(samples).metrics.items()}
        assert metrics["modes/blue"] == pytest.approx(blue)
        assert metrics["judge/similarity"] == pytest.approx(accuracy)
        assert scorer.seen == seen


def test_in_an_evaluation_the_judge_sees_every_image_once(config, build):
    parts = build(config)
    evaluators = sample_evaluators(parts.reward, parts.settings, parts.policy.device)
    judge, modes = evaluators[1:]
    shown, embed = [], judge.scorer.image_features
    judge.scorer.image_features = lambda images: shown.append(len(images)) or embed(images)
    evaluate(parts.policy, parts.prompts, [judge, modes], parts.settings, parts.run, "eval")
    assert sum(shown) == len(PROMPTS) * config.eval.num_image_per_prompt


# --- samples that are not finite -------------------------------------------------------------------------


def broken(samples):
    samples.images[1, 0, 2, 2] = torch.nan
    return samples


def test_a_judge_that_sees_an_image_of_nan_claims_nothing():
    samples = broken(painted(["red", "green"], ["a red bag", "a green bag"]))
    metrics = JudgeEvaluator(SharedFeatures(ColourScorer(), 3)).evaluate(samples).metrics
    assert set(metrics) == {"judge/accuracy", "judge/similarity"}
    assert all(map(math.isnan, metrics.values()))


def test_an_image_of_nan_is_in_no_mode():
    samples = broken(painted(["red", "blue"], ["a bag"] * 2))
    modes = {"a bag": {"red": "a red bag", "blue": "a blue bag"}}
    metrics = ModeEvaluator(SharedFeatures(ColourScorer(), 2), modes).evaluate(samples).metrics
    assert set(metrics) == {"modes/red", "modes/blue", "modes/entropy"}
    assert all(map(math.isnan, metrics.values()))


@pytest.mark.filterwarnings("error:invalid value")
def test_weights_of_nan_give_metrics_of_nan_and_the_run_goes_on(config, build):
    config.eval.rewards = ("jpeg_compressibility",)
    parts = build(config)
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter.fill_(torch.nan)
    evaluators = sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))
    metrics = evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, "eval").metrics
    assert {name.split("/")[1] for name in metrics} == {"reward", "judge", "modes"}
    assert all(map(math.isnan, metrics.values()))
    assert (parts.run.folder / "images/eval_000000.png").is_file()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[]", "is not a JSON object"),
        (b'{"a bag": 3}', "'a bag' must have an object of one or more modes"),
        (b'{"a bag": {"red": 3}}', "3, of 'a bag', must be text that is not empty"),
    ],
)
def test_a_file_that_holds_no_modes_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "modes.json").write_bytes(text)
    with pytest.raises(ConfigError, match=f"^config.eval.modes: .*{sentence}"):
        ModeEvaluator.load(SharedFeatures(ColourScorer(), 2), str(tmp_path / "modes.json"))


# --- the record ------------------------------------------------------------------------------------------


@pytest.fixture
def measured(config, build):
    """2 images of each of 4 prompts, and 5 of each of 3 for the diversity: parts, evaluators."""
    config.eval_diversity, config.eval_diversity_freq = True, 1
    config.num_seeds, config.diversity.num_prompts = 5, 3
    config.eval.rewards = ("jpeg_compressibility",)
    parts = build(config)
    evaluators = sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))
    evaluators += build_diversity_evaluators(parts.settings, parts.run, torch.device("cpu"))
    return parts, evaluators


def of_run(parts, evaluators, label="eval"):
    """The metrics, and the record as it is on the disk."""
    found = evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, label)
    return found.metrics, read_record(record_path(parts.run.folder, label, parts.run.counters.epoch))


def mean(values):
    return np.mean([value for value in values if value is not None])


def test_a_record_joins_the_images_of_all_evaluators(measured):
    _, record = of_run(*measured)
    assert record.prompts == list(PROMPTS)
    assert [(record.prompt.count(p), len(record.noise)) for p in range(4)] == [(5, 17)] * 3 + [(2, 17)]
    known = [i for i, value in enumerate(record.rewards["total"]) if value is not None]
    assert [(record.prompt[i], record.noise[i]) for i in known] == [(p, s) for p in range(4) for s in range(2)]
    assert [i for i, guess in enumerate(record.judge.guess) if guess is not None] == known
    assert record.diversity.noise == [list(range(5))] * 3
    assert record.sprite.images == list(range(17))


def test_what_is_logged_are_the_means_of_what_is_recorded(measured):
    metrics, record = of_run(*measured)
    for name, values in record.rewards.items():
        assert metrics[f"eval/reward/{name}"] == pytest.approx(mean(values), rel=1e-5)
    right = [guess == p for guess, p in zip(record.judge.guess, record.prompt, strict=True) if guess is not None]
    assert metrics["eval/judge/accuracy"] == pytest.approx(np.mean(right))
    assert metrics["eval/diversity/vendi"] == pytest.approx(np.mean(record.diversity.vendi), rel=1e-5)
    assert metrics["eval/diversity/rke"] == pytest.approx(np.mean(record.diversity.rke), rel=1e-5)
    assert record.extra["diversity/vendi_low"] == pytest.approx(metrics["eval/diversity/vendi_low"], rel=1e-5)
    assert all(0 < value < 1 for value in record.judge.probability if value is not None)


def test_the_judges_probability_is_the_softmax_at_its_scale():
    samples = painted(["red", "green", "blue"], ["a red bag", "a green bag", "a green bag"])
    judge = JudgeEvaluator(SharedFeatures(ColourScorer(), 2), model="x", independent=False).evaluate(samples).judge
    chance = math.exp(10) / (math.exp(10) + 1)
    assert judge.probability == pytest.approx([chance, chance, 0.5])
    assert (judge.guess, judge.model, judge.independent) == ([0, 1, 0], "x", False)


def test_a_judge_is_independent_of_rewards_that_are_not_trained_on(config, build):
    config.eval.rewards, config.reward_model.clipscore = ("clipscore",), config.eval.judge
    assert judge_of(build(config)).independent
    config.reward_model.pickscore, config.run_name = f"{config.eval.judge}/", "other"
    assert not judge_of(build(config)).independent


def test_a_judge_is_the_rewards_model_wherever_it_is_looked_for(config, build, monkeypatch, tmp_path):
    """An asset by its short name, and by the place where it is found from this folder."""
    monkeypatch.chdir(tmp_path)
    config.reward_model.pickscore, config.eval.judge = "assets/tiny_pickscore", find("assets/tiny_pickscore")
    assert not judge_of(build(config)).independent


def judge_of(parts):
    return sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))[1]


def moved(parts, epoch=1):
    parts.run.counters.epoch = epoch
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_later_weights_are_compared_with_the_base_on_the_same_noise(config, measured):
    before, base = of_run(*measured)
    moved(measured[0])
    after, record = of_run(*measured)
    assert (base.changes, base.diversity.to_base) == ({}, None)
    assert {"reward", "judge"} <= set(record.changes)
    change = record.changes["reward"]
    assert (change.images, change.paired) == (8, True)
    expected = after["eval/reward/total"] - before["eval/reward/total"]
    assert change.difference == pytest.approx(expected, abs=1e-5)
    own = [math.sqrt(max(0.0, 2 - 2 * float(a @ b))) for a, b in zip(*features(measured, base, record), strict=True)]
    diagonal = [record.diversity.to_base[0][i * 5 + i] for i in range(5)]
    assert diagonal == pytest.approx(own, abs=1e-3)


def features(measured, *records):
    """Of the first prompt's images, read from the sprites."""
    extractor = measured[1][-1].extractor
    for record in records:
        sheet = np.asarray(Image.open(record.sprite_path)).transpose(2, 0, 1) / 255
        tiles = [sheet[:, :32, 32 * i : 32 * i + 32] for i in range(5)]
        yield extractor(torch.tensor(np.stack(tiles), dtype=torch.float32))


def test_a_base_that_was_drawn_otherwise_or_is_damaged_is_told_and_not_compared(measured, capsys):
    parts, evaluators = measured
    _, base = of_run(parts, evaluators)
    moved(parts)
    write_record(parts.run.folder, replace(base, setting="other"), None)
    assert of_run(parts, evaluators)[1].changes == {}
    path = record_path(parts.run.folder, "eval", 0)
    path.write_text("{")
    assert of_run(parts, evaluators)[1].changes == {}
    path.unlink()
    assert of_run(parts, evaluators)[1].changes == {}
    said = capsys.readouterr().err
    for words in ("drawn or rewarded otherwise", "eval_000000.json is not JSON", "eval_000000.json is missing"):
        assert said.count(words) == 1


def test_a_full_disk_is_told_once_and_leaves_no_half_of_a_record(measured, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    parts, evaluators = measured
    monkeypatch.setattr(evaluations, "write_atomically", full)
    found = [evaluate(parts.policy, parts.prompts, evaluators, parts.settings, parts.run, "eval") for _ in range(2)]
    assert all(math.isfinite(one.metrics["eval/reward/total"]) for one in found)
    assert capsys.readouterr().err.count("could not be written (No space left on device); the run goes on") == 1
    assert {path.name for path in (parts.run.folder / "evaluations").iterdir()} == {"base_features.safetensors"}


def test_a_folder_that_was_moved_away_is_not_made_again(measured):
    parts, evaluators = measured
    parts.run.folder.rename(parts.run.folder.with_name("away"))
    evaluate(parts.policy, parts.prompts, evaluators[:1], parts.settings, parts.run, "eval")
    assert not parts.run.folder.exists()


# --- samples ---------------------------------------------------------------------------------------------


def test_rewards_are_means_over_all_samples_whatever_the_batch(config, build):
    config.eval.rewards = ("jpeg_compressibility",)
    parts = build(config)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    whole = parts.reward.evaluate(samples.images, samples.prompts, samples.metadata)
    for batch_size in (3, 8):
        metrics = RewardEvaluator(parts.reward, batch_size, torch.device("cpu")).evaluate(samples).metrics
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


def test_records_of_other_negative_prompts_are_of_another_setting_and_unread_ones_are_not(config, tmp_path):
    """Of runs from before there were any, the setting stays."""
    path = tmp_path / "prompts.jsonl"

    def setting(guidance: float, default: str = "", own: str = "") -> str:
        config.eval.guidance_scale, config.negative_prompt = guidance, default
        path.write_text(json.dumps({"prompt": "a bag"} | ({"negative_prompt": own} if own else {})))
        config.prompts.train = config.prompts.test = str(path)
        return setting_of(config, ["a bag"])

    assert setting(1.0) == setting(1.0, "blurry", "grey")
    found = [setting(2.0), setting(2.0, "blurry"), setting(2.0, "", "blurry"), setting(2.0, "blurry", "grey")]
    assert len({*found, setting(1.0)}) == 5
