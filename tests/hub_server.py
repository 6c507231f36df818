"""A stand-in for the hub's API, served on a loopback port, for the tests of uploads."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import constants

from fastrlhf.data import hub
from fastrlhf.distributed.ranks import is_first, on_first

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """A server that keeps repositories in memory. The token belongs to the user `ada`; nobody may write to repositories
    of `others`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}
        """Name of a repository -> whether it is private."""
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        """(repository, branch) -> path of a file -> its content."""
        self.requests: list[str] = []
        """Method and path of each request, in order."""
        self.broken: dict[str, int] = {}
        """Part of a request's path -> HTTP status with which the server answers the request."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        broken = next((status for part, status in hub.broken.items() if part in path), 0)
        if broken:
            self._answer(broken, {"error": "refused by the stand-in"})
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            self._model(f"{owner}/{name}", rest, body)

    def _create(self, asked: dict[str, Any]) -> None:
        owner, hub = asked.get("organization") or "ada", self.server
        name = f"{owner}/{asked['name']}"
        if name in hub.private:
            self._answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
        elif owner == "others":
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.files[name, "main"] = {}
            self._answer(200, {"url": f"{hub.url}/{name}"})

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        hub = self.server
        match rest:
            case _ if name not in hub.private:
                self._answer(404, {"error": "Repository not found"})
            case []:
                self._answer(200, {"id": name, "private": hub.private[name], "sha": "0" * 40})
            case ["auth-check", "write"]:
                self._answer(*((403, {"error": "Read-only token"}) if name.startswith("others/") else (200, {})))
            case ["revision", branch]:
                self._answer(*((200, {"id": name}) if (name, branch) in hub.files else (404, {"error": "no branch"})))
            case ["branch", branch]:
                exists = (name, branch) in hub.files
                hub.files.setdefault((name, branch), {})
                self._answer(*((409, {"error": "Reference already exists"}) if exists else (200, {})))
            case ["preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                self._answer(200, {"files": modes})
            case ["commit", branch]:
                self._commit(name, branch, [json.loads(line) for line in body.splitlines()])
            case _:
                self._answer(404, {"error": f"the stand-in has no {'/'.join(rest)}"})

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        if (name, branch) not in hub.files:
            self._answer(404, {"error": f"Invalid rev id: {branch}"})
            return
        for line in lines:
            if line["key"] == "file":
                hub.files[name, branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _validate(self, asked: dict[str, Any]) -> None:
        """Checks the header of a model card by the rules in the hub's documentation."""
        _, header, _ = asked["content"].split("---", 2)
        data = yaml.safe_load(header)
        wrong = [key for key in ("tags", "datasets") if not all(isinstance(x, str) for x in data.get(key, []))]
        for model in data.get("model-index", []):
            for result in model["results"]:
                named = {"type"} <= {*result["task"]} and {"name", "type"} <= {*result["dataset"]}
                wrong += [] if named and all({"type", "value"} <= {*m} for m in result["metrics"]) else ["model-index"]
        self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        told = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)


@contextmanager
def serving() -> Iterator[Hub]:
    """A context manager that runs a stand-in server and returns it."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()


def pushed(run: Callable[..., Any], place: Path, two: Path) -> list[str]:
    """Trains with push_to_hub and returns the requests of all ranks that concern the repository. All processes of
    tests/ranks.py must call this function."""
    with serving() if is_first() else nullcontext() as hub, pytest.MonkeyPatch.context() as patch:
        use(patch, on_first(lambda: hub.url))
        run("sft", place, two / "pushed", push_to_hub=True, hub_model_id="ada/two")
        return on_first(lambda: [one for one in hub.requests if "/api/repos" in one or "/api/models" in one])


def use(patch: pytest.MonkeyPatch, url: str) -> None:
    """Points the hub client of this process to `url`, with the token that the stand-in accepts."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")
    hub._answers.cache_clear()
