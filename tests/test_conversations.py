"""Trains on conversations and compares the first loss with the loss of a plain transformers model. The plain model
reads one whole conversation at a time; transformers renders the conversation and marks the assistant's turns."""

import datetime
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.algorithms.dpo import train_dpo
from fastrlhf.algorithms.sft import train_sft
from fastrlhf.config import DPOConfig, SFTConfig
from fastrlhf.config.files import load_yaml
from fastrlhf.runtime import inputs
from fastrlhf.runtime.run import Run
from fastrlhf.types import Example, Message
from tests.data import vocabularies
from tests.data.chat_templates import CHATML, TEMPLATES
from tests.golden import record_trl
from tests.golden.record_trl_chat import causal_lm

BETA = 0.3
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>SUFFIX{% endgeneration %}REST{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
PLAIN = {
    False: MARKED.replace("SUFFIX", "").replace("REST", "{{ '\n' }}"),
    True: MARKED.replace("SUFFIX", "\n").replace("REST", ""),
}
"""Value of train_suffix -> ChatML with generation markers, from which transformers finds the tokens of the
assistant."""


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


SYSTEM, USER, ASKS, TOOL = turn("system", "s f"), turn("user", "def f"), turn("user", "f f"), turn("tool", "e e")
SAYS, ANSWERS, ENDS = (turn("assistant", text) for text in ("def d", "fed", "e de f f"))
MESSAGES = [[SYSTEM, USER, ANSWERS, ASKS, SAYS], [ASKS, SAYS, USER, ANSWERS, ASKS, ENDS], [USER, ANSWERS]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folders = {}
    for name, seed in (("policy", record_trl.POLICY), ("reference", record_trl.REFERENCE)):
        folders[name] = str(tmp_path_factory.mktemp(name))
        causal_lm(seed).save_pretrained(folders[name])
        tokenizer = vocabularies.byte_level()
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folders[name])
    return folders


def plain_logprobs(path: str, turns: list[Message], template: str, first: int = 0) -> torch.Tensor:
    """Returns the log-probs, from full logits, of the tokens that transformers marks as the assistant's in the turns
    from number `first` on."""
    tokenizer, model = vocabularies.byte_level(), AutoModelForCausalLM.from_pretrained(path)
    made = tokenizer.apply_chat_template(
        turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    whole = tokenizer.apply_chat_template(turns, chat_template=CHATML, tokenize=False)
    assert tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False).strip().endswith(whole.strip())
    ids, mask = torch.tensor(made["input_ids"]), torch.tensor(made["assistant_masks"]).bool()
    if first:
        mask[: len(tokenizer.apply_chat_template(turns[:first], chat_template=template)["input_ids"])] = False
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[mask[1:], 0]


def sft(paths, rows: list[Example], **settings):
    fields = {"model_name_or_path": paths["policy"], "per_device_train_batch_size": len(rows), "max_steps": 1}
    return train_sft(SFTConfig(**fields | {"micro_batch_tokens": 150, "progress": False} | settings), rows)


def demonstrations() -> list[Example]:
    return [Example(prompt=turns[:-1], reference=turns[-1:], row=i) for i, turns in enumerate(MESSAGES)]


def assert_trained(result, logprobs: torch.Tensor, log: str) -> None:
    assert result.history[0]["loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert re.search(rf"train: {len(logprobs)} of \d+ tokens are trained \(", log)


@pytest.mark.parametrize("train_suffix", [False, True])
@pytest.mark.parametrize("train_on", ["last_assistant", "all_assistant"])
def test_sft_trains_the_turns_that_train_on_names(paths, caplog, train_on, train_suffix):
    caplog.set_level("INFO")
    result = sft(paths, demonstrations(), train_on=train_on, train_suffix=train_suffix)
    firsts = [len(turns) - 1 if train_on == "last_assistant" else 0 for turns in MESSAGES]
    expected = [
        plain_logprobs(paths["policy"], turns, PLAIN[train_suffix], first)
        for turns, first in zip(MESSAGES, firsts, strict=True)
    ]
    assert_trained(result, torch.cat(expected), caplog.text)


def test_sft_with_train_on_all_trains_every_token_that_has_a_predecessor(paths, caplog):
    caplog.set_level("INFO")
    result = sft(paths, demonstrations(), train_on="all")
    # Leaves out the newline after the last turn.
    joined = CHATML.replace("\n{% endfor", "{{ '' if loop.last else '\n' }}{% endfor")
    everything = "{% generation %}" + joined + "{% endgeneration %}"
    expected = torch.cat([plain_logprobs(paths["policy"], turns, everything) for turns in MESSAGES])
    assert result.history[0]["loss"] == pytest.approx(-expected.mean().item(), rel=1e-5)
    assert f"train: all {len(expected) + len(MESSAGES)} tokens are trained, including prompts" in caplog.text


@pytest.mark.parametrize("train_suffix", [False, True])
def test_sft_on_a_response_of_several_turns_trains_only_its_assistant_turns(paths, caplog, train_suffix):
    caplog.set_level("INFO")
    rows = [
        Example(prompt=[ASKS, ANSWERS, USER], reference=[SAYS, TOOL, ENDS], row=0),
        Example(prompt=[ASKS], reference=[ANSWERS], row=1),
    ]
    result = sft(paths, rows, train_suffix=train_suffix)
    expected = [
        plain_logprobs(paths["policy"], [*row.prompt, *row.reference], PLAIN[train_suffix], len(row.prompt))
        for row in rows
    ]
    assert_trained(result, torch.cat(expected), caplog.text)


@pytest.mark.parametrize(
    ("loss_type", "share_prompts", "train_suffix"),
    [("sigmoid", True, False), ("sigmoid", False, True), ("ipo", True, True)],
)
def test_dpo_counts_only_the_assistant_turns_of_responses(paths, loss_type, share_prompts, train_suffix):
    rows = [
        Example(prompt=[ASKS, ANSWERS, USER], chosen=[SAYS, TOOL, ENDS], rejected=[ANSWERS, TOOL, SAYS], row=0),
        Example(prompt=[SYSTEM, ASKS], chosen=[ANSWERS], rejected=[SAYS, USER, ANSWERS, TOOL, ENDS], row=1),
    ]
    config = DPOConfig(
        model_name_or_path=paths["policy"],
        ref_model_name_or_path=paths["reference"],
        beta=BETA,
        loss_type=loss_type,
        share_prompts=share_prompts,
        train_suffix=train_suffix,
        per_device_train_batch_size=2,
        max_steps=1,
        progress=False,
    )
    (metrics,) = train_dpo(config, rows).history
    losses, chosen = [], []
    for row in rows:
        ratios = []
        for answer in (row.chosen, row.rejected):
            conversation = [*row.prompt, *answer], PLAIN[train_suffix], len(row.prompt)
            own, theirs = (plain_logprobs(paths[name], *conversation) for name in ("policy", "reference"))
            ratio = own.sum() - theirs.sum()
            ratios.append(ratio / len(own) if loss_type == "ipo" else ratio)
            chosen += [own.sum().item()] * (answer is row.chosen)
        margin = ratios[0] - ratios[1]
        ipo = (margin - 1 / (2 * BETA)) ** 2
        losses.append(ipo if loss_type == "ipo" else -torch.nn.functional.logsigmoid(BETA * margin))
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(sum(chosen) / 2, rel=1e-5)


def on_day(monkeypatch, day: str) -> None:
    class Clock(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(inputs, "date", Clock)


def test_a_run_that_is_resumed_on_another_day_keeps_its_date(paths, tmp_path, monkeypatch):
    settings = {"chat_template": TEMPLATES["the day"], "learning_rate": 1e-2, "max_steps": 3, "save_steps": 1}

    def run(name: str, day: str):
        on_day(monkeypatch, day)
        return sft(paths, demonstrations(), output_dir=str(tmp_path / name), **settings)

    whole, later = run("whole", "2026-11-30"), run("later", "2026-12-01")
    log = Run.log

    def stop_at_2(self, step, metrics):
        if step == 2:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_at_2)
        for name in ("resumed", "stopped"):
            with pytest.raises(KeyboardInterrupt):
                run(name, "2026-11-30")
    resumed = run("resumed", "2026-12-01")
    with pytest.raises(ValueError, match=r"template_date: '2026-11-30' there, '2026-12-01' here"):
        sft(paths, demonstrations(), output_dir=str(tmp_path / "stopped"), **settings, template_date="2026-12-01")
    losses = [[row["loss"] for row in each.history] for each in (whole, resumed, later)]
    assert losses[1] == losses[0] != losses[2]
    assert load_yaml(str(tmp_path / "resumed" / "config.yaml"))["template_date"] == "2026-11-30"
    for first, day in ((losses[1][0], "30 Nov 2026"), (losses[2][0], "01 Dec 2026")):
        template = f"{day}\n{PLAIN[False]}"
        expected = [plain_logprobs(paths["policy"], turns, template, len(turns) - 1) for turns in MESSAGES]
        assert first == pytest.approx(-torch.cat(expected).mean().item(), rel=1e-5)
