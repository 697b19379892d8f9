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
from flow_grpo.rewards.client import Caller, Fetching, Network
from flow_grpo.rewards.image_path import check_images
from flow_grpo.rewards.registry import Metadata
from flow_grpo.rewards.wire import JSON, eight_bit, png_text

TOKEN_VARIABLE = "OPENAI_API_KEY"  # as the clients of such servers read it
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")
TOP = 20  # most likely words asked for, the most that such servers give
QUOTED = 120  # characters of an answer


@dataclass(frozen=True)
class Chat:
    """What is asked, and how the answer is read: `config.chat`."""

    url: str  # of the interface, as http://HOST:PORT/v1
    model: str = ""  # the name that the server gives it; "": the first of those it lists
    question: str = "Does this image show: {prompt}? Answer yes or no."
    answer: str = "yes"  # "yes": the probability of yes; "number": the last number of the answer
    scale: float = 1.0  # of "number": the best score there is, by which it is divided
    max_tokens: int = 64  # of the answer


class ChatReward:
    """In [0, 1] for "yes", and for "number" with its scale."""

    name = "chat"
    differentiable = False

    def __init__(self, chat: Any, network: Any) -> None:
        """`chat`, `network`: a `Chat` and a `Network`, or groups of settings that hold the same."""
        self.chat: Chat = chat if isinstance(chat, Chat) else Chat(**chat)
        network = network if isinstance(network, Network) else Network(**network)
        self._caller = Caller("chat", self.chat.url.rstrip("/"), network, TOKEN_VARIABLE)
        self._model = self.chat.model

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32. They are sent as PNGs.

        Raises:
            ValueError: for other images.
            RewardFailed: the server does not answer, or an answer cannot be read.
        """
        return self.submit(images, prompts, metadata).result()

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Fetching:
        """The same, without waiting for the scores. Images that are not finite are not sent."""
        check_images(images)
        finite = images.detach().flatten(1).isfinite().all(1).cpu()
        rows = finite.nonzero()[:, 0].tolist()
        pictures = eight_bit(images[finite.to(images.device)])
        tasks = [
            partial(self._score, picture, prompts[row]) for row, picture in zip(rows, pictures.unbind(), strict=True)
        ]
        return Fetching(self._caller, [self._caller.later(task) for task in tasks], finite, images.device)

    def heed(self, unwanted: Callable[[], bool]) -> None:
        """From now on, wait for scores only while it says False."""
        self._caller.unwanted = unwanted

    def _score(self, picture: Tensor, prompt: str) -> Tensor:
        if not self._model:
            self._model = self._first_model()
        asked = request_of(self.chat, self._model, prompt, png_text(picture))
        answer = self._caller.ask("/chat/completions", json.dumps(asked).encode(), JSON)
        try:
            read = chance_of_yes(answer) if self.chat.answer == "yes" else number_in(answer) / self.chat.scale
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
        return asked | {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
    return asked | {"max_tokens": chat.max_tokens}


def number_in(answer: Any) -> float:
    """The last number that the answer's text has, such as 7.5 of "Score: 7.5", or 7 of "7/10".

    Raises:
        ValueError: there is none.
    """
    text = _choice(answer)["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("its answer has no text")
    found = NUMBER.findall(re.sub(r"(\d)\s*/\s*\d+(\.\d+)?", r"\1", text))  # of 7/10 the 7
    if not found:
        raise ValueError(f"no number in {one_line(text, QUOTED)!r}")
    return float(found[-1])


def chance_of_yes(answer: Any) -> float:
    """P(yes) / (P(yes) + P(no)), each summed over the likeliest first words that are it, whatever their case.

    Raises:
        ValueError: neither is among them.
    """
    chances = {"yes": 0.0, "no": 0.0}
    words = (_choice(answer).get("logprobs") or {}).get("content") or []
    for one in words[0].get("top_logprobs", ()) if words else ():
        word = str(one.get("token", "")).strip(" \n\t.,!\"'▁Ġ").lower()  # as tokenizers mark a space
        if word in chances and isinstance(one.get("logprob"), int | float):
            chances[word] += math.exp(one["logprob"])
    total = sum(chances.values())
    if not 0 < total < math.inf:
        raise ValueError("neither yes nor no is among its likeliest first words" if words else "no log-probabilities")
    return chances["yes"] / total


def _choice(answer: Any) -> Mapping[str, Any]:
    try:
        choice = answer["choices"][0]
        choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"an answer of another form, {one_line(str(answer), QUOTED)!r}") from None
    return choice
