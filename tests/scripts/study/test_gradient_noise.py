"""Signal, noise and direction of gradients against closed forms, and the model's gradients against GRPO's own loss."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from flow_grpo.likelihood_ratio import OdeStepLikelihood, SdeLikelihood
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.metrics import MeanMetrics
from flow_grpo.prompts import PromptDataset
from flow_grpo.statistics import mean_interval
from scripts.study import gradient_noise
from scripts.study.gradient_noise import (
    direction,
    jackknife,
    loss_gradient,
    main,
    noise_of_batches,
    noise_of_repeats,
    reward_gradient,
    rollout,
    signal_to_noise,
    squared_mean,
    uphill_difference,
)
from scripts.study.outcomes import write_rows

P = 50


def draws(seed: int, n: int, mean: np.ndarray, std: float) -> np.ndarray:
    return mean + std * np.random.default_rng(seed).standard_normal((n, len(mean)))


def unit(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal(P)
    return found / np.linalg.norm(found)


# --- statistics -------------------------------------------------------------------------------------------


def test_the_squared_mean_is_unbiased_and_that_of_the_average_is_not():
    mean, std, n = 0.5 * unit(0), 1.0, 4
    found = [squared_mean(g @ g.T) for g in (draws(seed, n, mean, std) for seed in range(4000))]
    error = float(np.std(found)) / 4000**0.5
    assert abs(np.mean(found) - 0.25) < 4 * error
    naive = [np.square(draws(seed, n, mean, std).mean(0)).sum() for seed in range(500)]
    assert np.mean(naive) > 0.25 + 0.9 * P * std**2 / n


def test_signal_to_noise_of_many_batches_is_that_of_their_distribution():
    gradients = draws(1, 4000, 3 * unit(1), 0.5)
    assert signal_to_noise(gradients @ gradients.T) == pytest.approx(9 / (P * 0.25), rel=0.03)


def test_intervals_over_batches_hold_the_truth_about_as_often_as_they_say():
    truth = 4 / (P * 0.25)
    found = [noise_of_batches(draws(seed, 24, 2 * unit(2), 0.5)) for seed in range(400)]
    assert 0.9 < np.mean([one.low < truth < one.high for one in found]) < 0.99


def test_repeats_give_the_noise_of_the_probes_and_not_that_of_the_images():
    images = draws(3, 12, 3 * unit(3), 0.8)  # the batches' own means
    repeats = images[:, None] + 0.3 * np.random.default_rng(4).standard_normal((12, 40, P))
    expected = np.square(images).sum(1).mean() / (P * 0.09)
    found = noise_of_repeats(repeats)
    assert found.estimate == pytest.approx(expected, rel=0.05)
    assert found.low < expected < found.high
    assert noise_of_batches(repeats[:, 0]).estimate < 0.25 * expected


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(5).standard_normal(9)
    value, error = jackknife(lambda kept: float(values[kept].mean()), 9)
    expected = mean_interval(values)
    assert value == pytest.approx(expected.estimate, rel=1e-12)
    assert error == pytest.approx(values.std(ddof=1) / 3, rel=1e-12)


@pytest.mark.parametrize("cosine", [0.8, 0.0, -0.6])
def test_the_direction_is_that_of_the_means_with_the_sign_of_descent(cosine: float):
    up = unit(6)
    across = unit(7) - (unit(7) @ up) * up
    mean = cosine * up + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across)
    both = direction(draws(8, 400, -mean, 0.3), draws(9, 100, 2 * up, 0.3))
    share, found = both["uphill"], both["cosine"]
    assert found.estimate == pytest.approx(cosine, abs=0.04)
    assert found.low < cosine < found.high
    expected = cosine / (1 + P * 0.09) ** 0.5
    assert share.estimate == pytest.approx(expected, abs=0.02)
    assert share.low < expected < share.high


def test_gradients_without_a_mean_have_no_cosine_and_point_nowhere():
    found = direction(draws(10, 30, np.zeros(P), 1.0), draws(11, 30, unit(6), 0.1))
    assert np.isnan(found["cosine"].estimate)
    assert found["uphill"].low < 0 < found["uphill"].high


def test_the_difference_of_two_forms_is_sharper_where_they_share_their_batches():
    up, common = unit(6), draws(13, 60, np.zeros(P), 0.5)
    first, second = common - 0.4 * up, common - 0.1 * up
    reference = draws(14, 100, up, 0.05)
    paired = uphill_difference(first, second, reference)
    apart = uphill_difference(first, second[::-1], reference)
    expected = 0.4 / (0.16 + P * 0.25) ** 0.5 - 0.1 / (0.01 + P * 0.25) ** 0.5
    assert paired.low < expected < paired.high
    assert paired.low > 0
    assert apart.high - apart.low > 3 * (paired.high - paired.low)


def test_batches_draw_their_prompts_independently(small, build):
    """Without replacement, batches of one prompt are too rare, and the squared mean of gradients is biased."""
    parts = build(small)
    prompts = [rollout(parts.policy, parts.reward, parts.settings, number).prompts for number in range(40)]
    assert all(len(set(group)) == 1 for group in prompts)
    again = sum(a[0] == b[0] for a, b in pairwise(prompts))
    assert 3 <= again <= 18  # of 39, a quarter is expected of 4 prompts; a permutation has them at its seams only
    in_fours = [{group[0] for group in prompts[i : i + 4]} for i in range(0, 40, 4)]
    assert min(map(len, in_fours)) < 4


# --- gradients of the model -------------------------------------------------------------------------------

OPTIONS = [("sde", 1), ("ode_step", 1), ("ode_step", 0), ("ode_path", 1), ("cfm", 2)]


@pytest.fixture
def small(config, monkeypatch):
    """One group of 4 images of 16 dimensions; every slot is used."""
    config.resolution = 8
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 1, 4
    monkeypatch.setattr(gradient_noise, "STEPS_OF_A_BATCH", 10)
    monkeypatch.setattr(gradient_noise, "REWARD_IMAGES", 3)
    return config


def flat(policy) -> np.ndarray:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable]
    return torch.cat([one.flatten() for one in found]).double().numpy()


@pytest.mark.parametrize(("ratio", "probes"), OPTIONS)
def test_the_gradient_of_every_form_is_that_of_grpos_own_loss_at_the_sampling_weights(small, build, ratio, probes):
    small.train.ratio, small.train.ratio_probes = ratio, probes
    parts = build(small)
    rolled = rollout(parts.policy, parts.reward, parts.settings, 0)
    found = loss_gradient(parts.policy, rolled, parts.settings)
    one = PromptDataset((rolled.prompts[0],), ({},))
    batch = epoch_prompts(one, parts.settings.plan, small.seed, 0, 0)
    experience = grpo.collect(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    minibatch = grpo._minibatch(parts.policy, experience, torch.arange(4), parts.settings.config)
    slots = experience.old_log_probs.shape[1]
    for slot in range(slots):
        (grpo.step_loss(minibatch, slot, parts.settings.config)["loss"] / slots).backward()
    expected = flat(parts.policy)
    assert np.linalg.norm(expected) > 0
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_steps_of_a_batch_are_its_own_whatever_the_form_and_the_repeat(small, build, monkeypatch):
    monkeypatch.setattr(gradient_noise, "STEPS_OF_A_BATCH", 2)
    scored: list[int] = []
    for form in (SdeLikelihood, OdeStepLikelihood):
        original = form.score
        monkeypatch.setattr(
            form, "score", lambda self, v, t, k, slot, call=original: scored.append(slot) or call(self, v, t, k, slot)
        )
    found = {}
    for ratio in ("sde", "ode_step"):
        small.train.ratio = ratio
        parts = build(small)
        for number in range(6):
            rolled = rollout(parts.policy, parts.reward, parts.settings, number)
            for repeat in (0, 1):
                scored.clear()
                loss_gradient(parts.policy, rolled, parts.settings, repeat)
                found.setdefault(number, set()).add(tuple(scored))
    assert all(len(steps) == 1 for steps in found.values())
    drawn = {next(iter(steps)) for steps in found.values()}
    assert len(drawn) > 1
    assert all(len(set(steps)) == 2 for steps in drawn)


def test_a_repeat_draws_other_probes_and_the_exact_trace_has_none(small, build):
    found = {}
    for probes in (1, 0):
        small.train.ratio, small.train.ratio_probes = "ode_step", probes
        parts = build(small)
        experience = rollout(parts.policy, parts.reward, parts.settings, 0)
        found[probes] = [loss_gradient(parts.policy, experience, parts.settings, repeat) for repeat in (0, 0, 1)]
    first, same, other = found[1]
    np.testing.assert_array_equal(first, same)
    assert np.linalg.norm(first - other) > 0.1 * np.linalg.norm(first)
    np.testing.assert_array_equal(found[0][0], found[0][2])


def test_the_rewards_gradient_is_its_slope_through_the_whole_sampler(small, build):
    parts = build(small)
    policy = parts.policy
    with torch.no_grad():  # LoRA's A has a gradient once B is not zero
        for parameter in policy.trainable:
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    found = reward_gradient(policy, parts.reward, parts.settings, 0)
    towards = torch.from_numpy(found / np.linalg.norm(found)).float()

    def mean_reward(shift: float) -> float:
        values, rewards = [p.detach().clone() for p in policy.trainable], []
        with torch.no_grad():
            for parameter, part in zip(policy.trainable, towards.split([v.numel() for v in values]), strict=True):
                parameter += shift * part.view_as(parameter)

        def spy(images, prompts, metadata):
            rewards.append(parts.reward(images, prompts, metadata))
            return rewards[-1]

        reward_gradient(policy, spy, parts.settings, 0)
        with torch.no_grad():
            for parameter, value in zip(policy.trainable, values, strict=True):
                parameter.copy_(value)
        return rewards[0].total.detach().double().mean().item()

    h = 0.02
    slope = (8 * (mean_reward(h) - mean_reward(-h)) - (mean_reward(2 * h) - mean_reward(-2 * h))) / (12 * h)
    assert slope == pytest.approx(np.linalg.norm(found), rel=5e-3)


# --- the file ---------------------------------------------------------------------------------------------


def test_the_file_is_strict_json_with_null_for_what_cannot_be_had(tmp_path: Path):
    row = {"form": "ode_step", "probes": 0, "source": "cosine", "batches": 12}
    write_rows([{**row, "value": float("nan"), "low": -0.123456789, "high": 1.0}], tmp_path / "found" / "noise.json")
    found = json.loads((tmp_path / "found" / "noise.json").read_text())
    assert found == [{**row, "value": None, "low": -0.123457, "high": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batches", "3"], "--batches 3 is not allowed; it takes at least 12"),
        (["--exact_batches", "2"], "--exact_batches 2 is not allowed; it takes 3 to --batches, 64"),
        (["--exact_batches", "65"], "--exact_batches 65 is not allowed; it takes 3 to --batches, 64"),
    ],
)
def test_too_few_batches_are_refused_in_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_every_form_is_measured_by_every_measure_that_it_has(small, monkeypatch):
    monkeypatch.setattr(gradient_noise, "REPEATS", 2)
    monkeypatch.setattr(gradient_noise, "REPEATED_BATCHES", 3)
    monkeypatch.setattr(gradient_noise, "REWARD_BATCHES", 3)
    monkeypatch.setattr(gradient_noise, "recipe", lambda changes: changed(small, changes))
    generator = np.random.default_rng(12)
    monkeypatch.setattr(gradient_noise, "loss_gradient", lambda *_: generator.standard_normal(P))
    monkeypatch.setattr(gradient_noise, "reward_gradient", lambda *_: generator.standard_normal(P))
    rows = gradient_noise.measure(4, 3)
    found = {(row["form"], row["probes"]): [] for row in rows}
    for row in rows:
        found[row["form"], row["probes"]].append(row["source"])
        assert row["batches"] == (3 if row["form"] != "cfm" and row["probes"] == 0 else 4)
    always = {"batches", "uphill", "cosine"}
    assert {form: set(sources) for form, sources in found.items()} == {
        (form, probes): always
        | ({"over_sde"} if form != "sde" else set())
        | ({"probes"} if form != "sde" and probes > 0 else set())
        for form, probes in gradient_noise.FORMS
    }


def changed(config, changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config
