"""Computes fingerprints of what tokenised rows depend on: the files of a dataset, the tokenizer, and the code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastrlhf.data.forms import RESPONSES
from fastrlhf.data.templates import CLOCK
from fastrlhf.data.token_set import TokenSet
from fastrlhf.data.tokenizer import is_of_transformers
from fastrlhf.types import TokenizedExample

PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
"""Packages that read rows, render templates and encode text."""


def rows_fingerprint(rows: Sequence[TokenizedExample]) -> str:
    """Returns a text with the number of rows and a hash of their content in order."""
    if isinstance(rows, TokenSet) and rows.known_fingerprint:
        return rows.known_fingerprint
    digest = hashlib.sha256()
    for i in range(len(rows)):
        row = rows.arrays(i) if isinstance(rows, TokenSet) else rows[i]
        for field in dataclasses.fields(row):
            value: Any = getattr(row, field.name)
            if value is not None and field.name in ("prompt", *RESPONSES):
                digest.update(f"{field.name} {len(value)} ids".encode())
                digest.update(np.asarray(value, np.int64).tobytes())
            elif value is not None and field.name != "source":
                value = [list(map(int, ids)) for ids in value] if field.name == "responses" else value
                digest.update(f"{field.name} {value!r}".encode())
    return f"{len(rows)} rows of hash {digest.hexdigest()[:16]}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a hash of everything that decides how a tokenizer encodes text and conversations; None for a tokenizer
    without a serialised form of its whole pipeline: one that does not run in the Rust library, or one whose class comes
    with a model, because its code may change."""
    if not is_of_transformers(tokenizer):
        return None
    tokenizer = cast(PreTrainedTokenizerFast, tokenizer)
    core = tokenizer.backend_tokenizer
    core.no_truncation()  # a call of the tokenizer would do both
    core.no_padding()
    kind, template = type(tokenizer), str(tokenizer.chat_template or "")
    facts = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "settings": {name: str(value) for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"},
        "specials": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "ends": list(getattr(tokenizer, "more_end_ids", ())),
        "template": template,
        "today": str(date.today()) if "strftime_now" in CLOCK.sub("", template) else "",  # not the date of the run
    }
    return digest_of(core.to_str(), json.dumps(facts, sort_keys=True, default=str))


@cache
def code_fingerprint() -> str:
    """Returns a hash of the source code that makes tokens of rows, and of the versions of the packages that it uses."""
    data = Path(__file__).parent
    files = [*sorted(data.glob("*.py")), data.parent / "types.py", data.parent / "runtime" / "dataset.py"]
    return digest_of(*(file.read_text("utf-8") for file in files), *map(_version, PACKAGES))


def digest_of(*parts: str) -> str:
    """Returns a hash of texts, of 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
