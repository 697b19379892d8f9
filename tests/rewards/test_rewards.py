"""The weighted sum of rewards, and the sentence for each mistake; on a CLIP with random weights."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.recipes.base import declare, get_config
from flow_grpo.rewards.building import build_reward
from flow_grpo.rewards.checks import validate_rewards
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.jpeg import JpegIncompressibility
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.settings import resolve
from tests.pictures import make_images
from tests.rewards.scoring import NO_METADATA, make_config


def test_total_is_the_weighted_sum_of_the_terms(scorer: ClipScorer, checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=0.5, clipscore=-2.0, jpeg_compressibility=0.1)
    images, prompts = make_images(32, 32), ["a bag", "a coat", "a red dress", "a shirt"]
    reward = build_reward(config, "cpu")(images, prompts, NO_METADATA * 4)
    assert set(reward.terms) == {"pickscore", "clipscore", "jpeg_compressibility"}
    logits, kilobytes = (scorer.logits(images, prompts), JpegIncompressibility()(images, prompts, NO_METADATA * 4))
    torch.testing.assert_close(reward.terms["pickscore"], logits / 26)
    torch.testing.assert_close(reward.total, 0.5 * logits / 26 - 2 * logits / 30 - 0.1 * kilobytes)
    assert reward.total.dtype == torch.float32


def test_the_configuration_says_how_and_where_rewards_compute(checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=1.0)
    for dtype, offload in (("fp32", False), ("bf16", True)):
        config.reward_dtype, config.offload_rewards = dtype, offload
        scorer = build_reward(config, "cpu").models["pickscore"].scorer
        assert scorer.model.visual_projection.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        assert scorer.offload is offload


def test_rewards_with_one_checkpoint_share_one_scorer(checkpoint: str, tmp_path: Path) -> None:
    config = make_config(checkpoint, pickscore=1.0, clipscore=1.0)
    models = build_reward(config, "cpu").models
    assert models["pickscore"].scorer is models["clipscore"].scorer  # type: ignore[attr-defined]
    config.reward_model.clipscore = str(shutil.copytree(checkpoint, tmp_path / "other"))
    models = build_reward(config, "cpu").models
    assert models["pickscore"].scorer is not models["clipscore"].scorer  # type: ignore[attr-defined]


def test_evaluation_measures_more_rewards_and_the_same_total(checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=0.5)
    config.eval.rewards = ("jpeg_compressibility", "pickscore")
    reward, arguments = (build_reward(config, "cpu"), (make_images(32, 32), ["a bag"] * 4, NO_METADATA * 4))
    assert list(reward(*arguments).terms) == ["pickscore"]
    assert list(reward.evaluate(*arguments).terms) == ["pickscore", "jpeg_compressibility"]
    assert torch.equal(reward(*arguments).total, reward.evaluate(*arguments).total)


def test_rewards_without_weight_are_not_loaded(checkpoint: str) -> None:
    config = make_config(checkpoint, jpeg_incompressibility=1.0)
    config.reward_model.pickscore = "assets/none"
    validate_rewards(config)
    assert list(build_reward(config, "cpu").models) == ["jpeg_incompressibility"]


ALL = ", ".join(sorted(REWARDS))


def unlocked(config: ConfigDict) -> None:
    with config.unlocked():
        config.reward_fn.pikscore = 1.0


def set_values(**values: object) -> Callable[[ConfigDict], None]:
    return lambda config: config.update_from_flattened_dict({key.replace("__", "."): v for key, v in values.items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (unlocked, f"config.reward_fn.pikscore is not a reward; the nearest is pickscore (there are {ALL})."),
        (
            set_values(reward_fn__pickscore=0.0),
            (
                f"config.reward_fn has no weight other than 0; give one to any of {ALL}, "
                "as in --config.reward_fn.pickscore=1."
            ),
        ),
        (
            set_values(reward_fn__clipscore=math.nan),
            "config.reward_fn.clipscore = nan is not a weight; it takes a finite number.",
        ),
        (
            set_values(reward_fn__clipscore=-math.inf),
            "config.reward_fn.clipscore = -inf is not a weight; it takes a finite number.",
        ),
        (
            set_values(use_reward_gradient=True, reward_fn__jpeg_compressibility=0.5),
            (
                "config.reward_fn.jpeg_compressibility = 0.5 has no gradient, which config.use_reward_gradient = True "
                "needs; the differentiable rewards are aesthetic, clipscore, hpsv2, imagereward, pickscore, "
                "scenes_clip, scenes_soft, siglip, target_brightness, target_colour."
            ),
        ),
        (
            set_values(eval__rewards=("clipscor",)),
            (
                "config.eval.rewards = ('clipscor',): 'clipscor' is not a reward; the nearest is clipscore "
                f"(there are {ALL})."
            ),
        ),
        (
            set_values(reward_model__pickscore="assets/none"),
            (
                "config.reward_model.pickscore = 'assets/none' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(reward_model__pickscore="tests/none"),
            (
                "config.reward_model.pickscore = 'tests/none' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(eval__judge="~/no such folder"),
            (
                "config.eval.judge = '~/no such folder' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(reward_model__pickscore=""),
            "config.reward_model.pickscore is empty; it takes the directory or hub id (org/name) of a checkpoint.",
        ),
    ],
)
def test_each_mistake_has_its_sentence(
    checkpoint: str, change: Callable[[ConfigDict], None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    config = make_config(checkpoint, pickscore=1.0)
    change(config)
    with pytest.raises(ConfigError) as error:
        validate_rewards(config)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("name", "bounds", "words"),
    [
        ("pickscore", (0.0, 1.0), "is not read; it takes rewards of your own"),
        ("rde", (0.0, 1.0), "is not a reward; the nearest is red"),
        ("red", (1.0, 0.0), "is no range; it takes the lowest score, then the highest"),
    ],
)
def test_a_range_that_nothing_can_be_held_to_is_one_sentence(
    name: str, bounds: tuple[float, float], words: str
) -> None:
    config = get_config()
    declare(config, ["reward_files.red", f"reward_range.{name}"])
    config.reward_files.red, config.reward_range[name] = "http://127.0.0.1:9/score/red", bounds
    config.reward_fn.pickscore, config.reward_fn.red = 0.0, 1.0
    with pytest.raises(ConfigError, match=rf"config\.reward_range\.{name} = .* {words}"):
        validate_rewards(config)


def test_hub_ids_no_judge_and_unused_black_boxes_pass(checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=1.0)
    config.reward_model.pickscore = "yuvalkirstain/PickScore_v1"
    config.eval.judge = ""
    config.use_reward_gradient = True
    config.eval.rewards = ("jpeg_compressibility",)
    validate_rewards(config)


def test_the_registry_loads_no_heavy_library() -> None:
    code = "import sys, flow_grpo.rewards; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_folder_that_holds_no_clip_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded as a CLIP"):
        ClipScorer(str(tmp_path))


# --- prompts and sizes that a reward cannot look at -----------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("ocr", r"config\.prompts\.train = .*, prompt 1, is not for ocr: .*what a prompt quotes"),
        ("target_colour", r"config\.prompts\.train = .*, prompt 1, is not for target_colour: .*names one for all"),
        ("scenes", r"config\.prompts\.train = .*, prompt 3, is not for scenes: 'a bored coat' is not a caption"),
    ],
)
def test_prompts_that_a_reward_cannot_read_are_refused_before_anything_loads(config, tmp_path, reward, said):
    (tmp_path / "prompts.txt").write_text("a bag\na boot\na bored coat\n")
    config.prompts.train = str(tmp_path / "prompts.txt")
    config.reward_fn[reward] = 1.0
    with pytest.raises(ConfigError, match=said):
        resolve(config, 1, cuda=False)


def test_prompts_of_evaluations_are_read_as_well(config, tmp_path):
    (tmp_path / "train.txt").write_text("a red bag\n")
    config.prompts.train, config.reward_fn.target_colour = str(tmp_path / "train.txt"), 1.0
    with pytest.raises(ConfigError, match=r"config\.prompts\.test = .*, prompt 1, is not for target_colour"):
        resolve(config, 1, cuda=False)
    config.targets.colour = "red"
    resolve(config, 1, cuda=False)


def test_a_judge_of_scenes_reads_captions_alone(config, tmp_path):
    (tmp_path / "test.txt").write_text("a bag\na photo of a bag\n")
    config.prompts.test, config.eval.judge = str(tmp_path / "test.txt"), "assets/tiny_scenes_judge"
    with pytest.raises(ConfigError, match=r"config\.prompts\.test = .*, prompt 2, is not for eval\.judge"):
        resolve(config, 1, cuda=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward_fn.scenes", 1.0),
        ("reward_fn.scenes_soft", 1.0),
        ("eval.judge", "assets/tiny_scenes_judge"),
        ("diversity.extractor", "scenes"),
    ],
)
def test_scenes_have_one_size(config, key, value):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(
        ConfigError,
        match=rf"^config\.resolution = 32 makes images of 32 x 32 pixels, but config\.{key} takes 64 x 64\.$",
    ):
        resolve(config, 1, cuda=False)


@pytest.mark.parametrize("key", ["reward_model.scenes", "diversity.model"])
def test_what_is_no_detector_is_refused_before_anything_loads(config, key):
    config.reward_fn.scenes, config.resolution = 1.0, 64
    config.diversity.extractor, config.eval_diversity = "scenes", True
    config.pretrained.model, config.max_sequence_length = "assets/tiny_scenes", 12
    config.diversity.model = "assets/tiny_scenes_judge"
    resolve(config, 1, cuda=False)
    config.update_from_flattened_dict({key: "assets/tiny_scenes_clip"})
    with pytest.raises(ConfigError, match=rf"config\.{key} = 'assets/tiny_scenes_clip' is no detector of scenes"):
        resolve(config, 1, cuda=False)
