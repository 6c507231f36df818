"""A reward function that gets scores from a judge over HTTP, for models that are too large to load in the trainer.

    # my_judge.py
    from fastrlhf.rewards.http_judge import HTTPJudge
    helpful = HTTPJudge(url="http://localhost:8000/v1", model="my-judge")

    fastrlhf grpo --reward_functions my_judge.py:helpful ...

With a `model`, the judge is an OpenAI-compatible server. Each request is a chat that asks for a score of one response.
Without a `model`, the judge is a server that accepts {"prompts": [...], "completions": [...]} and answers {"scores":
[...]}. Scores are cached, and a response with a cached score is not sent again.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fastrlhf.types import Text

log = logging.getLogger(__name__)

TEMPLATE = """\
Rate the response to the request from {low:g} to {high:g}. Answer with only the number.

Request:
{prompt}

Response:
{completion}"""

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
AGAIN = (408, 409, 425, 429)
"""Status codes below 500 after which the request is retried."""

Score = float | None


class JudgeError(RuntimeError):
    """Raised if the judge gives no usable answer."""


@dataclass(kw_only=True)
class HTTPJudge:
    """A reward function of TRL's form, which takes prompts and completions. It returns one number per response, or None
    if the chat reply is not exactly one number in `low`..`high`.

    Raises JudgeError, naming the URL, if a request fails `retries` + 1 times.
    """

    url: str
    """URL of the judge; with a `model`, the base URL, to which /chat/completions is added."""
    model: str = ""
    """Name of the model on an OpenAI-compatible server. Empty: the server answers prompts and completions with
    scores."""
    template: str = TEMPLATE
    """Text of the chat message; {prompt}, {completion}, {low} and {high} are filled in."""
    low: float = 0.0
    high: float = 10.0
    """Scores range from `low` to `high`; a number outside this range is not accepted."""
    max_tokens: int = 16
    """Maximum number of tokens of a chat reply."""
    batch_size: int = 16
    """Number of responses per request, without a `model`."""
    concurrency: int = 8
    """Number of concurrent requests."""
    timeout: float = 60.0
    """Number of seconds within which a complete answer must arrive."""
    retries: int = 3
    """Number of retries, with waits of 1, 2, 4, ... seconds, if the server fails, does not answer in time, or gives an
    invalid answer."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable whose value, if it is set, is sent as a bearer token."""
    cache_size: int = 100_000
    """Number of responses whose scores are cached; the oldest are dropped."""
    _cache: dict[tuple[str, str], Score] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        pairs = [(_plain(prompt), _plain(text)) for prompt, text in zip(prompts, completions, strict=True)]
        known = {pair: self._cache[pair] for pair in pairs if pair in self._cache}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        size = 1 if self.model else self.batch_size
        batches = [new[i : i + size] for i in range(0, len(new), size)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            for batch, scores in zip(batches, pool.map(self._scores, batches), strict=True):
                known |= zip(batch, scores, strict=True)
        self._cache |= known
        while len(self._cache) > self.cache_size:
            del self._cache[next(iter(self._cache))]
        return [known[pair] for pair in pairs]

    def _scores(self, batch: Sequence[tuple[str, str]]) -> list[Score]:
        for attempt in range(self.retries + 1):
            try:
                return self._chat(*batch[0]) if self.model else self._batch(batch)
            except JudgeError as error:
                if attempt == self.retries or isinstance(error, _Refused):
                    raise
                log.warning("%s; retrying", error)
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def _chat(self, prompt: str, completion: str) -> list[Score]:
        asked = self.template.format(prompt=prompt, completion=completion, low=self.low, high=self.high)
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens}
        answer = self._post(
            f"{self.url.rstrip('/')}/chat/completions", body | {"messages": [{"role": "user", "content": asked}]}
        )
        try:
            reply = str(answer["choices"][0]["message"]["content"])
        except (TypeError, KeyError, IndexError):
            raise JudgeError(f"judge {self.url}: the answer is not a chat completion: {_short(answer)}") from None
        numbers = [float(text) for text in NUMBER.findall(reply)]
        inside = [number for number in numbers if self.low <= number <= self.high]
        return [inside[0] if len(inside) == 1 == len(numbers) else None]

    def _batch(self, batch: Sequence[tuple[str, str]]) -> list[Score]:
        prompts, completions = zip(*batch, strict=True)
        answer = self._post(self.url, {"prompts": prompts, "completions": completions})
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(batch):
            told = f'{{"scores": [...]}} with {len(batch)} numbers'
            raise JudgeError(f"judge {self.url}: must answer {told}; got {_short(answer)}")
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if score is not None and not (number and self.low <= score <= self.high):
                told = f"a score must be in {self.low:g}..{self.high:g}, or null"
                raise JudgeError(f"judge {self.url}: {told}; got {_short(score)}")
        return [None if score is None else float(score) for score in scores]

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(url, json.dumps(body).encode(), headers)
        until = time.monotonic() + self.timeout
        try:
            with urlopen(request, timeout=self.timeout) as response:
                content = b""
                while part := response.read1(1 << 16):
                    content += part
                    if time.monotonic() > until:
                        raise TimeoutError
            return json.loads(content, parse_constant=lambda name: math.nan)
        except HTTPError as error:
            kind = _Refused if error.code < 500 and error.code not in AGAIN else JudgeError
            raise kind(f"judge {url}: {error.code} {error.reason}: {_short(error.read(200))}") from None
        except TimeoutError:
            raise JudgeError(f"judge {url}: no complete answer within {self.timeout:g} s") from None
        except URLError as error:
            late = isinstance(error.reason, TimeoutError)
            told = f"no answer within {self.timeout:g} s" if late else error.reason
            raise JudgeError(f"judge {url}: {told}") from None
        except (ValueError, OSError, http.client.HTTPException) as error:
            raise JudgeError(f"judge {url}: {type(error).__name__}: {error}") from None


class _Refused(JudgeError):
    """The server rejected the request with a status code after which a retry is pointless."""


def _plain(text: Text) -> str:
    """Formats a conversation as text: each turn follows the name of its role."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def _short(value: Any) -> str:
    shown = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return shown if len(shown) <= 120 else shown[:120] + "..."
