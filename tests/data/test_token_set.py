import random

import numpy as np
import pytest

from fastrlhf.data.token_set import Block, TokenSet
from fastrlhf.types import Example, TokenizedExample


def row(number: int, draw: random.Random) -> TokenizedExample:
    """Draws a row that has each optional field (responses, group, label, untrained tokens) or lacks it at random."""

    def ids() -> list[int]:
        return [draw.randrange(2**31) for _ in range(draw.randint(1, 6))]

    fields = {name: ids() for name in ("chosen", "rejected", "reference") if draw.random() < 0.6}
    group = [ids() for _ in range(draw.randint(2, 4))] if draw.random() < 0.5 else None
    named = fields | {f"responses[{i}]": response for i, response in enumerate(group or [])}
    trained = {
        name: sorted(draw.sample(range(len(response)), draw.randint(1, len(response))))
        for name, response in named.items()
        if draw.random() < 0.5
    }
    labels = {"label": draw.choice([True, False, None]), "margin": draw.choice([None, 0.1, 2]), "wins": number}
    labels |= {"scores": [draw.random() for _ in group]} if group and draw.random() < 0.5 else {}
    return TokenizedExample(prompt=ids(), responses=group, trained=trained or None, row=number, **fields, **labels)


@pytest.fixture(scope="module")
def examples() -> list[TokenizedExample]:
    draw = random.Random(0)
    return [row(number, draw) for number in range(200)]


def test_a_set_has_the_items_of_the_list_from_which_it_was_made(examples):
    made = TokenSet.of(examples)
    assert list(made) == examples
    assert [made[i] for i in (-1, 0, 7)] == [examples[i] for i in (-1, 0, 7)]
    assert made == examples
    assert made != examples[:-1]
    assert made != [*examples[:-1], examples[0]]
    assert type(made[3].prompt) is list
    assert [type(token) for token in made[3].prompt] == [int] * len(examples[3].prompt)
    assert made.labels("label") == [example.label for example in examples]
    assert made.rows() == list(range(200))
    with pytest.raises(IndexError, match="row 200 of 200"):
        made[200]


def test_joined_blocks_and_joined_sets_have_the_rows_of_their_parts(examples):
    parts = [examples[:3], examples[3:70], examples[70:]]
    copied = TokenSet([Block.joined([Block.of(part) for part in parts])])
    viewed = TokenSet.joined(*parts)
    assert copied == examples
    assert viewed == examples
    order = random.Random(1).sample(range(200), 90)
    assert viewed.select(order) == [examples[i] for i in order]
    assert TokenSet.joined(viewed.select(order), copied[:5]) == [*(examples[i] for i in order), *examples[:5]]
    assert viewed.select(order)[10:20:3] == [examples[i] for i in order[10:20:3]]
    assert TokenSet.joined() == []


def test_lengths_are_those_of_the_items(examples):
    order = random.Random(2).sample(range(200), 150)
    made = TokenSet.joined(examples[:50], examples[50:]).select(order)
    for name in ("prompt", "chosen", "rejected", "reference"):
        assert made.lengths(name).tolist() == [len(getattr(examples[i], name) or ()) for i in order]
    assert made.rows() == order


def test_arrays_are_views_of_the_stored_tokens(examples):
    block = Block.of(examples)
    read = TokenSet([block]).arrays(5)
    assert np.shares_memory(read.prompt, block.tokens)
    assert read.prompt.dtype == np.int32
    assert read.prompt.tolist() == examples[5].prompt
    assert block.tokens.nbytes == 4 * sum(block.lengths[block.lengths > 0].tolist()) + 4 * block.group_lengths.sum()


def test_sources_are_found_by_the_place_of_the_example():
    sources = [Example(prompt=f"p{i}", row=i) for i in range(4)]
    rows = [TokenizedExample(prompt=[i], row=i) for i in (0, 2, 3)]  # the example of row 1 was dropped
    made = TokenSet([Block.of(rows, [0, 2, 3])]).with_sources(sources)
    assert [item.source.prompt for item in made.select([2, 0])] == ["p3", "p0"]
    assert TokenSet.of(rows)[0].source is None
