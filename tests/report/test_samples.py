"""Tests of logged samples, with two episodes in compat "reference". The first episode starts after a reset of one
token, which also earns rewards; the second episode starts at its prompt."""

import re
from html import unescape

import pytest
import torch

from fastrlhf.report.samples import has_token_rewards, sample_rows, token_samples, token_texts
from fastrlhf.types import Experience, Prefix, Rollout
from tests import tiny


def rollout(prompt: str, reset: str, completion: str) -> Rollout:
    tokens = [*tiny.ids(completion), tiny.EOS]
    return Rollout(
        prefix=Prefix(token_ids=tiny.ids(f"{prompt} {reset}"), num_reset=len(tiny.ids(reset)), row=7, episode=0),
        completion=tokens,
        sampler_logprob=[-1.0] * len(tokens),
        ended=True,
    )


def experience(**rewards: list[float]) -> Experience:
    zeros = torch.zeros(6)
    return Experience(
        cu_rows=torch.tensor([0, 4, 6], dtype=torch.int32),
        mask=torch.tensor([0, 1, 1, 1, 1, 1]).bool(),
        trained=torch.tensor([0, 1, 1, 1, 1, 1]).bool(),
        sampler_logprob=zeros,
        reference_logprob=zeros,
        advantage=zeros,
        kl_coef=0.1,
        rewards={name: torch.tensor(values) for name, values in rewards.items()},
        scores=torch.tensor([2.5, -1.0]),
    )


ROLLOUTS = [rollout("w1 w2", "w3", "w4 w5"), rollout("w6", "", "w7")]
EARNED = experience(
    score=[0.0, 0, 0, 2.5, 0, -1], kl=[9.0, -0.1, 0.2, 0, 0.123456789, 0], dpo=[0.0, 0.5, -0.4, 0, 0, 0]
)


def rows(count: int = 2):
    return sample_rows(tiny.tokenizer(), ROLLOUTS, EARNED, count)


def test_a_sample_has_the_rewards_of_its_sampled_tokens_by_name():
    first, second = rows()
    assert first == {
        "row": 7,
        "prompt": "w1 w2",
        "reset": "w3",
        "response": "w4 w5 <eos>",
        "score": 2.5,
        "tokens": ["w4", " w5", " <eos>"],
        "rewards": {
            "score": [0, 0, 2.5],
            "kl": [pytest.approx(-0.1, rel=1e-4), pytest.approx(0.2, rel=1e-4), 0],
            "dpo": [0.5, pytest.approx(-0.4, rel=1e-4), 0],
        },
    }
    # The second episode has two rows; their rewards are rounded to five digits
    assert second["rewards"] == {"score": [0, -1], "kl": [0.12346, 0], "dpo": [0, 0]}
    assert rows(1) == [first]


def spans(markup: str) -> list[tuple[str, str, str]]:
    """Returns (class and width, hover text, text) of every token in the HTML."""
    _, _, samples = markup.partition("</p>")
    found = re.findall(r'<span(?: class="(\w+)" style="--w:(\d+)%")?(?: title="(.*?)")?>(.*?)</span>', samples)
    return [(f"{kind} {width}".strip(), hover, unescape(text)) for kind, width, hover, text in found]


def test_a_token_has_the_colour_of_its_own_rewards_and_all_of_them_by_name():
    """Without the score, the rewards of each token sum to 0.4, -0.2, 0 (first episode) and 0.12346, 0 (second episode).
    The colour has its full strength of 60 % from 0.38 on, the 0.95 quantile of the non-zero absolute sums.
    """
    assert spans(token_samples(rows())) == [
        ("gain 60", "kl -0.1, dpo +0.5", "w4"),
        ("loss 32", "kl +0.2, dpo -0.4", " w5"),
        ("", "score +2.5", " <eos>"),
        ("gain 19", "kl +0.123", "w7"),
        ("", "score -1", " <eos>"),
    ]
    markup = token_samples(rows())
    assert '<span class="given">w1 w2</span><span class="prompt">w3</span>' in markup
    assert "row 7, score 2.5, reward 2.7" in markup
    assert all(f">{shade}</span>" in markup for shade in ("-0.38", "-0.19", "0", "+0.19", "+0.38"))


def test_tokens_without_rewards_are_not_coloured():
    silent = [row | {"rewards": {"score": [0.0] * len(row["tokens"])}} for row in rows()]
    assert {kind for kind, _, _ in spans(token_samples(silent))} == {""}
    assert "nan" not in token_samples(silent)
    assert token_samples([rows()[0] | {"tokens": [], "rewards": {}}]).count("<article>") == 1


def test_markup_in_tokens_and_names_is_text():
    attack = '"><script>'
    row = {"prompt": attack, "reset": attack, "tokens": [attack, "\n", ""], "rewards": {attack: [1.0, 1.0, 0.0]}}
    markup = token_samples([row])
    assert "<script" not in markup
    assert markup.count("&quot;&gt;&lt;script&gt;") == 5
    assert "&crarr;\n</span>" in markup
    assert "&middot;</span>" in markup


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": None},
        {"tokens": ["w4"]},
        {"tokens": [1, 2, 3]},
        {"rewards": [0.0]},
        {"rewards": {"kl": [0.0, 0.0, "nan"]}},
        {"rewards": {"kl": 0.0}},
    ],
)
def test_rows_of_another_format_are_recognised(changed):
    assert has_token_rewards(rows()[0])
    assert not has_token_rewards(rows()[0] | changed)
    assert not has_token_rewards({"prompt": "w1", "response": "w2", "score": 1.0})


def test_token_texts_add_up_if_a_character_has_several_tokens():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "a \u20ac b\u00e9"
    found = token_texts(Bytes(), list(text.encode()))
    assert "".join(found) == text
    assert found[2:5] == ["", "", "\u20ac"]
