import pytest
import torch

from fastrlhf.data.packing import (
    families,
    forest,
    group,
    in_order,
    micro_batches,
    num_computed,
    num_in_sequences,
    pack,
    pair,
    sequence,
    tree,
    trunks,
    unpack,
)
from fastrlhf.types import Segment


def test_two_sequences_pack_into_the_arrays_of_the_worked_example():
    batch = pack([Segment(token_ids=[7, 8, 1, 5, 0], num_scored=2), Segment(token_ids=[7, 9, 4], num_scored=1)])
    assert batch.token_ids.tolist() == [7, 8, 1, 5, 0, 7, 9, 4]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.rows.tolist() == [2, 3, 6]
    assert batch.targets.tolist() == [5, 0, 4]
    assert batch.cu_rows.tolist() == [0, 2, 3]
    assert batch.last.tolist() == [4, 7]
    assert batch.plan.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.plan.key_index is None
    assert batch.cu_rows.dtype == batch.plan.cu_seqlens.dtype == torch.int32
    assert (batch.num_tokens, batch.num_rows, batch.num_sequences) == (8, 3, 2)


def test_the_shift_predicts_each_target_from_the_token_before_it():
    batch = pack([sequence([3, 4], [5, 6, 7])])
    assert batch.token_ids[batch.rows].tolist() == [4, 5, 6]
    assert batch.targets.tolist() == [5, 6, 7]


def test_a_pair_on_its_prompt_computes_the_prompt_once():
    batch = pack(
        [
            Segment(token_ids=[7, 8]),
            Segment(token_ids=[1, 0], num_scored=2, parent=0, cut=2),
            Segment(token_ids=[2, 3, 0], num_scored=3, parent=0, cut=2),
        ]
    )
    assert batch.token_ids.tolist() == [7, 8, 1, 0, 2, 3, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.rows.tolist() == [1, 2, 1, 4, 5]  # row 1, the prompt's end, predicts both first tokens
    assert batch.targets.tolist() == [1, 0, 2, 3, 0]
    assert batch.cu_rows.tolist() == [0, 2, 5]  # the prompt does not count as a sequence
    assert batch.last.tolist() == [3, 6]
    assert batch.plan.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert batch.plan.cu_seqlens.tolist() == [0, 2, 4, 7]
    assert batch.plan.cu_seqlens_k.tolist() == [0, 2, 6, 11]
    assert unpack(batch) == [[7, 8, 1, 0], [7, 8, 2, 3, 0]]


def test_a_group_computes_its_prompt_once_and_keeps_the_order_of_its_responses():
    responses = [[1, 0], [2, 3, 0], [1, 0]]
    shared, plain = (pack(group([7, 8], responses, scored=True, share_prompt=on)) for on in (True, False))
    assert unpack(shared) == unpack(plain) == [[7, 8, *response] for response in responses]
    assert (shared.num_tokens, plain.num_tokens) == (9, 13)
    assert shared.cu_rows.tolist() == plain.cu_rows.tolist() == [0, 2, 5, 7]
    assert shared.targets.tolist() == [1, 0, 2, 3, 0, 1, 0]


def test_branches_may_start_at_different_cuts_and_have_branches_themselves():
    trunk = Segment(token_ids=[1, 2, 3, 4])
    batch = pack(
        [
            trunk,
            Segment(token_ids=[5], num_scored=1, parent=0, cut=2),
            Segment(token_ids=[6, 7], parent=0, cut=3),
            Segment(token_ids=[8], num_scored=1, parent=2, cut=1),
        ]
    )
    assert unpack(batch) == [[1, 2, 5], [1, 2, 3, 6, 8]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 4]
    assert batch.rows.tolist() == [1, 5]
    assert batch.targets.tolist() == [5, 8]


def test_unpack_inverts_pack():
    sequences = [[5], [1, 2, 3], [9, 9], [4, 0, 0, 0]]
    assert unpack(pack([Segment(token_ids=ids) for ids in sequences])) == sequences


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "nothing to pack"),
        ([Segment(token_ids=[])], "no tokens"),
        ([Segment(token_ids=[1, 2], num_scored=2)], r"num_scored 2 must be in 0\.\.1"),
        ([Segment(token_ids=[1], parent=0, cut=1)], "must come before it"),
        ([Segment(token_ids=[1]), Segment(token_ids=[2], parent=0, cut=2)], r"cut 2 must be in 1\.\.1"),
        (
            [Segment(token_ids=[1, 2], num_scored=1), Segment(token_ids=[2], parent=0, cut=1)],
            "cannot have scored tokens",
        ),
    ],
)
def test_an_invalid_forest_is_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        pack(segments)


def test_micro_batches_hold_every_item_once_within_the_budget_and_evenly():
    costs = [9, 1, 1, 1, 8, 7, 2, 3]
    micros = micro_batches(costs, 11)
    assert sorted(i for micro in micros for i in micro) == list(range(8))
    loads = [sum(costs[i] for i in micro) for micro in micros]
    assert len(micros) == 3
    assert max(loads) <= 11
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_micro_batches_can_be_a_multiple_of_the_processes(multiple):
    costs = [7, 1, 9, 3, 3, 5, 2, 8, 2, 4, 6, 6]  # 12 items, divisible by every `multiple` above
    for budget in (9, 11, 20, 100):
        micros = micro_batches(costs, budget, multiple=multiple)
        assert len(micros) % multiple == 0
        assert sorted(i for micro in micros for i in micro) == list(range(len(costs)))
        assert max(sum(costs[i] for i in micro) for micro in micros) <= budget
    assert micro_batches([5, 1, 1], 8, multiple=4) == [[0], [1], [2]]  # fewer items than the multiple


