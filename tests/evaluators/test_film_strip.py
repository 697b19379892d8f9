"""The film strip: its numbers, its files, and its history."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flow_grpo.evaluators.entropy import sample_log_density
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.evaluators.film_strip import (
    GAP,
    HEADER,
    LEFT,
    MAX_FRAMES,
    FilmStrip,
    StepVisualizer,
    cell_side,
    curves_figure,
    film_strip,
    strip_image,
    training_figure,
)
from flow_grpo.loops import drtune
from flow_grpo.statistics import half_widths
from flow_grpo.training import checkpoint
from flow_grpo.training.trainer import evaluate_weights
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


@pytest.fixture
def samples(parts):
    return draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)


@pytest.fixture
def drawn(monkeypatch):
    """The steps of the histories that are drawn, one list for each evaluation."""
    seen = []

    def curves(history):
        seen.append([record["step"] for record in history])
        return curves_figure(history)

    monkeypatch.setattr("flow_grpo.evaluators.film_strip.curves_figure", curves)
    return seen


def test_the_history_overlays_earlier_evaluations_and_forgets_later_ones(parts, samples, drawn):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    for _ in range(3):
        assert visualizer.evaluate(samples).metrics == {}
        parts.train(drtune)
    parts.run.counters.epoch = 1
    visualizer.evaluate(samples)
    assert drawn == [[0], [0, 1], [0, 1, 2], [0, 1]]
    values = [json.loads(p.read_text())["log_density"] for p in sorted((parts.run.folder / "steps").iterdir())]
    assert values[0] != values[2]
    names = {p.name for p in (parts.run.folder / "images").iterdir()}
    assert {f"eval_{kind}_00000{i}.png" for kind in ("strip", "curves", "training") for i in range(3)} <= names


@pytest.fixture
def history():
    """Three evaluations of two prompts, in two steps."""
    return [
        {
            "step": step,
            "sigmas": [1.0, 0.5, 0.0],
            "divergence": [[-step - 1.0, -5.0], [-step - 3.0, -7.0]],  # (P, T)
            "log_density": [[-30.0, step + 1.0, 10.0], [-32.0, step + 3.0, 20.0]],  # (P, T + 1)
        }
        for step in (0, 4, 9)
    ]


def test_the_figure_of_the_path_shows_the_whole_history(history):
    sigmas = history[0]["sigmas"]
    left, right = curves_figure(history).axes
    assert [list(line.get_xdata()) for line in left.lines] == [sigmas[:-1]] * 3
    assert [list(line.get_ydata()) for line in left.lines] == [[-2, -6], [-6, -6], [-11, -6]]
    assert [list(line.get_xdata()) for line in right.lines] == [sigmas] * 3
    assert [list(line.get_ydata()) for line in right.lines] == [[-31, 2, 15], [-31, 6, 15], [-31, 11, 15]]
    assert left.get_ylabel().startswith("div v")
    assert right.get_ylabel().startswith("log p")


def test_the_figure_of_training_shows_steps_and_their_change(history):
    left, right, left_change, right_change = training_figure(history).axes
    assert all(list(line.get_xdata()) == [0, 4, 9] for line in (*left.lines, *right.lines))
    assert [list(line.get_ydata()) for line in left.lines] == [[-2, -6, -11], [-6, -6, -6]]
    assert [list(line.get_ydata()) for line in right.lines] == [[-31] * 3, [2, 6, 11], [15] * 3]
    assert left.get_ylabel().startswith("divergence")
    assert right.get_ylabel().startswith("log density")
    changes = [[list(bars.lines[0].get_ydata()) for bars in a.containers] for a in (left_change, right_change)]
    assert changes == [[[0, -4, -9], [0, 0, 0]], [[0, 0, 0], [0, 4, 9], [0, 0, 0]]]


def test_the_figure_of_training_takes_the_prompts_that_all_evaluations_have(history):
    history[1]["divergence"], history[1]["log_density"] = (history[1][k][:1] for k in ("divergence", "log_density"))
    left, *_ = training_figure(history).axes
    assert list(left.lines[0].get_ydata()) == [-1, -5, -10]


def test_the_interval_of_a_mean_covers_it():
    """95 % of 4,000 sets of 5: standard error 0.34 %."""
    values = np.random.default_rng(0).normal(size=(4000, 5))
    covered = np.abs(values.mean(1)) < half_widths(values)
    assert covered.mean() == pytest.approx(0.95, abs=0.0105)
    normal = np.abs(values.mean(1)) < 1.96 * values.std(1, ddof=1) / 5**0.5  # the broken twin: no Student
    assert normal.mean() < 0.92
    assert np.isnan(half_widths(values[:, :1])).all()


# --- the strip ------------------------------------------------------------------------------------------


def strip_of(images: torch.Tensor) -> FilmStrip:
    prompts, steps = images.shape[:2]
    sigmas = np.linspace(1, 0, steps + 1).tolist()
    return FilmStrip(images, sigmas, torch.zeros(prompts, steps), torch.zeros(prompts, steps + 1))


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (32, 64), (48, 96), (64, 64), (200, 200), (512, 128)])
def test_cells_are_whole_multiples_or_parts(side, shown):
    images = torch.linspace(0, 1, side * side).view(1, 1, 1, side, side).expand(1, 1, 3, -1, -1)
    cell = np.asarray(strip_image(strip_of(images), ["a bag"]))[HEADER:, LEFT:]
    assert cell.shape == (shown, shown, 3) == (cell_side(side), cell_side(side), 3)
    assert cell.mean() == pytest.approx(127.5, abs=0.6)


def test_a_strip_has_a_row_for_each_prompt_and_a_column_for_each_step():
    images = torch.rand(2, 3, 3, 32, 32)
    drawn = np.asarray(strip_image(strip_of(images), ["a bag", "a hat"]))
    for row, step in np.ndindex(2, 3):
        top, left = HEADER + row * (64 + GAP), LEFT + step * (64 + GAP)
        expected = (images[row, step].permute(1, 2, 0).numpy() * 255).round()
        for offset in (0, 1):  # each pixel twice
            assert np.array_equal(drawn[top + offset : top + 64 : 2, left + offset : left + 64 : 2], expected)


def test_a_strip_of_many_steps_shows_the_first_the_last_and_some_between():
    images = torch.linspace(0, 1, 40).view(1, 40, 1, 1, 1).expand(1, -1, 3, 8, 8)
    drawn = np.asarray(strip_image(strip_of(images), ["a bag"]))
    shown = drawn[HEADER, LEFT :: 64 + GAP, 0].astype(int)
    assert (len(shown), shown[0], shown[-1]) == (MAX_FRAMES, 0, 255)
    assert (np.diff(shown) > 0).all()


def test_long_prompts_stay_beside_the_cells():
    drawn = np.asarray(strip_image(strip_of(torch.ones(2, 1, 3, 64, 64)), ["a very " + "long " * 60, "x" * 300]))
    assert (drawn[HEADER:, LEFT:] == 255).all()
    assert (drawn[HEADER:, :LEFT] < 128).any()
    assert (drawn[:HEADER, LEFT:] < 128).any()


def test_what_has_no_shape_leaves_no_mark_on_a_strip():
    strip = strip_of(torch.zeros(1, 1, 3, 64, 64))
    clean, written = (np.asarray(strip_image(strip, [text])) for text in ("a bag", "a\n\x1bbag\u202e"))
    np.testing.assert_array_equal(written, clean)


def test_a_resumed_run_goes_on_with_the_history_up_to_its_checkpoint(parts, samples, drawn, config, build):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    for epoch in range(4):
        visualizer.evaluate(samples)
        parts.train(drtune)
        if epoch == 0:
            checkpoint.Saver(parts.policy, parts.run, parts.settings).save(None)
    parts.run.finish()
    config.resume_from = str(parts.run.folder)
    again = build(config)
    checkpoint.resume(again.policy, again.run, again.settings)
    assert again.run.counters.epoch == 1
    assert [path.name for path in sorted((again.run.folder / "steps").iterdir())] == [
        "eval_000000.json",
        "eval_000001.json",
    ]
    drawn.clear()
    again.train(drtune)
    StepVisualizer(again.policy, again.settings, again.run).evaluate(samples)
    again.run.counters.epoch = 5  # the abandoned evaluation of epoch 3 would be among its curves
    StepVisualizer(again.policy, again.settings, again.run).evaluate(samples)
    assert drawn == [[0, 1, 2], [0, 1, 2, 5]]


def test_evaluations_of_another_number_of_steps_are_kept_but_not_drawn(parts, samples, drawn, config, build):
    StepVisualizer(parts.policy, parts.settings, parts.run).evaluate(samples)
    config.eval.num_steps, config.run_name = 6, "longer"
    longer = build(config)
    longer.run.folder, longer.run.counters.epoch = parts.run.folder, 1
    StepVisualizer(longer.policy, longer.settings, longer.run).evaluate(samples)
    longer.run.counters.epoch = 2
    StepVisualizer(longer.policy, longer.settings, longer.run).evaluate(samples)
    assert drawn == [[0], [1], [1, 2]]
    assert len(list((parts.run.folder / "steps").iterdir())) == 3


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "sig',
        "[]",
        '{"step": 1}',
        100_000 * "[",
        '{"step": "1", "sigmas": [1, 0], "divergence": [[1]], "log_density": [[1, 2]]}',
        '{"step": 1, "sigmas": [1, 0], "divergence": [["?"]], "log_density": [[1, 2]]}',
    ],
)
def test_a_record_that_cannot_be_read_is_left_out(parts, samples, drawn, text):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    visualizer.evaluate(samples)
    (parts.run.folder / "steps/eval_000001.json").write_text(text)
    parts.run.counters.epoch = 2
    visualizer.evaluate(samples)
    assert drawn == [[0], [0, 2]]


def test_a_record_is_replaced_in_one_piece(parts, samples, monkeypatch):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    visualizer.evaluate(samples)
    record = parts.run.folder / "steps/eval_000000.json"
    before, write = record.read_text(), Path.write_bytes

    def torn(path, content):
        write(path, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="no space left"):
        visualizer.evaluate(samples)
    assert record.read_text() == before


def test_averaged_weights_have_files_and_a_history_of_their_own(parts, drawn):
    for _ in range(3):  # the average follows the first update at once
        parts.train(drtune)
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    evaluate_weights(parts.policy, parts.prompts, [visualizer], parts.settings, parts.run)
    current, averaged = (
        json.loads((parts.run.folder / f"steps/{label}_000003.json").read_text()) for label in ("eval", "eval_ema")
    )
    assert current["log_density"] != averaged["log_density"]
    assert drawn == [[3], [3]]
    for kind in ("strip", "curves", "training"):
        first, second = (
            Image.open(parts.run.folder / f"images/{label}_{kind}_000003.png") for label in ("eval", "eval_ema")
        )
        assert not np.array_equal(np.asarray(first), np.asarray(second))


def test_weights_that_are_not_finite_leave_no_strip_and_the_history_whole(parts, samples, drawn):
    visualizer = StepVisualizer(parts.policy, parts.settings, parts.run)
    visualizer.evaluate(samples)
    kept = [p.detach().clone() for p in parts.policy.trainable]
    with torch.no_grad():
        parts.policy.trainable[0].fill_(math.nan)
    parts.run.counters.epoch = 1
    with pytest.warns(UserWarning, match="no film strip at epoch 1: the velocity is not finite at sigma = 1"):
        assert visualizer.evaluate(samples).metrics == {}
    assert not list(parts.run.folder.rglob("*_000001.*"))
    with torch.no_grad():
        parts.policy.trainable[0].copy_(kept[0])
    parts.run.counters.epoch = 2
    visualizer.evaluate(samples)
    assert drawn == [[0], [0, 2]]
