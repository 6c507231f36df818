"""Compares ids, losses and gradients with values of TRL 1.16 recorded by tests/golden/record_trl_chat.py."""

import json

import pytest

from fastrlhf.algorithms import dpo, sft
from fastrlhf.config import DPOConfig, SFTConfig
from fastrlhf.data.tokens import tokenize_examples
from fastrlhf.types import Example
from tests import tiny
from tests.data import vocabularies
from tests.data.chat_templates import CHATML
from tests.golden import record_trl
from tests.golden import record_trl_chat as recorded

GOLDEN = json.loads(recorded.FILE.read_text(encoding="utf-8"))
TOLERANCE = 1e-5


def conversations() -> list[Example]:
    made = []
    for row, (turns, chosen, rejected) in enumerate(recorded.CONVERSATIONS):
        prompt, better = recorded.conversation(turns, chosen)
        worse = recorded.conversation(turns, rejected)[1]
        made.append(Example(prompt=prompt, chosen=better, rejected=worse, row=row))
    return made


def spaced(fields, trailing_space):
    rows = [Example(prompt=p, chosen=c, rejected=r, row=i) for i, (p, c, r) in enumerate(recorded.SPACED)]
    made = tokenize_examples(
        rows, vocabularies.byte_level(), max_length=64, fields=fields, trailing_space=trailing_space
    )
    return made.examples, made.report


def test_white_space_at_the_end_of_a_prompt_moves_as_in_trl():
    rows, report = spaced(("chosen", "rejected"), "response")
    assert [[row.prompt, row.chosen, row.rejected] for row in rows] == GOLDEN["space"]["dpo"]
    assert "5 prompts end in white space, which begins the response (as in TRL)" in report.summary()
    rows, _ = spaced(("chosen",), "response")
    assert [[len(row.prompt), *row.prompt, *row.chosen] for row in rows] == GOLDEN["space"]["sft"]


def test_by_default_white_space_stays_with_its_prompt():
    rows, report = spaced(("chosen", "rejected"), "prompt")
    tokenizer = vocabularies.byte_level()
    assert [tokenizer.decode(row.prompt) for row in rows] == [prompt for prompt, *_ in recorded.SPACED]
    golden = GOLDEN["space"]["dpo"]
    differ = [[row.prompt, row.chosen, row.rejected] != theirs for row, theirs in zip(rows, golden, strict=True)]
    assert sum(differ) == report.space_ended == 5
    assert "5 prompts end in white space, which stays in the prompt (TRL moves it: see trailing_space)" in (
        report.summary()
    )


def test_a_prompt_without_a_response_keeps_no_space_that_would_join_one():
    prompts = [Example(prompt=text, row=i) for i, text in enumerate(["def: ", "def:\n\n", "def:\n", "def:"])]
    tokenizer = vocabularies.byte_level()
    tokenizer.add_tokens([" a"])  # a prompt without a response is tokenised with the stand-in response "a"
    made = tokenize_examples(prompts, tokenizer, max_length=64, fields=(), trailing_space="response")
    assert [tokenizer.decode(row.prompt) for row in made.examples] == ["def:", "def:", "def:\n", "def:"]
    assert made.report.space_ended == 2


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folders = {}
    for name, seed in (("policy", record_trl.POLICY), ("reference", record_trl.REFERENCE)):
        folders[name] = str(tmp_path_factory.mktemp(name))
        recorded.causal_lm(seed).save_pretrained(folders[name])
        tokenizer = vocabularies.byte_level()
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize(("case", "train_suffix"), [("chatml", True), ("newline", False)])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_losses_of_chatml_are_those_of_trl_with_and_without_its_newline(paths, monkeypatch, case, train_suffix, kind):
    golden, rows = GOLDEN[case][kind], conversations()
    common = {
        "model_name_or_path": paths["policy"],
        "train_suffix": train_suffix,
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "micro_batch_tokens": 300,
        "progress": False,
    }
    if kind == "sft":
        made = tiny.record_gradients(monkeypatch, sft)
        result = sft.train_sft(SFTConfig(response="chosen", **common), rows)
    else:
        made = tiny.record_gradients(monkeypatch, dpo)
        settings = {"ref_model_name_or_path": paths["reference"], "loss_type": "ipo", "beta": recorded.IPO_BETA}
        result = dpo.train_dpo(DPOConfig(**settings, **common), rows)
    gradients = made[0].steps[0][0]
    names = [name for name, _ in result.model.named_parameters()]
    ours = record_trl.summary(zip(names, gradients, strict=True))
    grad_norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert result.history[0]["loss"] == pytest.approx(golden["loss"], rel=TOLERANCE)
    assert grad_norm == pytest.approx(golden["grad_norm"], rel=TOLERANCE)
    assert ours.keys() == golden["gradients"].keys()
    for name, (norm, dot) in golden["gradients"].items():
        assert ours[name] == [pytest.approx(norm, rel=TOLERANCE), pytest.approx(dot, abs=TOLERANCE * norm)], name


@pytest.mark.parametrize(("case", "train_suffix"), [("chatml", True), ("newline", False)])
def test_ids_of_chatml_are_those_of_trl_with_and_without_its_newline(case, train_suffix):
    tokenizer = vocabularies.byte_level()
    arguments = {"max_length": 200, "chat_template": CHATML, "train_suffix": train_suffix}
    rows = tokenize_examples(conversations(), tokenizer, fields=("chosen", "rejected"), **arguments).examples
    chosen = [row.prompt + row.chosen for row in rows]
    assert chosen == GOLDEN[case]["sft"]["token_ids"]
    assert chosen + [row.prompt + row.rejected for row in rows] == GOLDEN[case]["dpo"]["token_ids"]
