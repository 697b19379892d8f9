"""Scores from another process, over HTTP: batches at once, bounded retries, and one sentence when there are none.

`submit` returns at once; what it returns waits for the scores. A request that is repeated has the very same body, and
an answer that is not to this body is refused, so nothing is scored by other images' scores.
"""

from __future__ import annotations

import math
import os
import socket
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter
from torch import Tensor

from flow_grpo.errors import RewardFailed
from flow_grpo.figure_text import one_line
from flow_grpo.messages import say
from flow_grpo.rewards.image_path import check_images
from flow_grpo.rewards.registry import Metadata
from flow_grpo.rewards.wire import SAFETENSORS, TOKEN_VARIABLE, digest_of, pack

T = TypeVar("T")

BUSY = (429, 502, 503, 504)  # of a server that may answer later
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # seconds between two attempts, doubled each time, with jitter
SLICE = 0.5  # seconds of waiting after which it is asked whether scores are still wanted
LARGEST = torch.finfo(torch.float32).max
LONGEST = 16 * 2**20  # bytes of an answer
REASON = 200  # characters quoted of an answer


@dataclass(frozen=True)
class Network:
    """How a server is asked: `config.remote`."""

    timeout: float  # seconds for one answer
    patience: float  # seconds of failing attempts after which there are no scores
    batch_size: int  # images of one request
    concurrency: int  # requests at once


class Unanswered(Exception):
    """An attempt failed in a way that may pass: no connection, no answer in time, a busy server."""


@dataclass(frozen=True)
class Fetching:
    """Scores that are being fetched."""

    caller: Caller
    parts: Sequence[Future[Tensor]]
    finite: Tensor  # (B,) bool: the images that were sent
    device: torch.device

    def failed(self) -> bool:
        """Whether a part is known to have failed, without waiting."""
        return any(part.done() and part.exception() is not None for part in self.parts)

    def result(self) -> Tensor:
        """Wait for them: (B,) float32; nan for images that are not finite.

        Raises:
            RewardFailed: there are none, or nobody wants them any more.
        """
        scores = torch.full((len(self.finite),), math.nan)
        found = [self.caller.wait(part) for part in self.parts]
        if found:
            scores[self.finite] = torch.cat(found)
        return scores.to(self.device)


