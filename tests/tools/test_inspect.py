import json
import re
from html import unescape

import pytest

from fastrlhf.cli import main
from fastrlhf.config import DPOConfig, DRPOConfig, RewardConfig, SFTConfig
from fastrlhf.tools.inspect import Inspection, Line, Row, format_html, format_text, inspect_rows
from tests import tiny


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
    found = re.findall(r'<span class="(\w+)" title="(\d+)">', page)
    assert found == [(role, str(token)) for line in inspection.rows[0].lines for role, token in line.tokens]
    assert "<h1>a &lt;run&gt;</h1>" in page


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
