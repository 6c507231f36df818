import pytest
import torch

from fastrlhf.data.packing import pack
from fastrlhf.models.forward import (
    enable_activation_checkpointing,
    scored_states,
    sequence_scores,
    state_kl,
    token_logprobs,
    token_values,
)
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Segment
from tests import tiny

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [5, 6, 7, 20, 21, 22, 23, 24, 25]]


def scored(ids: list[int]) -> Segment:
    return Segment(token_ids=ids, num_scored=len(ids) - 1)


@torch.no_grad()
def own_logprobs(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].float()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_packed_logprobs_equal_the_models_own_one_by_one(name):
    model = tiny.policy(name)
    packed = token_logprobs(model, pack([scored(ids) for ids in SEQUENCES]), temperature=0.7).logprob
    alone = torch.cat([own_logprobs(model, ids, 0.7) for ids in SEQUENCES])
    torch.testing.assert_close(packed, alone, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_the_kl_of_every_state_is_that_of_the_models_own_distributions(name):
    """Compares the KL with its definition over the whole vocabulary, with temperature and soft caps."""
    model, reference = tiny.policy(name), tiny.policy(name, seed=5)
    batch = pack([scored(ids) for ids in SEQUENCES])
    states, reference_states = scored_states(model, batch), scored_states(reference, batch)
    found = state_kl(model, states, reference, reference_states, batch.targets, temperature=0.7)
    expected = []
    for ids in SEQUENCES:
        p, q = ((m(torch.tensor([ids])).logits[0, :-1].double() / 0.7).log_softmax(-1) for m in (model, reference))
        expected.append((p.exp() * (p - q)).sum(-1))
    assert torch.cat(expected).min() > 1e-3
    torch.testing.assert_close(found.kl, torch.cat(expected).float(), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found.reference_logprob, token_logprobs(reference, batch, temperature=0.7).logprob)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_branches_equal_the_separate_sequences_in_value_and_gradient(name):
    model = tiny.policy(name)
    forest = [
        Segment(token_ids=SEQUENCES[0]),
        Segment(token_ids=[14, 15], num_scored=2, parent=0, cut=7),
        Segment(token_ids=[16, 17, 18], num_scored=3, parent=0, cut=3),
    ]
    plain = [
        Segment(token_ids=[*SEQUENCES[0], 14, 15], num_scored=2),
        Segment(token_ids=[*SEQUENCES[0][:3], 16, 17, 18], num_scored=3),
    ]
    results = []
    for segments in (forest, plain):
        logprob = token_logprobs(model, pack(segments)).logprob
        model.zero_grad()
        (logprob * torch.arange(1.0, 6.0)).sum().backward()
        results.append([logprob.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_changing_one_sequence_moves_no_number_of_another(name):
    model = tiny.policy(name)
    before = token_logprobs(model, pack([scored(ids) for ids in SEQUENCES])).logprob
    changed = [SEQUENCES[0], [30, 31], SEQUENCES[2]]
    after = token_logprobs(model, pack([scored(ids) for ids in changed])).logprob
    others = torch.tensor([True] * 6 + [False] + [True] * 8)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@torch.no_grad()
def test_scores_equal_the_plain_sequence_classifier(name, tmp_path):
    tiny.policy(name).save_pretrained(tmp_path)
    model = load_reward_model(str(tmp_path), pad_token_id=0)
    packed = sequence_scores(model, pack([Segment(token_ids=ids) for ids in SEQUENCES]))
    alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_value_of_a_token_is_read_where_the_token_is_predicted(tmp_path):
    tiny.policy().save_pretrained(tmp_path)
    critic = load_reward_model(str(tmp_path), pad_token_id=0)
    values = token_values(critic, pack([Segment(token_ids=[5, 6, 7, 8], num_scored=2)]))
    prefixes = sequence_scores(critic, pack([Segment(token_ids=[5, 6]), Segment(token_ids=[5, 6, 7])]))
    torch.testing.assert_close(values, prefixes, rtol=1e-5, atol=1e-6)


def saved_bytes(model, batch) -> int:
    """Returns the bytes that autograd saves in a forward, without the weights."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, batch)
    return sum(kept.values())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_activation_checkpointing_changes_no_bit_and_saves_memory(name):
    """Uses a forest, because recomputation must repeat the attention over its branches. Checkpointing must also leave
    the attention mode of the model unchanged.
    """
    forest = pack(
        [
            Segment(token_ids=SEQUENCES[0]),
            Segment(token_ids=[14, 15], num_scored=2, parent=0, cut=7),
            Segment(token_ids=[16, 17, 18], num_scored=3, parent=0, cut=3),
            scored(SEQUENCES[2]),
        ]
    )
    results, kept = [], []
    for checkpointing in (False, True):
        model = tiny.policy(name)
        if checkpointing:
            enable_activation_checkpointing(model)
        before = model.config._attn_implementation
        logprob = token_logprobs(model, forest).logprob
        assert not model.training
        logprob.sum().backward()
        assert model.config._attn_implementation == before
        results.append([logprob.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        kept.append(saved_bytes(model, forest))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]
