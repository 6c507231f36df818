from typing import cast

import pytest
import torch

from fastrlhf.data.packing import pack
from fastrlhf.models.forward import (
    LogitMap,
    enable_activation_checkpointing,
    scored_states,
    sequence_scores,
    set_logit_map,
    state_kl,
    state_logprobs,
    state_policy_loss,
    token_logprobs,
    token_nll,
    token_values,
)
from fastrlhf.models.loading import load_reward_model
from fastrlhf.types import Segment
from fastrlhf_kernels import policy_loss
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


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_gradients(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-6 * b.norm()


def heads(name: str, kind: str):
    """Returns a model whose head is tied to the embedding, is frozen, is trained without the backbone, has a bias, or
    has a scale of its logits."""
    model = tiny.policy(name)
    head = cast(torch.nn.Linear, model.get_output_embeddings())
    if kind == "tied":
        model.model.embed_tokens.weight = head.weight
    elif kind == "frozen":
        head.weight.requires_grad_(False)
    elif kind == "only the head":
        model.requires_grad_(False)
        head.weight.requires_grad_(True)
    elif kind == "bias":
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(head.weight)))
    elif kind == "scale":
        set_logit_map(model, LogitMap(scale=0.5))
    return model


KINDS = [(name, "plain") for name in tiny.ARCHITECTURES] + [
    ("llama", kind) for kind in ("tied", "frozen", "only the head", "bias", "scale")
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_losses_with_gradients_in_the_forward_pass_equal_those_in_two_steps(name, kind):
    """Gemma has a soft cap. The two packs are summed, as in a step of several micro-batches."""
    model, packs = heads(name, kind), [pack([scored(ids) for ids in part]) for part in (SEQUENCES[:2], SEQUENCES[2:])]
    forms = [[token_nll(model, each, num_tokens=7, form=form) for each in packs] for form in ("one_shot", "auto")]
    plain = torch.stack([-token_logprobs(model, each).logprob.sum() / 7 for each in packs]).sum()
    expected = gradients(model, plain)
    for loss in (torch.stack(losses).sum() for losses in forms):
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        assert_same_gradients(gradients(model, loss), expected)

    rows = torch.linspace(-3, -1, 8), torch.linspace(-1, 2, 8), torch.tensor([True] * 6 + [False] * 2)
    options: dict = {"num_tokens": 6, "entropy_coef": 0.1, "dual_clip": 3.0}
    batch = packs[1]
    heat = torch.linspace(0.5, 1.5, 8)
    states = scored_states(model, batch)
    scores = state_logprobs(model, states, batch.targets, temperature=heat, entropy=True)
    two = policy_loss(scores.logprob, *rows, **options, entropy=scores.entropy)
    expected = gradients(model, two.loss)
    states = scored_states(model, batch)
    one = state_policy_loss(model, states, batch.targets, *rows, **options, temperature=heat, form="one_shot")
    assert one.loss.item() == pytest.approx(two.loss.item(), rel=1e-6)
    assert list(one.metrics) == list(two.metrics)
    for a, b in zip(one.metrics.values(), two.metrics.values(), strict=True):
        assert a.value.item() == pytest.approx(b.value.item(), rel=2e-6, abs=1e-6)
    assert_same_gradients(gradients(model, one.loss), expected)
