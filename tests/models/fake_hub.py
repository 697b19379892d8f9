"""A hub on this machine: what huggingface_hub asks of one, answered from folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub


def commit_of(name: str, revision: str) -> str:
    """40 letters, as git has them."""
    return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


class Hub:
    """Models by id and revision; what was asked for."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.asked: list[str] = []  # METHOD path

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        """Serve a folder, by its revision's name and by its commit."""
        self.models[name, revision] = self.models[name, commit_of(name, revision)] = folder

    @property
    def given(self) -> set[str]:
        """The files that were fetched."""
        return {line.split("/resolve/")[1].partition("/")[2] for line in self.asked if line.startswith("GET /org")}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        name, _, rest = path.removeprefix("/api/models").strip("/").partition("/resolve/")
        if path.startswith("/api/models"):
            return self._listing(name)
        revision, _, file = rest.partition("/")
        if not any(known == name for known, _ in self.models):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if (name, revision) not in self.models:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        folder = self.models[name, revision]
        commit = revision if len(revision) == 40 else commit_of(name, revision)
        if not (folder / file).is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = (folder / file).read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def _listing(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Of org/name[/revision/R | /tree/R]."""
        org, model, kind, revision = [*path.split("?")[0].split("/"), "revision", "main"][:4]
        name = f"{org}/{model}"
        folder = self.models[name, revision]
        commit = revision if len(revision) == 40 else commit_of(name, revision)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "tree":
            found: Any = [
                {"type": "file", "path": name, "size": path.stat().st_size,
                 "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                for name, path in zip(names, files, strict=True)
            ]  # fmt: skip
        else:
            found = {"id": name, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            path = unquote(self.path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, content = hub.answer(path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD  # noqa: N815 - the library's name

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub there is, with an empty cache."""
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        for api in (hf_api.api, transformers_hub.hf_api()):
            monkeypatch.setattr(api, "endpoint", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
