"""The embedded verifiable task: sums of two digits with one right answer each.

    prompt  3 + 8 =
    answer  11

Every sum is one token, so a policy that has never seen an answer sometimes finds the right answer by chance
(1 draw in 24 at first), and reinforcement learning can start from random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrlhf.types import Example

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

LARGEST = 9
"""Largest summand."""
SPECIALS = ("<pad>", "<eos>", "<unk>")
VOCABULARY = (*SPECIALS, "+", "=", *map(str, range(2 * LARGEST + 1)))


def examples() -> list[Example]:
    """Returns all sums of two digits as examples with the column `answer`."""
    return [
        Example(prompt=f"{a} + {b} =", row=a * (LARGEST + 1) + b, columns={"answer": str(a + b)})
        for a in range(LARGEST + 1)
        for b in range(LARGEST + 1)
    ]


def right_sum(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward function: 1 if the response is the right sum and nothing else, otherwise 0."""
    return [float(text.split() == [right]) for text, right in zip(completions, answer, strict=True)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per word of `VOCABULARY`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    base.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model_config() -> LlamaConfig:
    """Returns the configuration of a policy with two layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
