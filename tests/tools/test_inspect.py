import json
import os
import re
import subprocess
import sys
from html import unescape

import pytest

from fastrlhf.cli import main
from fastrlhf.config import DPOConfig, DRPOConfig, KTOConfig, RewardConfig, SFTConfig
from fastrlhf.tools.inspect import Inspection, Line, Row, format_html, format_text, inspect_rows
from tests import tiny
from tests.data import vocabularies
from tests.data.chat_templates import TOOLS


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inspect")
    tiny.tokenizer().save_pretrained(folder)
    row = {"prompt": "w1 w2", "completion": "w3 w4 w5 w6", "chosen": "w7", "rejected": "w8 w9"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return {
        "tokenizer_name_or_path": str(folder),
        "dataset_name": str(folder / "rows.jsonl"),
        "columns": "reference=completion",
        "per_device_train_batch_size": 1,
        "max_steps": 1,
    }


def roles(config, row: int = 0) -> list[list[tuple[str, int]]]:
    return [line.tokens for line in inspect_rows(config, 1).rows[row].lines]


def of(role: str, text: str) -> list[tuple[str, int]]:
    return [(role, token) for token in tiny.ids(text)]


def test_sft_trains_the_response_and_its_eos(settings):
    end = ("eos", tiny.EOS)
    assert roles(SFTConfig(**settings)) == [[*of("prompt", "w1 w2"), *of("trained", "w3 w4 w5 w6"), end]]


def test_if_the_prompt_is_trained_its_first_token_is_not(settings):
    config = SFTConfig(**settings, completion_only_loss=False)
    assert roles(config)[0][:3] == [*of("prompt", "w1"), *of("trained", "w2 w3")]


def test_a_truncated_response_is_reported_without_an_eos(settings):
    inspection = inspect_rows(SFTConfig(**settings, max_length=5), 1)
    (line,) = inspection.rows[0].lines
    assert line.tokens == [*of("prompt", "w1 w2"), *of("trained", "w3 w4 w5")]
    assert "cut at max_length" in line.note
    assert "cut: 1 responses, 0 prompts" in inspection.facts


def test_the_responses_of_a_pair_share_one_prompt(settings):
    end = ("eos", tiny.EOS)
    assert roles(DPOConfig(**settings)) == [
        of("prompt", "w1 w2"),
        [*of("trained", "w7"), end],
        [*of("trained", "w8 w9"), end],
    ]


def test_a_reward_model_trains_no_token_and_scores_the_last(settings):
    assert roles(RewardConfig(**settings))[1:] == [
        [*of("masked", "w7"), ("score", tiny.EOS)],
        [*of("masked", "w8 w9"), ("score", tiny.EOS)],
    ]


def test_an_episode_shows_what_it_is_reset_to(settings):
    config = DRPOConfig(**settings, response_length=8, reset_min=1)
    ((line,),) = [row.lines for row in inspect_rows(config, 1).rows]
    k = len(line.tokens) - 2
    assert 1 <= k <= 4
    assert line.tokens == [*of("prompt", "w1 w2"), *of("reset", "w3 w4 w5 w6")[:k]]
    assert f"at most {8 - k} tokens" in line.note


def test_without_colour_no_escape_code_is_written_and_those_of_the_data_are_shown(settings, monkeypatch):
    inspection = inspect_rows(SFTConfig(**settings), 1)
    monkeypatch.setattr("fastrlhf.tools.inspect.token_texts", lambda tokenizer, ids: ["\x1b[31m\n"] * len(ids))
    text = format_text(inspection, colour=False)
    assert "\x1b" not in text
    assert "prompt  | \\x1b[31m\\n" in text
    assert "\x1b[32m\\x1b" in format_text(inspection, colour=True)


def test_the_page_shows_every_token_once_with_its_role_and_id(settings):
    inspection = inspect_rows(DPOConfig(**settings), 1)
    page = format_html(inspection, "a <run>")
    found = re.findall(r'<span class="(\w+)(?: special)?" title="(\d+)(?:, special token)?">', page)
    assert found == [(role, str(token)) for line in inspection.rows[0].lines for role, token in line.tokens]
    assert re.findall(r'<span class="(\w+ special)" title="(.+?)">', page) == [("eos special", "1, special token")] * 2
    assert "<h1>a &lt;run&gt;</h1>" in page


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
SHORT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello <b>"}]


def inspected(kind, folder, rows, **keys):
    """Inspects `rows` with a byte-level tokenizer and a chat template that writes tool definitions."""
    tokenizer = vocabularies.byte_level()
    tokenizer.chat_template = TOOLS
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "tokenizer_name_or_path": str(folder),
        "dataset_name": str(folder / "rows.jsonl"),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
    }
    return inspect_rows(kind(**settings | keys), 1)


