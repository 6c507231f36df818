from dataclasses import replace

import pytest

from bench.resets import SCALE, gold_judge, strict_task
from fastrlhf.data.toy import toy_tokenizer
from fastrlhf.types import Prefix, Rollout


def test_the_gold_judge_scores_the_whole_response_with_its_reset_tokens():
    task, tokenizer = strict_task(0), toy_tokenizer()
    (example,) = task.examples("train", 1)
    ideal = task.ideal(str(example.prompt))
    prompt, response = (tokenizer(text)["input_ids"] for text in (example.prompt, ideal))
    for k in (0, 3):
        prefix = Prefix(token_ids=[*prompt, *response[:k]], num_reset=k, row=0, episode=0)
        completion = [*response[k:], tokenizer.eos_token_id]
        rollout = Rollout(prefix=prefix, completion=completion, sampler_logprob=[-1.0] * len(completion), ended=True)
        (score,) = gold_judge(task, [rollout]).tolist()
        assert score == pytest.approx(task.gold_reward(str(example.prompt), ideal) / SCALE)


def test_careful_references_have_a_much_higher_gold_reward():
    task = strict_task(0)
    pairs = zip(
        task.examples("train", 200), replace(task, min_haste=0.0, max_haste=0.2).examples("train", 200), strict=True
    )
    gains = []
    for sloppy, careful in pairs:
        assert sloppy.prompt == careful.prompt
        worth = [task.gold_reward(str(e.prompt), str(e.reference)) for e in (sloppy, careful)]
        gains.append(worth[1] - worth[0])
    assert sum(gains) / len(gains) > 5
