import torch

from fastrlhf.data.packing import pack
from fastrlhf.models.alone import num_computed_alone, states_one_by_one
from fastrlhf.types import Segment

FOREST = [
    Segment(token_ids=[5, 6, 7, 8]),
    Segment(token_ids=[9], parent=0, cut=4),
    Segment(token_ids=[10, 11], parent=0, cut=2),
    Segment(token_ids=[12, 13, 14]),
    # Branches off after the first token of its parent; no segment continues the whole parent
    Segment(token_ids=[15, 16], parent=3, cut=1),
]


def test_every_token_sees_its_own_past_in_any_order_of_the_pack():
    """Uses a fake model in which the state of a token is a number; its base-32 digits are the ids up to this token."""
    calls = []

    def run(ids):
        calls.append(ids.tolist())
        states = torch.zeros(*ids.shape, dtype=torch.float64)
        total = torch.zeros(len(ids), dtype=torch.float64)
        for t in range(ids.shape[1]):
            total = 32 * total + ids[:, t]
            states[:, t] = total
        return [states[..., None]]

    (states,) = states_one_by_one(run, pack(FOREST))
    found = states[:, 0].tolist()
    paths = [
        [5], [5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 10], [5, 6, 10, 11],
        [12], [12, 13], [12, 13, 14], [12, 15], [12, 15, 16],
    ]  # fmt: skip
    assert found == [sum(token * 32**i for i, token in enumerate(reversed(path))) for path in paths]
    # Sequences of equal length run in one batch, without padding.
    assert calls == [[[5, 6, 7, 8, 9]], [[5, 6, 10, 11]], [[12, 13, 14], [12, 15, 16]]]
    assert num_computed_alone(pack(FOREST).plan) == 5 + 4 + 3 + 3


def test_a_shared_token_gets_the_gradients_of_all_sequences_that_contain_it():
    weight = torch.tensor(2.0, requires_grad=True)
    states, again = states_one_by_one(lambda ids: [weight * ids[..., None].double(), ids], pack(FOREST))
    states.sum().backward()
    assert torch.equal(again, pack(FOREST).token_ids)
    assert weight.grad == sum(sum(segment.token_ids) for segment in FOREST)


def test_processes_make_equally_many_calls(monkeypatch):
    monkeypatch.setattr("fastrlhf.models.alone.from_all", lambda own: [own, 5])
    calls = []

    def run(ids):
        calls.append(tuple(ids.shape))
        return [ids[..., None].double()]

    (states,) = states_one_by_one(run, pack(FOREST), in_step=True)
    assert calls == [(1, 5), (1, 4), (2, 3), (1, 3), (1, 3)]
    assert states[:, 0].tolist() == [token for segment in FOREST for token in segment.token_ids]
