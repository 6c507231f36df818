from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from fastrlhf.data.packing import pack, sequence
from fastrlhf.data.resets import uniforms
from fastrlhf.models.forward import token_logprobs
from fastrlhf.rollout.engine import SAMPLE_STREAM, TransformersEngine, checked_rollouts, end_index
from fastrlhf.rollout.probe import decoder_of
from fastrlhf.types import Prefix, Rollout
from tests import tiny

LENGTH = 9


def engine(model, **settings) -> TransformersEngine:
    fields = {"eos_token_id": tiny.EOS, "response_length": LENGTH, "temperature": 0.7, "seed": 3, "batch_size": 64}
    return TransformersEngine(model=model, **fields | settings)


def prefixes(count: int) -> list[Prefix]:
    return [
        Prefix(token_ids=[3 + (i * j) % 20 for j in range(1, 5 + i % 4)], num_reset=i % 4, row=i, episode=i)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_recorded_logprobs_are_those_of_the_packed_forward(name):
    model = tiny.policy(name)
    rollouts = engine(model).generate(prefixes(12))
    batch = pack([sequence(rollout.prefix.token_ids, rollout.completion) for rollout in rollouts])
    with torch.no_grad():
        rescored = token_logprobs(model, batch, temperature=0.7).logprob
    recorded = torch.tensor([x for rollout in rollouts for x in rollout.sampler_logprob])
    torch.testing.assert_close(recorded, rescored, rtol=1e-5, atol=1e-5)


def test_a_response_stops_at_its_eos_or_when_its_budget_with_the_reset_is_spent():
    rollouts = engine(tiny.policy()).generate(prefixes(200))
    assert {rollout.ended for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert (rollout.completion[-1] == tiny.EOS) == rollout.ended
        assert tiny.EOS not in rollout.completion[:-1]
        assert len(rollout.sampler_logprob) == len(rollout.completion)
        if not rollout.ended:
            assert len(rollout.completion) == LENGTH - rollout.prefix.num_reset


def test_a_response_stops_at_the_first_of_several_ends_and_is_the_same_up_to_there():
    ends = (tiny.EOS, 9, 17)
    rollouts = engine(tiny.policy(), eos_token_id=ends).generate(prefixes(100))
    assert {rollout.completion[-1] for rollout in rollouts if rollout.ended} == set(ends)
    for rollout, alone in zip(rollouts, engine(tiny.policy()).generate(prefixes(100)), strict=True):
        assert not set(ends) & set(rollout.completion[:-1])
        assert rollout.completion == alone.completion[: len(rollout.completion)]
        assert rollout.ended == (rollout.completion[-1] in ends)
    assert checked_rollouts(rollouts, prefixes(100), eos_token_id=ends, stops_at_eos=True) == rollouts
    with pytest.raises(ValueError, match="has ended=True, which contradicts its tokens"):
        checked_rollouts(rollouts, prefixes(100), eos_token_id=tiny.EOS, stops_at_eos=True)


def test_an_eos_in_the_last_slot_ends_the_response():
    rollouts = engine(tiny.policy()).generate(prefixes(400))
    last_slot = [
        r for r in rollouts if len(r.completion) == LENGTH - r.prefix.num_reset and r.completion[-1] == tiny.EOS
    ]
    assert last_slot
    assert all(rollout.ended for rollout in last_slot)


def test_with_stop_at_eos_off_the_engine_samples_to_the_length_limit():
    rollouts = engine(tiny.policy(), stop_at_eos=False).generate(prefixes(100))
    assert all(len(rollout.completion) == LENGTH - rollout.prefix.num_reset for rollout in rollouts)
    early = [rollout for rollout in rollouts if rollout.ended]
    assert early
    assert all(rollout.completion[end_index(rollout, tiny.EOS)] == tiny.EOS for rollout in early)


def test_a_sample_depends_only_on_seed_and_episode():
    model = tiny.policy()
    together = engine(model).generate(prefixes(30))
    in_threes = engine(model, batch_size=3).generate(prefixes(30))
    backwards = engine(model).generate(prefixes(30)[::-1])[::-1]
    assert [r.completion for r in together] == [r.completion for r in in_threes] == [r.completion for r in backwards]
    assert [r.completion for r in together] != [r.completion for r in engine(model, seed=4).generate(prefixes(30))]


def forwards(
    model: PreTrainedModel, sampler: TransformersEngine, starts: list[Prefix]
) -> tuple[list[Rollout], list[tuple[int, ...]]]:
    """Samples episodes from the prefixes `starts`. Returns the rollouts and the shape of `input_ids` in every forward
    of the model."""
    decoder_of(model)  # runs the probe before the forwards are counted
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    rollouts = sampler.generate(starts)
    hook.remove()
    return rollouts, shapes


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_shared_prefixes_are_prefilled_once_without_changing_the_samples(name):
    model = tiny.policy(name)
    text = prefixes(8)[7].token_ids  # 7 tokens; episodes start after 4 to 7 tokens
    starts = [Prefix(token_ids=text[: 4 + i % 4], num_reset=i % 4, row=0, episode=i) for i in range(20)]
    together, shapes = forwards(model, engine(model), starts)
    assert shapes[0] == (1, 7)
    assert all(shape[1] == 1 for shape in shapes[1:])
    apart = [rollout for prefix in starts for rollout in engine(model).generate([prefix])]
    assert [r.completion for r in together] == [r.completion for r in apart]
    for ours, theirs in zip(together, apart, strict=True):
        assert ours.sampler_logprob == pytest.approx(theirs.sampler_logprob, abs=1e-5)
    assert len({tuple(r.completion) for r in together}) > 10


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_samples_are_those_of_a_loop_that_reads_the_whole_text_for_every_token(name):
    model = tiny.policy(name)
    starts = prefixes(7)
    for prefix, rollout in zip(starts, engine(model, batch_size=3).generate(starts), strict=True):
        tokens = []
        for uniform in uniforms(3, SAMPLE_STREAM, prefix.episode, LENGTH - prefix.num_reset):
            with torch.no_grad():
                logits = model(torch.tensor([[*prefix.token_ids, *tokens]]), use_cache=False).logits[0, -1]
            cumulative = (logits.double() / 0.7).softmax(-1).cumsum(-1)
            tokens.append(int((cumulative <= uniform * cumulative[-1]).sum()))
            if tokens[-1] == tiny.EOS:
                break
        assert rollout.completion == tokens


def test_a_slot_that_becomes_free_goes_to_an_episode_that_waits():
    """Uses two slots for five episodes, one of nine tokens and four of two. The prefill samples the first token of
    every episode."""
    model = tiny.policy()
    starts = [Prefix(token_ids=[5 + i] * 9, num_reset=7 if i else 0, row=i, episode=i) for i in range(5)]
    rollouts, shapes = forwards(model, engine(model, batch_size=2, stop_at_eos=False), starts)
    assert [len(rollout.completion) for rollout in rollouts] == [9, 2, 2, 2, 2]
    assert shapes == [(1, 18), (2, 1), *[(1, 9), (2, 1)] * 3, *[(1, 1)] * 4]


def test_prefixes_are_prefilled_in_micro_batches_and_draw_the_same():
    """Uses three texts of nine tokens, each shared by two episodes. A text longer than micro_batch_tokens is a separate
    pack."""
    model = tiny.policy()
    starts = [Prefix(token_ids=[5 + i // 2] * (6 + 3 * (i % 2)), num_reset=0, row=i, episode=i) for i in range(6)]
    together, shapes = forwards(model, engine(model), starts)
    packed, parts = forwards(model, engine(model, micro_batch_tokens=18), starts)
    alone, single = forwards(model, engine(model, micro_batch_tokens=2), starts)
    assert [shapes[:1], parts[:2], single[:3]] == [[(1, 27)], [(1, 18), (1, 9)], [(1, 9)] * 3]
    assert single[3][1] == 1
    assert [r.completion for r in together] == [r.completion for r in packed] == [r.completion for r in alone]


def test_slots_are_halved_once_half_of_them_are_enough_and_none_waits():
    model = tiny.policy()
    starts = [Prefix(token_ids=[5 + i] * 9, num_reset=[0, 4, 6, 7][i % 4], row=i, episode=i) for i in range(8)]
    rollouts, shapes = forwards(model, engine(model, stop_at_eos=False), starts)
    assert [len(rollout.completion) for rollout in rollouts] == [9, 5, 3, 2] * 2
    # The limits are 9, 5, 3 and 2 tokens, for two episodes each; the prefill samples the first token.
    assert [shape[0] for shape in shapes[1:]] == [8, 8, 4, 4, 2, 2, 2, 2]


def test_a_cuda_graph_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match=r"^decode: cuda_graph needs a CUDA GPU, but the model is on the cpu; set e"):
        engine(tiny.policy(), decode="cuda_graph")


def test_no_prefixes_give_no_rollouts():
    assert engine(tiny.policy()).generate([]) == []


def test_samples_follow_the_tempered_distribution():
    model = tiny.policy()
    same = [Prefix(token_ids=[5, 6, 7], num_reset=LENGTH - 1, row=0, episode=i) for i in range(4000)]
    drawn = torch.tensor([rollout.completion[0] for rollout in engine(model, batch_size=500).generate(same)])
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(drawn, minlength=tiny.VOCAB)
    deviation = (counts - 4000 * expected) / (4000 * expected * (1 - expected)).sqrt()
    assert deviation[expected > 0.005].abs().max() < 4.5


def test_temperature_zero_equals_greedy_generation():
    model = tiny.policy()
    [rollout] = engine(model, temperature=0).generate([Prefix(token_ids=[5, 6, 7], num_reset=0, row=0, episode=0)])
    expected = model.generate(
        torch.tensor([[5, 6, 7]]),
        attention_mask=torch.ones(1, 3),
        do_sample=False,
        max_new_tokens=LENGTH,
        pad_token_id=0,
    )[0, 3:]
    assert rollout.completion == expected.tolist()


def test_a_reset_that_leaves_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="leaves nothing to sample after the 9 reset tokens of row 4"):
        engine(tiny.policy()).generate([Prefix(token_ids=[5] * 10, num_reset=9, row=4, episode=0)])


def test_the_end_is_the_first_eos_or_the_last_token():
    prefix = Prefix(token_ids=[5], num_reset=0, row=0, episode=0)
    ended = Rollout(prefix=prefix, completion=[7, 1, 1], sampler_logprob=[0.0] * 3, ended=True)
    cut = Rollout(prefix=prefix, completion=[7, 8, 9], sampler_logprob=[0.0] * 3, ended=False)
    assert (end_index(ended, 1), end_index(cut, 1)) == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion": [], "sampler_logprob": []}, "has 0 tokens"),
        ({"sampler_logprob": [0.0]}, "has 2 tokens and 1 log-probs"),
        ({"sampler_logprob": [0.0, float("nan")]}, "has a log-prob that is not finite"),
        ({"ended": False}, "has ended=False, which contradicts its tokens"),
        ({"completion": [1, 1]}, "continues after its EOS"),
    ],
)
def test_wrong_results_of_an_engine_are_detected(change, message):
    prefix = Prefix(token_ids=[5], num_reset=0, row=3, episode=0)
    good = Rollout(prefix=prefix, completion=[7, 1], sampler_logprob=[0.0, 0.0], ended=True)
    assert checked_rollouts([good], [prefix], eos_token_id=1, stops_at_eos=True) == [good]
    with pytest.raises(ValueError, match=f"row 3 {message}"):
        checked_rollouts([replace(good, **change)], [prefix], eos_token_id=1, stops_at_eos=True)
    with pytest.raises(ValueError, match="one rollout per prefix"):
        checked_rollouts([], [prefix], eos_token_id=1, stops_at_eos=True)


def test_nan_weights_end_sampling_with_one_sentence():
    model = tiny.policy()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        engine(model).generate(prefixes(3))
