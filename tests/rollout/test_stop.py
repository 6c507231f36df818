"""Tests of responses that end at a stop string, with hand-written cases."""

from dataclasses import replace

import pytest

from fastrlhf.algorithms.ppo import train_ppo
from fastrlhf.config import GRPOConfig, PPOConfig
from fastrlhf.rollout.engine import checked_rollouts, end_index
from fastrlhf.rollout.stop import Stops
from fastrlhf.types import Prefix, Rollout
from tests import tiny
from tests.algorithms.test_ppo import config, paths  # noqa: F401 (a fixture)

# ruff: noqa: F811 (the fixture)


def rollout(text: str, *, ended: bool = False) -> Rollout:
    tokens = tiny.ids(text) + [tiny.EOS] * ended
    return Rollout(
        prefix=Prefix(token_ids=[5], num_reset=0, row=3, episode=0),
        completion=tokens,
        sampler_logprob=[-float(i) for i in range(len(tokens))],
        ended=ended,
    )


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("w1 w2 w3 w4", False, "w1 w2 w3"),  # the string spans two tokens
        ("w7 w2 w9", True, "w7"),  # the first of several strings
        ("w1 w2 w4", True, None),
        ("w7", False, "w7"),
        ("w1 w2 w3", False, "w1 w2 w3"),
    ],
)
def test_a_response_is_cut_after_the_token_that_completes_a_string(text, ended, kept):
    whole = rollout(text, ended=ended)
    found = Stops(strings=("w2 w3", "w7"), tokenizer=tiny.tokenizer()).cut(whole)
    if kept is None:
        assert found is whole
        return
    num = len(kept.split())
    assert found == replace(whole, completion=tiny.ids(kept), sampler_logprob=whole.sampler_logprob[:num], ended=True)
    assert end_index(found, tiny.EOS) == num - 1


def test_an_engine_without_stop_strings_may_not_report_an_end_without_an_eos():
    stopped = replace(rollout("w1 w2"), ended=True)
    prefixes = [stopped.prefix]
    with pytest.raises(ValueError, match="row 3 has ended=True, which contradicts its tokens"):
        checked_rollouts([stopped], prefixes, eos_token_id=tiny.EOS, stops_at_eos=True)
    assert checked_rollouts([stopped], prefixes, eos_token_id=tiny.EOS, stops_at_eos=True, may_stop=True) == [stopped]
    unended = replace(rollout("w1", ended=True), ended=False)
    with pytest.raises(ValueError, match="row 3 has ended=False, which contradicts its tokens"):
        checked_rollouts([unended], prefixes, eos_token_id=tiny.EOS, stops_at_eos=True, may_stop=True)


def test_a_run_trains_and_evaluates_on_responses_that_end_at_the_string(paths):
    seen = []

    def watch(one):
        seen.append(one)
        return float(one.ended)

    cfg = config({"model_name_or_path": paths["model_name_or_path"]}, GRPOConfig, stop=("w3", "w9"), num_generations=4)
    result = train_ppo(cfg, tiny.examples(12), tiny.examples(4, seed=1), reward_functions={"watch": watch})
    marks = {*tiny.ids("w3 w9")}
    stopped = [one for one in seen[2:] if marks & {*one.completion}]
    assert stopped
    for one in stopped:
        assert one.ended
        assert one.completion[-1] in marks
        assert not marks & {*one.completion[:-1]}
    assert result.history[0]["val/num_eos_tokens"] == 12 - 12 * result.history[0]["completions/clipped_ratio"]


def test_empty_stop_strings_and_compat_reference_are_refused():
    with pytest.raises(ValueError, match=r"^stop: must be empty with compat reference"):
        PPOConfig(compat="reference", stop=("x",))
    with pytest.raises(ValueError, match=r"^stop: must be strings that are not empty; got \('',\)"):
        PPOConfig(stop=("",))