class Caller:
    """Requests to one address, each tried until it is answered, is refused, or patience ends."""

    def __init__(self, reward: str, address: str, network: Network, token_variable: str) -> None:
        """`reward`: its name; the token is read from the environment variable."""
        self.reward, self.address, self.network = reward, address, network
        token = os.environ.get(token_variable, "")
        self._token_variable = token_variable
        self._client = httpx.Client(
            timeout=network.timeout,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=network.concurrency),
            trust_env=not is_loopback(address),  # no proxy of the environment can reach this machine's own servers
        )
        self._told = False
        self._found = False  # whether anything has answered at this address
        self.unwanted: Callable[[], bool] = lambda: False  # whether nobody needs scores any more
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # not an executor's threads: the process would not end before these have, and they may wait for a dead server
        for _ in range(network.concurrency):
            Thread(target=_work, args=(self._tasks,), name="reward", daemon=True).start()
        weakref.finalize(self, _dismiss, self._tasks, network.concurrency)

    def later(self, function: Callable[[], T]) -> Future[T]:
        """The function's value, from a thread of ours."""
        future: Future[T] = Future()
        self._tasks.put(partial(_settle, future, function))
        return future

    def wait(self, future: Future[T]) -> T:
        """Its value. RewardFailed where scores are unwanted before it is there."""
        while not wait((future,), SLICE).done:
            if self.unwanted():
                raise self.failure("was not waited for: the run is to stop")
        return future.result()

    def ask(self, path: str, body: bytes | None = None, kind: str = SAFETENSORS) -> Any:
        """The JSON that is answered; a POST where there is a body.

        Raises:
            RewardFailed: it is refused, or is no JSON, or there is no answer for as long as patience lasts.
        """
        retrying = Retrying(
            stop=stop_after_delay(self.network.patience),
            wait=wait_exponential_jitter(FIRST_WAIT, LONGEST_WAIT),
            retry=retry_if_exception_type(Unanswered),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            answer = retrying(self._attempt, path, body, kind)
        except Unanswered as error:
            raise self.failure(f"gave no answer for {self.network.patience:g} seconds ({error})") from None
        self._told = False
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise self.failure(f"answered what is no JSON: {one_line(answer.text[:REASON], REASON)}") from None

    def failure(self, what: str) -> RewardFailed:
        """The error whose sentence says what the server did."""
        return RewardFailed(self.reward, f"as the server at {self.address} {what}")

    def _attempt(self, path: str, body: bytes | None, kind: str) -> httpx.Response:
        url = f"{self.address}{path}"
        try:
            if body is None:
                answer = self._whole("GET", url)
            else:
                answer = self._whole("POST", url, content=body, headers={"Content-Type": kind})
            self._found = True
        except httpx.TransportError as error:
            why = one_line(str(error), REASON) or type(error).__name__
            if hopeless := self._hopeless(error):
                raise self.failure(f"{hopeless} ({why})") from error
            raise Unanswered(why) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self.failure(f"cannot be asked ({one_line(str(error), REASON)})") from error
        if answer.status_code in BUSY:
            raise Unanswered(f"{answer.status_code}: {_quoted(answer)}")
        if answer.status_code in (401, 403):
            raise self.failure(f"refuses the token of the environment variable {self._token_variable}")
        if answer.status_code != 200:
            raise self.failure(f"answered {answer.status_code}: {_quoted(answer)}")
        return answer

    def _hopeless(self, error: httpx.TransportError) -> str:
        """In words, why no waiting mends it; empty: it may pass, as a host that was found is found again."""
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "cannot be trusted"
        return "" if self._found or not _is_unknown(error) else "cannot be found: no such host"

    def _whole(self, method: str, url: str, **request: Any) -> httpx.Response:
        """An answer that is read to its end: httpx bounds the time to each part of one, and not its size."""
        ends = time.monotonic() + self.network.timeout
        body = bytearray()
        with self._client.stream(method, url, **request) as answer:
            for part in answer.iter_bytes():
                body += part
                if len(body) > LONGEST:
                    raise self.failure(f"answered more than {LONGEST // 2**20} MiB")
                if time.monotonic() > ends:
                    raise Unanswered(f"its answer did not end within {self.network.timeout:g} seconds")
        return httpx.Response(answer.status_code, content=bytes(body))

    def _tell(self, state: RetryCallState) -> None:
        """Once for each time that the server goes away."""
        if not self._told:
            self._told = True
            cause = state.outcome.exception() if state.outcome else ""
            say(
                f"the reward {self.reward} waits for the server at {self.address}, for up to "
                f"{self.network.patience:g} seconds ({cause})."
            )


class ServedReward(ABC):
    """A reward that another process computes; it has no gradient."""

    differentiable = False

    def __init__(self, name: str, address: str, network: Network, token_variable: str) -> None:
        self.name = name
        self._caller = Caller(name, address, network, token_variable)

    @abstractmethod
    def _tasks(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> list[Callable[[], Tensor]]:
        """What fetches the scores of finite images (N, 3, H, W), a part of them each, in their order."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts -> (B,) float32. They are sent in 8 bits.

        Raises:
            ValueError: for other images.
            RewardFailed: there are no scores.
        """
        return self.submit(images, prompts, metadata).result()

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Fetching:
        """The same, without waiting for the scores. Images that are not finite are not sent."""
        check_images(images)
        finite = images.detach().flatten(1).isfinite().all(1).cpu()
        rows = finite.nonzero()[:, 0].tolist()
        sent = images.detach()[finite.to(images.device)]
        tasks = self._tasks(sent, [prompts[i] for i in rows], [metadata[i] for i in rows]) if rows else []
        return Fetching(self._caller, [self._caller.later(task) for task in tasks], finite, images.device)

    def heed(self, unwanted: Callable[[], bool]) -> None:
        """From now on, wait for scores only while it says False."""
        self._caller.unwanted = unwanted


class RemoteReward(ServedReward):
    """That of `fme serve`, or of whatever answers in the same way."""

    def __init__(self, name: str, url: str, network: Network) -> None:
        """`url`: http://HOST:PORT/score/NAME; where it ends before /score, NAME is this reward's own."""
        address, found, served = url.rstrip("/").partition("/score/")
        super().__init__(name, address, network, TOKEN_VARIABLE)
        self._path = f"/score/{served if found else name}"

    def _tasks(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> list[Callable[[], Tensor]]:
        size = self._caller.network.batch_size
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return [partial(self._scores, pack(images[p], prompts[p], metadata[p]), prompts[p]) for p in parts]

    def _scores(self, body: bytes, prompts: Sequence[str]) -> Tensor:
        answer = self._caller.ask(self._path, body)
        scores = answer.get("scores") if isinstance(answer, Mapping) else None
        if not isinstance(scores, list):
            raise self._caller.failure(f'answered without "scores": {one_line(str(answer), REASON)}')
        if answer.get("digest") != digest_of(body):
            raise self._caller.failure("answered for other images than were sent (its digest is not the request's)")
        if len(scores) != len(prompts):
            raise self._caller.failure(f"gave {len(scores)} scores for {len(prompts)} images")
        for score, prompt in zip(scores, prompts, strict=True):
            if type(score) not in (int, float) or not abs(score) <= LARGEST:
                raise self._caller.failure(f"gave {score!r:.40} for an image of {prompt!r:.80}, which is no number")
        return torch.tensor(scores, dtype=torch.float32)


def _work(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    """Of a thread: one task after another, until one is None."""
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds its caller


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # for whoever waits
        future.set_exception(error)


def _dismiss(tasks: SimpleQueue[Callable[[], None] | None], threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)


def is_loopback(address: str) -> bool:
    """Whether it is one of this machine's own, by which no other machine can be meant."""
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _is_unknown(error: BaseException | None) -> bool:
    """Whether it is that no address has the host's name."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def _quoted(answer: httpx.Response) -> str:
    """What a server says: the detail of FastAPI's answers, or the beginning of the text."""
    try:
        said = answer.json()
        said = said.get("detail", said) if isinstance(said, Mapping) else said
    except (ValueError, RecursionError):
        said = answer.text
    return one_line(str(said), REASON) or "nothing"
