import re
from datetime import date

import pytest

from fastrlhf.data.reading import open_reader
from fastrlhf.data.specials import add_template_end
from fastrlhf.data.tokens import TextRules, tokenize_examples
from fastrlhf.types import Example, Prefix, Rollout
from tests.data import vocabularies
from tests.data.chat_templates import CHATML

RULES = TextRules(day=date(2026, 11, 30))
TURN = [{"role": "user", "content": "Write code:\n"}]
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizers(conversations: bool):
    run, judge = vocabularies.byte_level(), vocabularies.sentencepiece(legacy=True)
    if conversations:
        run.chat_template, judge.chat_template = CHATML, OTHER_TEMPLATE
        add_template_end(run)
    return run, judge


def rows_of(run, prompts, **rules):
    examples = [Example(prompt=prompt, row=i) for i, prompt in enumerate(prompts)]
    return tokenize_examples(examples, run, max_length=200, fields=(), keep_source=True, **rules).examples


def rollout(row, run, text: str, *, end: str = "</s>", num_reset: int = 0) -> Rollout:
    ids = run(text, add_special_tokens=False)["input_ids"]
    prefix = Prefix(token_ids=[*row.prompt, *ids[:num_reset]], num_reset=num_reset, row=row.row, episode=0)
    completion = [*ids[num_reset:], *([run.convert_tokens_to_ids(end)] if end else [])]
    return Rollout(prefix=prefix, completion=completion, sampler_logprob=[], ended=bool(end))


def direct(judge, prompt, response) -> tuple[list[int], list[int]]:
    """Returns (ids of the prompt, ids of the response) by the judge's own tokenizer."""
    (row,) = tokenize_examples([Example(prompt=prompt, reference=response)], judge, max_length=200).examples
    return row.prompt, row.reference


def test_a_judge_of_texts_reads_them_with_its_own_tokenizer():
    run, judge = tokenizers(False)
    rows = rows_of(run, ["Write code:\n", "f: "])
    read = open_reader("judge", run, judge, rows, RULES)
    first, second = rows
    assert read([rollout(first, run, "def f"), rollout(second, run, " def", num_reset=1)]) == [
        direct(judge, "Write code:\n", "def f"),
        direct(judge, "f: ", " def"),
    ]
    (prompt, response), (_, empty) = read([rollout(first, run, "def f", end=""), rollout(first, run, "")])
    # A truncated response has no EOS.
    assert (prompt, [*response, judge.eos_token_id]) == direct(judge, "Write code:\n", "def f")
    assert empty == [judge.eos_token_id]
    past = rollout(first, run, "d</s>fff")
    assert read([past]) == [direct(judge, "Write code:\n", "d")]


def test_a_judge_of_conversations_reads_them_through_its_own_template():
    run, judge = tokenizers(True)
    rows = rows_of(run, [TURN])
    read = open_reader("judge", run, judge, rows, RULES)
    answer = [{"role": "assistant", "content": "def f"}]
    ((prompt, response),) = read([rollout(rows[0], run, "def f", end="<|im_end|>")])
    assert (prompt, response) == direct(judge, TURN, answer)
    assert judge.decode([*prompt, *response]) == "<s> [user] Write code:\n</s> [assistant] def f</s>"
    ((_, cut),) = read([rollout(rows[0], run, "def f", end="")])
    assert [*cut, judge.eos_token_id] == response


def test_white_space_that_the_run_moved_is_read_once():
    run, judge = tokenizers(False)
    run.add_tokens([" a"])
    rules = TextRules(trailing_space="response")
    rows = rows_of(run, ["f: "], trailing_space="response")
    assert run.decode(rows[0].prompt) == "f:"
    read = open_reader("judge", run, judge, rows, rules)
    assert read([rollout(rows[0], run, " def")]) == [direct(judge, "f:", " def")]


def test_a_template_that_refuses_a_row_or_asks_for_the_day_is_found_before_the_run():
    run, judge = tokenizers(True)
    rows = rows_of(run, [TURN, [{"role": "system", "content": "s"}, *TURN]])
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    judge.chat_template = refusing + OTHER_TEMPLATE
    expected = "judge: its own chat template cannot render row 1: template_refuses: the chat template refuses the turns"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}: no system$"):
        open_reader("judge", run, judge, rows, RULES)
    judge.chat_template = "{{ strftime_now('%d') }}" + OTHER_TEMPLATE
    with pytest.raises(ValueError, match=r"^template_date: the chat template of judge asks for a date"):
        open_reader("judge", run, judge, rows, TextRules())
    open_reader("judge", run, judge, rows, RULES)