def shown(inspection, folder):
    return format_text(inspection, colour=False).replace(f"{folder}/", "").splitlines()


def test_a_conversation_with_tools_is_shown_turn_by_turn(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}], "note": "none"},
        {"messages": [{"role": "user", "content": "hi" * 200}, SHORT[1]]},
        {"tools": [TOOL], "messages": TURNS, "note": "a\x1bb", "votes": 3},
    ]
    keys = {"max_length": 300, "truncation_mode": "drop", "max_bad_fraction": 0.5, "train_on": "all_assistant"}
    inspection = inspected(SFTConfig, tmp_path, rows, **keys, chat_template_kwargs='{"terse": true}')
    assert shown(inspection, tmp_path) == [
        "rows.jsonl: 2 examples of 3 rows (messages, conversational)",
        "columns not used in prompt or response: note",
        "skipped 1 empty_response:",
        "  row 0 (rows.jsonl line 1): reference is empty or white space: {'messages': [{'role': 'user', 'content': "
        "'hi'}, {'role': 'assistant', 'content': ' '}], 'note': 'none'}",
        "1 of 2 rows within 300 tokens",
        "1 of 1 responses end in EOS, added to 0",
        "cut: 0 responses, 0 prompts",
        "1 end in <|im_end|> and get no </s> behind it",
        "dropped 1 for longer_than_max_length:",
        "  row 1",
        'chat_template_kwargs: {"terse": true}',
        "147 tokens per epoch, 24 of them trained; a row has 147.0 on average, 147 at most",
        "step 1 of 1: 1 rows in packs of 147 tokens",
        "",
        "  prompt   given to the model, not trained",
        "  trained  the loss is computed on these tokens",
        "  eos      a trained token that ends the response",
        "  masked   belongs to a response, but is not trained",
        "",
        "row 2: 147 tokens, 24 trained",
        '  tools for the chat template: [{"type": "function", "function": {"name": "add", "parameters": {}}}]',
        '  column note, not used: "a\\u001bb"',
        "  column votes, not used: 3",
        "  prompt and reference: 147 tokens",
        "    turn 1 user",
        "    prompt  | \u27e6<|im_start|>\u27e7system\\n",
        '    prompt  | [{"type": "function", "function": {"name": "add", "parameters": {}}}]\u27e6<|im_end|>\u27e7\\n',
        "    prompt  | \u27e6<|im_start|>\u27e7user\\n",
        "    prompt  | 1+1?\u27e6<|im_end|>\u27e7\\n",
        "    turn 2 assistant (calls add)",
        "    prompt  | \u27e6<|im_start|>\u27e7assistant\\n",
        '    trained | [add {"a": 1}]',
        "    eos     | \u27e6<|im_end|>\u27e7",
        "    masked  | \\n",
        "    turn 3 tool",
        "    masked  | \u27e6<|im_start|>\u27e7tool\\n",
        "    masked  | 2\u27e6<|im_end|>\u27e7\\n",
        "    turn 4 assistant",
        "    masked  | \u27e6<|im_start|>\u27e7assistant\\n",
        "    trained | It is 2.",
        "    eos     | \u27e6<|im_end|>\u27e7",
    ]
    page = format_html(inspection, "rows")
    headings = re.findall(r"<h4>(.*?)</h4>", page)
    assert headings == ["turn 1 user", "turn 2 assistant (calls add)", "turn 3 tool", "turn 4 assistant"]
    assert "<span>skipped 1 empty_response:</span>" in page
    assert "<span>dropped 1 for longer_than_max_length:</span><span>  row 1</span>" in page
    assert "<br>column note, not used: &quot;a\\u001bb&quot;<br>column votes, not used: 3</p>" in page
    assert spans(page, "trained") == '[add {"a": 1}]It is 2.'
    assert spans(page, "eos special") == "<|im_end|>" * 2
    assert spans(page, "masked special") == "<|im_start|><|im_end|><|im_start|>"


