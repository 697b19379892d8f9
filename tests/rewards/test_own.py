"""Rewards of one's own: what may be one, whether it has a gradient, and the sentence for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from config.base import get_config
from flow_grpo.errors import ConfigError
from flow_grpo.recipes.base import declare
from flow_grpo.rewards import building, chosen, own_files
from flow_grpo.rewards.building import RewardFailed, build_reward, in_batch
from flow_grpo.rewards.checks import validate_rewards
from flow_grpo.rewards.own import load_own
from flow_grpo.rewards.own_files import check_place, digest, in_full, read_option
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.settings import resolve
from tests.pictures import make_images
from tests.rewards.scoring import NO_METADATA

CODE = """
import helper_of_mine
import numpy as np
import torch

def brightness(images, prompts):
    return images.flatten(1).mean(1)

def by_metadata(images, prompts, metadata):
    return images.flatten(1).mean(1) + len(metadata)

def as_list(images, prompts):
    return [float(len(prompt)) for prompt in prompts]

def as_tensors(images, prompts):
    return [image.mean() for image in images]

def by_numpy(images, prompts):
    return np.asarray(images).mean((1, 2, 3))

class Red:
    def __call__(self, images, prompts, metadata):
        return images[:, 0].flatten(1).mean(1) * helper_of_mine.ONE

class Promised(Red):
    differentiable = False

class Network(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, images, prompts):
        return super().forward(images.mean((2, 3)))[:, 0]

red = Red()

def scalar(images, prompts):
    return images.mean()

def infinite(images, prompts):
    return images.flatten(1).mean(1) / 0

def of_four(images, prompts, metadata, more):
    return images

def fails(images, prompts):
    raise KeyError("weights")

class Unmade:
    def __init__(self):
        raise OSError("no weights")

number = 3

def words(images, prompts):
    return prompts

def nothing(images, prompts): ...

def ends(images, prompts):
    raise SystemExit(3)
