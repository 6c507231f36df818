from fastrlhf.data.rendered_ids import encode_rendered
from fastrlhf.data.templates import Piece, Rendered
from fastrlhf.types import Example
from tests.data.vocabularies import byte_level

ENDS = {2: "</s>", 4: "<|im_end|>"}


def test_pieces_are_encoded_one_after_the_other_with_one_end_and_only_the_trained_ones_are_trained():
    pieces = [Piece(text="d<|im_end|>"), Piece(text="\nf:", trained=False), Piece(text=" f</s>\n</s>")]
    rendered = [(Example(prompt="def"), Rendered(prompt="def", responses={"reference": pieces}))]
    tokenizer = byte_level()
    (row,) = encode_rendered(rendered, tokenizer, ENDS).rows
    response = row.responses["reference"]
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(row.prompt) == ["def"]
    assert tokens(response.ids) == ["d", "<|im_end|>", "\u010a", "f", ":", "\u0120f", "</s>"]
    assert response.trained == [0, 1, 5, 6]
    assert (response.end, response.had_end, response.goes_on) == (2, True, False)
    (with_suffix,) = encode_rendered(rendered, tokenizer, ENDS, train_suffix=True).rows
    assert with_suffix.responses["reference"].ids == [*response.ids, *tokenizer("\n")["input_ids"]]
    assert with_suffix.responses["reference"].trained == [0, 1, 2, 5, 6, 7]


def test_a_whole_text_gives_its_first_token_to_the_prompt():
    rendered = [(Example(prompt=""), Rendered(prompt="", responses={"reference": [Piece(text="def f")]}))]
    (row,) = encode_rendered(rendered, byte_level(), ENDS).rows
    assert byte_level().convert_ids_to_tokens([*row.prompt]) == ["def"]
    assert byte_level().convert_ids_to_tokens(row.responses["reference"].ids) == ["\u0120f", "</s>"]
