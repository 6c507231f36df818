"""Tests of a judge over HTTP, with a local server that replies, fails, hangs or sends invalid replies."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastrlhf.cli import main
from fastrlhf.rewards import http_judge
from fastrlhf.rewards.functions import RewardFunctions
from fastrlhf.rewards.http_judge import HTTPJudge, JudgeError
from tests import tiny
from tests.rewards.test_functions import ROLLOUTS


class Server(ThreadingHTTPServer):
    """A local server that answers each request with the next entry of `plan`: a body (bytes or JSON), a status code, or
    "hang"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.released = [], [], threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        answer = self.server.plan.pop(0) if self.server.plan else {"scores": [len(t) for t in body["completions"]]}
        if answer == "hang":
            self.server.released.wait(5)
            return
        code, content = (answer, b"no") if isinstance(answer, int) else (200, answer)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def waits(monkeypatch):
    made = []
    monkeypatch.setattr(http_judge.time, "sleep", made.append)
    return made


def says(text: str) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def test_texts_are_sent_in_batches_and_no_text_twice(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = HTTPJudge(url=server.url, batch_size=2, concurrency=1)
    assert judge(["p", "p", "q", "p"], ["a", "bb", "a", "bb"]) == [1, 2, 1, 2]
    assert judge(["p", "r"], ["bb", [{"role": "assistant", "content": "ccc"}]]) == [2, 3]
    assert [body for _, body, _ in server.seen] == [
        {"prompts": ["p", "p"], "completions": ["a", "bb"]},
        {"prompts": ["q"], "completions": ["a"]},
        {"prompts": ["r"], "completions": ["ccc"]},
    ]
    assert {key for *_, key in server.seen} == {"Bearer secret"}


def test_a_chat_reply_without_a_number_gives_no_reward(server):
    server.plan += [says("7.5"), says("I would say 11"), says("from 3 to 4"), says("none")]
    judge = HTTPJudge(url=server.url + "/", model="m", concurrency=1)
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert judge([prompt, "a", "b", "c"], ["x {y}", "x", "x", "x"]) == [7.5, None, None, None]
    path, body, key = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", None)
    assert body["model"] == "m"
    (message,) = body["messages"]
    assert message["content"].startswith("Rate the response to the request from 0 to 10.")
    assert message["content"].endswith("Request:\nsystem: be brief\n\nuser: hi\n\nResponse:\nx {y}")


@pytest.mark.parametrize(
    "lie",
    [
        b"<html>",
        b"",
        {"scores": [1]},
        {"scores": 1},
        [1, 2],
        {"scores": [1, "2"]},
        {"scores": [1, 11]},
        b'{"scores": [1, NaN]}',
    ],
)
def test_a_server_that_fails_or_sends_invalid_replies_is_asked_again(server, waits, lie):
    server.plan += [500, lie]
    judge = HTTPJudge(url=server.url, retries=2)
    assert judge(["p", "p"], ["a", "bb"]) == [1, 2]
    assert waits == [1, 2]
    server.plan += [lie, lie]
    with pytest.raises(JudgeError, match=rf"^judge {server.url}: "):
        HTTPJudge(url=server.url, retries=1)(["p", "p"], ["a", "bb"])


def test_scores_may_be_null(server):
    server.plan.append({"scores": [None, 3]})
    assert HTTPJudge(url=server.url)(["p", "p"], ["a", "b"]) == [None, 3]


def test_a_server_that_hangs_is_left_after_the_timeout(server, waits):
    server.plan += ["hang", "hang"]
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"no (complete )?answer within 0.2 s$"):
        HTTPJudge(url=server.url, timeout=0.2, retries=1)(["p"], ["a"])
    assert time.monotonic() - start < 3
    assert waits == [1]


def test_a_refusal_is_final_and_a_missing_server_is_reported(server, waits):
    server.plan.append(404)
    with pytest.raises(JudgeError, match=rf"^judge {server.url}: 404 Not Found: no$"):
        HTTPJudge(url=server.url)(["p"], ["a"])
    assert waits == []
    with pytest.raises(JudgeError, match=r"^judge http://127.0.0.1:9/: .*refused"):
        HTTPJudge(url="http://127.0.0.1:9/", retries=0)(["p"], ["a"])


def test_the_cache_has_a_limited_size(server):
    judge = HTTPJudge(url=server.url, cache_size=2)
    judge(["p"] * 3, ["a", "bb", "ccc"])
    judge(["p"], ["a"])
    assert server.seen[-1][1]["completions"] == ["a"]


def test_it_is_a_reward_function_of_a_run(server):
    run = RewardFunctions(functions={"judge": HTTPJudge(url=server.url)}, tokenizer=tiny.tokenizer())
    assert run.totals(run(ROLLOUTS)) == [5, 5]


def test_a_run_without_its_judge_ends_with_one_line_before_models_load(tmp_path, capsys, waits):
    file, rows = tmp_path / "judge.py", tmp_path / "rows.jsonl"
    file.write_text(
        "from fastrlhf.rewards.http_judge import HTTPJudge\nhelpful = HTTPJudge(url='http://127.0.0.1:9', retries=1)\n"
    )
    rows.write_text('{"prompt": "w1"}\n' * 4)
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.model_config().save_pretrained(tmp_path / "model")  # there are no weights
    keys = {"model_name_or_path": tmp_path / "model", "dataset_name": rows, "output_dir": tmp_path / "run"}
    keys |= {"reward_functions": f"{file}:helpful", "per_device_train_batch_size": 8, "device": "cpu"}
    assert main(["grpo", *(str(part) for key, value in keys.items() for part in (f"--{key}", value))]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    start = "fastrlhf grpo: reward_functions: 'helpful' raised JudgeError: judge http://127.0.0.1:9: "
    assert last.startswith(start)
    assert last.endswith("refused; in a trial call on row 0, before the run")
    assert waits == [1]
