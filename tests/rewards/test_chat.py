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
from flow_grpo.rewards.chat import TOKEN_VARIABLE, Chat, ChatReward, chance_of_yes, number_in
from flow_grpo.rewards.checks import check_question
from flow_grpo.rewards.client import Network
from tests.rewards.http_servers import Answer, answering

QUICK = Network(timeout=5.0, patience=20.0, concurrency=2)


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
    ],
)
def test_a_score_is_the_last_number_of_the_text(text, number):
    assert number_in(said(text)) == number


@pytest.mark.parametrize("answer", [said("very nice"), said(""), {"choices": []}, {}, [], said(None)])
def test_an_answer_without_a_number_is_refused(answer):
    with pytest.raises(ValueError, match=r"no number|another form|no text"):
        number_in(answer)


def test_yes_is_summed_over_its_spellings_and_weighed_against_no():
    answer = likely(**{"Yes": math.log(0.3), " yes": math.log(0.1), "No": math.log(0.1), "Maybe": math.log(0.5)})
    assert chance_of_yes(answer) == pytest.approx(0.8)


@pytest.mark.parametrize("answer", [likely(Maybe=-0.1), said("Yes"), {}])
def test_an_answer_with_neither_yes_nor_no_is_refused(answer):
    with pytest.raises(ValueError, match=r"neither yes nor no|no log-probabilities|another form"):
        chance_of_yes(answer)


@pytest.mark.parametrize("question", ["{caption}", "{prompt", "{}"])
def test_a_question_with_another_blank_than_the_prompt_is_refused(question):
    with pytest.raises(ConfigError, match=r"config\.chat\.question"):
        check_question(question)


def reward_at(address: str, **chat: object) -> ChatReward:
    return ChatReward(Chat(url=f"{address}/v1", **chat), QUICK)


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
    assert (body["model"], body["logprobs"], body["max_tokens"]) == ("m", True, 1)


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


def test_a_wrong_token_is_refused_by_the_name_of_its_variable():
    with answering(lambda path, body: (401, {})) as address, pytest.raises(RewardFailed, match=TOKEN_VARIABLE):
        reward_at(address, model="m")(torch.zeros(1, 3, 4, 4), ["a"], [{}])
