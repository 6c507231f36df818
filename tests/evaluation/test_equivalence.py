"""Tests of the judges of semantic equivalence, with two tiny NLI classifiers made by the tests."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fastrlhf.evaluation import equivalence
from fastrlhf.evaluation.equivalence import (
    Comparison,
    NLIJudge,
    Relation,
    exact_match,
    function_judge,
    open_judge,
    relations,
    token_batches,
)

C, N, E = Relation
WORDS = [f"w{i}" for i in range(40)]


def save_nli(
    folder: Path, order: tuple[int, ...] = (0, 1, 2), labels=("contradiction", "neutral", "entailment")
) -> str:
    """Saves a two-layer BERT classifier. `order` permutes the outputs of the classifier together with their names."""
    ids = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    base = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    base.pre_tokenizer = WhitespaceSplit()
    base.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=1.0,
        id2label=dict(enumerate(labels[i] for i in order)),
        label2id={labels[i]: place for place, i in enumerate(order)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        some = torch.randint(4, len(ids), (64, 20))
    with torch.no_grad():
        model.classifier.bias -= model(input_ids=some).logits.mean(0)  # centres the logits, so that every label occurs
        model.classifier.weight.copy_(model.classifier.weight[list(order)])
        model.classifier.bias.copy_(model.classifier.bias[list(order)])
    model.save_pretrained(folder)
    return str(folder)


def judge(source, batch_tokens=200, side_tokens=20):
    return NLIJudge(source, device="cpu", dtype="float32", batch_tokens=batch_tokens, side_tokens=side_tokens)


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    return save_nli(tmp_path_factory.mktemp("nli"))


def comparisons(count=40, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def words(most):
        number = int(torch.randint(1, most, (1,), generator=draw))
        return " ".join(WORDS[i] for i in torch.randint(40, (number,), generator=draw).tolist())

    return [Comparison(words(4), words(9), words(9)) for _ in range(count)]


def test_labels_are_read_from_the_configuration_in_any_order(nli, tmp_path):
    other = save_nli(tmp_path / "other", order=(2, 0, 1))
    asked = comparisons()
    said = judge(nli)(asked)
    assert said == judge(other)(asked)
    assert len(set(said)) == 3  # all three labels occur


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("entailment", "not_entailment")])
def test_labels_without_the_three_names_are_refused(labels):
    with pytest.raises(ValueError, match=r"equivalence: 'model' names its labels .*id2label in its config"):
        relations(dict(enumerate(labels)), "model")
    assert relations({0: "ENTAILMENT", 1: "neutral", 2: "Contradiction"}, "model") == [E, N, C]


def test_batches_give_the_labels_of_the_plain_model_on_single_pairs(nli):
    asked = comparisons()
    plain = judge(nli)
    model, tokenizer = plain._model, plain._tokenizer
    expected = []
    for prompt, first, second in asked:
        inputs = tokenizer(f"{prompt}\n{first}", f"{prompt}\n{second}", return_tensors="pt")
        assert inputs["token_type_ids"].unique().tolist() == [0, 1]
        with torch.no_grad():
            expected.append(Relation(model(**inputs).logits.argmax().item()))
    assert plain(asked) == expected
    assert judge(nli, batch_tokens=43)(asked) == expected  # 43 tokens per batch: one or two pairs
    assert plain([]) == []


def test_a_comparison_that_repeats_is_asked_once_and_batches_keep_their_budget(nli, monkeypatch):
    counted, sizes = judge(nli, batch_tokens=100), []
    label = counted._label
    monkeypatch.setattr(
        counted, "_label", lambda rows: sizes.append([len(r["input_ids"]) for r in rows]) or label(rows)
    )
    asked = comparisons(30)
    assert counted([*asked, *asked]) == counted(asked) * 2
    half = sizes[: len(sizes) // 2]
    assert sum(map(len, half)) == 30
    assert all(len(rows) * max(rows) <= 100 for rows in half)
    lengths = [length for rows in half for length in rows]
    assert lengths == sorted(lengths)


def test_the_prompt_loses_its_beginning_before_an_answer_loses_its_end(nli):
    cut = judge(nli, side_tokens=4)._sides(
        [("w0 w1 w2", "w3 w4"), ("w0 w1", "w3 w4 w5 w6"), ("w0", "w3 w4 w5 w6 w7"), ("w0 w1", "w2 w3"), ("", "w1")]
    )
    assert cut == ["w1 w2\nw3 w4", "w3 w4 w5 w6", "w3 w4 w5 w6", "w0 w1\nw2 w3", "w1"]


def test_an_invalid_judge_is_refused_before_anything_is_judged(nli, tmp_path):
    with pytest.raises(ValueError, match=r"equivalence: .* is not an NLI model in a folder or on the hub"):
        open_judge(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nli_side_tokens: must be such that a pair of 53 tokens fits 48 positions"):
        judge(nli, side_tokens=25)
    with pytest.raises(ValueError, match="equivalence: 'nowhere' cannot be imported"):
        open_judge("nowhere:same")
    with pytest.raises(ValueError, match="equivalence: must be a function that returns True or False; got 1"):
        function_judge(lambda *_: 1)([Comparison("", "a", "b")])  # pyright: ignore[reportArgumentType]


def test_exact_match_forgives_case_punctuation_and_white_space():
    asked = [Comparison("p", "The dog, asleep.", " the  dog asleep"), Comparison("p", "a b", "b a")]
    assert exact_match(asked) == [E, C]
    assert open_judge("exact") is exact_match


def test_a_user_defined_judge_gets_the_prompt(tmp_path):
    (tmp_path / "mine.py").write_text("def same(prompt, a, b):\n    return prompt == 'yes' and len(a) == len(b)\n")
    own = open_judge(f"{tmp_path / 'mine.py'}:same")
    assert own([Comparison("yes", "ab", "cd"), Comparison("no", "ab", "cd"), Comparison("yes", "a", "cd")]) == [E, C, C]


def test_token_batches_by_hand():
    assert token_batches([2, 3, 5, 5, 9], 10) == [range(0, 2), range(2, 4), range(4, 5)]
    assert token_batches([], 10) == []
    assert token_batches([20], 10) == [range(0, 1)]
    assert equivalence.normalised("") == ""
