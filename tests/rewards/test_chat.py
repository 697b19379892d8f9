"""A vision-language model as a reward: what is asked, and how answers are read."""

from __future__ import annotations

import base64
import io
import json
import math

import pytest
import torch
from PIL import Image

from flow_grpo.errors import ConfigError, RewardFailed
from flow_grpo.recipes.base import get_config
from flow_grpo.rewards.chat import TOKEN_VARIABLE, ChatReward, chance_of_yes, number_in
from flow_grpo.rewards.checks import check_question
from tests.rewards.http_servers import Answer, answering

QUICK = {"timeout": 5.0, "patience": 20.0, "batch_size": 16, "concurrency": 2}


def said(text: str) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def likely(**words: float) -> dict:
    """An answer whose first word has these log-probabilities."""
    top = [{"token": word, "logprob": logprob} for word, logprob in words.items()]
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7.0),
        ("Score: 7.5", 7.5),
        ("I rate it 7/10.", 7.0),
        ("The 3 cats look good: 8 / 10", 8.0),
        ("-2", -2.0),
        ("**9**", 9.0),
        ("Score: 4.", 4.0),
        ("7 out of 10", 7.0),
        ("Score: 9/10\n1. composition 2. colours", 9.0),
        ("8 (on a scale of 1-10)", 8.0),
        ("I rate it 4 on a scale from 1 to 5", 4.0),
        ("Rating: [[8]]", 8.0),
        ("8,5", 8.5),
        ("1,000", 1000.0),
        (".85", 0.85),
        ("\u22123", -3.0),
        ("<think>I see 3 cats,\nso 2/10.</think>\n8", 8.0),
    ],
)
def test_a_score_is_the_last_number_of_the_text(text, number):
    assert number_in(said(text)) == number


@pytest.mark.parametrize(
    "answer", [said("very nice"), said(""), said("<think>say 3"), {"choices": []}, {}, [], said(None)]
)
def test_an_answer_without_a_number_is_refused(answer):
    with pytest.raises(ValueError, match=r"no number|another form|no text|no end"):
        number_in(answer)


def test_yes_is_summed_over_its_spellings_and_weighed_against_no():
    answer = likely(**{"Yes": math.log(0.3), " yes": math.log(0.1), "No": math.log(0.1), "Maybe": math.log(0.5)})
    assert chance_of_yes(answer) == pytest.approx(0.8)


@pytest.mark.parametrize("yes", ["▁Yes", "ĠYes", "\nYES", "**Yes", '"yes', "Yes,"])
def test_yes_is_known_however_tokenizers_write_it(yes):
    assert chance_of_yes(likely(**{yes: math.log(0.6), "No": math.log(0.2)})) == pytest.approx(0.75)


def test_a_blank_before_the_first_word_is_passed_over():
    answer = likely(Yes=math.log(0.6), No=math.log(0.2))
    content = answer["choices"][0]["logprobs"]["content"]
    content.insert(0, {"token": "Ċ", "top_logprobs": [{"token": "No", "logprob": math.log(0.1)}]})
    assert chance_of_yes(answer) == pytest.approx(0.75)


def logged(content: object) -> dict:
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": content}]}


@pytest.mark.parametrize(
    "answer",
    [
        likely(Maybe=-0.1),
        likely(**{"<think>": -0.001, "Yes": -20.0}),
        said("Yes"),
        {},
        logged([1]),
        logged({"content": [None]}),
        logged({"content": [{"top_logprobs": None}]}),
        logged({"content": [{"top_logprobs": ["yes"]}]}),
        logged({"content": [{"top_logprobs": [{"token": "yes", "logprob": 1e9}]}]}),
    ],
)
def test_an_answer_with_neither_yes_nor_no_is_refused(answer):
    with pytest.raises(ValueError, match=r"neither yes nor no|no log-probabilities|another form"):
        chance_of_yes(answer)


@pytest.mark.parametrize("question", ["{caption}", "{prompt", "{}", "{prompt.x}", "{prompt:d}"])
def test_a_question_with_another_blank_than_the_prompt_is_refused(question):
    with pytest.raises(ConfigError, match=r"config\.chat\.question"):
        check_question(question)


def reward_at(address: str, **chat: object) -> ChatReward:
    return ChatReward({**get_config().chat, "url": f"{address}/v1", **chat}, QUICK)


def redness(body: bytes) -> float:
    """Of the picture of a request, as a share."""
    url = json.loads(body)["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    return picture.getpixel((0, 0))[0] / 255


def test_each_image_gets_the_score_that_was_given_for_it():
    def answer(path: str, body: bytes) -> Answer:
        return 200, said(f"Score: {100 * redness(body):.4f}")

    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 4, 4)
    with answering(answer) as address:
        scores = reward_at(address, model="m", answer="number", scale=100.0)(images, ["a"] * 6, [{}] * 6)
    torch.testing.assert_close(scores, images[:, 0, 0, 0], atol=1e-5, rtol=0)


def test_the_question_has_the_prompt_and_asks_for_log_probabilities():
    asked = []

    def answer(path: str, body: bytes) -> Answer:
        asked.append((path, json.loads(body)))
        return 200, likely(yes=-0.1, no=-3.0)

    with answering(answer) as address:
        reward_at(address, model="m", question="Is it {prompt}?")(torch.zeros(1, 3, 4, 4), ["a cat"], [{}])
    [(path, body)] = asked
    assert path == "/v1/chat/completions"
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "Is it a cat?"}
    assert (body["model"], body["logprobs"], body["top_logprobs"]) == ("m", True, 20)


def test_without_a_name_the_first_model_that_the_server_lists_is_asked():
    names = []

    def answer(path: str, body: bytes) -> Answer:
        if path == "/v1/models":
            return 200, {"data": [{"id": "first"}, {"id": "second"}]}
        names.append(json.loads(body)["model"])
        return 200, likely(yes=-0.1)

    with answering(answer) as address:
        reward_at(address)(torch.zeros(2, 3, 4, 4), ["a", "b"], [{}] * 2)
    assert names == ["first"] * 2


def test_an_answer_that_cannot_be_read_names_the_prompt():
    with (
        answering(lambda path, body: (200, said("lovely"))) as address,
        pytest.raises(RewardFailed, match="no score for an image of 'a cat': no number in 'lovely'"),
    ):
        reward_at(address, model="m", answer="number")(torch.zeros(1, 3, 4, 4), ["a cat"], [{}])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"message": {"content": "8"}}, "8 is more than config.chat.scale = 5"),
        ({"message": {"content": "The 2"}, "finish_reason": "length"}, "longer than config.chat.max_tokens = 64"),
    ],
    ids=["scale", "length"],
)
def test_a_number_that_cannot_be_the_score_is_refused(choice, words):
    with (
        answering(lambda path, body: (200, {"choices": [choice]})) as address,
        pytest.raises(RewardFailed, match=words),
    ):
        reward_at(address, model="m", answer="number", scale=5.0)(torch.zeros(1, 3, 4, 4), ["a"], [{}])


def test_a_wrong_token_is_refused_by_the_name_of_its_variable():
    with answering(lambda path, body: (401, {})) as address, pytest.raises(RewardFailed, match=TOKEN_VARIABLE):
        reward_at(address, model="m")(torch.zeros(1, 3, 4, 4), ["a"], [{}])