def test_micro_batches_depend_only_on_the_costs():
    assert micro_batches([4, 4, 4], 8) == micro_batches([4, 4, 4], 8)
    assert micro_batches([], 8) == []


def test_an_item_above_the_budget_is_named():
    with pytest.raises(ValueError, match="micro_batch_tokens: 8 cannot hold pair 1 of 9 tokens"):
        micro_batches([3, 9], 8, "pair")


@pytest.mark.parametrize("prompt", [[7, 8, 9], []])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_pair_holds_the_same_sequences_whether_they_share_the_prompt_or_not(prompt, share_prompt):
    trees = [pair(prompt, [1, 0], [2, 3, 0], scored=bool(prompt), share_prompt=share_prompt) for _ in range(2)]
    batch = pack(forest(trees))
    assert unpack(batch) == 2 * [[*prompt, 1, 0], [*prompt, 2, 3, 0]]
    assert (
        batch.num_tokens == sum(map(num_computed, trees)) == 2 * (8 if share_prompt and prompt else 5 + 2 * len(prompt))
    )
    assert sum(map(num_in_sequences, trees)) == 2 * (5 + 2 * len(prompt))
    assert batch.targets.tolist() == (2 * [1, 0, 2, 3, 0] if prompt else [])


def test_a_tree_computes_the_longest_prefix_once_and_holds_every_sequence():
    prefixes, responses = [[7, 8], [7, 8, 1, 2], [7, 8, 1]], [[5, 0], [6], [9, 9, 0]]
    batch = pack(tree(prefixes, responses))
    assert batch.token_ids.tolist() == [7, 8, 1, 2, 5, 0, 6, 9, 9, 0]
    assert unpack(batch) == [[*prefix, *response] for prefix, response in zip(prefixes, responses, strict=True)]
    assert batch.targets.tolist() == [5, 0, 6, 9, 9, 0]
    assert batch.rows.tolist() == [1, 4, 3, 2, 7, 8]  # the last token of a prefix predicts a first token


def test_trunks_are_the_texts_that_are_not_prefixes_of_others():
    texts = [[7, 8], [7, 9], [7, 8, 1], [7, 8, 1, 4], [7, 8, 2], [70], [7, 8]]
    found = trunks(texts)
    assert set(found) == {tuple(text) for text in texts}
    assert set(found.values()) == {(7, 8, 1, 4), (7, 8, 2), (7, 9), (70,)}
    assert all(trunk[: len(text)] == text for text, trunk in found.items())


def test_families_share_a_text_and_stay_within_the_budget():
    prefixes = [[7, 8], [5], [7, 8, 1, 2], [7, 8, 1], [5], [7, 8, 1, 2]]
    responses = [[0], [3] * 9, [4, 0], [0], [0], [3] * 4]
    assert families(prefixes, responses, 1000) == [[0, 2, 3, 5], [1, 4]]
    # [7, 8, 1, 2] with responses of 1, 2 and 1 tokens costs 4 + 4 = 8; [5] with its two responses costs 1 + 9 + 1 = 11.
    assert families(prefixes, responses, 8) == [[0, 2, 3], [1], [4], [5]]


def test_a_forest_counts_parents_from_its_own_trees():
    tree = [Segment(token_ids=[1, 2]), Segment(token_ids=[3], parent=0, cut=1), Segment(token_ids=[4], parent=1, cut=1)]
    assert [s.parent for s in forest([tree, [Segment(token_ids=[5])], tree])] == [-1, 0, 1, -1, -1, 4, 5]
    assert num_in_sequences(tree[:2]) == 2


def test_micro_batches_in_order_keep_neighbours_together():
    assert in_order([3, 4, 2, 8, 1, 1], 8) == [[0, 1], [2], [3], [4, 5]]
    assert in_order([], 8) == []
    with pytest.raises(ValueError, match=r"^micro_batch_tokens: 8 cannot hold episode 1 of 9 tokens"):
        in_order([3, 9], 8, "episode")


def test_untrained_tokens_are_in_the_context_but_have_no_row():
    alone = pack([sequence([7, 8], [1, 5, 6, 0], trained=[0, 3])])
    assert (alone.rows.tolist(), alone.targets.tolist(), alone.cu_rows.tolist()) == ([1, 4], [1, 0], [0, 2])
    shared = pair([7, 8], [1, 5, 0], [2, 0], scored=True, share_prompt=True, trained=[[0, 2], None])
    apart = pair([7, 8], [1, 5, 0], [2, 0], scored=True, share_prompt=False, trained=[[0, 2], None])
    for segments in (shared, apart):
        batch = pack(segments)
        assert (batch.targets.tolist(), batch.cu_rows.tolist()) == ([1, 0, 2, 0], [0, 2, 4])
    with pytest.raises(ValueError, match="scored must be 1 indices of its tokens, in order"):
        pack([Segment(token_ids=[7, 8], num_scored=1, scored=[0])])