"""


def line_of(words: str) -> int:
    """In CODE, counted from 1."""
    return next(n for n, line in enumerate(CODE.splitlines(), start=1) if words in line)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_mine.py").write_text("ONE = 1.0\n")
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def own(file: Path | str, thing: str, **changes: object) -> ConfigDict:
    config = get_config()
    declare(config, ["reward_files.mine"])
    config.reward_files.mine = f"{file}:{thing}"
    config.update_from_flattened_dict(changes)
    return config


def load(file: Path, thing: str, needs_gradient: bool = False):
    return load_own("mine", f"{file}:{thing}", get_config(), "cpu", needs_gradient)


def checked(file: Path, thing: str):
    """As a command does it: before anything is imported, and then."""
    check_place("mine", f"{file}:{thing}")
    return load(file, thing)


@pytest.mark.parametrize(
    ("thing", "expected", "differentiable"),
    [
        ("brightness", lambda x: x.flatten(1).mean(1), True),
        ("by_metadata", lambda x: x.flatten(1).mean(1) + 4, True),
        ("as_list", lambda x: torch.full((4,), 5.0), False),
        ("as_tensors", lambda x: x.flatten(1).mean(1), True),
        ("by_numpy", lambda x: torch.from_numpy(np.asarray(x).mean((1, 2, 3))), False),
        ("Red", lambda x: x[:, 0].flatten(1).mean(1), True),
        ("red", lambda x: x[:, 0].flatten(1).mean(1), True),
        ("Promised", lambda x: x[:, 0].flatten(1).mean(1), False),
    ],
)
def test_a_class_an_object_or_a_function_is_a_reward(file, thing, expected, differentiable):
    reward, images = load(file, thing), make_images(8, 8)
    assert reward.differentiable is differentiable
    scores = reward(images, ["a bag"] * 4, NO_METADATA * 4)
    assert (scores.dtype, scores.shape) == (torch.float32, (4,))
    torch.testing.assert_close(scores, expected(images), rtol=1e-6, atol=1e-6)


def test_a_network_of_ones_own_is_frozen_and_has_its_gradient_at_the_pixels(file):
    reward = load(file, "Network", needs_gradient=True)
    assert not any(parameter.requires_grad for parameter in reward.score.parameters())
    assert not reward.score.training


SENTENCES = [
    ("none", "mine.py has no none; the nearest is"),
    ("scalar", "ValueError: scalar gave torch.float32 of shape () for 2 images; it is to give a number for each"),
    (
        "words",
        "ValueError: words gave ['a t-shirt', 'a t-shirt']; it is to give a number for each image, of shape (2,).",
    ),
    ("nothing", "ValueError: nothing gave None; it is to give a number for each image, of shape (2,)."),
    ("ends", f"mine.py, line {line_of('SystemExit')}: SystemExit: 3."),
    ("infinite", "tried on random images, gave [inf, inf]; scores are to be finite."),
    ("of_four", "cannot be called with (images, prompts) or (images, prompts, metadata)."),
    ("fails", f"mine.py, line {line_of('KeyError')}: KeyError: 'weights'"),
    ("Unmade", "Unmade() failed:"),
    ("Unmade", f"mine.py, line {line_of('OSError')}: OSError: no weights"),
    ("number", "number of {file} cannot be called; it takes a function (images, prompts)"),
]


@pytest.mark.parametrize(("thing", "words"), SENTENCES)
def test_each_mistake_is_a_sentence_that_names_the_file(file, thing, words):
    with pytest.raises(ConfigError) as error:
        checked(file, thing)
    assert str(error.value).startswith("config.reward_files.mine")
    assert words.format(file=file) in str(error.value)
    assert str(file) in str(error.value) or thing == "infinite"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = [\n", "line 1: SyntaxError: '[' was never closed."),
        ("import os\nimport no_such_module\ndef score(a, b): ...\n", "line 2: ModuleNotFoundError: No module named"),
        ("def score(a, b): ...\nraise SystemExit(3)\n", "line 2: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_names_its_line(tmp_path, code, words, monkeypatch):
    monkeypatch.delitem(sys.modules, "reward_of_mine", raising=False)
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ConfigError) as error:
        checked(file, "score")
    assert f"{file}, {words}" in str(error.value)
    assert "reward_of_mine" not in sys.modules


@pytest.mark.parametrize(
    ("thing", "why"),
    [
        ("as_list", "its scores do not depend on the pixels by operations that autograd knows"),
        ("by_numpy", "RuntimeError: Can't call numpy() on Tensor that requires grad"),
        ("Promised", "its attribute differentiable is False"),
    ],
)
def test_a_reward_without_a_gradient_is_refused_where_one_is_needed(file, thing, why):
    config = resolve(own(file, thing, use_reward_gradient=True, **{"sample.sde_type": "ode"}), 1, cuda=False).config
    with pytest.raises(ConfigError, match=r"has no gradient, which config.use_reward_gradient = True needs: ") as error:
        build_reward(config, "cpu")
    assert why in str(error.value)
    config = own(file, thing, use_reward_gradient=True, **{"reward_fn.mine": 0.0, "reward_fn.pickscore": 1.0})
    config.eval.rewards = ("mine",)
    assert build_reward(config, "cpu").models["mine"].differentiable is False  # only measured


def test_its_weight_is_1_unless_it_is_given_and_its_path_is_kept_in_full(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    config = own(file.name, "brightness")
    assert config.reward_fn.mine == 1.0
    settings = resolve(config, 1, cuda=False)
    assert settings.config.reward_files.mine == f"{file}:brightness"
    reward, images = build_reward(settings.config, "cpu"), make_images(8, 8)
    scores = reward(images, ["a bag"] * 4, NO_METADATA * 4)
    torch.testing.assert_close(scores.total, images.flatten(1).mean(1))


PLACES = [
    ("mine.py", "names no place; it takes FILE.py:THING, package.module:THING or http://HOST:PORT."),
    ("no_such.py:score", "there is no file {folder}/no_such.py;"),
    ("no_such_package.module:score", "there is no module no_such_package.module here;"),
    ("flow_grpo.no_such:score", "there is no module flow_grpo.no_such here;"),
]


@pytest.mark.parametrize(("text", "words"), PLACES)
def test_a_place_that_is_none_is_told_before_anything_is_imported(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_place("mine", text)
    assert words.format(folder=tmp_path) in str(error.value)


def test_a_module_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "slow_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "rewards.py").write_text("def score(images, prompts): ...")
    monkeypatch.syspath_prepend(tmp_path)
    check_place("mine", "slow_package.rewards:score")
    assert digest("slow_package.rewards:score") != ""
    with pytest.raises(ConfigError, match="has no scores; the nearest is score"):
        check_place("mine", "slow_package.rewards:scores")


def test_a_served_reward_is_the_same_wherever_its_server_is_and_another_is_not():
    here = digest("http://here:8000/score/pickscore")
    assert here == digest("https://there/score/pickscore/") != ""
    assert here != digest("http://here:8000/score/clipscore")


def test_names_that_are_taken_are_refused(file):
    config = own(file, "brightness")
    for name, words in (("pickscore", "pickscore is a reward already"), ("total", "'total' is no name for a reward")):
        with config.unlocked():
            config.reward_files[name] = f"{file}:brightness"
        with pytest.raises(ConfigError, match=words):
            validate_rewards(config)
        with config.unlocked():
            del config.reward_files[name]


def test_a_package_may_announce_a_reward(file, monkeypatch):
    monkeypatch.setattr(own_files, "announced", lambda: {"mine": f"{file}:brightness"})
    config = get_config()
    config.reward_fn.pickscore, config.eval.rewards = 1.0, ("mine",)
    settings = resolve(config, 1, cuda=False)
    assert settings.config.reward_files.mine == f"{file}:brightness"
    assert settings.config.reward_fn.get("mine", 0.0) == 0.0
    assert chosen.is_own(settings.config, "mine")


OPTIONS = [
    ("pickscore", ("pickscore", "", "")),
    ("pickscore=a/b", ("pickscore", "a/b", "")),
    ("mine=my.module:Thing", ("mine", "", "my.module:Thing")),
    ("mine=/there/my.py:Thing", ("mine", "", "/there/my.py:Thing")),
]


@pytest.mark.parametrize(("text", "expected"), OPTIONS)
def test_one_grammar_for_every_command(text, expected):
    asked = read_option(text, REWARDS)
    assert (asked.name, asked.model, asked.place) == expected


@pytest.mark.parametrize("text", ["mine", "mine=there", "=a.b:c", "pickscore=my.py:Thing", "a b=my.py:Thing"])
def test_other_options_are_one_sentence(text):
    with pytest.raises(ConfigError, match="--reward "):
        read_option(text, REWARDS)


def test_paths_are_kept_in_full_and_modules_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert in_full("a/b.py:Thing") == f"{tmp_path}/a/b.py:Thing"
    assert in_full("a.b:Thing") == "a.b:Thing"


def test_ones_own_is_tried_before_a_checkpoint_loads(file, monkeypatch):
    loaded = []
    monkeypatch.setattr(building, "load_scorer", lambda *arguments: loaded.append(arguments))
    config = own(file, "scalar", **{"reward_fn.pickscore": 1.0})
    with pytest.raises(ConfigError, match="scalar gave"):
        build_reward(resolve(config, 1, cuda=False).config, "cpu")
    assert loaded == []


def test_a_reward_that_raises_names_itself_the_line_the_prompt_and_the_batch(file):
    file.write_text(
        "def score(images, prompts):\n    if len(images) > 2:\n        raise KeyError('weights')\n    return [0, 1]\n"
    )
    reward = build_reward(resolve(own(file, "score"), 1, cuda=False).config, "cpu")
    with pytest.raises(RewardFailed) as error, in_batch("in epoch 3"):
        reward(make_images(8, 8), ["a bag", "a boot", "a bag", "a coat"], NO_METADATA * 4)
    assert str(error.value) == (
        f"the reward mine failed in epoch 3 on the images of 'a bag' and 3 more: {file}, line 3: KeyError: 'weights'; "
        "what was saved is intact"
    )
