"""What the detector of scenes says in an evaluation: right or wrong, and the modes that a caption leaves open."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from flow_grpo.evaluators.evaluation import record_of, sample_evaluators
from flow_grpo.evaluators.samples import JudgeEvaluator
from flow_grpo.evaluators.scenes import SceneJudge, SceneModes, of_modes, scene_modes
from flow_grpo.runs.evaluations import read_record, write_record
from flow_grpo.runs.progress import Counters
from flow_grpo.runs.record import NONE_OF_THEM
from flow_grpo.scenes.captions import COLOURS, Garment, Reading, parse
from flow_grpo.scenes.detector import EMPTY, Cells
from flow_grpo.types import Samples

RED, GREEN, BLUE = (list(COLOURS).index(name) for name in ("red", "green", "blue"))
DRESS, BOOT = 3, 9


class Painted:
    """A detector of images whose first pixels say, for each cell, its label and its colour."""

    def cells(self, images: Tensor) -> Cells:
        said = images[:, :2, 0, :4].round()  # (B, 2, 4)
        labels, colours = (
            torch.full((len(images), 4, n), -9.0).scatter(2, said[:, i, :, None].nan_to_num().long(), 0.0)
            for i, n in enumerate((EMPTY + 1, len(COLOURS)))
        )
        return Cells(labels.masked_fill(said[:, 0, :, None].isnan(), math.nan), colours)


def scene(*garments: tuple[int, int] | None) -> Reading:
    return tuple(None if garment is None else Garment(*garment) for garment in garments)


def painted(prompts: list[str], scenes: list[Reading]) -> Samples:
    images = torch.zeros(len(scenes), 3, 64, 64)
    for image, cells in zip(images, scenes, strict=True):
        for cell, garment in enumerate(cells):
            image[:2, 0, cell] = torch.tensor((EMPTY, 0) if garment is None else (garment.label, garment.colour))
    numbers = list(dict.fromkeys(prompts))
    ids = torch.tensor([numbers.index(prompt) for prompt in prompts])
    nothing = torch.zeros(len(scenes), 1, 1, 1)
    return Samples(images, nothing, tuple(prompts), ({},) * len(prompts), ids, torch.arange(len(prompts)))


RIGHT = scene((DRESS, RED), None, None, (BOOT, BLUE))
PAIR = "a dress and a boot"


def test_accuracy_is_the_share_that_satisfies_its_caption():
    samples = painted(
        ["a red dress", "a red dress", PAIR, PAIR],
        [scene(None, (DRESS, RED), None, None), scene(None, (DRESS, BLUE), None, None), RIGHT, RIGHT],
    )
    found = SceneJudge(Painted(), model="x", independent=False).evaluate(samples)
    assert found.metrics == {"judge/accuracy": 0.75, "judge/accuracy_colour": 0.5, "judge/accuracy_two": 1.0}
    judge = found.judge
    assert (judge.guess, judge.model, judge.independent) == ([0, NONE_OF_THEM, 1, 1], "x", False)
    assert judge.probability[0] > 0.9 > 0.1 > judge.probability[1]


def test_an_image_that_is_not_finite_is_neither_right_nor_wrong():
    samples = painted([PAIR, PAIR, "a dress"], [RIGHT, RIGHT, scene((DRESS, RED), None, None, None)])
    samples.images[1] = math.nan
    found = SceneJudge(Painted()).evaluate(samples)
    assert found.judge.guess == [0, None, 1]
    assert math.isnan(found.metrics["judge/accuracy"])
    assert math.isnan(found.metrics["judge/accuracy_two"])
    assert found.metrics["judge/accuracy_single"] == 1.0
    assert all(math.isnan(value) for value in SceneModes(Painted(), None).evaluate(samples).metrics.values())


def test_a_guess_of_no_prompt_is_kept_in_a_record(tmp_path):
    samples = painted([PAIR, "a dress", PAIR], [RIGHT, RIGHT, scene(None, None, None, None)])
    record = record_of(samples, [(samples, SceneJudge(Painted()).evaluate(samples))], Counters())
    assert record.judge.guess == [0, NONE_OF_THEM, NONE_OF_THEM]
    assert read_record(write_record(tmp_path, record, samples.images)).judge.guess == record.judge.guess


def test_entropies_of_modes_are_those_of_the_shares_seen():
    scenes = [
        scene((DRESS, RED), None, None, None),
        scene(None, (DRESS, RED), None, None),
        scene(None, (DRESS, GREEN), None, None),
        scene((DRESS, BLUE), (DRESS, BLUE), None, None),
    ]
    found = scene_modes("single", scenes)
    colours = -sum(share * math.log(share) for share in (0.4, 0.2, 0.4))  # of five objects
    cells = -sum(share * math.log(share) for share in (0.4, 0.6))
    layouts = -sum(share * math.log(share) for share in (0.25, 0.5, 0.25))
    assert found == pytest.approx(
        {"colour_entropy": colours, "cell_entropy": cells, "layout_entropy": layouts, "entropy": colours + cells}
    )


def test_a_colour_that_the_caption_says_is_no_mode():
    found = scene_modes("colour", [scene((DRESS, RED), None, None, None), scene((DRESS, BLUE), None, None, None)])
    assert found == {"cell_entropy": 0.0, "layout_entropy": 0.0, "entropy": 0.0}


def test_images_without_objects_have_one_layout():
    nothing = [scene(None, None, None, None)] * 3
    assert set(scene_modes("single", nothing).values()) == {0.0}


def test_modes_are_means_over_captions_and_by_kind():
    captions = [parse("a dress"), parse("a boot"), parse("a red dress")]
    varied = [scene((DRESS, RED), None, None, None), scene(None, (DRESS, BLUE), None, None)]
    alike = [scene((DRESS, RED), None, None, None)] * 2
    found = of_modes(captions, [varied, alike, varied])
    assert found["colour_entropy"] == pytest.approx(math.log(2) / 2)  # of two captions, one has both colours
    assert found["cell_entropy"] == pytest.approx(2 * math.log(2) / 3)
    assert found["entropy_single"] == pytest.approx(math.log(2))
    assert found["entropy_colour"] == pytest.approx(math.log(2))
    assert found["red"] == pytest.approx(0.75)
    assert sum(found[name] for name in COLOURS) == pytest.approx(1)


def test_modes_of_a_uniform_law_come_near_their_most():
    generator = np.random.default_rng(0)
    scenes = []
    for _ in range(4000):
        cells: list[tuple[int, int] | None] = [None] * 4
        cells[generator.integers(4)] = (DRESS, int(generator.integers(8)))
        scenes.append(scene(*cells))
    found = scene_modes("single", scenes)
    assert found["colour_entropy"] == pytest.approx(math.log(8), abs=0.01)
    assert found["layout_entropy"] == found["cell_entropy"] == pytest.approx(math.log(4), abs=0.01)


def test_the_judge_is_a_detector_where_its_folder_holds_one(config):
    settings = SimpleNamespace(config=config)
    assert any(isinstance(evaluator, JudgeEvaluator) for evaluator in evaluators_of(settings))
    config.eval.judge = "assets/tiny_scenes_judge"
    kinds = {type(evaluator): evaluator for evaluator in evaluators_of(settings)}
    assert kinds[SceneJudge].independent
    assert kinds[SceneModes].request is None
    config.eval_diversity = True
    kinds = {type(evaluator): evaluator for evaluator in evaluators_of(settings)}
    assert kinds[SceneModes].request.num_image_per_prompt == config.num_seeds


def test_the_rewards_own_detector_is_no_independent_judge(config):
    config.reward_fn.pickscore, config.reward_fn.scenes = 0.0, 1.0
    config.eval.judge = config.reward_model.scenes
    kinds = {type(evaluator): evaluator for evaluator in evaluators_of(SimpleNamespace(config=config))}
    assert not kinds[SceneJudge].independent


def evaluators_of(settings: SimpleNamespace) -> list:
    return sample_evaluators(None, settings, torch.device("cpu"))
