"""Checks that the Hugging Face hub answers, because the hub's client may otherwise wait for ever without a message."""

from __future__ import annotations

import http.client
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants


def check_hub(source: str, what: str) -> None:
    """Raises ValueError if `source` is not a local path and the hub does not answer in time; the message begins with
    `what`. Any answer is accepted. A refused connection is accepted too, because the hub's client then raises an error
    or uses its cache. The hub is asked once per process.
    """
    if not Path(source).expanduser().exists() and not constants.HF_HUB_OFFLINE and is_silent():
        raise ValueError(
            f"{what} is not a local file or folder, and the hub at {constants.ENDPOINT} has not answered for "
            f"{constants.HF_HUB_ETAG_TIMEOUT} s; try again, or set HF_HUB_OFFLINE=1 if it is in the cache"
        )


def is_silent() -> bool:
    """Returns whether the hub does not answer in time. It is asked once per process."""
    return not _answers(constants.ENDPOINT)


@cache
def _answers(endpoint: str) -> bool:
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except TimeoutError:
        return False
    except URLError as error:
        return not isinstance(error.reason, TimeoutError)
    except (OSError, ValueError, http.client.HTTPException):
        return True
    return True
