"""A server of rewards, for machines that training cannot share with them: `fme serve`. FastAPI answers.

    GET  /            the rewards that are served, and the limits
    POST /score/NAME  images and prompts as `wire.py` has them -> {"scores": [...], "digest": of the body}

A body, a batch and the queue are bounded: what is too much is refused before it is read whole, or is asked to come
again later. Images are scored one request after another, by one thread.
"""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from flow_grpo.figure_text import one_line
from flow_grpo.rewards.own import RAISED
from flow_grpo.rewards.registry import RewardModel
from flow_grpo.rewards.wire import digest_of, unpack

REASON = 300  # characters of what a reward says went wrong


@dataclass(frozen=True)
class Limits:
    """What the server takes."""

    body: int = 256 * 2**20  # bytes of a request
    batch: int = 64  # images of a request
    queue: int = 64  # requests that wait or are being scored
    seconds: float = 60.0  # in which a body is to come


def reward_app(
    models: Mapping[str, RewardModel], about: Mapping[str, Any], limits: Limits, device: Any, token: str = ""
) -> FastAPI:
    """The application that serves `models` by name.

    Args:
        about: what the first page says of each, by name.
        token: what `Authorization: Bearer` must say; "": anybody who reaches the server may ask.
    """
    app = FastAPI(title="fme serve", docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(1, "scoring")  # a network on one device: together they would be no faster
    waiting = 0

    def check(request: Request) -> None:
        said = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    @app.get("/")
    def index(request: Request) -> dict[str, Any]:
        check(request)
        return {"rewards": dict(about), "limits": vars(limits)}

    @app.post("/score/{name}")
    async def score(name: str, request: Request) -> JSONResponse:
        nonlocal waiting
        check(request)
        if name not in models:
            raise HTTPException(404, f"{name!r:.80} is not served; there are {', '.join(models)}")
        if waiting >= limits.queue:
            raise HTTPException(503, "the queue is full", headers={"Retry-After": "1"})
        waiting += 1
        try:
            body = await _body(request, limits)
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            loop = asyncio.get_running_loop()
            scores = await loop.run_in_executor(worker, _scores, models[name], body, kind, limits, device)
        finally:
            waiting -= 1
        return JSONResponse({"scores": scores, "digest": digest_of(body)})

    return app


async def _body(request: Request, limits: Limits) -> bytes:
    try:
        return await asyncio.wait_for(_read(request, limits.body), limits.seconds)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {limits.seconds:g} seconds") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None  # nobody reads it, but it is no error here


async def _read(request: Request, most: int) -> bytes:
    """The request's body; it is left unread where its header or the part that has come says that it is too large."""
    parts, size = [], 0
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise HTTPException(413, f"the body has {declared} bytes; it takes at most {most}")
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"the body has more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _scores(model: RewardModel, body: bytes, kind: str, limits: Limits, device: Any) -> list[float | None]:
    """In the worker's thread: the scores; None, which JSON has, for those that are not finite."""
    try:
        images, prompts, metadata = unpack(body, kind, limits.batch, limits.body)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    try:
        with torch.no_grad():
            found = model(images.to(device), prompts, metadata).double().tolist()
    except RAISED as error:  # the server goes on
        raise HTTPException(500, f"the reward failed: {one_line(str(error), REASON)}") from error
    return [value if math.isfinite(value) else None for value in found]
