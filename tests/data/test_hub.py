"""Tests of the client with a hub that accepts connections and never answers; sockets and processes are real."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from fastrlhf.data import hub
from fastrlhf.data.hub import check_hub
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    hub._answers.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener(urllib.request.ProxyHandler({})))
    yield
    hub._answers.cache_clear()


@pytest.mark.parametrize("lacks", ["model", "dataset"])
def test_a_run_that_needs_a_silent_hub_ends_in_one_line(silent, tmp_path, lacks):
    model = "owner/model" if lacks == "model" else tiny.save_policy(tmp_path / "policy")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    dataset = "owner/data" if lacks == "dataset" else str(tmp_path / "rows.jsonl")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "HF_ENDPOINT": silent,
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    flags = {"model_name_or_path": model, "dataset_name": dataset, "output_dir": str(tmp_path / "run")}
    arguments = [part for key, value in flags.items() for part in (f"--{key}", value)]
    ended = subprocess.run(
        [sys.executable, "-m", "fastrlhf.cli", "sft", *arguments],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 100},
    )
    assert ended.returncode == 2
    told = ended.stderr.splitlines()[-1]
    assert f"is not a local file or folder, and the hub at {silent} has not answered for 1 s; try again" in told
    assert f"owner/{'model' if lacks == 'model' else 'data'}" in told
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_accept_connections_times_out(monkeypatch):
    """Fills the accept queue of a socket, so that the kernel does not answer further connections."""
    with socket.socket() as server, ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"has not answered for 0\.2 s"):
            check_hub("owner/model", "tokenizer:")


def test_local_files_and_offline_runs_do_not_contact_the_hub(silent, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    check_hub(str(tmp_path), "tokenizer:")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("owner/model", "tokenizer:")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        ValueError, match=r"^tokenizer: is not a local file or folder, and the hub at .* has not answered"
    ):
        check_hub("owner/model", "tokenizer:")


def test_a_hub_that_answers_or_refuses_is_handled_by_its_client(monkeypatch):
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check_hub("owner/model", "tokenizer:")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    check_hub("owner/model", "tokenizer:")
