"""Rewards over HTTP: the client against our server, and against servers that fail in every way."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from flow_grpo.errors import ConfigError, RewardFailed
from flow_grpo.rewards import client
from flow_grpo.rewards.checks import check_address
from flow_grpo.rewards.client import Network, RemoteReward, is_loopback
from flow_grpo.rewards.server import Limits, reward_app
from flow_grpo.rewards.wire import JSON, SAFETENSORS, TOKEN_VARIABLE, digest_of, pack, unpack
from tests.rewards.http_servers import Answer, answering, serving

QUICK = Network(timeout=5.0, patience=20.0, batch_size=3, concurrency=2)
HASTY = Network(timeout=0.3, patience=0.5, batch_size=3, concurrency=2)


class FirstPixel:
    """The first pixel, plus the length of the prompt, plus what the metadata add."""

    name, differentiable = "first", False

    def __call__(self, images, prompts, metadata):
        added = [len(prompt) + one.get("plus", 0) for prompt, one in zip(prompts, metadata, strict=True)]
        return images[:, 0, 0, 0] + torch.tensor(added)


def first_server(limits: Limits = Limits(), token: str = ""):  # noqa: B008
    return serving(reward_app({"first": FirstPixel()}, {"first": {}}, limits, "cpu", token))


def levels(count: int) -> torch.Tensor:
    """(count, 3, 4, 4) of 8-bit values, all different."""
    return (torch.arange(count * 48).reshape(count, 3, 4, 4) % 256).float() / 255


def ask(address: str, images: torch.Tensor, network: Network = QUICK) -> torch.Tensor:
    prompts = ["x" * (i + 1) for i in range(len(images))]
    return RemoteReward("first", f"{address}/score/first", network)(images, prompts, [{"plus": 10}] * len(images))


def test_scores_are_those_of_the_reward_in_order():
    images = levels(8)
    with first_server() as address:
        scores = ask(address, images)
    assert torch.equal(scores, images[:, 0, 0, 0] + (torch.arange(1.0, 9.0) + 10))


def test_an_image_that_is_not_finite_is_not_sent_and_scores_nan():
    images = levels(4)
    images[1, 0, 2, 2] = math.nan
    with first_server() as address:
        scores = ask(address, images)
    assert scores.isnan().tolist() == [False, True, False, False]
    assert scores[3] == images[3, 0, 0, 0] + 14


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (51, 0, 0)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_pngs_in_json_score_as_safetensors():
    body = {"images": [png(4, 4)], "prompts": ["abc"]}
    with first_server() as address:
        answer = httpx.post(f"{address}/score/first", json=body).json()
    assert answer["scores"] == pytest.approx([3.2])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (SAFETENSORS, b"garbage"),
        (SAFETENSORS, b"\x80\x04\x95"),  # a pickle's first bytes
        (SAFETENSORS, pack(levels(2), ["a"], [{}, {}])),
        (SAFETENSORS, pack(levels(5), ["a"] * 5, [{}] * 5)),
        (SAFETENSORS, save({"images": torch.zeros(1, 3, 0, 4, dtype=torch.uint8)}, {"prompts": '["a"]'})),
        (JSON, b"{}"),
        (JSON, b"[" * 100_000),
        (JSON, b'{"images": ["bm8="], "prompts": ["a"]}'),
        ("application/octet-stream", b""),
    ],
    ids=["garbage", "pickle", "prompts", "batch", "no pixels", "empty", "deep", "picture", "kind"],
)
def test_a_body_of_another_form_is_refused_with_its_fault(kind, body):
    with first_server(Limits(batch=4)) as address:
        answer = httpx.post(f"{address}/score/first", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_a_body_beyond_the_limit_is_refused_with_413():
    with first_server(Limits(body=1000)) as address, pytest.raises(RewardFailed, match="413: the body has"):
        ask(address, torch.rand(3, 3, 40, 40))


def test_a_body_without_a_length_is_refused_once_it_is_too_large():
    with first_server(Limits(body=1000)) as address:
        sent = (b"x" * 600 for _ in range(3))
        answer = httpx.post(f"{address}/score/first", content=sent, headers={"Content-Type": SAFETENSORS})
    assert answer.status_code == 413


def test_pictures_that_unfold_to_more_than_the_limit_are_refused_before_that():
    sent = {"images": [png(2000, 500)] * 2, "prompts": ["a"] * 2}
    with first_server(Limits(body=5_000_000)) as address:  # they are a few kilobytes
        answer = httpx.post(f"{address}/score/first", json=sent)
    assert answer.status_code == 422
    assert "2000000 pixels" in answer.json()["detail"]


def test_a_body_that_does_not_come_leaves_the_queue():
    with first_server(Limits(queue=1, seconds=0.2)) as address:
        server = httpx.URL(address)
        with socket.create_connection((server.host, server.port), timeout=20) as slow:
            slow.sendall(b"POST /score/first HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert ask(address, levels(1)).isfinite().all()


def test_a_client_that_leaves_is_no_error_of_the_server():
    app = reward_app({"first": FirstPixel()}, {}, Limits(), "cpu")
    scope = {"type": "http", "method": "POST", "path": "/score/first", "query_string": b"", "headers": []}
    sent = []

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400


def test_a_full_queue_is_asked_again_until_there_is_room():
    with first_server(Limits(queue=1)) as address:
        scores = ask(address, levels(12), Network(timeout=5.0, patience=60.0, batch_size=1, concurrency=4))
    assert scores.isfinite().all()


def test_the_right_token_is_taken(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with first_server(token="secret") as address:
        assert ask(address, levels(2)).isfinite().all()


@pytest.mark.parametrize("token", ["", "wrong", "sécret"])
def test_a_wrong_token_is_refused_at_once(monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with first_server(token=token or "another") as address, pytest.raises(RewardFailed, match=TOKEN_VARIABLE):
        ask(address, levels(2))


def test_a_reward_that_raises_is_told_in_its_own_words():
    class Broken(FirstPixel):
        def __call__(self, images, prompts, metadata):
            raise RuntimeError("no such feature")

    app = reward_app({"first": Broken()}, {}, Limits(), "cpu")
    with serving(app) as address, pytest.raises(RewardFailed, match="500: the reward failed: no such feature"):
        ask(address, levels(1))


FAULTS: dict[str, tuple[Answer, str]] = {
    "garbage": ((200, b"<html>"), "no JSON"),
    "no scores": ((200, {"ok": True}), 'without "scores"'),
    "none": ((200, [1, 2]), 'without "scores"'),
    "other images": ((200, {"scores": [1.0] * 3, "digest": "0" * 64}), "other images"),
    "error": ((418, {"detail": "a teapot"}), "418: a teapot"),
    "moved": ((302, b""), "302: nothing"),
    "deep": ((200, b"[" * 100_000), "no JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_one_sentence_that_names_reward_and_server(fault):
    said, words = FAULTS[fault]
    with answering(lambda path, body: said) as address, pytest.raises(RewardFailed, match=words) as caught:
        ask(address, levels(3))
    assert str(caught.value).startswith(f"the reward first failed as the server at {address} ")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0, 2.0], "2 scores for 3 images"),
        ([1.0, None, 2.0], "None for an image of 'xx'"),
        ([1, "2", 3], "'2'"),
        ([1, 10**400, 1e39], "10000"),
    ],
    ids=["too few", "nan", "text", "beyond float32"],
)
def test_scores_that_are_not_one_number_for_each_image_are_refused(scores, words):
    def answer(path: str, body: bytes) -> Answer:
        return 200, {"scores": scores, "digest": digest_of(body)}

    with answering(answer) as address, pytest.raises(RewardFailed, match=words):
        ask(address, levels(3))


def test_a_server_that_never_answers_ends_patience():
    release = threading.Event()

    def answer(path: str, body: bytes) -> Answer:
        release.wait(20)
        return 200, {}

    with answering(answer) as address:
        with pytest.raises(RewardFailed, match=r"gave no answer for 0\.5 seconds"):
            ask(address, levels(1), HASTY)
        release.set()


def test_no_server_ends_patience():
    with pytest.raises(RewardFailed, match=r"no answer for 0\.5 seconds .*refused"):
        ask("http://127.0.0.1:9", levels(1), HASTY)


def test_a_host_that_nobody_knows_is_told_at_once(monkeypatch):
    def look_up(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(RewardFailed, match=r"http://no\.such\.host:8000 cannot be found: no such host"):
        ask("http://no.such.host:8000", levels(1), replace(QUICK, patience=3600.0))


def test_a_host_that_has_answered_may_be_unknown_for_a_while(monkeypatch):
    known = socket.getaddrinfo

    def answer(path: str, body: bytes) -> Answer:
        return 200, {"scores": [1.0], "digest": digest_of(body)}

    def look_up(*arguments: object) -> object:
        monkeypatch.setattr(socket, "getaddrinfo", known)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    with answering(answer) as address:
        reward = RemoteReward("first", address.replace("127.0.0.1", "localhost"), QUICK)
        assert reward(levels(1), ["a"], [{}]).tolist() == [1.0]
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert reward(levels(1), ["a"], [{}]).tolist() == [1.0]
    assert socket.getaddrinfo is known  # it was asked again


def test_an_answer_that_drips_is_not_waited_for():
    release = threading.Event()

    def drip() -> Iterator[bytes]:
        while not release.wait(0.05):  # far quicker than the timeout of each part
            yield b" "

    with answering(lambda path, body: (200, drip())) as address:
        with pytest.raises(RewardFailed, match=r"its answer did not end within 0\.3 seconds"):
            ask(address, levels(1), HASTY)
        release.set()


def test_an_answer_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(client, "LONGEST", 2**20)
    with (
        answering(lambda path, body: (200, repeat(b" " * 2**16))) as address,
        pytest.raises(RewardFailed, match="answered more than 1 MiB"),
    ):
        ask(address, levels(1))


def test_an_attempt_that_failed_is_repeated_with_the_same_bytes():
    bodies: list[bytes] = []

    def answer(path: str, body: bytes) -> Answer:
        bodies.append(body)
        return (503, {}) if len(bodies) < 3 else (200, {"scores": [1.0] * 3, "digest": digest_of(body)})

    with answering(answer) as address:
        assert ask(address, levels(3)).tolist() == [1.0] * 3
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_scores_are_fetched_while_the_caller_goes_on():
    release = threading.Event()

    def answer(path: str, body: bytes) -> Answer:
        release.wait(20)
        return 200, {"scores": [1.0], "digest": digest_of(body)}

    with answering(answer) as address:
        pending = RemoteReward("first", address, QUICK).submit(levels(1), ["a"], [{}])
        assert not pending.failed()
        release.set()
        assert pending.result().tolist() == [1.0]


def test_requests_are_under_way_together():
    together = threading.Barrier(2)  # broken, and with it the answer, unless two wait at once

    def answer(path: str, body: bytes) -> Answer:
        together.wait(20)
        return 200, {"scores": [1.0] * 3, "digest": digest_of(body)}

    with answering(answer) as address:
        assert len(ask(address, levels(6))) == 6


def test_packing_rounds_to_the_nearest_of_256_levels():
    images = torch.rand(2, 3, 5, 7)
    found, prompts, metadata = unpack(pack(images, ["a", "é"], [{}, {"n": [1]}]), SAFETENSORS, 2, 2**20)
    assert (found - images).abs().max() <= 0.5 / 255 + 1e-6
    assert (prompts, metadata) == (["a", "é"], [{}, {"n": [1]}])


def test_scores_that_nobody_wants_any_more_are_not_waited_for():
    release, waited = threading.Event(), []

    def answer(path: str, body: bytes) -> Answer:
        release.wait(20)
        return 200, {}

    def unwanted() -> bool:
        waited.append(None)
        return len(waited) == 2

    with answering(answer) as address:
        reward = RemoteReward("first", address, Network(timeout=3600.0, patience=3600.0, batch_size=1, concurrency=1))
        reward.heed(unwanted)
        with pytest.raises(RewardFailed, match="the run is to stop"):
            reward(levels(1), ["a"], [{}])
        release.set()


def test_a_process_ends_although_a_request_is_still_repeated():
    lines = (
        "import torch",
        "from flow_grpo.rewards.client import Network, RemoteReward",
        "reward = RemoteReward('first', 'http://127.0.0.1:9', Network(60.0, 3600.0, 16, 4))",
        "reward.submit(torch.zeros(1, 3, 4, 4), ['a'], [{}])",
        "raise SystemExit(3)",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=300).returncode == 3


@pytest.mark.parametrize("proxy", ["HTTP_PROXY", "ALL_PROXY"])
def test_no_proxy_is_asked_for_a_server_of_this_machine(monkeypatch, proxy):
    monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with first_server() as address:
        assert ask(address, levels(1), HASTY).isfinite().all()


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:8000", True),
        ("https://localhost", True),
        ("http://10.0.0.2:8000", False),
        ("http://localhost.example.org", False),
    ],
)
def test_which_addresses_are_of_this_machine(address, own):
    assert is_loopback(address) is own


@pytest.mark.parametrize(
    "url",
    [
        "http://:8000/score/a",
        "http://host:port/score/a",
        "http://host:0/score/a",
        "ftp://host/score/a",
        "http://[::1/score/a",
        "http://host/score/a?token=b",
    ],
)
def test_what_is_no_address_is_one_sentence(url):
    with pytest.raises(ConfigError, match=r"reward_files\.far = .* is no address; it takes http://HOST:PORT"):
        check_address("reward_files.far", url)


def test_an_address_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ConfigError, match="has a name or password") as caught:
        check_address("reward_files.far", "http://me:secret@host:8000/score/a")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host/score/a", "https://host:8000/v1", "http://[::1]:8000/score/a"])
def test_an_address_passes(url):
    check_address("reward_files.far", url)
