"""Reading the words that a prompt asks for."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from flow_grpo import places
from flow_grpo.errors import ConfigError
from flow_grpo.rewards import checks
from flow_grpo.rewards.ocr import Ocr, share
from flow_grpo.rewards.prompt_words import asked_for
from scripts.bench.ocr import draw
from tests.rewards.scoring import make_config


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return Ocr()


def test_written_words_are_read_and_other_words_are_not(ocr: Ocr) -> None:
    images = torch.stack([to_tensor(draw("Hello World")), to_tensor(draw("table", 10))])
    images = torch.cat([images, torch.full_like(images[:1], 0.5), torch.full_like(images[:1], math.nan)])
    prompts = ['a sign that says "hello world"', 'a "table" of wood', 'an empty "wall"', 'a "wall"']
    scores = ocr(images, prompts, [{}] * 4)
    assert scores.dtype == torch.float32
    assert scores[:3].tolist() == [1, 1, 0]
    assert scores[3].isnan()
    assert ocr(images[:1], ['a sign that says "Hexlo Worlds"'], [{}]).item() == pytest.approx(1 - 2 / 11)


@pytest.mark.parametrize(
    ("read", "asked", "expected"),
    [
        ("HELLO", "hello", 1.0),
        ("say hel lo twice", "Hello", 1.0),  # more may stand there
        ("helo", "hello", 0.8),
        ("", "hello", 0.0),
        ("quite another text", "hi", 0.0),  # not below 0
    ],
)
def test_the_share_is_flow_grpos(read: str, asked: str, expected: float) -> None:
    assert share(read, asked) == pytest.approx(expected)


def test_what_is_asked_for_stands_in_quotes() -> None:
    assert asked_for('a cup, "Tea Time" on it, and "Now"') == "Tea Time"
    assert asked_for("ein Schild: „Halt“") == "Halt"
    for prompt in ("a cup", 'a cup "  "', 'an inch is 1"'):
        with pytest.raises(ValueError, match="the reward ocr reads what a prompt quotes"):
            asked_for(prompt)


def test_a_missing_package_is_one_sentence_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = places.find_spec
    monkeypatch.setattr(places, "find_spec", lambda name: None if name == "rapidocr" else found(name))
    with pytest.raises(ConfigError) as error:
        checks.validate_rewards(make_config("", ocr=1.0))
    assert str(error.value) == (
        "config.reward_fn.ocr needs rapidocr, not installed here; "
        "pip install 'flow-matching-entropy[ocr]' installs all that it needs."
    )
