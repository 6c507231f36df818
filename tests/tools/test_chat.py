import io
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrlhf.cli import main
from fastrlhf.config import ChatConfig
from fastrlhf.data.tokens import TextRules
from fastrlhf.models.loading import load_reward_model
from fastrlhf.models.vocabulary import allowed_ids
from fastrlhf.tools import chat as module
from fastrlhf.tools.chat import Chat, open_chat, talk
from tests import tiny
from tests.models.test_vocabulary import ROWS, idle, padded

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] | replace('u', 'w1') | replace('a', 'w2') | replace('s', 'w3') }}"
    " {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("chat")
    base = tiny.save_policy(place / "base")
    tiny.save_adapter(place / "adapter", base, 1)
    tiny.save_reward_model(place / "judge")
    return place


def config(folders, **keys) -> ChatConfig:
    return ChatConfig(
        model_name_or_path=str(folders / "base"),
        chat_template=TEMPLATE,
        response_length=8,
        max_length=64,
        temperature=0.0,
        **keys,
    )


def greedy(model, prompt: list[int], num: int) -> list[int]:
    """Returns the greedy continuation, computed without a cache, up to and including the EOS."""
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tiny.EOS:
            break
    return ids[len(prompt) :]


def text(ids: list[int]) -> str:
    return tiny.tokenizer().decode(ids, skip_special_tokens=True)


def test_each_answer_is_what_the_model_says_to_the_whole_conversation(folders):
    chat, out = open_chat(config(folders, system="w7")), io.StringIO()
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    chat.ask("w4 w5", out)
    first = greedy(model, tiny.ids("w3 w7 w1 w4 w5 w2"), 8)
    assert chat.turns[1] == {"role": "assistant", "content": text(first)}
    assert out.getvalue().split("\n")[0] == text(first)
    chat.ask("w6", out)
    second = greedy(model, tiny.ids(f"w3 w7 w1 w4 w5 w2 {text(first)} w1 w6 w2"), 8)
    assert chat.turns[3]["content"] == text(second)


def test_the_commands_change_the_conversation(folders):
    chat, out = open_chat(config(folders)), io.StringIO()
    talk(chat, iter(["w4\n", "\n", "/system w9\n", "/reset\n", "/what\n", "w5\n", "/exit\n", "w6\n"]), out)
    assert chat.system == "w9"
    assert [turn["content"] for turn in chat.turns if turn["role"] == "user"] == ["w5"]
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    assert chat.turns[-1]["content"] == text(greedy(model, tiny.ids("w3 w9 w1 w5 w2"), 8))
    assert module.HELP in out.getvalue()


def test_an_adapter_answers_and_the_judge_scores_each_answer(folders, capsys):
    keys = {"adapter": str(folders / "adapter" / "adapter"), "reward_model_path": str(folders / "judge")}
    chat, out = open_chat(config(folders, **keys)), io.StringIO()
    score = chat.ask("w4", out)
    merged = folders / "merged"
    assert main(["merge", str(folders / "adapter" / "adapter"), "--output_dir", str(merged)]) == 0
    answer = greedy(AutoModelForCausalLM.from_pretrained(merged), tiny.ids("w1 w4 w2"), 8)
    assert chat.turns[-1]["content"] == text(answer)
    judge = load_reward_model(str(folders / "judge"), pad_token_id=0)
    read = [*tiny.ids(f"w1 w4 w2 {text(answer)}"), tiny.EOS]
    states = judge.model(torch.tensor([read])).last_hidden_state
    assert score == pytest.approx(judge.score(states[0, -1]).item(), abs=1e-5)
    alone = open_chat(replace(config(folders), model_name_or_path=str(folders / "adapter" / "adapter")))
    alone.ask("w4", out)
    assert alone.turns == chat.turns


def test_a_model_without_a_template_continues_the_text(folders):
    chat = open_chat(ChatConfig(model_name_or_path=str(folders / "base"), temperature=0, response_length=5))
    out = io.StringIO()
    chat.ask("w4 w5", out)
    chat.ask("w4 w5", out)
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    told = text(greedy(model, tiny.ids("w4 w5"), 5))
    lines = [line for line in out.getvalue().splitlines() if not line.startswith("(stopped")]
    assert lines == [told, told]


@pytest.mark.parametrize("holes", [(), (4, 17, 30)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ids_without_a_token_are_never_sampled(folders, monkeypatch, holes, temperature):
    model, seen = padded(holes=holes), set()
    kept = module._Kept.__call__

    def watched(self, input_ids, scores, **others):
        seen.update(input_ids[0, self._num_prompt :].tolist())
        return kept(self, input_ids, scores, **others)

    monkeypatch.setattr(module._Kept, "__call__", watched)
    settings = replace(config(folders), temperature=temperature)

    def sampled(allowed):
        monkeypatch.setattr(module, "allowed_ids", allowed)
        chat = Chat(config=settings, model=model, tokenizer=tiny.tokenizer(holes), rules=TextRules())
        seen.clear()
        for word in range(5, 13):
            chat.reset()
            chat.ask(f"w{word}", io.StringIO())
        return set(seen)

    assert sampled(lambda model: range(ROWS)) & idle(holes)
    assert not sampled(allowed_ids) & idle(holes)


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(folders, monkeypatch):
    chat, out = open_chat(config(folders)), io.StringIO()
    whole = greedy(AutoModelForCausalLM.from_pretrained(folders / "base"), tiny.ids("w1 w4 w2"), 8)
    assert len(whole) > 3
    steps = iter(range(100))
    put = module._Streamer.put

    def interrupt(self, value):
        if next(steps) == 3:  # the prompt and two tokens are written; Ctrl-C comes with the third
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(module._Streamer, "put", interrupt)
    chat.ask("w4", out)
    assert chat.turns[-1]["content"] == text(whole[:3])


def test_a_conversation_without_room_is_not_answered_and_not_remembered(folders):
    chat, out = open_chat(config(folders)), io.StringIO()
    talk(chat, iter(["w4 " * 70]), out)
    assert out.getvalue() == (
        "not answered: the conversation has 72 tokens and no room in 64 for an answer; /reset it\n"
    )
    assert chat.turns == []


def test_the_command_reads_standard_input(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("w4\n/exit\n"))
    flags = ["--chat_template", TEMPLATE, "--temperature", "0", "--response_length", "8"]
    assert main(["chat", str(folders / "base"), *flags]) == 0
    answer = text(greedy(AutoModelForCausalLM.from_pretrained(folders / "base"), tiny.ids("w1 w4 w2"), 8))
    assert capsys.readouterr().out.startswith(f"{module.HELP}\n{answer}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model_name_or_path: must be a folder or a hub name; got ''"),
        (["base", "judge"], "holds no adapter (adapter_config.json)"),
        (["base", "--save_steps", "5"], "save_steps: must be"),
        (["base", "--reward_model_path", "nowhere"], "reward_model_path: 'nowhere' is neither a local folder nor"),
    ],
)
def test_bad_input_is_one_line(folders, capsys, words, message):
    places = [str(folders / word) if (folders / word).exists() else word for word in words]
    assert main(["chat", *places]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
