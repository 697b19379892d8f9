"""A vision-language model as a reward, over the chat interface that vLLM, SGLang and others serve.

It is asked about each image by itself. Its score is a number that it writes, or the probability of the word "yes",
from the log-probabilities of its first word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flow_grpo.figure_text import one_line
from flow_grpo.rewards.client import Network, ServedReward
from flow_grpo.rewards.registry import Metadata
from flow_grpo.rewards.wire import JSON, eight_bit, png_text

TOKEN_VARIABLE = "OPENAI_API_KEY"  # as the clients of such servers read it
NUMBER = r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?![\w.]*\d)"
OF_A_SCALE = re.compile(rf"({NUMBER})\s*(?:/|out of)\s*\d")  # 7/10, 7 out of 10
RANGE = re.compile(r"\b(?:scale (?:of|from)|from)\s*\d+\s*(?:-|\u2013|to)\s*\d+")  # on a scale of 1 to 10
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
BLANK = " \n\t▁ĠĊ"  # as tokenizers write a space and the end of a line
FIRST = 3  # words asked for, where the first of them that is not blank is yes or no
LEAST = 0.01  # chance of yes and no together, below which it did not answer the question
TOP = 20  # most likely words asked for, the most that such servers give
QUOTED = 120  # characters of an answer


@dataclass(frozen=True)
class Chat:
    """What is asked, and how the answer is read: `config.chat`."""

    url: str  # of the interface, as http://HOST:PORT/v1
    model: str  # the name that the server gives it; "": the first of those it lists
    question: str  # a template with {prompt}
    answer: str  # "yes": the probability of yes; "number": the number that it says
    scale: float  # of "number": the best score there is, by which it is divided
    max_tokens: int  # of the answer


class ChatReward(ServedReward):
    """In [0, 1] for "yes", and for "number" with its scale."""

    def __init__(self, chat: Mapping[str, Any], network: Mapping[str, Any]) -> None:
        """`chat`, `network`: groups of settings that hold what a `Chat` and a `Network` do."""
        self.chat = Chat(**chat)
        super().__init__("chat", self.chat.url.rstrip("/"), Network(**network), TOKEN_VARIABLE)
        self._model = self.chat.model

    def _tasks(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> list[Callable[[], Tensor]]:
        pictures = zip(eight_bit(images).unbind(), prompts, strict=True)
        return [partial(self._score, picture, prompt) for picture, prompt in pictures]

    def _score(self, picture: Tensor, prompt: str) -> Tensor:
        if not self._model:
            self._model = self._first_model()
        asked = request_of(self.chat, self._model, prompt, png_text(picture))
        answer = self._caller.ask("/chat/completions", json.dumps(asked).encode(), JSON)
        try:
            read = chance_of_yes(answer) if self.chat.answer == "yes" else score_in(answer, self.chat)
        except ValueError as error:
            raise self._caller.failure(f"gave no score for an image of {prompt!r:.80}: {error}") from None
        return torch.tensor([read], dtype=torch.float32)

    def _first_model(self) -> str:
        listed = self._caller.ask("/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._caller.failure("lists no model; config.chat.model names one") from None


def request_of(chat: Chat, model: str, prompt: str, png: str) -> dict[str, Any]:
    """What is posted to /chat/completions: one image, then the question; always the likeliest words."""
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "text", "text": chat.question.format(prompt=prompt)},
    ]
    asked = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0}
    if chat.answer == "yes":
        return asked | {"max_tokens": FIRST, "logprobs": True, "top_logprobs": TOP}
    return asked | {"max_tokens": chat.max_tokens}


def score_in(answer: Any, chat: Chat) -> float:
    """The number that the answer says, over the best that there is.

    Raises:
        ValueError: there is none, it is beyond the best, or the answer ends before its end.
    """
    if _choice(answer).get("finish_reason") == "length":
        raise ValueError(f"its answer is longer than config.chat.max_tokens = {chat.max_tokens}")
    number = number_in(answer)
    if number > chat.scale:
        raise ValueError(f"{number:g} is more than config.chat.scale = {chat.scale:g}, the best score there is")
    return number / chat.scale


def number_in(answer: Any) -> float:
    """What is said to be so much of a scale, as 7 of "7/10" or "7 out of 10"; else the last number of the text.

    What a model thinks before it answers is left out. Of several, the last.

    Raises:
        ValueError: there is none.
    """
    text = _choice(answer)["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("its answer has no text")
    said = THOUGHT.sub("", text).replace("\u2212", "-")
    if "<think>" in said:
        raise ValueError(f"no end of its thinking in {one_line(text, QUOTED)!r}")
    said = re.sub(r"(?<=\d),(?=\d{3}\b)", "", RANGE.sub("", said))  # 1,000
    said = re.sub(r"(?<=\d),(?=\d)", ".", said)  # 7,5
    found = OF_A_SCALE.findall(said) or re.findall(NUMBER, said)
    if not found:
        raise ValueError(f"no number in {one_line(text, QUOTED)!r}")
    return float(found[-1])


def chance_of_yes(answer: Any) -> float:
    """P(yes) / (P(yes) + P(no)), each summed over the likeliest first words that are it, whatever their case.

    Raises:
        ValueError: neither is among them, or both are so unlikely that it has answered something else.
    """
    choice = _choice(answer)
    try:
        words = (choice.get("logprobs") or {}).get("content") or []
        if not words:
            raise ValueError("no log-probabilities")
        first = next((word for word in words if str(word.get("token", "-")).strip(BLANK)), words[0])
        chances = {"yes": 0.0, "no": 0.0}
        for one in first.get("top_logprobs") or ():
            word = re.sub(r"[\W_]", "", str(one["token"]).lstrip(BLANK)).lower()
            if word in chances and isinstance(one["logprob"], int | float):
                chances[word] += math.exp(one["logprob"])
    except (AttributeError, KeyError, TypeError, OverflowError):
        raise _another_form(answer) from None
    total = sum(chances.values())
    if not LEAST <= total < math.inf:
        said = one_line(str(choice["message"]["content"]), QUOTED)
        raise ValueError(f"neither yes nor no is likely as its first word; it began {said!r}")
    return chances["yes"] / total


def _choice(answer: Any) -> Mapping[str, Any]:
    try:
        choice: Mapping[str, Any] = answer["choices"][0]
        choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _another_form(answer) from None
    return choice


def _another_form(answer: Any) -> ValueError:
    return ValueError(f"an answer of another form, {one_line(str(answer), QUOTED)!r}")