def spans(page, kind):
    """Returns the text of all spans of a class that follow the legend."""
    body = page.partition("What the colours mean</h2>")[2].partition("<h3>")[2]
    return unescape("".join(re.findall(rf'<span class="{kind}" title=".*?">(.*?)</span>', body, re.S)))


def test_a_preference_pair_with_a_system_column_is_shown(tmp_path):
    row = {"system": "Be brief.", "prompt": "Q?", "chosen": "yes", "rejected": "no", "rater": "x", "margin": 2.5}
    inspection = inspected(DPOConfig, tmp_path, [row], margin_scale=1.0)
    assert shown(inspection, tmp_path) == [
        "rows.jsonl: 1 examples of 1 rows (pairs, text, read as conversations because of the column system)",
        "columns not used in prompt or response: rater",
        "1 of 1 rows within 1,024 tokens",
        "2 of 2 responses end in EOS, added to 0",
        "cut: 0 responses, 0 prompts",
        "2 end in <|im_end|> and get no </s> behind it",
        "47 tokens per epoch, 7 of them trained; a row has 47.0 on average, 47 at most",
        "step 1 of 1: 1 rows in packs of 47 tokens",
        "",
        "  prompt   given to the model, not trained",
        "  trained  the loss is computed on these tokens",
        "  eos      a trained token that ends the response",
        "",
        "row 0: 47 tokens, 7 trained",
        "  margin: 2.5",
        '  column rater, not used: "x"',
        "  prompt: 40 tokens",
        "    turn 1 system",
        "    prompt  | \u27e6<|im_start|>\u27e7system\\n",
        "    prompt  | Be brief.\u27e6<|im_end|>\u27e7\\n",
        "    turn 2 user",
        "    prompt  | \u27e6<|im_start|>\u27e7user\\n",
        "    prompt  | Q?\u27e6<|im_end|>\u27e7\\n",
        "    generation prompt",
        "    prompt  | \u27e6<|im_start|>\u27e7assistant\\n",
        "  chosen: 4 tokens",
        "    turn 3 assistant",
        "    trained | yes",
        "    eos     | \u27e6<|im_end|>\u27e7",
        "  rejected: 3 tokens",
        "    turn 3 assistant",
        "    trained | no",
        "    eos     | \u27e6<|im_end|>\u27e7",
    ]
    page = format_html(inspection, "rows")
    assert (
        '<p class="tokens">margin: 2.5<br>column rater, not used: &quot;x&quot;</p><h3>prompt: 40 tokens</h3>' in page
    )
    assert re.findall(r"<h[34]>(.*?)</h[34]>", page) == [
        *("prompt: 40 tokens", "turn 1 system", "turn 2 user", "generation prompt"),
        *("chosen: 4 tokens", "turn 3 assistant", "rejected: 3 tokens", "turn 3 assistant"),
    ]
    assert spans(page, "trained") == "yesno"


def test_a_row_with_a_label_is_shown(tmp_path):
    rows = [{"prompt": "Q?", "completion": "no", "label": False, "rater": "x"}] * 2
    inspection = inspected(KTOConfig, tmp_path, rows, per_device_train_batch_size=2)
    assert shown(inspection, tmp_path)[-8:] == [
        "",
        "row 1: 5 tokens, 3 trained",
        "  label: false",
        '  column rater, not used: "x"',
        "  prompt and response: 5 tokens",
        "    prompt  | Q?",
        "    trained | no",
        "    eos     | \u27e6</s>\u27e7",
    ]
    a, b, c, d, eos = (token for _, token in inspection.rows[0].lines[0].tokens)
    page = format_html(inspection, "rows")
    assert (
        '<p class="tokens">label: false<br>column rater, not used: &quot;x&quot;</p>'
        "<h3>prompt and response: 5 tokens</h3>"
        f'<p class="tokens"><span class="prompt" title="{a}">Q</span><span class="prompt" title="{b}">?</span>'
        f'<span class="trained" title="{c}">n</span><span class="trained" title="{d}">o</span>'
        f'<span class="eos special" title="{eos}, special token">&lt;/s&gt;</span></p></section>'
    ) in page


def test_an_episode_of_a_conversation_is_shown_with_its_turns_and_its_reset(tmp_path):
    rows = [{"prompt": SHORT[:1], "completion": [SHORT[1]], "answer": 7}]
    inspection = inspected(DRPOConfig, tmp_path, rows, reset_prob=1.0, reset_min=1, response_length=20)
    (line,) = inspection.rows[0].lines
    num_reset = sum(role == "reset" for role, _ in line.tokens)
    assert 1 <= num_reset <= 9
    assert shown(inspection, tmp_path)[-8:] == [
        "  column answer, not used: 7",
        f"  prefix: {21 + num_reset} tokens; after it the policy samples at most {20 - num_reset} tokens",
        "    turn 1 user",
        "    prompt  | \u27e6<|im_start|>\u27e7user\\n",
        "    prompt  | hi\u27e6<|im_end|>\u27e7\\n",
        "    turn 2 assistant",
        "    prompt  | \u27e6<|im_start|>\u27e7assistant\\n",
        f"    reset   | {'hello <b>'[:num_reset]}",
    ]


def test_a_terminal_of_another_encoding_gets_escapes(settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"sft": settings}))
    command = [sys.executable, "-m", "fastrlhf", "inspect", "--config", str(file)]
    found = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert b"eos     | \\u27e6 <eos>\\u27e7" in found.stdout


def test_markup_in_the_data_is_text_in_the_page():
    class Markup:
        def decode(self, ids, **_):
            return "<script>" * len(ids)

    row = Row(title="<b>", lines=[Line(name="<i>", tokens=[("prompt", 0)])])
    page = format_html(Inspection(tokenizer=Markup(), facts=[], rows=[row]), "a")
    assert not re.search("<script|<b>|<i>", page)
    assert "<script>" in unescape(page)


def test_the_command_uses_the_only_section_and_asks_if_there_are_two(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"dpo": settings}))
    assert main(["inspect", "--config", str(file), f"--html={tmp_path / 'rows.html'}", "--num", "1"]) == 0
    output = capsys.readouterr().out
    assert "rejected: 3 tokens" in output
    assert "\x1b" not in output
    assert "rejected: 3 tokens" in (tmp_path / "rows.html").read_text()

    file.write_text(json.dumps({"dpo": settings, "sft": settings}))
    assert main(["inspect", "--config", str(file)]) == 2
    assert "--command: the file has the sections dpo, sft; choose one of dpo, sft" in capsys.readouterr().err
    assert main(["inspect", "--config", str(file), "--command", "stf"]) == 2
    assert "--command: 'stf' is not a trainer; did you mean 'sft'?" in capsys.readouterr().err
    assert main(["inspect", "--config", str(file), "--command", "sft", "--num", "0"]) == 2
    assert "num: must be at least 1; got 0" in capsys.readouterr().err


def test_rows_of_several_datasets_are_named_by_their_place(settings, tmp_path):
    words = {"prompt": "w1 w2", "completion": "w3"}
    for name, num in (("a", 3), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(words) + "\n") * num)
    entries = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "weight": 3}]
    inspection = inspect_rows(SFTConfig(**settings | {"dataset_name": entries, "max_steps": 5}), 5)
    titles = [row.title.partition(":")[0] for row in inspection.rows]
    known = {
        "row 0 (row 0 of a)",
        "row 1 (row 1 of a)",
        "row 2 (row 2 of a)",
        "row 3 (row 0 of b)",
        "row 4 (row 1 of b)",
    }
    assert set(titles) <= known
    assert sum(title.endswith("of b)") for title in titles) == 3  # of 5 draws, b has 3 * 2 / (1 * 3 + 3 * 2)
